"""Problems 13 and 14: texts to token rows with a mask, and the training loop."""

from grader import oracle_losses as oracle
from problems.ladder import Check, Problem, only

LOOP = "dpo_minimal/loop.py"

# --- tokenization and masks -------------------------------------------------------------------

WORDS = [
    "the",
    "a",
    "big",
    "small",
    "red",
    "old",
    "cub",
    "fox",
    "ants",
    "school",
    "call",
    "young",
    "shirt",
    "salt",
    "wine",
    "it",
    "is",
    "not",
]


def sentence(rng, n):
    return " ".join(rng.choice(WORDS, n))


def encode_inputs(question=4, answer=5, start="", merges=""):
    def draw(rng, v):
        q, a = sentence(rng, question) + "?", start + sentence(rng, answer) + "."
        return {"question": q, "answer": a, "salt": int(rng.integers(10**6)), "merges": merges}

    return draw


def expect_encoded(i, v, bug=""):
    return oracle.encode(**i, bug=bug)


def pair_inputs(spare):
    """A pair that has `spare` tokens of room; its rejected answer is the longer one."""

    def draw(rng, v):
        salt = int(rng.integers(10**6))
        pair = [sentence(rng, 4), sentence(rng, 3), sentence(rng, 6)]
        prompt, _, rejected = oracle.encode_pair(pair, 10**6, salt)["encoded"]
        return {"pair": pair, "max_length": len(prompt) + len(rejected) + spare, "salt": salt}

    return draw


def expect_pair(i, v, bug=""):
    return oracle.encode_pair(**i, bug=bug)


def row_inputs(*sizes):
    def draw(rng, v):
        def ids(n):
            return rng.integers(3, 5000, n).tolist()

        return {"examples": [[[1, *ids(p)], [*ids(a), 2]] for p, a in sizes]}

    return draw


def expect_rows(i, v, bug=""):
    return oracle.answer_rows(**i, v=v, bug=bug) | {"dtypes": ["torch.int64", "torch.bool"]}


TOKENS = Problem(
    name="tokenization",
    title="Safe tokenization and masks",
    file="dpo_minimal/data.py",
    holes=("encode_example", "encode_pair"),
    more_holes={"dpo_minimal/batches.py": ("answer_rows",)},
    text="""`encode_example`: tokenize `format_prompt(question)` with BOS, and for each answer
prompt + space + answer jointly with BOS and EOS; what follows the prompt is the answer. If the
joint ids do not begin with the prompt's, raise InputError. `encode_pair`: prompt, chosen,
rejected, or None if the prompt with the longer answer has more than max_length tokens: nothing is
cut. `answer_rows`: rows padded on the right with 0 (use `pad`), and the mask. {mask}""",
    checks=(
        Check(
            *("hand value", 2, "encode", encode_inputs(), expect_encoded),
            "BOS, template, question | answer with its leading space, EOS.",
        ),
        Check(
            *("odd answers", 2, "encode", encode_inputs(start="\n7 "), expect_encoded),
            "An answer that begins with a line break or a digit still follows the prompt.",
        ),
        Check(
            *(
                "merging",
                2,
                "encode",
                encode_inputs(merges="Answer: the", start="the "),
                expect_encoded,
            ),
            "A tokenizer that merges 'Answer:' with what follows: InputError, not a wrong split.",
        ),
        Check(
            *("fits", 1, "encode_pair", pair_inputs(0), expect_pair),
            "Prompt + longer answer of exactly max_length tokens fit.",
        ),
        Check(
            *("too long", 2, "encode_pair", pair_inputs(-1), expect_pair),
            "One token more is None; nothing is cut.",
        ),
        Check(
            *("rows", 2, "answer_rows", row_inputs((2, 3), (4, 2), (1, 7)), expect_rows),
            "Right padding; the answer's tokens are scored by the rule of the problem, pads not.",
        ),
        Check(
            *("one row", 1, "answer_rows", row_inputs((1, 1)), expect_rows),
            "The shortest row of all.",
        ),
    ),
    bugs={
        "one short": "Exactly max_length tokens fit.",
        "cut": "A pair that is too long is cut; it must be dropped (None).",
        "only chosen measured": "Only the chosen answer is measured: the other may be longer.",
        "both answers measured": "The two answers are in rows of their own: take the longer one.",
        "space with the prompt": "The prompt is tokenized with the answer's leading space.",
        "merge not noticed": "Joint ids that do not begin with the prompt's must be an InputError.",
        "tokenized apart": "The answer is tokenized apart: its leading space is lost.",
        "EOS left out": "The EOS is missing: the model never learns to stop.",
        "EOS twice": "There are two EOS.",
        "BOS before the answer": "There is a BOS in front of the answer.",
        "no BOS": "The BOS in front of the prompt is missing.",
        "another template": "The template is that of `format_prompt`.",
        "padded on the left": "The rows are padded on the left.",
        "prompt scored": "The prompt is scored.",
        "pads scored": "Pads are scored.",
        "EOS not scored": "The last token of the rule is not scored.",
        "one early": "The mask begins one token too early.",
        "one late": "The mask begins one token too late.",
        "the taught rule": "This is the taught rule; the problem asks for another one.",
    },
    changes={
        "answer": "Scored are the answer's tokens, its EOS included.",
        "skip first": "NOT AS TAUGHT: the answer's FIRST token is not scored, all others are.",
        "no EOS": "NOT AS TAUGHT: the answer's tokens are scored WITHOUT the EOS.",
    },
)

# --- the training loop ------------------------------------------------------------------------


