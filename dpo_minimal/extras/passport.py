"""A run's passport: its products, read back as a stranger would, give the run's own numbers.

    python -m dpo_minimal.evaluate --verify RUN

Two products are read: the adapter dpo/ over the base in 4 bits, and merged/ alone. The numbers are
those of eval.json, on the same held-out pairs. How far they may be apart comes from arithmetic:

- merged/ keeps bfloat16's 8 bits of each weight. What this does to a number is measured: merged/ is
  rounded once more (`round_again`), which is as strong as its own rounding. TIMES the root mean
  square of what this changes, over the pairs, is the tolerance. (A mean is never larger than it.)
- dpo/ over the same base is the same arithmetic, perhaps added up in another order. In float32 a
  sum of K products is then off by sqrt(K) 2^-24, relatively, and one of rounded weights by 2^-9.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama
from dpo_minimal.data import encode_pairs, load_pairs
from dpo_minimal.evaluate import one_epoch
from dpo_minimal.extras import digest, large
from dpo_minimal.extras.losses import loss_settings, pair_lengths, preference_loss
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.rounding import NAMES, TIMES, round_again, same_arithmetic, tolerances
from dpo_minimal.formats.chat import find_template
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import reward_metrics
from dpo_minimal.reference import pair_logps
from dpo_minimal.tokenizer import load_tokenizer


class Row(NamedTuple):
    """A line of the passport; numbers, or texts that must be equal (then without a tolerance)."""

    what: str
    run: float | str
    read: float | str
    tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """Whether what was read back is the run's own."""
        if self.tolerance is None:
            return self.run == self.read
        return abs(self.run - self.read) <= self.tolerance


def open_tokenizer(model_folder, adapter_folder=None):
    """The tokenizer for a model, or for an adapter on it."""
    return load_tokenizer(model_folder, find_template(adapter_folder, model_folder))


def contains(adapter, first) -> bool:
    """Whether an adapter folder is the adapter `first` with another one stacked onto it."""
    whole = open_safetensors(Path(adapter) / "adapter_model.safetensors")
    for name, part in open_safetensors(Path(first) / "adapter_model.safetensors").items():
        if not name.endswith("lora_A.weight"):
            continue
        rows = part.read()
        if name not in whole or not torch.equal(whole[name].read()[: len(rows)], rows):
            return False
    return True


def values_of(policy, ref, lengths, flags: dict) -> dict[str, torch.Tensor]:
    """{metric: [n]} of pairs, from log-probabilities and lengths [n, 2] (chosen, rejected)."""
    losses, chosen_rewards, rejected_rewards = preference_loss(
        *policy.T, *ref.T, lengths=lengths, settings=loss_settings(flags)
    )
    return {"loss": losses} | reward_metrics(*policy.T, chosen_rewards, rejected_rewards)


# --- what is read -----------------------------------------------------------------------------


class Passport(NamedTuple):
    """What a run says of itself: its folder, flags, held-out numbers, and its base's folder."""

    run: Path
    flags: dict
    held_out: dict
    base: Path
    dtype: torch.dtype


def read_passport(run, model=None, dtype=None) -> Passport:
    """Read config.json and eval.json; InputError if the run has not been evaluated."""
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"--verify {run}: no such run's folder")
    for name in ("config.json", "eval.json", "dpo", "merged"):
        if not (run / name).exists():
            raise InputError(f"--verify {run}: it has no {name}; run --stage evaluate first")
    record, held_out = read_json(run / "config.json"), read_json(run / "eval.json").get("held_out")
    if "arguments" not in record or "base_digest" not in (held_out or {}):
        raise InputError(f"--verify {run}: made by an earlier version; run --stage evaluate again")
    flags = record["arguments"]
    base = Path(model or flags["model"] or run / "base")
    if not base.is_dir():
        raise InputError(f"--verify {run}: its base {base} is not there: give --model")
    dtype = getattr(torch, dtype or record["dtype"].removeprefix("torch."))
    return Passport(run, flags, held_out, base, dtype)


