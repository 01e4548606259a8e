"""Seconds of the questions that a run's evaluation asks: ours, and those of another checkout.

    python benchmarks/evaluation.py --model path/to/SmolLM2-135M --against path/to/another/checkout

Base, SFT and DPO answer the same questions, sampled and greedy, and the KL of the samples follows:
`report.compare`, which takes nearly all of the evaluation's time. The adapters are random, and as
large as trained ones. The sides take turns, each in a process of its own. Loading is not timed.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from record import in_turn, machine_record, script_parser, settings_record, spread, write_result

QUESTIONS = [f"Explain in a few sentences what {thing} is." for thing in (
    "a hash table", "inflation", "photosynthesis", "a sonnet", "an index fund", "a glacier",
    "recursion", "a vaccine", "the tide", "a fugue", "an enzyme", "a monopoly",
    "a neutron star", "sourdough", "a firewall", "erosion",
)]  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model folder, with its tokenizer")
    add("--against", help="the folder of another checkout of this project")
    add("--new", type=int, default=128, help="tokens of an answer at most")
    add("--rounds", type=int, default=2)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="benchmarks/results/evaluation-NAME.json")
    add("--side", help=argparse.SUPPRESS)  # for its own child processes: the checkout to import
    return parser


def main():
    """Run each side as a child process in each round; print and write the figures."""
    args = make_parser().parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    from step import run_alone  # not above: a child process imports another checkout

    sides = {"ours": Path(__file__).parents[1]}
    if args.against:
        sides["against"] = Path(args.against).absolute()
    name = args.out or f"evaluation-{Path(args.model).name}.json"
    out, rounds = Path(__file__).parent / "results" / name, []
    for number in range(args.rounds):
        rounds.append({})
        for side in in_turn(list(sides), number):
            flags = ["--side", sides[side], "--model", args.model, "--device", args.device]
            flags += ["--new", args.new, "--threads", args.threads]
            flags = list(map(str, flags))
            threads = str(args.threads)
            rounds[-1][side] = run_alone("evaluation.py", flags, OMP_NUM_THREADS=threads)
            print(f"round {number + 1}  {side:8} {rounds[-1][side]['seconds']:.1f} s", flush=True)
        record = {"machine": machine_record(), "arguments": settings_record(args)}
        write_result(out, record | {"summary": summarize(rounds), "rounds": rounds})


def measure(args) -> dict[str, float]:
    """In the child process: seconds and the KLs that were found."""
    sys.path.insert(0, args.side)
    from dpo_minimal.checkpoint import load_llama
    from dpo_minimal.extras import report
    from dpo_minimal.lora import add_adapter
    from dpo_minimal.tokenizer import load_tokenizer

    assert Path(report.__file__).is_relative_to(args.side), report.__file__
    torch.set_num_threads(args.threads)
    model = load_llama(args.model, args.device, torch.float32, "nf4")
    torch.manual_seed(0)
    for name in ("sft", "dpo"):
        add_adapter(model, name)
        for full, parameter in model.named_parameters():
            if f"{name}.lora_B" in full:
                torch.nn.init.normal_(parameter, std=0.003)
    tokenizer = load_tokenizer(args.model)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        table, _ = report.compare(
            model.eval(),
            tokenizer,
            QUESTIONS,
            args.device,
            max_new_tokens=args.new,
            seed=0,
            judged=False,
        )
    seconds = time.perf_counter() - started
    return {"seconds": seconds} | {f"kl of {name}": row["kl_to_sft"] for name, row in table.items()}


def summarize(rounds) -> dict:
    """Medians over the rounds, and how many times as long the other side takes."""
    sides = {side: statistics.median(r[side]["seconds"] for r in rounds) for side in rounds[0]}
    if "against" not in sides:
        return {"seconds": sides}
    ratios = [round_["against"]["seconds"] / round_["ours"]["seconds"] for round_ in rounds]
    return {"seconds": sides, "times_as_long": spread(ratios)}


if __name__ == "__main__":
    main()
