"""DPO training against TRL's DPOTrainer: 20 steps from the same weights over the same pairs.

Ours runs as train.py drives it: `loop.train`, with a table of the reference's log-probabilities.
TRL runs its own trainer, over PEFT and, where quantized, bitsandbytes. What is brought to one
convention, all of it below: neither order is shuffled; TRL's learning rates are our schedule (its
own starts at 0); its QLoRA adapters are float32 again, where it makes them bfloat16; for IPO our
log-ratios are divided by the answers' lengths, as TRL does (`dpo_loss` itself takes sums, as the
paper's formula reads); ours takes the initial adapter from PEFT and, where quantized, the weights
of bitsandbytes.
"""

import json
import math
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from oracles import (
    NO_ORACLE,
    TINY,
    load_transformers,
    nf4_from_bitsandbytes,
    smollm2_folder,
    transformers_llama,
)

from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_llama
from dpo_minimal.data import EncodedPair, PreferencePair, encode_pair
from dpo_minimal.extras.losses import LossSettings, batch_lengths, preference_loss
from dpo_minimal.loop import Settings, Stage, learning_rate, train
from dpo_minimal.lora import add_adapter, lora_layers
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics
from dpo_minimal.nf4 import NF4Linear
from dpo_minimal.reference import known_reference_logps, new_table
from dpo_minimal.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason=NO_ORACLE)
peft = pytest.importorskip("peft", reason=NO_ORACLE)
datasets = pytest.importorskip("datasets", reason=NO_ORACLE)
tokenizers = pytest.importorskip("tokenizers", reason=NO_ORACLE)
trl = pytest.importorskip("trl", reason=NO_ORACLE)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs, about each other

