"""The way from a flag to what it changes: each flag at a value that is not its default.

`train.main` runs with all of them; what the stages hand to the loop, the loss, the optimizer and
the model is recorded, and compared with what the flag says.
"""

import functools
import json
from dataclasses import replace

import pytest
import torch
from test_train import TINY, command, metrics, preference_rows, write_rows

import train
from dpo_minimal import evaluate, forum, loop, reference, run
from dpo_minimal.batches import packed_order, pair_order
from dpo_minimal.data import encode_pairs, encode_sft, load_splits
from dpo_minimal.extras import report
from dpo_minimal.extras.losses import LossSettings, loss_kinds
from dpo_minimal.lora import lora_layers
from dpo_minimal.loss import LOSSES
from dpo_minimal.nf4 import NF4Linear
from dpo_minimal.run import make_parser
from dpo_minimal.tokenizer import load_tokenizer

SEED, MAX_LENGTH = 5, 70  # some of the pairs are longer


def quiet(text):
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 60 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows(60))


class Recorder:
    """Stands between train.py and what it calls, and writes down what is handed over."""

    def __init__(self, patch):
        self.stages, self.losses, self.optimizers, self.saved, self.compared = {}, [], [], [], {}
        self.compiled, self.references = [], []
        patch.setattr(train, "train", functools.partial(self.train, train.train))
        for module in (train, evaluate):
            right = functools.partial(self.loss, module.preference_loss)
            patch.setattr(module, "preference_loss", right)
        right = functools.partial(self.reference, reference.reference_logps)
        patch.setattr(reference, "reference_logps", right)
        patch.setattr(torch.optim, "AdamW", functools.partial(self.adamw, torch.optim.AdamW))
        patch.setattr(loop, "save_state", functools.partial(self.save, loop.save_state))
        patch.setattr(report, "compare", functools.partial(self.compare, report.compare))
        patch.setattr(run, "check_compiler", lambda device: None)  # there may be none here
        patch.setattr(torch.nn.Module, "compile", lambda block: self.compiled.append(block))

    def train(self, right, model, stage, settings, folder, resume=False, asked=()):
        layers = lora_layers(model)
        trained = [path for path, layer in layers.items() if stage.name in layer.adapters]
        adapters = [layers[path].adapters[stage.name] for path in trained]
        rows, _ = next(stage.order.batches(settings.batch_size))
        nf4 = [m for m in model.modules() if isinstance(m, NF4Linear)]
        self.stages[stage.name] = {
            "settings": settings,
            "batch": stage.collate(rows),
            "first rows": rows,
            "rank": {len(adapter.lora_A) for adapter in adapters},
            "scale": {adapter.scale for adapter in adapters},
            "dropout": {adapter.dropout for adapter in adapters},
            "targets": {path.split(".")[-1] for path in trained},
            "A": adapters[0].lora_A.detach().clone() if adapters else None,
            "dtype": model.model.embed_tokens.weight.dtype,
            "quantized": len(nf4),
            "checkpointing": (model.gradient_checkpointing, {m.keep_weight for m in nf4}),
            "tables": {name: len(table) for name, table in stage.tables.items()},
        }
        sizes = self.stages[stage.name]["sizes"] = []

        def collate(rows):
            sizes.append(len(rows))
            return stage.collate(rows)

        right(model, replace(stage, collate=collate), settings, folder, resume, asked)

    def loss(self, right, *logps, lengths, settings):
        self.losses.append(settings)
        return right(*logps, lengths=lengths, settings=settings)

    def reference(self, right, model, batch):
        self.references += batch.indices
        return right(model, batch)

    def adamw(self, right, parameters, **options):
        self.optimizers.append(options)
        return right(parameters, **options)

    def save(self, right, path, model, optimizer, tables, progress):
        self.saved.append((path.stem, progress[0]))
        right(path, model, optimizer, tables, progress)

    def compare(self, right, model, tokenizer, questions, **options):
        self.compared = options
        return right(model, tokenizer, questions, **options)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, model_folder, data):
    """(recorder, run folder) of a run with every flag of the training that is not a switch."""
    out = tmp_path_factory.mktemp("runs") / "flags"
    flags = {
        "--beta": 0.37,
        "--label-smoothing": 0.2,
        "--nll-weight": 0.3,
        "--learning-rate": 0.003,
        "--batch-size": 3,
        "--grad-accum": 2,
        "--max-steps": 4,
        "--warmup-steps": 3,
        "--eval-every": 2,
        "--stop-when": 1e6,
        "--save-every": 3,
        "--seed": SEED,
        "--max-length": MAX_LENGTH,
        "--lora-r": 3,
        "--lora-alpha": 5,
        "--lora-dropout": 0.25,
        "--target-modules": "k_proj,up_proj",
        "--dtype": "bfloat16",
    }
    words = [word for pair in flags.items() for word in pair]
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        command("--model", model_folder, "--data", data, *words, "--out", out)
    return recorder, out


