"""The training loop: schedule, accumulation, clipping, the log, and going on after a kill."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import fill_adapter, quantize_model, random_tokens, tiny_llama

from dpo_minimal import InputError, reference
from dpo_minimal.batches import Order, packed_batch, pair_batch
from dpo_minimal.data import EncodedPair
from dpo_minimal.log import Log, rewind
from dpo_minimal.loop import (
    Settings,
    Stage,
    count_steps,
    learning_rate,
    load_state,
    save_state,
    train,
)
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics, token_logps
from dpo_minimal.reference import known_reference_logps, new_table, pair_logps

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
    """One example per row."""
    return packed_batch(EXAMPLES, [[i] for i in indices], "cpu")


def by_length(seed=0):
    """The order of the examples' indices: sorted by length within an epoch."""
    return Order(lambda w: sorted(w, key=LENGTHS.__getitem__), len(LENGTHS), 99, seed)


class Fixed:
    """Stands for an Order: these batches, and then again, for ever."""

    def __init__(self, batches):
        self.epoch = batches

    def num_batches(self, batch_size):
        return len(self.epoch)

    def batches(self, batch_size, place=(0, 0)):
        for n in itertools.count(place[1]):
            yield self.epoch[n % len(self.epoch)], (0, n + 1)


def adapted(dtype=torch.float64, dropout=0.0, seed=5):
    """A tiny 4-bit base with a fresh trainable adapter."""
    model = quantize_model(tiny_llama(dtype))
    torch.manual_seed(seed)
    add_adapter(model, "sft", r=2, alpha=4, dropout=dropout, targets="all")
    return model.to(dtype)


