"""The training loop: schedule, accumulation, clipping, the log, and going on after a kill."""

import json
import math

import pytest
import torch
from helpers import fill_adapter, random_tokens, tiny_llama

from dpo_minimal.batches import Batches, packed_batch, pair_batch
from dpo_minimal.data import EncodedPair
from dpo_minimal.evaluate import pair_logps
from dpo_minimal.loop import Log, Settings, count_steps, learning_rate, steps_per_epoch, train
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics, token_logps
from dpo_minimal.nf4 import quantize_model

LENGTHS = [3 + i % 5 for i in range(12)]
EXAMPLES = [([1], random_tokens(1, n, seed=n)[0].tolist()) for n in LENGTHS]
ANSWERS = [answer for _, answer in EXAMPLES]
PAIRS = [EncodedPair([1, 5], *both) for both in zip(ANSWERS[:6], ANSWERS[6:], strict=True)]
ALL_PAIRS = list(range(6))
TIMING = ("tokens_per_second", "peak_memory_gb")


def sft_objective(model, batch):
    """-log pi of each scored token."""
    return -token_logps(model, batch.tokens, batch.loss_mask, batch.positions, batch.mask), {}


def sft_collate(indices):
    """One example a row."""
    return packed_batch(EXAMPLES, [[i] for i in indices], "cpu")


def in_batches(size, seed):
    """Numbers of the examples, sorted by length within an epoch, in shuffled batches."""
    return Batches(lambda w: sorted(w, key=LENGTHS.__getitem__), len(LENGTHS), 99, seed, size)


def adapted(dtype=torch.float64, dropout=0.0, seed=5):
    """A tiny 4-bit base with a fresh trainable adapter."""
    model = quantize_model(tiny_llama(dtype))
    torch.manual_seed(seed)
    add_adapter(model, "sft", r=2, alpha=4, dropout=dropout, targets="all")
    return model.to(dtype)


def weights(model):
    """Copies of the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(folder, model, settings, steps=6, order=None, collate=sft_collate, **more):
    """Train in a folder, on SFT unless told otherwise; returns the rows of its metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    order = order or in_batches(settings.batch_size, settings.seed)
    epoch = steps_per_epoch(settings, math.ceil(len(LENGTHS) / settings.batch_size))
    log = Log(folder / "metrics.jsonl", "sft", steps, epoch)
    objective = more.pop("objective", sft_objective)
    train(model, objective, order, collate, steps, settings, log, folder / "sft.pt", **more)
    return rows_of(folder)


def rows_of(folder):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    """Rows without what depends on the clock or the machine."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


class Recorder(torch.optim.AdamW):
    """AdamW that writes down the learning rate and the gradient's norm of each step."""

    seen: list = []

    def step(self, closure=None):
        (group,) = self.param_groups
        norm = sum(p.grad.square().sum() for p in group["params"] if p.grad is not None).sqrt()
        self.seen.append((group["lr"], float(norm)))
        return super().step(closure)


@pytest.fixture
def recorder(monkeypatch):
    """What each step of the optimizer saw, (learning rate, gradient norm)."""
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return Recorder


# The schedule.


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [
        (2, 10, {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.85355339059, 6: 0.5, 9: 0.03806023374}),
        (0, 4, {0: 1.0, 1: 0.85355339059, 2: 0.5, 3: 0.14644660941}),
        (None, 40, {0: 0.25, 3: 1.0, 4: 1.0, 22: 0.5}),  # a tenth of the steps
        (None, 3, {0: 1.0, 1: 0.75, 2: 0.25}),  # half a cosine at 0, 60 and 120 degrees
        (4, 4, {0: 0.25, 3: 1.0}),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine(warmup, steps, rates):
    settings = Settings(learning_rate=3.0, batch_size=1, warmup_steps=warmup)
    for step, share in rates.items():
        assert learning_rate(step, steps, settings) == pytest.approx(3 * share, rel=1e-9), step


@pytest.mark.parametrize(
    ("changes", "examples", "steps"),
    [
        ({}, 10, 3),  # batches of 4, 4 and 2
        ({"grad_accum": 2}, 10, 2),
        ({"epochs": 3.0}, 10, 9),
        ({"epochs": 0.5}, 16, 2),
        ({"epochs": 2.0, "grad_accum": 4}, 10, 2),
        ({"max_steps": 2}, 10, 2),
        ({"max_steps": 5}, 10, 3),
    ],
)
def test_the_number_of_steps_is_counted_by_hand(changes, examples, steps):
    batches = math.ceil(examples / 4)
    assert count_steps(Settings(learning_rate=1.0, batch_size=4, **changes), batches) == steps


# The step.


def test_each_step_uses_the_rate_of_the_schedule_and_clips_the_gradient(tmp_path, recorder):
    def loud(model, batch):
        return 1000 * sft_objective(model, batch)[0], {}

    settings = Settings(learning_rate=0.01, batch_size=3, warmup_steps=2, max_grad_norm=0.5)
    rows = run(tmp_path, adapted(), settings, steps=6, objective=loud)
    # 0.01 times 1/2, 1, then (1 + cos(k pi / 4)) / 2
    rates = [0.005, 0.01, 0.01, 0.0085355339, 0.005, 0.0014644661]
    assert [rate for rate, _ in recorder.seen] == pytest.approx(rates, rel=1e-7)
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-7)
    assert [norm for _, norm in recorder.seen] == pytest.approx([0.5] * 6, rel=1e-4)
    assert all(row["grad_norm"] > 5 for row in rows)  # what is logged is the norm before clipping