@pytest.fixture(scope="module")
def switched(tmp_path_factory, model_folder, data):
    """(recorder, run folder) of a run with the switches, another loss, and epochs."""
    out = tmp_path_factory.mktemp("runs") / "switches"
    held = write_rows(out.parent / "held.jsonl", preference_rows(13))
    flags = ["--loss", "simpo", "--simpo-gamma", 0.75, "--epochs", 3, "--batch-size", 16]
    flags += ["--grad-accum", 1, "--compile"]
    flags += ["--no-quantize", "--no-gradient-checkpointing", "--eval-data", held]
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        command("--model", model_folder, "--data", data, *flags, "--out", out)
    return recorder, out


def steps_of(out, stage):
    """The training rows of a stage in metrics.jsonl."""
    return [row for row in metrics(out) if row["stage"] == stage and "loss" in row]


def test_beta_label_smoothing_and_loss_reach_training_and_evaluation_alike(recorded, switched):
    # 4 steps of 2 batches, evaluations before steps 0 and 2 and behind the last, and at the end
    asked = LossSettings(loss="sigmoid", beta=0.37, label_smoothing=0.2, nll_weight=0.3)
    assert recorded[0].losses == [asked] * (4 * 2 + 3 + 1)
    assert set(switched[0].losses) == {LossSettings(loss="simpo", beta=0.1, simpo_gamma=0.75)}


def test_a_loss_without_a_reference_computes_none_and_leaves_none_for_others(recorded, switched):
    assert recorded[0].references and list(recorded[1].glob("reference-*.pt"))
    assert not switched[0].references and not list(switched[1].glob("reference-*.pt"))


@pytest.mark.parametrize("kind", loss_kinds())
def test_every_loss_of_the_table_is_a_choice_of_the_flag_and_has_its_line_of_help(kind):
    assert make_parser("").parse_args(["--loss", kind]).loss == kind
    assert f"{kind}: {loss_kinds()[kind]}" in make_parser("").format_help().replace(
        "\n" + " " * 24, "\n"
    )


def test_every_flag_says_what_it_is():
    silent = [a.option_strings for a in make_parser("")._actions if not (a.help or "").strip()]
    assert not silent


def test_a_new_loss_has_its_choice_and_its_help_whatever_is_in_it(monkeypatch):
    def always_one(delta, beta, label_smoothing):
        """One: 100% of the time (%s, %d)."""

    monkeypatch.setitem(LOSSES, "one", always_one)
    assert "one: One: 100% of the time (%s, %d)." in make_parser("").format_help()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_adapter_has_the_rank_the_scale_the_dropout_and_the_targets(recorded, stage):
    seen = recorded[0].stages[stage]
    assert seen["rank"] == {3} and seen["scale"] == {5 / 3} and seen["dropout"] == {0.25}
    assert seen["targets"] == {"k_proj", "up_proj"}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_adapters_random_start_is_that_of_the_seed(recorded, stage):
    A = recorded[0].stages[stage]["A"]
    torch.manual_seed(SEED)
    bound = 1 / 16**0.5  # hidden_size 16
    torch.testing.assert_close(A, torch.empty(3, 16).uniform_(-bound, bound), rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_rate_and_the_warmup_are_those_of_the_flags(recorded, stage):
    rates = [row["learning_rate"] for row in steps_of(recorded[1], stage)]
    # three steps of warmup, then the beginning of a cosine of one step
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.003], rel=1e-12)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_batches_have_the_size_and_a_step_so_many_of_them(recorded, stage):
    recorder, out = recorded
    seen = recorder.stages[stage]
    assert (seen["settings"].batch_size, seen["settings"].grad_accum) == (3, 2)
    # Each step sees two batches of three rows, but for what is left at the end of a window.
    assert len(seen["sizes"]) == 2 * 4 and set(seen["sizes"]) <= {1, 2, 3}
    assert seen["sizes"].count(3) >= 6
    assert steps_of(out, stage)[0]["num_tokens"] > seen["batch"].num_tokens


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weight_decay_reaches_the_optimizer(recorded, stage):
    assert recorded[0].stages[stage]["settings"].weight_decay == 0.05
    assert [options["weight_decay"] for options in recorded[0].optimizers] == [0.05, 0.05]


def test_steps_evaluations_and_saved_states_come_when_the_flags_say(recorded):
    recorder, out = recorded
    assert [row["step"] for row in metrics(out) if row["stage"] == "dpo" and "loss" in row] == [
        *range(4)
    ]
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [0, 2, 4]
    assert recorder.saved == [("sft", 3), ("dpo", 3)]


