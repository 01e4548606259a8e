"""Settings by name: (the flags that hold for a whole run, how each stage trains)."""

from dataclasses import fields, replace

from dpo_minimal.loop import Settings

# There an answer is one of 15, which is some 2.7 nats of choice, and the implicit reward at the
# optimum is the true score. So beta is 1: beta 0.1 would ask for log-ratios ten times as large.
FORUM = (
    dict(beta=1.0, max_length=128, target_modules="all", gradient_checkpointing=False),
    {
        "pretrain": Settings(learning_rate=2e-3, batch_size=8, weight_decay=0.0, save_every=200),
        "sft": Settings(learning_rate=2e-3, batch_size=8, epochs=3, save_every=100),
        "dpo": Settings(
            learning_rate=1.5e-3, batch_size=32, epochs=2, eval_every=100, save_every=50
        ),
    },
)
BLOG_FLAGS = dict(beta=0.1, max_length=1024, target_modules="q_proj,v_proj")
# For a --model and --data: the blog's settings, but as many steps as the data have, and a larger
# learning rate in SFT. The blog had 500 steps of 8 rows; smaller data need larger steps.
USUAL = (
    BLOG_FLAGS,
    {
        "sft": Settings(learning_rate=5e-4, batch_size=4, grad_accum=2, save_every=100),
        "dpo": Settings(
            learning_rate=5e-4, batch_size=4, grad_accum=4, eval_every=100, save_every=100
        ),
    },
)
# The numbers of "Fine-tune Llama 2 with DPO" and of its scripts sft_llama2.py and dpo_llama2.py in
# TRL's stack_llama_2. Where the scripts slip, this project does something else:
# - They drop pairs whose prompt + answer has more than 1,024 characters; we count tokens.
# - DPO's target modules are q_proj, k_proj and v_proj there, because the others in its list are
#   named as in GPT-J and match nothing in a Llama; we keep SFT's q_proj and v_proj.
# - SFT's adapter, trained over the NF4 base, is merged into the 16-bit weights, and the result is
#   loaded in 4 bits again (without asking for NF4, so in FP4). We keep the one NF4 base.
# - SFT cuts the packed texts every 1,024 tokens, and they see each other; ours stay whole, apart.
# - The prompt ends in "Answer: "; for SentencePiece the space belongs to the answer.
STACK_LLAMA_2 = (
    BLOG_FLAGS,
    {
        "sft": Settings(
            learning_rate=1e-4,
            batch_size=4,
            grad_accum=2,
            max_steps=500,
            epochs=1e6,
            warmup_steps=100,
            save_every=100,
        ),
        "dpo": Settings(
            learning_rate=5e-4,
            batch_size=4,
            grad_accum=4,
            max_steps=1000,
            epochs=1e6,
            warmup_steps=100,
            eval_every=100,
            save_every=100,
        ),
    },
)
PRESETS = {"forum": FORUM, "usual": USUAL, "stack-llama-2": STACK_LLAMA_2}
# Flags that say how a stage trains. Unlike the others, they mean nothing to another stage.
STAGE_FLAGS = {field.name for field in fields(Settings)}


def preset_of(args) -> tuple[dict, dict[str, Settings]]:
    """(flags, each stage's settings) that hold unless flags say otherwise."""
    return PRESETS[args.preset or ("usual" if args.data else "forum")]


def stage_settings(args) -> dict[str, Settings]:
    """Each stage's preset, with the flags that were given in place of its own values."""
    given = {name: getattr(args, name, None) for name in STAGE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    return {stage: replace(preset, **given) for stage, preset in preset_of(args)[1].items()}
