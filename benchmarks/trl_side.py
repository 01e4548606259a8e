"""TRL's side of against_trl.py: DPOTrainer over the same pairs in the same order, with a clock.

Needs `pip install ".[oracle]"`. The sides `trl-...` differ in `trl_settings`.
"""

import time

import datasets
import torch
import transformers
import trl
from peft import LoraConfig
from same_task import BETA, LORA, make_settings, start_adapter
from step import peak_memory, reset_peak, wait
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.utils import is_flash_attn_2_available

from dpo_minimal.loop import learning_rate


def run_trl(folder, pairs, order, args, scratch) -> dict:
    """Train with TRL on the same pairs in the same order."""
    memory_before = peak_memory(args.device)
    rows = [pairs[i]._asdict() for batch in order for i in batch]
    rows = [{f"{name}_ids": ids for name, ids in row.items()} for row in rows]
    trainer = Trainer(
        args,
        str(folder),
        args=trl.DPOConfig(output_dir=str(scratch), **trl_settings(args)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        **qlora(args),
    )
    start_adapter(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        **{"times": trainer.times, "losses": losses},
        "reference_seconds": trainer.reference_seconds,
        **{"memory_before_gb": memory_before / 1e9, "load_peak_gb": trainer.load_peak / 1e9},
    }


def qlora(args) -> dict:
    """The arguments of DPOTrainer for quantization and adapters."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )
    adapter = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=LORA["targets"].split(","),
        task_type="CAUSAL_LM",
    )
    return {"quantization_config": quantization, "peft_config": adapter}


def trl_settings(args) -> dict:
    """The arguments of DPOConfig."""
    settings = make_settings(args)
    common = {
        "beta": BETA,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.grad_accum,
        "max_steps": args.warmup + args.steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": args.length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "model_init_kwargs": {"device_map": {"": 0 if args.device == "cuda" else "cpu"}},
    }
    if args.side == "trl-default":
        return common | {"bf16": args.dtype == "bfloat16"}
    return common | {
        "bf16": False,  # no autocast: the whole model is in --dtype
        "gradient_checkpointing": args.gradient_checkpointing,
        "precompute_ref_log_probs": True,
        "optim": "adamw_torch_fused",
        "torch_compile": args.side == "trl-compile",
        "model_init_kwargs": common["model_init_kwargs"]
        | {"dtype": args.dtype, "attn_implementation": fastest_attention(args)},
    }


def fastest_attention(args) -> str:
    """Flash attention where it is installed, else torch's own attention."""
    flash = args.device == "cuda" and args.dtype == "bfloat16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


class Clock(transformers.TrainerCallback):
    """Notes the time after each step, like the clock of our side."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, _, state, control, **kwargs):
        flags = self.trainer.flags
        if state.global_step in (flags.warmup, flags.warmup + flags.steps):
            wait()
        self.trainer.times.append((time.perf_counter(), time.process_time()))


class Trainer(trl.DPOTrainer):
    """DPOTrainer over token ids in the given order, with our learning rates and a clock."""

    reference_seconds = 0.0

    def __init__(self, flags, *positional, **named):
        self.flags, self.times = flags, []  # first: the methods below are called while it is built
        super().__init__(*positional, **named)
        self.add_callback(Clock(self))

    def _prepare_dataset(self, dataset, *_):
        self.load_peak = peak_memory(self.flags.device)  # the model is loaded, nothing has run yet
        reset_peak(self.flags.device)
        return dataset

    def _precompute_ref_logps(self, *positional):
        # In eval mode bitsandbytes repacks its weights on some CPUs, and gradients are wrong from
        # then on. Without dropout both modes compute the same.
        self.model.train()
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*positional)
        self.reference_seconds = time.perf_counter() - started
        return dataset

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    def create_scheduler(self, num_training_steps, optimizer=None):
        settings, steps = make_settings(self.flags), self.flags.warmup + self.flags.steps

        def factor(step):
            return learning_rate(step, steps, settings) / settings.learning_rate

        optimizer = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler


def word_tokenizer():
    """A tokenizer with special tokens only. TRL needs these, but the pairs are already ids."""
    model = Tokenizer(WordLevel({f"<{i}>": i for i in range(3)}, unk_token="<0>"))
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