def test_a_small_gradient_is_not_clipped_and_is_the_mean_over_scored_tokens(tmp_path, recorder):
    model, other = adapted(), adapted()
    settings = Settings(learning_rate=0.0, batch_size=3, max_grad_norm=1e9)
    (row,) = run(tmp_path, model, settings, steps=1, order=iter([[0, 4, 7]]))
    losses = torch.cat([sft_objective(other, sft_collate([i]))[0] for i in (0, 4, 7)])
    losses.mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in other.parameters() if p.requires_grad))
    assert recorder.seen[0][1] == pytest.approx(norm, rel=1e-9)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-9)


def dpo_setup(model):
    """(objective, collate) of DPO with the model's adapter `sft` as the reference."""
    batch = pair_batch(PAIRS, ALL_PAIRS, "cpu")
    with active_adapters(model, ["sft"]), torch.no_grad():
        reference = torch.stack(preference_logps(model, batch))  # [2, B]

    def objective(model, batch):
        policy = preference_logps(model, batch)
        losses, *rewards = dpo_loss(*policy, *reference[:, batch.indices], beta=0.5)
        return losses, reward_metrics(*policy, *rewards)

    return objective, lambda indices: pair_batch(PAIRS, indices, "cpu")


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_four_batches_of_one_are_one_batch_of_four(tmp_path, task):
    # The examples have different numbers of tokens, so a mean of means would differ.
    numbers = [0, 3, 1, 4, 5, 2, 4, 0, 2, 5, 3, 1]
    results = []
    for size, accum in ((4, 1), (1, 4), (2, 2)):
        model, more = adapted(), {}
        fill_adapter(model, "sft")
        if task == "dpo":
            add_adapter(model, "dpo", r=2, targets="all")
            model.to(torch.float64)
            fill_adapter(model, "dpo")
            more = dict(zip(("objective", "collate"), dpo_setup(model), strict=True))
        before = weights(model)
        order = iter([numbers[i : i + size] for i in range(0, 12, size)])
        settings = Settings(learning_rate=0.01, batch_size=size, grad_accum=accum)
        rows = untimed(run(tmp_path / f"{size}", model, settings, 3, order, **more))
        assert all((weight != before[n]).any() for n, weight in weights(model).items())
        results.append((rows, weights(model)))
    for rows, after in results[1:]:
        for row, expected in zip(rows, results[0][0], strict=True):
            numbers_of = {name: value for name, value in row.items() if name != "stage"}
            expected.pop("stage", None)
            assert numbers_of == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for name, weight in results[0][1].items():
            torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_a_dpo_step_moves_the_margin_but_neither_the_base_nor_the_reference(tmp_path):
    model = adapted(torch.float32)
    fill_adapter(model, "sft")
    add_adapter(model, "dpo", r=2, targets="q_proj,v_proj")
    objective, collate = dpo_setup(model)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if ".dpo." not in n}
    with active_adapters(model, ["sft"]):
        before = pair_logps(model, PAIRS, [ALL_PAIRS], "cpu")
    settings = Settings(learning_rate=0.01, batch_size=6, warmup_steps=0)
    order = iter([ALL_PAIRS] * 3)
    rows = run(tmp_path, model, settings, 3, order, objective=objective, collate=collate)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["rewards/margins"] > 0.01  # stuck at ln 2 if the adapter were frozen
    assert rows[1]["loss"] < math.log(2) - 0.01
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())
    with active_adapters(model, ["sft"]):
        assert torch.equal(pair_logps(model, PAIRS, [ALL_PAIRS], "cpu"), before)


def test_in_a_bfloat16_model_nearly_all_adapter_entries_move_at_1e_6(tmp_path):
    model = adapted(torch.float32).to(torch.bfloat16)
    fill_adapter(model, "sft")
    before = weights(model)
    settings = Settings(learning_rate=1e-6, batch_size=12, warmup_steps=0, weight_decay=0.0)
    run(tmp_path, model, settings, 1, iter([list(range(12))]))
    moved = torch.cat([(model.get_parameter(n) != w).flatten() for n, w in before.items()])
    # 1e-6 is above half a float32 unit in the last place of values up to 16; of a bfloat16
    # value of 0.2, whose unit is 1e-3, hardly anything would move
    assert moved.float().mean() > 0.99


# The log.