STEPS = 20
SMOOTHING = 0.2  # of robust DPO
CLOSE = 1e-5  # roundings of 6e-8, carried through 20 steps of Adam
SETTINGS = Settings(learning_rate=2e-3, batch_size=4, epochs=STEPS, max_steps=STEPS, warmup_steps=4)
COMPARED = [
    *("loss", "grad_norm", "learning_rate", "num_tokens", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
]


def random_pairs(count):
    """Pairs of random tokens with BOS and EOS, of very different lengths."""
    rng = random.Random(0)

    def tokens(shortest, longest):
        return [rng.randrange(3, TINY["vocab_size"]) for _ in range(rng.randint(shortest, longest))]

    def pair():
        return EncodedPair([1, *tokens(1, 12)], [*tokens(1, 20), 2], [*tokens(1, 20), 2])

    return [pair() for _ in range(count)]


def trl_model(folder, quantize):
    """The folder's model as TRL users load it, plain or in NF4."""
    if not quantize:
        return load_transformers(folder)
    pytest.importorskip("bitsandbytes", reason=NO_ORACLE)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    return load_transformers(folder, quantization_config=settings, device_map="cpu")


def word_tokenizer():
    """TRL asks for a tokenizer, if only for its special tokens: the pairs have ids already."""
    vocabulary = {f"<{i}>": i for i in range(TINY["vocab_size"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<0>", bos_token="<1>", eos_token="<2>"
    )


class InOrder:
    """A trainer that takes pairs in their order, with our schedule."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    def create_scheduler(self, num_training_steps, optimizer=None):
        def factor(step):
            return learning_rate(step, STEPS, SETTINGS) / SETTINGS.learning_rate

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class Trainer(InOrder, trl.DPOTrainer):
    """TRL's trainer over pairs of ids."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trl_trainer(folder, pairs, kind, beta, quantize, grad_accum, out):
    """A Trainer over the folder's model with a new float32 adapter on all linear layers."""
    rows = [{f"{name}_ids": ids for name, ids in pair._asdict().items()} for pair in pairs]
    settings = trl.DPOConfig(
        loss_type=kind,
        label_smoothing=SMOOTHING if kind == "robust" else 0.0,
        beta=beta,
        **trainer_settings(grad_accum, out),
    )
    trainer = Trainer(
        trl_model(folder, quantize),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=new_adapter(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def new_adapter():
    """PEFT's settings of an adapter on all linear layers."""
    return peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def trainer_settings(grad_accum, out) -> dict:
    """SETTINGS in the words of TRL's trainers."""
    return dict(
        output_dir=str(out),
        per_device_train_batch_size=SETTINGS.batch_size // grad_accum,
        gradient_accumulation_steps=grad_accum,
        max_steps=STEPS,
        learning_rate=SETTINGS.learning_rate,
        weight_decay=SETTINGS.weight_decay,
        max_grad_norm=SETTINGS.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )


def our_model(folder, trainer, quantize):
    """The folder's model in ours, with the NF4 weights and the initial adapter of the trainer.

    Its adapter `sft` is a new one, so that the reference, base + sft, is the base.
    """
    model = load_llama(folder, quantize="nf4" if quantize else None)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            weight = trainer.model.base_model.model.get_submodule(path).base_layer.weight
            quantized = nf4_from_bitsandbytes(weight.data, weight.quant_state)
            torch.testing.assert_close(layer.packed, quantized.packed)
            model.set_submodule(path, NF4Linear(quantized))
    add_adapter(model, "sft", r=1)
    add_adapter(model, "dpo", r=4, alpha=8, targets="all")
    for path, layer in lora_layers(model).items():
        theirs = trainer.model.base_model.model.get_submodule(path)
        layer.adapters["dpo"].lora_A.data.copy_(theirs.lora_A["default"].weight)
        assert not theirs.lora_B["default"].weight.any()
    return model


class InTurn:
    """An order without a shuffle, as TRL's is here: each epoch sees the n pairs one by one."""

    def __init__(self, n):
        self.n = n

    def num_batches(self, batch_size):
        return self.n // batch_size

    def batches(self, batch_size, place):
        while True:
            for at in range(0, self.n, batch_size):
                yield list(range(at, at + batch_size)), place


def train_ours(model, pairs, kind, beta, grad_accum, out):
    """The DPO stage of train.py, and the rows of its metrics.jsonl."""
    table = new_table(len(pairs))
    settings = LossSettings(kind, beta, label_smoothing=SMOOTHING if kind == "robust" else 0.0)

    def objective(model, batch):
        policy = torch.stack(preference_logps(model, batch))  # [2, B]
        ref = known_reference_logps(model, batch, table).T  # [2, B]
        lengths = batch_lengths(batch)  # [B, 2]
        losses, chosen, rejected = preference_loss(
            *policy, *ref, lengths=lengths, settings=settings
        )
        if kind == "ipo":  # of means over the answers' tokens, as TRL has it
            losses, _, _ = dpo_loss(*policy / lengths.T, *ref / lengths.T, beta=beta, kind=kind)
        return losses, reward_metrics(*policy, chosen, rejected)

    collate = partial(pair_batch, pairs, device="cpu")
    stage = Stage("dpo", objective, InTurn(len(pairs)), collate, tables={"training": table})
    size = SETTINGS.batch_size // grad_accum
    train(model, stage, replace(SETTINGS, batch_size=size, grad_accum=grad_accum), out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def difference(ours, theirs, name):
    """The largest difference of a metric over the steps, relative where it is larger than 1."""
    values = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(1, abs(b)) for a, b in values)


@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize(
    ("kind", "beta", "grad_accum"),
    [
        *[("sigmoid", 0.1, 1), ("sigmoid", 0.5, 2), ("ipo", 0.1, 1), ("hinge", 0.1, 1)],
        *[("robust", 0.1, 1), ("apo_zero", 0.5, 1)],
    ],
)
def test_20_steps_agree_with_trl(tmp_path, kind, beta, grad_accum, quantize):
    transformers_llama(tmp_path / "base")
    pairs = random_pairs(12)
    trainer = trl_trainer(
        tmp_path / "base", pairs, kind, beta, quantize, grad_accum, tmp_path / "trl"
    )
    model = our_model(tmp_path / "base", trainer, quantize)
    ours = train_ours(model, pairs, kind, beta, grad_accum, tmp_path)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(theirs) == STEPS
    differences = {name: difference(ours, theirs, name) for name in COMPARED}
    print(f"largest difference {max(differences.values()):.1e}")
    assert max(differences.values()) < CLOSE, differences
    # The steps led somewhere, so that agreement means something.
    assert ours[-1]["rewards/margins"] > 1 and ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    if kind == "sigmoid" and not quantize:
        norms = [row["grad_norm"] for row in ours]
        assert min(norms) < SETTINGS.max_grad_norm < max(norms)  # some are clipped, some are not
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_trl_tokenizes_a_real_pair_to_our_ids():
    folder = smollm2_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pair = PreferencePair("How many legs has a spider?", "Eight: it is no insect.", "6, I think")
    # The texts that TRL's users write; it adds the EOS itself, and no BOS with this tokenizer.
    row = {
        "prompt": f"{tokenizer.bos_token}Question: {pair.prompt}\n\nAnswer:",
        "chosen": f" {pair.chosen}",
        "rejected": f" {pair.rejected}",
    }
    dataset = datasets.Dataset.from_list([row])
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None)
    prepared = trl.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, settings, "train")
    expected = [prepared[0][f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
    assert list(encode_pair(load_tokenizer(folder), pair, max_length=100)) == expected