def test_epochs_count_how_often_the_data_are_seen(switched):
    recorder, out = switched
    pairs = recorder.stages["dpo"]["tables"]["training"]
    assert len(steps_of(out, "dpo")) == -(-3 * -(-pairs // 16) // 1)
    assert steps_of(out, "dpo")[-1]["epoch"] == 3


def test_the_seed_draws_the_held_out_pairs_and_the_order_and_the_length_drops_pairs(
    recorded, data, model_folder
):
    stages, tokenizer = recorded[0].stages, load_tokenizer(model_folder)
    splits, other = (load_splits(data, seed=seed, log=quiet) for seed in (SEED, 0))
    assert list(splits.evaluation) != list(other.evaluation)
    pairs = encode_pairs(tokenizer, splits.train, MAX_LENGTH, "", quiet)
    held_out = encode_pairs(tokenizer, splits.evaluation, MAX_LENGTH, "", quiet)
    assert stages["dpo"]["tables"] == {"training": len(pairs), "held-out": len(held_out)}
    assert len(pairs) < len(splits.train)
    orders = [pair_order(pairs, 3, seed) for seed in (SEED, 0)]
    first, other = (next(order.batches(3))[0] for order in orders)
    assert stages["dpo"]["first rows"] == first != other
    texts = encode_sft(tokenizer, splits.sft, MAX_LENGTH, quiet)
    orders = [packed_order(texts, MAX_LENGTH, len(texts), seed) for seed in (SEED, 0)]
    first, other = (next(order.batches(3))[0] for order in orders)
    assert stages["sft"]["first rows"] == first != other
    assert recorded[0].compared["seed"] == SEED


def test_the_model_is_of_the_dtype_in_4_bits_and_recomputes_its_blocks(recorded, switched):
    for stage in ("sft", "dpo"):
        on, off = recorded[0].stages[stage], switched[0].stages[stage]
        assert (on["dtype"], off["dtype"]) == (torch.bfloat16, torch.float32)
        assert (on["quantized"], off["quantized"]) == (14, 0)  # 7 layers in each of 2 blocks
        assert on["checkpointing"] == (True, {True}) and off["checkpointing"] == (False, set())


def test_checkpointing_can_be_switched_off_for_4_bit_layers_too(tmp_path, model_folder, data):
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        flags = ["--no-gradient-checkpointing", "--stage", "sft", "--max-steps", 1]
        command("--model", model_folder, "--data", data, *flags, "--out", tmp_path / "run")
    assert recorder.stages["sft"]["checkpointing"] == (False, {False})


def test_each_block_is_compiled_for_each_stage_if_asked(recorded, switched):
    assert len(recorded[0].compiled) == 0 and len(switched[0].compiled) == 2 * 2


def test_held_out_pairs_are_those_of_eval_data(switched):
    assert switched[0].stages["dpo"]["tables"]["held-out"] == 13


def test_a_seed_is_remembered_from_stage_to_stage(tmp_path, model_folder, data):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        few = ["--max-steps", 1, "--out", out]
        command("--model", model_folder, "--data", data, "--seed", 7, *few, "--stage", "sft")
        command(*few, "--stage", "dpo")
    assert json.loads((out / "config.json").read_text())["arguments"]["seed"] == 7
    torch.manual_seed(7)
    expected = torch.empty(8, 16).uniform_(-0.25, 0.25)
    torch.testing.assert_close(recorder.stages["dpo"]["A"], expected, rtol=0, atol=0)


def test_without_resume_an_interrupted_stage_begins_anew(tmp_path, model_folder, data, monkeypatch):
    runs = {"killed": tmp_path / "killed", "fresh": tmp_path / "fresh"}
    flags = ["--model", model_folder, "--data", data, "--max-steps", 4, "--batch-size", 4]
    for out in runs.values():
        command(*flags, "--out", out, "--stage", "sft")
    write = loop.Log.write

    def die(log, step, prefix="", **values):
        if step == 3 and not prefix:
            raise KeyboardInterrupt
        write(log, step, prefix, **values)

    dpo = ["--stage", "dpo", "--max-steps", 4, "--batch-size", 4, "--grad-accum", 1]
    monkeypatch.setattr(loop.Log, "write", die)
    with pytest.raises(KeyboardInterrupt):
        command("--out", runs["killed"], *dpo, "--save-every", 1)
    monkeypatch.setattr(loop.Log, "write", write)
    assert (runs["killed"] / "state" / "dpo.pt").exists()
    for out in runs.values():
        command("--out", out, *dpo, "--learning-rate", 0.01)
    assert metrics(runs["killed"]) == metrics(runs["fresh"])
    adapters = [out / "dpo" / "adapter_model.safetensors" for out in runs.values()]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_thread_ends_with_an_eos_that_is_scored(tmp_path, monkeypatch):
    threads, seen = forum.make_forum(0)["pretrain"][:60], []
    monkeypatch.setattr(forum, "make_forum", lambda seed: {"pretrain": threads})
    monkeypatch.setattr(train, "TINY_LLAMA", TINY)
    keep_fitting = train.keep_fitting

    def watch(encoded, *rest):
        seen.extend(encoded)
        return keep_fitting(encoded, *rest)

    monkeypatch.setattr(train, "keep_fitting", watch)
    command("--stage", "pretrain", "--max-steps", 1, "--max-length", 999, "--out", tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "base")
    for (unscored, scored), thread in zip(seen, threads, strict=True):
        assert unscored == [tokenizer.bos_id]
        assert scored == tokenizer.encode(thread["text"]) + [tokenizer.eos_id]