def test_every_step_is_a_line_and_evaluations_come_between(tmp_path):
    settings = Settings(learning_rate=0.01, batch_size=3, grad_accum=2, epochs=3.0, eval_every=2)
    calls = []

    def evaluate(model):
        calls.append(len(rows_of(tmp_path)))
        return {"loss": 1.5, "rewards/margins": 0.25}

    rows = run(tmp_path, adapted(), settings, 5, evaluate=evaluate)
    kinds = [("eval" if "eval_loss" in row else "step", row["step"]) for row in rows]
    assert kinds == [
        *[("eval", 0), ("step", 0), ("step", 1), ("eval", 2), ("step", 2), ("step", 3)],
        *[("eval", 4), ("step", 4), ("eval", 5)],
    ]
    assert len(calls) == 4 and all(row["stage"] == "sft" for row in rows)
    evaluation, first, second = rows[0], rows[1], rows[2]
    assert evaluation["eval_rewards/margins"] == 0.25 and "loss" not in evaluation
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch"} < first.keys()
    assert first["tokens_per_second"] > 0 and 0.01 < first["peak_memory_gb"] < 100
    # two batches of three examples a step; tokens count the BOS, pads do not count
    batches = list(zip(range(4), in_batches(3, 0), strict=False))
    counts = [sum(LENGTHS[i] + 1 for i in batch) for _, batch in batches]
    assert first["num_tokens"] == sum(counts[:2]) and second["num_tokens"] == sum(counts)
    # 12 examples are 4 batches, so 2 steps an epoch; an evaluation comes before its step
    assert [r["epoch"] for r in rows if "loss" in r] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert [r["epoch"] for r in rows if "eval_loss" in r] == [0.0, 1.0, 2.0, 2.5]


def test_the_logged_loss_is_that_of_all_micro_batches(tmp_path):
    model = adapted()
    expected = torch.cat([sft_objective(model, sft_collate([i]))[0] for i in (2, 3, 4)]).mean()
    settings = Settings(learning_rate=0.01, batch_size=1, grad_accum=3)
    (row,) = run(tmp_path, model, settings, 1, iter([[2], [3], [4]]))
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-9)


def test_rewinding_keeps_other_stages_and_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": "pretrain", "step": 9}] + [{"stage": "sft", "step": i} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "sft", "st')
    Log(path, "sft", 10).rewind(2)
    assert rows_of(tmp_path) == lines[:3]
    Log(path, "dpo", 10).rewind(0)
    assert rows_of(tmp_path) == lines[:3]


# Going on after a kill.


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def evaluate_twice(model):
    """An evaluation that must not change what training does next."""
    return {"loss": float(pair_logps(model, PAIRS, [[0, 1], [2]], "cpu")[:3].mean())}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("killed_at", [1, 4, 5, 7])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, dropout, killed_at):
    # States are saved after steps 3 and 6: a kill at 1 starts over, at 4 and 5 goes on from 3.
    settings = Settings(
        learning_rate=0.01, batch_size=2, grad_accum=2, save_every=3, eval_every=4, seed=3
    )

    def collate(indices, calls=None):
        if calls is not None:
            calls.append(indices)
            if len(calls) > 2 * killed_at + 1:  # in the middle of an accumulation
                raise Killed
        return sft_collate(indices)

    whole = adapted(torch.float32, dropout)
    expected = run(tmp_path / "whole", whole, settings, 8, evaluate=evaluate_twice)
    model, calls = adapted(torch.float32, dropout), []
    with pytest.raises(Killed):
        run(
            tmp_path / "killed",
            model,
            settings,
            8,
            collate=lambda indices: collate(indices, calls),
            evaluate=evaluate_twice,
        )
    assert (tmp_path / "killed" / "sft.pt").exists() == (killed_at >= 3)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "step": 4, "lo')  # the kill came in the middle of a line
    model = adapted(torch.float32, dropout)  # a new process starts from the beginning
    resumed = run(tmp_path / "killed", model, settings, 8, evaluate=evaluate_twice)
    assert untimed(resumed) == untimed(expected)
    after = weights(whole)
    assert all(torch.equal(weight, after[name]) for name, weight in weights(model).items())


def test_dropout_is_drawn_anew_each_step(tmp_path):
    # So that the test above is about the random state: with dropout, equal batches differ.
    settings = Settings(learning_rate=0.0, batch_size=2)
    model = adapted(torch.float32, 0.3)
    fill_adapter(model, "sft")
    rows = run(tmp_path, model, settings, 2, iter([[0, 1], [0, 1]]))
    assert rows[0]["loss"] != rows[1]["loss"]


def test_an_evaluation_moves_neither_the_random_state_nor_the_mode(tmp_path):
    after = []
    for evaluate in (None, evaluate_twice):
        model = adapted(torch.float32, 0.3)
        settings = Settings(learning_rate=0.01, batch_size=3, eval_every=1)
        run(tmp_path / str(evaluate is None), model, settings, 4, evaluate=evaluate)
        after.append(weights(model))
        assert model.training
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