def read_texts(passport: Passport, data, log) -> list:
    """The run's held-out pairs as text: drawn again as the run did, or those of `data`."""
    if data:
        return load_pairs(data, log)
    flags, run = passport.flags, passport.run
    place = flags["data"] or run / "data"
    if not Path(place).exists() and not Path(place).parent.is_dir():
        raise InputError(f"--verify {run}: its data {place} are not there: give --data")
    splits = large.load_splits(place, flags["eval_data"], flags["seed"], log, folder=run)
    return splits.evaluation


def check_ids(folder, model, pairs):
    """InputError unless the model has an embedding of every token of the pairs."""
    if max(max(ids) for pair in pairs for ids in pair) >= model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has more tokens than the embedding")


def read_adapter(passport: Passport, adapter, pairs, device, quantize):
    """(policy, reference) log-probabilities [n, 2] of the adapter over the base, and sft/."""
    model = load_llama(passport.base, device, passport.dtype, quantize)
    load_adapter(model, adapter, "dpo")
    reference = []
    if not passport.flags["no_sft"]:
        load_adapter(model, passport.run / "sft", "sft")
        reference = ["sft"]
    check_ids(passport.base, model, pairs)
    batches, logps = one_epoch(pairs, 4), []
    for names in (["dpo"], reference):
        with active_adapters(model, names):
            logps.append(pair_logps(model, pairs, batches, device))
    return logps


def read_merged(passport: Passport, folder, pairs, device):
    """(policy, policy after another rounding) log-probabilities [n, 2], and the widest sum."""
    model = load_llama(folder, device, passport.dtype, quantize=None)
    check_ids(folder, model, pairs)
    batches = one_epoch(pairs, 4)
    policy = pair_logps(model, pairs, batches, device)
    round_again(model)
    return policy, pair_logps(model, pairs, batches, device), model.config.intermediate_size


# --- the verdict ------------------------------------------------------------------------------


def check_inputs(passport: Passport, adapter, merged, unquantized, texts, encoded):
    """(rows of what must be equal, what is wrong with those that are not).

    encoded: {"base": the pairs by the base's tokenizer, "merged": by that of the merged folder}.
    """
    held_out, rows, reasons = passport.held_out, [], []

    def must_equal(what, run, read, reason):
        rows.append(Row(what, str(run)[:12], str(read)[:12]))
        if run != read:
            reasons.append(reason)

    stored = {True: "unquantized", False: "in 4 bits"}
    trained = stored[passport.flags["no_quantize"]]
    read, reason = digest.of_pairs(texts), "other pairs than those that the run was evaluated on"
    must_equal("pairs", held_out["texts_digest"], read, reason)
    reason = f"wrong base: {passport.base} has other weights than the run's base"
    must_equal("base", held_out["base_digest"], digest.of_base(passport.base), reason)
    reason = f"the base is {stored[unquantized]}: the adapter was trained over it {trained}"
    must_equal("base is", trained, stored[unquantized], reason)
    for name, folder in (("base", passport.base), ("merged", merged)):
        reason = f"{folder}: another tokenizer or template: the pairs have other tokens"
        read = digest.of_pairs(encoded[name])
        must_equal(f"{name}'s tokens", held_out["tokens_digest"], read, reason)
    if not passport.flags["no_sft"]:
        has = contains(adapter, passport.run / "sft")
        reason = f"{adapter}: an adapter without the SFT: it does not contain the run's sft/"
        must_equal("adapter has SFT", "yes", "yes" if has else "no", reason)
    return rows, reasons


