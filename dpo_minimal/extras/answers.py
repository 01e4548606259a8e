"""What a run's base, SFT and DPO answer to a question, and the reward that DPO gives each answer.

One base model in memory serves all of them: before each token, the adapters are switched.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_minimal import InputError, forum
from dpo_minimal.batches import answer_rows
from dpo_minimal.checkpoint import load_adapter, load_llama
from dpo_minimal.data import encode_example
from dpo_minimal.extras.report import variants
from dpo_minimal.extras.sampling import ready_to_sample
from dpo_minimal.formats.chat import find_template
from dpo_minimal.formats.rows import read_rows
from dpo_minimal.generate import make_chooser, sample_steps
from dpo_minimal.llama import Llama
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import sequence_logps
from dpo_minimal.run import saved_flags
from dpo_minimal.tokenizer import load_tokenizer


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, and what its config.json says that matters for answering."""

    folder: Path
    base: Path  # the base model's folder
    beta: float
    quantize: str | None  # as for `load_llama`
    sft: bool  # False after --no-sft
    on_forum: bool
    flags: dict  # all the flags, as they were saved


@dataclass(frozen=True)
class Trio:
    """A run that is loaded: the model with its adapters, and who answers with which of them."""

    run: FinishedRun
    model: Llama
    tokenizer: object
    variants: dict[str, list[str]]  # name: active adapters; without "SFT" after --no-sft
    reference: list[str]  # the adapters of DPO's reference


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: see `generate`. seed None: another one each time."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Answer:
    """An answer so far; what is known only at its end is None before.

    log_pi and log_ref: nats of the whole answer under DPO and under its reference. reward:
    beta * (log_pi - log_ref). true_score: the judge's, for questions of the forum.
    """

    text: str = ""
    tokens: int = 0
    cut: bool = False  # ended by max_new_tokens and not by an EOS
    log_pi: float | None = None
    log_ref: float | None = None
    reward: float | None = None
    true_score: float | None = None


# --- opening a run ----------------------------------------------------------------------------


def find_run(folder, model=None) -> FinishedRun:
    """The run in a folder. model: the base's folder, if not where the run found it.

    InputError, before anything is loaded, if something is not there.
    """
    folder = Path(folder)
    flags = saved_flags(folder, resume=True, stage=None)
    if not flags:
        raise InputError(f"{folder}: there is no run with a config.json")
    if "beta" not in flags:
        raise InputError(f"{folder / 'config.json'} does not say beta: run train.py again")
    sft = not flags.get("no_sft")
    for stage in ["sft", "dpo"] if sft else ["dpo"]:
        if not (folder / stage).is_dir():
            raise InputError(f"{folder} has no {stage}/ yet: run train.py --stage {stage} first")
    base = Path(model or flags.get("model") or folder / "base")
    if not base.is_dir():
        raise InputError(f"{base}: the run's base model is not there: say where with --model")
    quantize = None if flags.get("no_quantize") else "nf4"
    on_forum = flags.get("data") is None
    return FinishedRun(
        folder, base, flags["beta"], quantize=quantize, sft=sft, on_forum=on_forum, flags=flags
    )


def run_tokenizer(run: FinishedRun):
    """The tokenizer that the run was trained with."""
    return load_tokenizer(run.base, find_template(run.folder / "dpo", run.base))


def open_run(run: FinishedRun, device: str, dtype: torch.dtype) -> Trio:
    """Load the base once, and the run's adapters over it."""
    tokenizer = run_tokenizer(run)
    model = load_llama(run.base, device, dtype, run.quantize)
    reference = ["sft"] if run.sft else []
    for name in reference:
        load_adapter(model, run.folder / name, name)
    load_adapter(model, run.folder / "dpo", "dpo")  # this one is sft + dpo: it is activated alone
    model.eval()
    return Trio(run, model, tokenizer, variants(model), reference)


def example_questions(run: FinishedRun, most=6) -> list[str]:
    """Questions that no stage has trained on: samples.md's, else the forum's; maybe none."""
    samples = run.folder / "samples.md"
    if samples.exists():
        blocks = f"\n{samples.read_text('utf-8')}".split("\n### ")[1:]
        questions = [block.split("\n\n- **")[0].strip() for block in blocks]
    else:
        path = run.folder / "data" / "evaluation" / "forum.jsonl"
        rows = read_rows(path) if run.on_forum and path.exists() else ()
        questions = [row["question"] for _, row in rows]
    return list(dict.fromkeys(questions))[:most]


# --- answering --------------------------------------------------------------------------------


def ask(trio: Trio, question: str, sampling: Sampling):
    """Yield {variant: Answer} as the answers grow by a token at a time, side by side.

    Each answer is what `generate` gives with these settings. InputError if there is no question, or
    it leaves no room for an answer.
    """
    prompt = encode_question(trio, question)
    steps = {name: start(trio, prompt, sampling) for name in trio.variants}
    ids = {name: [] for name in steps}
    answers = {name: Answer() for name in steps}
    with ready_to_sample(trio.model):
        while steps:
            for name in list(steps):
                with active_adapters(trio.model, trio.variants[name]):
                    grown = next(steps[name], None)
                if grown is not None:
                    ids[name] = grown[0]
                    text = trio.tokenizer.decode(ids[name]).strip()
                    answers[name] = Answer(text, len(ids[name]))
                else:
                    del steps[name]
                    answers[name] = rewarded(trio, question, prompt, ids[name])
            yield dict(answers)


def encode_question(trio: Trio, question: str) -> list[int]:
    """The prompt of a question in tokens; InputError if an answer could not follow."""
    if not question.strip():
        raise InputError("there is no question yet")
    prompt = encode_example(trio.tokenizer, question)[0]
    most = trio.model.config.max_position_embeddings
    if len(prompt) >= most:
        raise InputError(f"the question has {len(prompt)} tokens, this model reads {most} in all")
    return prompt


def start(trio: Trio, prompt: list[int], sampling: Sampling):
    """The steps of an answer, under whatever adapters are active when each is taken."""
    return sample_steps(
        trio.model,
        [prompt],
        sampling.max_new_tokens,
        eos_id=trio.tokenizer.eos_id,
        chooser=make_chooser(sampling.temperature, sampling.top_p, sampling.seed),
    )


def rewarded(trio: Trio, question: str, prompt: list[int], ids: list[int]) -> Answer:
    """The finished answer of these tokens, with its reward."""
    text = trio.tokenizer.decode(ids).strip()
    log_pi = answer_logp(trio, ["dpo"], prompt, ids)
    log_ref = answer_logp(trio, trio.reference, prompt, ids)
    known = trio.run.on_forum and question in forum.QUESTIONS
    return Answer(
        text=text,
        tokens=len(ids),
        cut=ids[-1] != trio.tokenizer.eos_id,
        log_pi=log_pi,
        log_ref=log_ref,
        reward=trio.run.beta * (log_pi - log_ref),
        true_score=forum.judge(question, text) if known else None,
    )


@torch.no_grad()
def answer_logp(trio: Trio, adapters: list[str], prompt: list[int], ids: list[int]) -> float:
    """log pi of an answer's tokens, its EOS included, under these adapters; in nats."""
    tokens, loss_mask = answer_rows([(prompt, ids)], trio.model.lm_head.weight.device)
    with active_adapters(trio.model, adapters):
        return float(sequence_logps(trio.model, tokens, loss_mask)[0])
