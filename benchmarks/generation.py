"""Tokens per second of generation: ours, and transformers + bitsandbytes on the same NF4 model.

    python benchmarks/generation.py --model path/to/SmolLM2-135M --rows 1 16

Needs `pip install ".[oracle]"`. The sides take turns for some rounds, each in a process of its own.
Both continue the same random prompts greedily from the bare NF4 base, by exactly --new tokens, with
a key/value cache. Loading and one short answer before are not timed; reading the prompt is, and on
our side the unpacking of the weights, which every pass does again.

  ours          `generate.sample` as the evaluation of a run calls it
  ours-packed   the same where memory does not allow to unpack the weights
  transformers  `AutoModelForCausalLM.generate` with BitsAndBytesConfig, NF4, double quantization
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from models import model_folder
from record import in_turn, machine_record, script_parser, settings_record, spread, write_result
from step import peak_memory, reset_peak, run_alone, wait

from dpo_minimal.checkpoint import load_llama
from dpo_minimal.extras import sampling
from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.generate import make_chooser, sample

SIDES = ("ours", "ours-packed", "transformers")
NEVER = -1  # an EOS that no model gives


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default="random:smollm2-135m", help="model folder, or random:SHAPE")
    add("--rows", type=int, nargs="+", default=[1, 16], help="answers at a time")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="what it computes in")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--new", type=int, default=64, help="tokens of an answer")
    add("--rounds", type=int, default=3)
    add("--sides", nargs="+", choices=SIDES, default=["ours", "transformers"])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--scratch", help="where random models are made")
    add("--out", help="benchmarks/results/generation-NAME.json")
    # Only for its own child processes, one per side and round:
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def main():
    """Run each side as a child process in each round; print and write the figures."""
    args = make_parser().parse_args()
    if args.side:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args)))
        return
    folder = model_folder(args.model, args.scratch)
    name = args.out or f"generation-{Path(args.model).name.replace(':', '-')}.json"
    out, rounds = Path(__file__).parent / "results" / name, []
    for number in range(args.rounds):
        rounds.append({})
        for side in in_turn(args.sides, number):
            rounds[-1][side] = run_side(side, folder, args)
            print(f"round {number + 1}  {side:12}  {short(rounds[-1][side])}", flush=True)
        record = {"machine": machine_record(), "arguments": settings_record(args)}
        write_result(out, record | {"summary": summarize(args.sides, rounds), "rounds": rounds})
    print(format_table(summarize(args.sides, rounds)))


def run_side(side: str, folder, args) -> dict:
    """The figures of one side in one round, from a new process."""
    flags = ["--side", side, "--model", folder, "--device", args.device]
    flags += ["--rows", *args.rows, "--dtypes", *args.dtypes, "--threads", args.threads]
    flags += ["--prompt", args.prompt, "--new", args.new]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return run_alone("generation.py", flags, OMP_NUM_THREADS=str(args.threads), **quiet)


def measure(args) -> dict:
    """In the child process: {"float32, 1 rows": {tokens per second, peak memory}}."""
    figures = {}
    for dtype in args.dtypes:
        make = transformers_side if args.side == "transformers" else our_side
        answer = make(args, getattr(torch, dtype))
        vocabulary = read_config(args.model).vocab_size
        for rows in args.rows:
            generator = torch.Generator().manual_seed(0)
            shape = (rows, args.prompt)
            prompts = torch.randint(3, vocabulary, shape, generator=generator)  # [rows, prompt]
            answer(prompts[:1, :4], 2)
            reset_peak(args.device)
            wait()
            started = time.perf_counter()
            first = answer(prompts, args.new)
            wait()
            seconds = time.perf_counter() - started
            figures[f"{dtype}, {rows} rows"] = {
                "tokens_per_second": rows * args.new / seconds,
                "seconds": seconds,
                "peak_memory_gb": peak_memory(args.device) / 1e9,
                "first_tokens": first,
            }
    return figures


def our_side(args, dtype):
    """A function (prompts [B, T], new tokens) -> the first row's first tokens."""
    model = load_llama(args.model, args.device, dtype, "nf4").eval()
    if args.side == "ours-packed":
        sampling.memory_now = lambda device: None

    def answer(prompts, new):
        with sampling.ready_to_sample(model):
            return sample(model, prompts.tolist(), new, NEVER, make_chooser(0))[0][:8]

    return answer


def transformers_side(args, dtype):
    """The same with the libraries."""
    import transformers

    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(args.model),
        quantization_config=four_bits,
        dtype=dtype,
        device_map={"": 0 if args.device == "cuda" else args.device},
    ).eval()

    @torch.no_grad()
    def answer(prompts, new):
        prompts = prompts.to(model.device)
        told = dict(attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0)
        ids = model.generate(prompts, max_new_tokens=new, min_new_tokens=new, **told)
        return ids[0, prompts.shape[1] :][:8].tolist()

    return answer


# --- the summary ------------------------------------------------------------------------------


def short(figures: dict) -> str:
    """One round of one side, on one line."""
    cells = [f"{name}: {figure['tokens_per_second']:.1f}" for name, figure in figures.items()]
    return "tokens/s  " + "  ".join(cells)


def summarize(sides, rounds) -> dict:
    """Medians over the rounds, and ratios within a round to the side `transformers`."""
    summary = {"tokens_per_second": {}, "ratios": {}}
    for side in sides:
        for name in rounds[0][side]:
            speeds = [round_[side][name]["tokens_per_second"] for round_ in rounds]
            summary["tokens_per_second"][f"{side}, {name}"] = statistics.median(speeds)
            if side == "transformers" or "transformers" not in sides:
                continue
            theirs = [round_["transformers"][name]["tokens_per_second"] for round_ in rounds]
            ratios = [our / their for our, their in zip(speeds, theirs, strict=True)]
            summary["ratios"][f"{side}, {name}"] = spread(ratios)
    return summary


def format_table(summary: dict) -> str:
    """The medians and the ratios as a Markdown table."""
    lines = ["", "| side | tokens/s | times transformers |", "|---|---|---|"]
    for name, speed in summary["tokens_per_second"].items():
        ratio = summary["ratios"].get(name)
        told = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "-"
        lines.append(f"| {name} | {speed:.1f} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