def check_numbers(passport: Passport, adapter, merged, quantize, encoded, device, failed) -> list:
    """A row for each number of each product. failed: what `check_inputs` found to be unequal."""
    flags, pairs = passport.flags, encoded["base"]
    policy, ref = read_adapter(passport, adapter, pairs, device, quantize)
    from_merged, moved, width = read_merged(passport, merged, pairs, device)
    values, of_merged, after_moving = (
        values_of(logps, ref, pair_lengths(pairs), flags) for logps in (policy, from_merged, moved)
    )
    bounds = tolerances(of_merged, after_moving)
    narrow = same_arithmetic(bounds, values, width, passport.dtype)
    rows = compare("adapter", passport.held_out, values, narrow, NAMES)
    if "merged's tokens" in failed:
        return rows
    if not failed:  # answer by answer, which is sharper than means
        apart, again = (from_merged - policy), (moved - from_merged)
        rms, bound = (float(d.square().mean().sqrt()) for d in (apart, again))
        rows.append(Row("merged from adapter, rms", 0.0, rms, TIMES * bound))
    # The rewards of merged/ need a reference, and so the right base.
    names = NAMES[:2] if failed & {"base", "base is"} else NAMES
    return rows + compare("merged", passport.held_out, of_merged, bounds, names)


def encode_held_out(passport: Passport, texts, folders, log):
    """The pairs in tokens of a model's folder, or of an adapter's on it; none if that fails."""
    try:
        tokenizer = open_tokenizer(*folders)
        return encode_pairs(tokenizer, texts, passport.flags["max_length"], "held-out pairs", log)
    except InputError as error:  # a tokenizer without the template's tokens, for example
        if folders[0] == passport.base:
            raise
        log(f"warning   {folders[0]}: {error}")
        return ()


def check(passport: Passport, adapter, merged, data, device, unquantized, log=print):
    """(rows, reasons): what was compared, and in words what is wrong with what did not pass."""
    texts, encoded = read_texts(passport, data, log), {}
    for name, folders in {"base": (passport.base, adapter), "merged": (merged,)}.items():
        encoded[name] = encode_held_out(passport, texts, folders, log)
    rows, reasons = check_inputs(passport, adapter, merged, unquantized, texts, encoded)
    failed = {row.what for row in rows if not row.passed}
    quantize = None if unquantized else "nf4"
    try:
        rows += check_numbers(passport, adapter, merged, quantize, encoded, device, failed)
    except InputError as error:  # a base of another shape, for example
        if not reasons:
            raise
        return rows, [*reasons, str(error)]
    for kind, folder in (("adapter", adapter), ("merged", merged)):
        if not reasons and not all(row.passed for row in rows if row.what.startswith(f"{kind} ")):
            reasons.append(f"{folder}: other weights than those that the run was evaluated with")
    return rows, reasons


def compare(kind: str, held_out: dict, values: dict, bounds: dict, names) -> list[Row]:
    """A row per metric: the run's mean, and the mean that was read back."""
    rows = []
    for name in names:
        mean = float(values[name].mean())
        rows.append(Row(f"{kind} {name}", held_out[f"eval_{name}"], mean, bounds[name]))
    return rows


def format_rows(rows) -> str:
    """The passport as a table."""
    lines = ["| what | run | read back | tolerance | verdict |\n|---|---|---|---|---|"]
    for row in rows:
        cells = [row.what, row.run, row.read, "equal"]
        if row.tolerance is not None:
            cells[1:] = [f"{row.run:+.6f}", f"{row.read:+.6f}", f"{row.tolerance:.2g}"]
        lines.append(f"| {' | '.join(cells)} | {'ok' if row.passed else 'FAIL'} |")
    return "\n".join(lines)


def verify(args, device):
    """Print a run's passport; exit status 1 if anything does not pass."""
    passport = read_passport(args.verify, args.model, args.dtype)
    adapter, merged = args.adapter or passport.run / "dpo", args.merged or passport.run / "merged"
    unquantized = args.no_quantize or passport.flags["no_quantize"]
    rows, reasons = check(passport, adapter, merged, args.data, device, unquantized)
    print("\n".join([format_rows(rows), *(f"FAIL      {reason}" for reason in reasons)]))
    if reasons:
        raise SystemExit(1)
    print(f"passed    {passport.run}: what is read back is what the run measured")
