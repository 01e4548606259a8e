"""The open problem: a submitted DPO adapter, judged by its true score and its KL to the reference.

No code of the submission runs. Its adapter is data (safetensors and JSON), which the taught
package reads in a process of its own. Sampling 360 answers takes half a minute on one core.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository, or of the autograder's zip
POINTS, START, FULL, LARGEST_KL = 20, 1.0, 2.6, 2.0
NEW_TOKENS, LARGEST_FILE, SECONDS = 64, 2**25, 240
ANSWERS = 3  # to each question: the mean of 120 answers has a standard error of 0.2, of 360 of 0.1


def grade(submission: Path, folder: Path, seed: int) -> list[dict]:
    """One row of the form that grade.py uses. folder: has base/ and sft/."""
    adapter = next(
        (p for p in (submission / "dpo", submission / "open" / "dpo") if p.is_dir()), None
    )
    if adapter is None:
        return [row(0, "No folder dpo/ was handed in.")]
    for path in adapter.iterdir():
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return [row(0, "dpo/ holds something that is not a plain file of decent size.")]
    command = [sys.executable, "-I", "-B", __file__, adapter, folder, str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(getattr(error, "stderr", error))  # students do not see the grader's output
        return [row(0, f"The adapter could not be used ({type(error).__name__}).")]
    return [row(points(**found), "True score {true_score:+.2f}, KL {kl:.2f}.".format(**found))]


def row(score: float, output: str) -> dict:
    """A result of the open problem."""
    return {"problem": "open problem", "rung": "true score", "score": score, "max": POINTS} | {
        "output": output + f" Full points at {FULL}, KL at most {LARGEST_KL}.",
        "visible": True,
    }


def points(true_score: float, kl: float) -> float:
    """Linear from START to FULL; no points too far from the reference."""
    share = (true_score - START) / (FULL - START)
    return round(POINTS * min(1.0, max(0.0, share)), 1) if kl <= LARGEST_KL else 0.0


def measure(adapter: str, folder: str, seed: int) -> dict[str, float]:
    """Sample answers with base + adapter and judge them. Runs in a process of its own."""
    taught = ROOT / "taught"
    sys.path.insert(0, str(taught if taught.exists() else ROOT))
    import torch

    from dpo_minimal import forum
    from dpo_minimal.checkpoint import load_adapter, load_llama
    from dpo_minimal.data import format_prompt
    from dpo_minimal.evaluate import kl_estimate
    from dpo_minimal.extras.report import judge_answers
    from dpo_minimal.generate import sample_answers
    from dpo_minimal.lora import active_adapters
    from dpo_minimal.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    base = Path(folder) / "base"
    model = load_llama(base, "cpu", torch.float32, "nf4")
    load_adapter(model, Path(folder) / "sft", "sft")
    load_adapter(model, Path(adapter), "dpo")
    tokenizer = load_tokenizer(base)
    held_out = forum.make_forum(0)["evaluation"]  # questions that no other part contains
    questions = sorted({entry["question"] for entry in held_out}) * ANSWERS
    prompts = [tokenizer.encode(format_prompt(question), bos=True) for question in questions]
    with torch.no_grad(), active_adapters(model, ["dpo"]):
        ids = sample_answers(model, tokenizer, questions, NEW_TOKENS, seed=seed)
        kl = kl_estimate(model, ["sft"], prompts, ids, "cpu")
    answers = [tokenizer.decode(answer).strip() for answer in ids]
    return {"true_score": judge_answers(questions, answers)["true_score"], "kl": kl}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