def training_inputs(steps, accum=1, uneven=False, clip=1e9, decay=0.0, warmup=0, **extra):
    def draw(rng, v):
        x, y = rng.standard_normal((24, 3)), 3 * rng.standard_normal(24)
        sizes = [1 + (t % 3) * 2 if uneven else 3 for t in range(2 * steps * accum)]
        batches = [rng.choice(24, n, replace=False).tolist() for n in sizes]
        settings = {"learning_rate": 0.05, "batch_size": 3, "grad_accum": accum}
        settings |= {"warmup_steps": warmup, "weight_decay": decay, "max_grad_norm": clip}
        more = {k: extra[k] for k in extra if k in ("resume_at", "evaluates")}
        settings |= {k: extra[k] for k in extra if k not in more}
        i = {"x": x.astype("float32"), "y": y.astype("float32")}
        i["w"] = rng.standard_normal(3).astype("float32")
        return i | {"batches": batches, "steps": steps, "settings": settings, **more}

    return draw


def expect_training(*names):
    def expect(i, v, bug=""):
        out = oracle.training(**only(i, *i), bug=bug)
        return {name: out[name] for name in names}

    return expect


TRAINING = Problem(
    name="training",
    title="The training loop",
    file=LOOP,
    holes=("train",),
    helpers={LOOP: ("evaluation_is_due", "next_batches", "means")},
    text="""AdamW with `fused=True` and the weight decay of the settings on the trainable
parameters. `count_steps` gives the number of steps. `start`, called with
folder/state/<the stage's name>.pt, gives the step, the number of tokens and the place in the order
to go on from. `Log` gets folder/metrics.jsonl; `stage.order.batches(batch_size, place)` yields
(rows, the place behind them), and `stage.collate(rows)` makes a batch. Each step: its
`learning_rate(...)`; `grad_accum` batches; the sum of all losses over the sum of all counts (never
a mean of means), clipped by norm; step; `log.write(step, loss=, learning_rate=, grad_norm= (before
clipping), num_tokens= (of all steps), tokens_per_second=, and the mean of each metric over all
examples of the step)`. After every `save_every`-th step (if that is not 0), `save_state` with the
stage's tables and progress=(steps done, num_tokens, place). With `stage.evaluate`, what
`stage.evaluate(model)` returns is logged with the prefix "eval_": before step s whenever
`eval_every` divides s (if it is not 0; s = 0 only if `eval_at_start`), with step=s, and always
after the last step, with step=steps. `count_steps`, `start`, `save_state` and `Log` are given.
`evaluation_is_due`, `next_batches` and `means` are parts of the taught loop, cut out with it: fill
them, or write all of it in `train`. There is one process: you need nothing from `parallel`. No
points hang on `asked` (Ctrl-C: finish the step, save the state, raise KeyboardInterrupt) and
`stop_unless_finite` (given), but with them your loop loses nothing.""",
    checks=(
        Check(
            *("shape", 1, "training", training_inputs(3), expect_training("w", "steps")),
            "Three steps are logged, and the weights move.",
        ),
        Check(
            *("first step", 3, "training", training_inputs(1), expect_training("w", "loss")),
            "One step of Adam moves each weight by the rate against its gradient's sign.",
            1e-4,
        ),
        Check(
            *("several steps", 3, "training", training_inputs(5), expect_training("w", "loss")),
            "Five steps: gradients are cleared, the rate falls as a cosine.",
            1e-4,
        ),
        Check(
            *(
                "accumulation",
                3,
                "training",
                training_inputs(4, accum=3, uneven=True),
                expect_training("w", "loss", "miss", "grad_norm"),
            ),
            "Three uneven micro-batches are one batch: every example has the same weight.",
            1e-4,
        ),
        Check(
            *(
                "clipping",
                2,
                "training",
                training_inputs(6, uneven=True, clip=0.7),
                expect_training("w", "grad_norm"),
            ),
            "The gradient is clipped to max_grad_norm; the logged norm is the one before.",
            1e-4,
        ),
        Check(
            *(
                "schedule and decay",
                2,
                "training",
                training_inputs(6, decay=0.5, warmup=2),
                expect_training("w", "learning_rate", "num_tokens"),
            ),
            "Warmup and cosine from `learning_rate`; decoupled weight decay.",
            1e-4,
        ),
        Check(
            *(
                "resume",
                2,
                "training",
                training_inputs(5, accum=2, resume_at=2, save_every=2),
                expect_training("weights seen", "steps", "num_tokens", "saved at", "saved places"),
            ),
            "Goes on where 2 steps are done, with the batches that come then; saves at 2 and 4.",
            1e-4,
        ),
        Check(
            *(
                "evaluation",
                1,
                "training",
                training_inputs(5, evaluates=True, eval_every=2),
                expect_training("evaluated at"),
            ),
            "Evaluated before steps 0, 2, 4 and after the last.",
        ),
    ),
    bugs={
        "mean of means": "Micro-batches are averaged one by one: small ones count too much.",
        "micro-batches summed": "The micro-batches' means are summed: not divided by all counts.",
        "gradients not cleared": "Gradients are not cleared after a step.",
        "not clipped": "The gradient is not clipped.",
        "constant rate": "The rate is constant: set it for each step from `learning_rate`.",
        "no weight decay": "Weight decay is left out.",
        "Adam with L2": "This is Adam with an L2 term; AdamW decays the weights themselves.",
        "last micro-batch logged": "The log shows the last micro-batch only.",
        "starts again from step 0": "An interrupted run starts again from step 0.",
        "batches read again": "A resumed run reads the first batches again.",
    },
)

PROBLEMS = (TOKENS, TRAINING)
