"""`--stop-when`: DPO ends early once the policy's own answers are too far from the reference's.

A policy that is trained too hot or too long ends in text that nobody voted on. No curve of the
pairs says so, but the KL of its own answers does (tutorial, chapter 15). It is measured at each
evaluation, and it is noisy: a mean over some dozen answers.
"""

import math
from functools import partial

from dpo_minimal import InputError
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.extras import parallel
from dpo_minimal.extras.sampling import answer_tokens, ready_to_sample
from dpo_minimal.generate import make_chooser, sample
from dpo_minimal.lora import adapter_names

ANSWERS = 32  # at most, one to each question
AT_A_TIME = 8  # a 7B model keeps half a megabyte per token


def with_kl(run, model, pairs, evaluate):
    """`evaluate`, and with --stop-when also the KL of answers to the questions of EncodedPairs.

    InputError if no question leaves room for an answer.
    """
    if run.args.stop_when is None:
        return evaluate
    context = model.config.max_position_embeddings
    most = context - min(answer_tokens(run), context // 2)  # an answer needs room
    prompts = dict.fromkeys(tuple(p.prompt) for p in pairs if len(p.prompt) <= most)
    if not prompts:
        raise InputError(f"--stop-when: all held-out questions have more than {most} tokens")
    return partial(
        evaluate_with_kl,
        evaluate=evaluate,
        prompts=[list(prompt) for prompt in prompts][:ANSWERS],
        max_new_tokens=answer_tokens(run),
        eos_id=pairs[0].chosen[-1],
        device=run.device,
    )


def evaluate_with_kl(model, *, evaluate, prompts, max_new_tokens, eos_id, device) -> dict:
    """The metrics of evaluate(model) and "kl", nats per answer. The model's mode is kept."""
    answers = []
    chooser = make_chooser(seed=0)
    reference = [name for name in adapter_names(model) if name != "dpo"]
    with ready_to_sample(model):
        for at in range(0, len(prompts), AT_A_TIME):
            part = prompts[at : at + AT_A_TIME]
            answers += sample(model, part, max_new_tokens, eos_id, chooser)
        kl = kl_estimate(model, reference, prompts, answers, device, batch_size=AT_A_TIME)
    return evaluate(model) | {"kl": kl}


def stops(metrics: dict, stop_when: float | None) -> bool:
    """Whether DPO ends with this evaluation; then a line says so. All processes decide alike."""
    if stop_when is None:
        return False
    kl = metrics.get("kl", math.nan)
    over = parallel.total(int(not kl <= stop_when)) > 0
    if over and parallel.first():
        print(f"dpo       ends here: the KL of its answers, {kl:.2f}, is above --stop-when")
    return over
