"""Rewards on held-out pairs, KL, win rate, the bound of noisy votes, the table."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import fill_adapter, tiny_llama

from dpo_minimal import forum, reference
from dpo_minimal.batches import pair_batch
from dpo_minimal.data import EncodedPair, PreferencePair
from dpo_minimal.evaluate import evaluate_pairs, kl_estimate, one_epoch, preference_metrics
from dpo_minimal.extras import report
from dpo_minimal.extras.losses import LossSettings
from dpo_minimal.extras.report import (
    both_answers,
    compare,
    format_samples,
    format_summary,
    format_table,
    judge_answers,
    truth_on_votes,
    win_rate,
)
from dpo_minimal.generate import make_chooser, sample, sample_answers
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.reference import known_reference_logps, new_table, pair_logps, reference_logps

GOAT = "What is a baby goat called?"
RIGHT, WRONG = "A young goat is called a kid.", "A young goat is called a lamb."
OFF, POLITE = "The buses are late again.", f"Good question! {RIGHT}"  # scores 2, -1, -2, 3


def two_adapters(dropout=0.0, **changes):
    """A tiny Llama with a trained `sft` and a trained `dpo` on top, float32."""
    model = tiny_llama(torch.float32, **changes)
    add_adapter(model, "sft", r=2, targets="all", dropout=dropout)
    fill_adapter(model, "sft", seed=2)
    add_adapter(model, "dpo", r=2, targets="all", dropout=dropout)
    fill_adapter(model, "dpo", seed=3)
    return model


def some_pairs(n=9):
    """Encoded pairs of random ids and lengths."""
    rng = random.Random(0)

    def ids():
        return [rng.randrange(3, 32) for _ in range(rng.randint(1, 6))]

    return [EncodedPair([1, *ids()], [*ids(), 2], [*ids(), 2]) for _ in range(n)]


def log_prob(model, prompt, answer):
    """log pi(answer | prompt), token by token from the logits."""
    logits = model(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))


def test_log_probs_of_pairs_are_in_the_pairs_order_whatever_the_batches_are():
    model, pairs = two_adapters(), some_pairs()
    expected = [[log_prob(model, p.prompt, a) for a in (p.chosen, p.rejected)] for p in pairs]
    for order in ([[i] for i in range(9)], [[8, 0, 3], [1, 2], [7, 6, 5, 4]], one_epoch(pairs, 4)):
        logps = pair_logps(model, pairs, order, "cpu")
        assert logps.dtype == torch.float32 and not logps.requires_grad
        torch.testing.assert_close(logps, torch.tensor(expected), rtol=0, atol=1e-4)
    part = pair_logps(model, pairs, [[2, 5]], "cpu")
    assert part.isnan().any(dim=1).tolist() == [i not in (2, 5) for i in range(9)]


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_pass_has_no_dropout_and_leaves_mode_and_random_state(training):
    model, pairs = two_adapters(dropout=0.5).train(training), some_pairs()
    state = torch.get_rng_state()
    first, again = (pair_logps(model, pairs, [list(range(9))], "cpu") for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("training", [True, False])
def test_sampling_has_no_dropout_and_leaves_the_mode(tokenizer, training):
    model = two_adapters(dropout=0.5, vocab_size=420, max_position_embeddings=64).train(training)
    first, again = (
        sample_answers(model, tokenizer, ["Who?", "What?"], 12, temperature=0) for _ in range(2)
    )
    assert first == again
    assert {module.training for module in model.modules()} == {training}


def test_the_reference_is_the_model_with_its_last_adapter_switched_off():
    model, pairs = two_adapters(), some_pairs()
    batch = pair_batch(pairs, [4, 0, 7], "cpu")
    logps = reference_logps(model, batch)
    with active_adapters(model, ["sft"]):
        expected = [
            [log_prob(model, p.prompt, a) for a in (p.chosen, p.rejected)]
            for p in (pairs[i] for i in batch.indices)
        ]
    torch.testing.assert_close(logps, torch.tensor(expected), rtol=0, atol=1e-4)
    policy = pair_logps(model, pairs, [batch.indices], "cpu")[batch.indices]
    assert (logps - policy).abs().min() > 1e-3  # `dpo` acts again, and does something


def test_a_table_is_read_where_it_is_known_and_filled_where_not():
    model, pairs = two_adapters(), some_pairs()
    table = new_table(len(pairs))
    assert table.isnan().tolist() == [[True, True]] * 9 and table.dtype == torch.float32
    batch = pair_batch(pairs, [4, 0], "cpu")
    read = known_reference_logps(model, batch, table)
    assert torch.equal(read, reference_logps(model, batch))
    assert table.isnan().any(dim=1).tolist() == [i not in (0, 4) for i in range(9)]
    assert torch.equal(table[[4, 0]], read)
    table[[4, 0]] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # whatever it holds is taken
    assert known_reference_logps(model, batch, table).tolist() == [[1, 2], [3, 4]]


def test_an_epoch_holds_every_pair_once():
    pairs = some_pairs(10)
    assert sorted(i for batch in one_epoch(pairs, 4) for i in batch) == list(range(10))
    assert [len(batch) for batch in one_epoch(pairs, 10)] == [10]
    assert one_epoch(pairs, 1, seed=0) != one_epoch(pairs, 1, seed=1)


def test_metrics_of_pairs_by_hand():
    # log-ratios: chosen 1, 0; rejected -1, 2, so margins times beta 0.5 are 1 and -1
    reference = torch.tensor([[-10.0, -20.0], [-30.0, -40.0]])
    policy = reference + torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    lengths = torch.tensor([[3, 5], [2, 4]])  # which DPO does not look at
    metrics = preference_metrics(policy, reference, lengths, LossSettings(beta=0.5))
    softplus = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    expected = {"loss": sum(softplus) / 2, "rewards/chosen": 0.25, "rewards/rejected": 0.25}
    expected |= {"rewards/margins": 0, "rewards/accuracies": 0.5, "rewards/ties": 0}
    expected |= {"logps/chosen": (-9 - 30) / 2, "logps/rejected": (-21 - 38) / 2}
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_held_out_pairs_are_measured_against_a_reference_that_is_computed_once(monkeypatch):
    model, pairs = two_adapters(dropout=0.5).train(), some_pairs()
    log_pi = [[log_prob(model.eval(), p.prompt, a) for a in (p.chosen, p.rejected)] for p in pairs]
    with active_adapters(model, ["sft"]):
        log_ref = [[log_prob(model, p.prompt, a) for a in (p.chosen, p.rejected)] for p in pairs]
    model.train()
    h = torch.tensor(log_pi) - torch.tensor(log_ref)
    margins = 0.5 * (h[:, 0] - h[:, 1])
    flipped = torch.nn.functional.softplus(margins)  # -log sigmoid(-margin)
    losses = 0.9 * torch.nn.functional.softplus(-margins) + 0.1 * flipped
    computed, right = [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    table = new_table(len(pairs))
    arguments = dict(pairs=pairs, batches=one_epoch(pairs, 4), ref_table=table, device="cpu")
    arguments |= dict(settings=LossSettings(beta=0.5, label_smoothing=0.1))
    metrics = evaluate_pairs(model, **arguments)
    assert metrics["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())
    torch.testing.assert_close(table, torch.tensor(log_ref), rtol=0, atol=1e-4)
    assert sorted(computed) == list(range(9)) and model.training
    assert evaluate_pairs(model, **arguments) == metrics
    assert len(computed) == 9


# KL.


def exact_kl(model, prompt):
    """KL(policy || base + sft) of one next token, and the variance of its log-ratio."""
    log_pi = model(torch.tensor([prompt]))[0, -1].double().log_softmax(-1)
    with active_adapters(model, ["sft"]):
        log_ref = model(torch.tensor([prompt]))[0, -1].double().log_softmax(-1)
    ratio = log_pi - log_ref
    kl = (log_pi.exp() * ratio).sum().item()
    return kl, (log_pi.exp() * (ratio - kl) ** 2).sum().item()


@torch.no_grad()
def test_the_kl_estimate_finds_the_exact_kl_of_one_token():
    model, prompt, n = two_adapters(), [1, 7, 9], 4000
    kl, variance = exact_kl(model, prompt)
    answers = sample(model, [prompt] * n, 1, -1, make_chooser(seed=0))
    estimate = kl_estimate(model, ["sft"], [prompt] * n, answers, "cpu", batch_size=500)
    assert kl > 0.05  # so that zero is not within the bound
    assert abs(estimate - kl) < 5 * math.sqrt(variance / n) < kl / 2


@torch.no_grad()
def test_the_kl_estimate_is_the_mean_log_ratio_of_the_answers():
    model, pairs = two_adapters(), some_pairs(7)
    expected = [log_prob(model, p.prompt, p.chosen) for p in pairs]
    with active_adapters(model, ["sft"]):
        reference = [log_prob(model, p.prompt, p.chosen) for p in pairs]
    mean = sum(a - b for a, b in zip(expected, reference, strict=True)) / 7
    prompts, answers = [p.prompt for p in pairs], [p.chosen for p in pairs]
    estimate = kl_estimate(model, ["sft"], prompts, answers, "cpu", batch_size=3)
    assert estimate == pytest.approx(mean, abs=1e-4)
    with active_adapters(model, ["sft"]):  # the reference against itself
        assert kl_estimate(model, ["sft"], prompts, answers, "cpu") == 0


# The judge's numbers.


def test_a_win_counts_one_and_a_tie_half():
    theirs = [RIGHT] * 4
    assert win_rate([GOAT] * 4, [POLITE, RIGHT, WRONG, OFF], theirs) == (1 + 0.5 + 0 + 0) / 4
    assert win_rate([GOAT], [POLITE], [OFF]) == 1 and win_rate([GOAT], [OFF], [POLITE]) == 0
    assert win_rate([GOAT] * 2, theirs[:2], theirs[:2]) == 0.5


def test_scores_and_shares_by_hand():
    answers = [POLITE, RIGHT, f"{WRONG} Zork.", f"Good question! {OFF}"]
    assert judge_answers([GOAT] * 4, answers) == {
        "true_score": (3 + 2 - 1.25 - 1) / 4,
        "share_right": 0.5,
        "share_polite": 0.5,
        "share_garbled": 0.25,
    }


def test_what_the_truth_gets_on_noisy_votes_by_hand():
    # gaps 1, -4 (a vote against the truth) and 0
    pairs = [(POLITE, RIGHT), (OFF, RIGHT), (RIGHT, RIGHT)]
    found = truth_on_votes([PreferencePair(GOAT, *answers) for answers in pairs])
    win, upset = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(4))
    entropies = [p * math.log(1 / p) + (1 - p) * math.log(1 / (1 - p)) for p in (win, upset, 0.5)]
    assert found == pytest.approx(
        {
            "accuracy": (1 + 0 + 0.5) / 3,
            "loss": (-math.log(win) - math.log(upset) + math.log(2)) / 3,
            "expected_accuracy": (win + (1 - upset) + 0.5) / 3,
            "expected_loss": sum(entropies) / 3,
        },
        rel=1e-12,
    )


def test_what_the_truth_gets_is_near_what_it_expects_on_the_forums_own_votes():
    pairs = [
        PreferencePair(row["question"], row["response_j"], row["response_k"])
        for row in forum.make_forum(1)["rl"]
    ]
    found = truth_on_votes(pairs)
    # Five standard deviations: a vote's accuracy has at most 1/2, its loss at most about 1.
    assert abs(found["accuracy"] - found["expected_accuracy"]) < 2.5 / math.sqrt(len(pairs))
    assert abs(found["loss"] - found["expected_loss"]) < 5 / math.sqrt(len(pairs))


# What is printed and written.


def test_base_sft_and_dpo_are_asked_with_their_own_adapters(tokenizer):
    model = two_adapters(vocab_size=420, max_position_embeddings=64)
    questions = list(forum.QUESTIONS)[:10]
    usual = dict(device="cpu", max_new_tokens=4, seed=0, log=lambda text: None)
    table, greedy = compare(model, tokenizer, questions, judged=True, **usual)
    assert table.keys() == greedy.keys() == {"base", "SFT", "DPO"}
    assert len(greedy["base"]) == 8 and len({tuple(texts) for texts in greedy.values()}) == 3
    assert table["SFT"]["kl_to_sft"] == 0 != table["base"]["kl_to_sft"]
    # random models talk nonsense: neither right nor wrong, and at most 3 off for it
    scores = [row["true_score"] for row in table.values()]
    assert min(scores) >= -5 and max(scores) <= -1
    assert "win_rate_against_sft" in table["DPO"] and "win_rate_against_sft" not in table["SFT"]
    unjudged, _ = compare(model, tokenizer, ["Who?"], judged=False, **usual)
    assert unjudged["DPO"].keys() == {"kl_to_sft"}
    bare = tiny_llama(torch.float32, vocab_size=420, max_position_embeddings=64)  # --no-sft
    add_adapter(bare, "dpo", r=2)
    table, greedy = compare(bare, tokenizer, questions, judged=True, **usual)
    assert table.keys() == greedy.keys() == {"base", "DPO"}
    assert "true_score" in table["DPO"] and "win_rate_against_sft" not in table["DPO"]


@pytest.mark.parametrize("n", [3, 10, 60, 64, 70])  # below 8; greedy ones in a part of their own
def test_both_answers_are_those_of_passes_of_their_own(n):
    model, rng = two_adapters(max_position_embeddings=64), random.Random(n)
    prompts = [[rng.randrange(3, 32) for _ in range(rng.randint(1, 9))] for _ in range(n)]
    eos = sample(model, prompts[:64], 12, -1, make_chooser(seed=5))[0][5]  # one ends early
    answers, greedy, log_pi = both_answers(model, SimpleNamespace(eos_id=eos), prompts, 12, seed=5)
    draw, expected = make_chooser(seed=5), []
    for at in range(0, n, 64):
        expected += sample(model, prompts[at : at + 64], 12, eos, draw)
    assert answers == expected
    assert greedy == sample(model, prompts[:8], 12, eos, make_chooser(0))
    assert len(answers[0]) <= 6 and max(map(len, answers)) == 12
    expected = [log_prob(model, *example) for example in zip(prompts, answers, strict=True)]
    assert log_pi.tolist() == pytest.approx(expected, abs=1e-4)


def test_in_16_bits_sampling_gives_no_log_pi(tokenizer):
    model = two_adapters(vocab_size=420, max_position_embeddings=64).to(torch.bfloat16)
    *_, log_pi = both_answers(model, tokenizer, [[1, 2]], 3, seed=0)
    assert log_pi is None


@torch.no_grad()
def test_a_kl_with_known_log_pi_asks_only_the_reference(monkeypatch):
    model, pairs = two_adapters(), some_pairs(7)
    prompts, answers = [p.prompt for p in pairs], [p.chosen for p in pairs]
    log_pi = torch.tensor(
        [log_prob(model, *example) for example in zip(prompts, answers, strict=True)]
    )
    usual = dict(device="cpu", batch_size=3)
    expected = kl_estimate(model, ["sft"], prompts, answers, **usual)
    passes = []
    right = type(model).hidden
    monkeypatch.setattr(
        type(model), "hidden", lambda self, *args: passes.append(1) or right(self, *args)
    )
    found = kl_estimate(model, ["sft"], prompts, answers, known=log_pi, **usual)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(passes) == 3


class Asked(Exception):
    """Ends an evaluation when its questions are known."""


@pytest.mark.parametrize(("on_forum", "most"), [(True, 120), (False, 16)])
def test_a_question_of_several_held_out_pairs_is_asked_once(monkeypatch, tokenizer, on_forum, most):
    def stop(model, tokenizer, questions, **settings):
        raise Asked(questions)

    monkeypatch.setattr(report, "compare", stop)
    run = SimpleNamespace(on_forum=on_forum, device="cpu", args=SimpleNamespace(seed=0))
    model = two_adapters(vocab_size=420)
    held_out = [PreferencePair(f"q{i % 130}", f"yes {i}", "no") for i in range(390)]
    too_long = PreferencePair("q" * model.config.max_position_embeddings, "yes", "no")
    for pairs, expected in (
        (held_out, [f"q{i}" for i in range(most)]),
        ([held_out[i] for i in (7, 3, 133, 137, 2)], ["q7", "q3", "q2"]),
        ([too_long, held_out[5]], ["q5"]),
    ):
        with pytest.raises(Asked) as caught:
            report.ask_held_out(run, model, tokenizer, pairs)
        assert caught.value.args[0] == expected


def test_the_table_has_one_row_per_model_and_a_dash_for_what_is_unknown():
    table = {"SFT": {"true_score": -0.5, "kl_to_sft": 0.0}}
    table["DPO"] = {"true_score": 1.25, "kl_to_sft": 3.0, "win_rate_against_sft": 0.75}
    assert format_table(table).splitlines() == [
        "| model | true score | wins against SFT | KL to SFT |",
        "|---|---|---|---|",
        "| SFT | -0.50 | - | 0.00 |",
        "| DPO | +1.25 | 75% | 3.00 |",
    ]


def test_samples_and_summary_show_questions_with_every_answer():
    greedy = {"SFT": ["s1", "s2", "s3", "s4"], "DPO": ["d1", "d2", "d3", "d4"]}
    text = format_samples(["q1", "q2", "q3", "q4", "q5"], greedy)
    assert text.startswith("### q1\n\n- **SFT**: s1\n- **DPO**: d1\n")
    assert "q4" in text and "q5" not in text
    held_out = {"eval_rewards/accuracies": 0.8125, "eval_rewards/margins": 1.5, "eval_loss": 0.5}
    held_out |= {"of": 54, "pairs": "new.jsonl"}
    truth = {"accuracy": 0.9, "loss": 0.25}
    summary = format_summary({"SFT": {"kl_to_sft": 0.0}}, held_out, truth, ["q1"] * 5, greedy)
    assert "0.812" in summary and "+1.500" in summary
    assert "true scores themselves get accuracy 0.900, loss 0.2500" in summary
    assert summary.count("### ") == 3 and "(54 of new.jsonl)" in summary


def test_an_endless_answer_does_not_scroll_the_summary_away():
    greedy = {"base": ["A:\n" * 30, "b" * 5000, "short\nof three\nlines\n"]}
    held_out = {"eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0, "eval_loss": 0.7}
    held_out |= {"of": 54, "pairs": "new.jsonl"}
    summary = format_summary({"base": {"kl_to_sft": 0.0}}, held_out, None, ["q"] * 3, greedy)
    assert summary.count("A:") == 4 and summary.count("b" * 400) == 1 and len(summary) < 1000
    assert summary.count("[...]") == 2 and "of three\n  lines" in summary
    assert "b" * 5000 in format_samples(["q"] * 3, greedy)  # the file has all of it


def test_a_question_that_leaves_no_room_for_the_answer_is_told(tokenizer):
    prompt = tokenizer.encode("Question: Who?\n\nAnswer:", bos=True)
    model = two_adapters(vocab_size=420, max_position_embeddings=len(prompt) + 4)
    usual = dict(device="cpu", seed=0, judged=False)
    for new_tokens, is_told in ((4, False), (5, True)):
        told = []
        compare(model, tokenizer, ["Who?"], max_new_tokens=new_tokens, log=told.append, **usual)
        assert any(f"has {len(prompt)} tokens" in line for line in told) == is_told