def weights(model):
    """Copies of the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(folder, model, settings, steps=None, resume=False, **stage):
    """Train in a folder, on SFT unless told otherwise; returns the rows of its metrics.jsonl.

    steps: if given, as many, however many epochs that takes. stage: fields of `Stage`.
    """
    folder.mkdir(exist_ok=True)
    if steps:
        settings = replace(settings, epochs=99.0, max_steps=steps)
    usual = dict(name="sft", objective=sft_objective, order=by_length(), collate=sft_collate)
    train(model, Stage(**usual | stage), settings, folder, resume)
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
    assert min(row["grad_norm"] for row in rows) > 5  # the log has the norm before clipping


def test_a_small_gradient_is_not_clipped_and_is_the_mean_over_scored_tokens(tmp_path, recorder):
    model, other = adapted(), adapted()
    settings = Settings(learning_rate=0.0, batch_size=3, max_grad_norm=1e9)
    (row,) = run(tmp_path, model, settings, steps=1, order=Fixed([[0, 4, 7]]))
    losses = torch.cat([sft_objective(other, sft_collate([i]))[0] for i in (0, 4, 7)])
    losses.mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in other.parameters() if p.requires_grad))
    assert recorder.seen[0][1] == pytest.approx(norm, rel=1e-9)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-9)


@pytest.mark.parametrize(("given", "decay"), [({}, 0.05), ({"weight_decay": 0.25}, 0.25)])
def test_with_a_zero_gradient_a_step_shrinks_the_weights_by_rate_times_decay(
    tmp_path, given, decay
):
    def flat(model, batch):
        return 0 * sft_objective(model, batch)[0], {}

    model = adapted()
    fill_adapter(model, "sft")
    before = weights(model)
    settings = Settings(learning_rate=0.5, batch_size=3, warmup_steps=0, **given)
    run(tmp_path, model, settings, steps=1, objective=flat)
    assert min(weight.abs().max() for weight in before.values()) > 0.01
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name] * (1 - 0.5 * decay), rtol=1e-14, atol=0)


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
        order = Fixed([numbers[i : i + size] for i in range(0, 12, size)])
        settings = Settings(learning_rate=0.01, batch_size=size, grad_accum=accum)
        rows = untimed(run(tmp_path / f"{size}", model, settings, 3, order=order, **more))
        unmoved = [n for n, weight in weights(model).items() if torch.equal(weight, before[n])]
        assert unmoved == []
        results.append((rows, weights(model)))
    for rows, after in results[1:]:
        for row, expected in zip(rows, results[0][0], strict=True):
            row, expected = row | {"stage": 0}, expected | {"stage": 0}  # numbers only
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-6)
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
    order = Fixed([ALL_PAIRS])
    rows = run(tmp_path, model, settings, 3, order=order, objective=objective, collate=collate)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["rewards/margins"] > 0.01  # stuck at ln 2 if the adapter were frozen
    assert rows[1]["loss"] < math.log(2) - 0.01
    assert [n for n, t in frozen.items() if not torch.equal(model.state_dict()[n], t)] == []
    with active_adapters(model, ["sft"]):
        assert torch.equal(pair_logps(model, PAIRS, [ALL_PAIRS], "cpu"), before)


def test_in_a_bfloat16_model_nearly_all_adapter_entries_move_at_1e_6(tmp_path):
    model = adapted(torch.float32).to(torch.bfloat16)
    fill_adapter(model, "sft")
    before = weights(model)
    settings = Settings(learning_rate=1e-6, batch_size=12, warmup_steps=0, weight_decay=0.0)
    run(tmp_path, model, settings, 1, order=Fixed([list(range(12))]))
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
    assert calls == [0, 3, 6, 8] and {row["stage"] for row in rows} == {"sft"}
    evaluation, first, second = rows[0], rows[1], rows[2]
    assert evaluation["eval_rewards/margins"] == 0.25 and "loss" not in evaluation
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch"} < first.keys()
    assert first["tokens_per_second"] > 0 and 0.01 < first["peak_memory_gb"] < 100
    # Two batches of three examples per step. Tokens count the BOS; pads do not count.
    batches = list(zip(range(4), by_length().batches(3), strict=False))
    counts = [sum(LENGTHS[i] + 1 for i in batch) for _, (batch, _) in batches]
    assert first["num_tokens"] == sum(counts[:2]) and second["num_tokens"] == sum(counts)
    # 12 examples are 4 batches, so 2 steps per epoch; an evaluation comes before its step.
    assert [r["epoch"] for r in rows if "loss" in r] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert [r["epoch"] for r in rows if "eval_loss" in r] == [0.0, 1.0, 2.0, 2.5]


def test_the_screen_tells_what_warns_of_leakage(tmp_path, capsys):
    values = {"chosen": -1.25, "margins": 0.5, "accuracies": 0.75}
    rewards = {f"rewards/{name}": value for name, value in values.items()}
    Log(tmp_path / "metrics.jsonl", "dpo", 0, 10).write(
        0, loss=0.5, tokens_per_second=7.0, **rewards
    )
    line = "loss 0.500000 chosen -1.250 margins +0.500 accuracies 0.75"
    assert line in capsys.readouterr().out


def test_the_logged_loss_is_that_of_all_micro_batches(tmp_path):
    model = adapted()
    expected = torch.cat([sft_objective(model, sft_collate([i]))[0] for i in (2, 3, 4)]).mean()
    settings = Settings(learning_rate=0.01, batch_size=1, grad_accum=3)
    (row,) = run(tmp_path, model, settings, 1, order=Fixed([[2], [3], [4]]))
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 4), ({"epochs": 2.5, "grad_accum": 2}, 5), ({"max_steps": 3}, 3)]
)
def test_a_stage_takes_the_steps_of_its_epochs(tmp_path, changes, steps):
    # 12 examples in batches of 3: 4 batches per epoch.
    rows = run(tmp_path, adapted(), Settings(learning_rate=0.01, batch_size=3, **changes))
    assert [row["step"] for row in rows] == list(range(steps))
    seen = steps * 3 * changes.get("grad_accum", 1)
    assert rows[-1]["epoch"] == pytest.approx(seen / 12)


def test_rewinding_keeps_other_stages_and_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": "pretrain", "step": 9}] + [{"stage": "sft", "step": i} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "sft", "st')
    rewind(path, "sft", 2)
    assert rows_of(tmp_path) == lines[:3]
    rewind(path, "dpo", 0)
    assert rows_of(tmp_path) == lines[:3]
    rewind(path, "sft", 0)
    assert rows_of(tmp_path) == lines[:1]


# Going on after a kill.


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def dying_after(n, collate=sft_collate):
    """A collate that is killed when it should make its batch n + 1."""
    calls = []

    def collate_or_die(rows):
        calls.append(rows)
        if len(calls) > n:
            raise Killed
        return collate(rows)

    return collate_or_die


def assert_same_weights(model, expected):
    """Equal trainable parameters, bit for bit."""
    expected = weights(expected)
    different = [n for n, weight in weights(model).items() if not torch.equal(weight, expected[n])]
    assert different == []


def evaluate_twice(model):
    """An evaluation that must not change what training does next."""
    return {"loss": float(pair_logps(model, PAIRS, [[0, 1], [2]], "cpu")[:3].mean())}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("killed_at", [1, 4, 5, 7])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, dropout, killed_at):
    # States are saved after steps 3 and 6: a kill at 1 starts over, at 4 and 5 goes on from 3.
    settings = Settings(learning_rate=0.01, batch_size=2, grad_accum=2, save_every=3, eval_every=4)
    stage = dict(order=by_length(seed=3), evaluate=evaluate_twice)
    whole = adapted(torch.float32, dropout)
    expected = run(tmp_path / "whole", whole, settings, 8, **stage)
    model, killed = adapted(torch.float32, dropout), tmp_path / "killed"
    with pytest.raises(Killed):  # in the middle of an accumulation
        run(killed, model, settings, 8, **stage, collate=dying_after(2 * killed_at + 1))
    assert (killed / "state" / "sft.pt").exists() == (killed_at >= 3)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "step": 4, "lo')  # the kill came in the middle of a line
    model = adapted(torch.float32, dropout)  # a new process starts from the beginning
    resumed = run(killed, model, settings, 8, resume=True, **stage)
    assert untimed(resumed) == untimed(expected)
    assert_same_weights(model, whole)


def test_without_resume_the_state_of_an_earlier_run_is_not_used(tmp_path):
    # The earlier run had another rate, so a step of it would show in everything after.
    settings = Settings(learning_rate=0.01, batch_size=2, save_every=3)
    whole = adapted(torch.float32, 0.3)
    expected = run(tmp_path / "whole", whole, settings, 8)
    again, other = tmp_path / "again", replace(settings, learning_rate=0.02)
    with pytest.raises(Killed):
        run(again, adapted(torch.float32, 0.3), other, 8, collate=dying_after(4))
    assert (again / "state" / "sft.pt").exists()
    model = adapted(torch.float32, 0.3)
    assert untimed(run(again, model, settings, 8)) == untimed(expected)
    assert_same_weights(model, whole)
    # Nor is it left for a later resume: a run that dies before its first state starts over.
    with pytest.raises(Killed):
        run(again, adapted(torch.float32, 0.3), settings, 8, collate=dying_after(1))
    assert not (again / "state" / "sft.pt").exists()


def table_setup():
    """(model, objective, table): DPO with the reference in a table, at its beginning."""
    model = adapted(torch.float32)
    fill_adapter(model, "sft")
    add_adapter(model, "dpo", r=2, targets="q_proj,v_proj")
    table = new_table(len(PAIRS))

    def objective(model, batch):
        ref_chosen, ref_rejected = known_reference_logps(model, batch, table).T
        losses, *_ = dpo_loss(*preference_logps(model, batch), ref_chosen, ref_rejected, beta=0.5)
        return losses, {}

    return model, objective, table


def test_a_resumed_run_computes_only_what_the_table_in_its_state_lacks(tmp_path, monkeypatch):
    computed, right = [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    # 6 pairs in batches of 1: an epoch is 6 steps. The state of step 4 knows pairs 3, 1, 4 and 0.
    order = Fixed([[3], [1], [4], [0], [5], [2]])
    settings = Settings(learning_rate=0.01, batch_size=1, save_every=4)
    pairs, results = lambda indices: pair_batch(PAIRS, indices, "cpu"), []
    for die in (False, True):
        model, objective, table = table_setup()
        stage = dict(order=order, objective=objective, collate=pairs, tables={"training": table})
        folder = tmp_path / f"{die}"
        if die:
            with pytest.raises(Killed):
                run(folder, model, settings, 9, **stage | {"collate": dying_after(5, pairs)})
            assert computed == [3, 1, 4, 0, 5]
            computed.clear()
            model, objective, table = table_setup()
            stage |= dict(objective=objective, tables={"training": table})
        rows = run(folder, model, settings, 9, resume=die, **stage)
        assert computed == ([5, 2] if die else [3, 1, 4, 0, 5, 2])  # nothing in the second epoch
        computed.clear()
        results.append((untimed(rows), table.tolist(), model))
    assert results[1][:2] == results[0][:2]
    assert_same_weights(results[1][2], results[0][2])


def test_a_state_with_tables_of_another_size_is_refused(tmp_path):
    model = adapted(torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    path = tmp_path / "state" / "dpo.pt"
    saved = {"training": new_table(10), "held-out": torch.ones(4, 2)}
    save_state(path, model, optimizer, saved, reached=(3, 100, (0, 3)))
    other = {"training": new_table(10), "held-out": new_table(5)}
    with pytest.raises(InputError) as caught:
        load_state(path, model, optimizer, other)
    said = "5 held-out pairs, and the interrupted run had 4: resume with the same data"
    assert str(caught.value) == f"{path}: {said}"
    same = {"training": new_table(10), "held-out": new_table(4)}
    assert tuple(load_state(path, model, optimizer, same)) == (3, 100, (0, 3))
    assert same["held-out"].tolist() == [[1, 1]] * 4
    assert same["training"].isnan().tolist() == [[True, True]] * 10


def test_dropout_is_drawn_anew_each_step(tmp_path):
    # So that the test above is about the random state: with dropout, equal batches differ.
    settings = Settings(learning_rate=0.0, batch_size=2)
    model = adapted(torch.float32, 0.3)
    fill_adapter(model, "sft")
    rows = run(tmp_path, model, settings, 2, order=Fixed([[0, 1]]))
    assert rows[0]["loss"] != rows[1]["loss"]


def test_an_evaluation_moves_neither_the_random_state_nor_the_mode(tmp_path):
    after = []
    for evaluate in (None, evaluate_twice):
        model = adapted(torch.float32, 0.3)
        settings = Settings(learning_rate=0.01, batch_size=3, eval_every=1)
        run(tmp_path / str(evaluate is None), model, settings, 4, evaluate=evaluate)
        after.append(model)
        assert model.training
    assert_same_weights(*after)
