"""Sampling: greedy, cached, batched, top-p, the end of an answer, seeds, the command line."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fill_adapter, quantize_model, random_tokens, tiny_llama

from dpo_minimal.checkpoint import load_llama, save_adapter
from dpo_minimal.data import format_prompt
from dpo_minimal.extras.cache import Cache
from dpo_minimal.extras.sampling import ready_to_sample
from dpo_minimal.generate import choose, generate, make_chooser, sample, sample_answers
from dpo_minimal.lora import add_adapter
from dpo_minimal.nf4 import NF4Linear

NEVER = -1  # an EOS that no model gives
ROWS = [random_tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6)]


def greedy_without_cache(model, row, n, eos=NEVER):
    """The likeliest continuation, by a forward pass over everything for each token."""
    answer = []
    while len(answer) < n and eos not in answer:
        answer.append(int(model(torch.tensor([row + answer]))[0, -1].argmax()))
    return answer


def greedy(model, rows, n, eos=NEVER):
    """`sample` at temperature 0."""
    return sample(model, rows, n, eos, make_chooser(0))


def test_greedy_with_a_cache_equals_the_argmax_of_full_forward_passes():
    for seed in range(3):
        model = tiny_llama(torch.float32, seed=seed)
        expected = [greedy_without_cache(model, row, 12) for row in ROWS]
        assert greedy(model, ROWS, 12) == expected
        assert len({tuple(e) for e in expected}) > 1  # rows matter
        assert [greedy(model, [row], 12)[0] for row in ROWS] == expected


def test_cached_log_probs_of_a_batch_of_unequal_rows_equal_those_of_each_row():
    # Sharper than the tokens: every logit that the sampler sees, against full forward passes.
    seen = []

    def chooser(logits):
        seen.append(logits)
        return logits.argmax(dim=-1)

    model = tiny_llama(torch.float32)
    answers = sample(model, ROWS, 8, NEVER, chooser)
    for i, row in enumerate(ROWS):
        full = model(torch.tensor([row + answers[i]]))[0]
        for step in range(8):
            expected = full[len(row) - 1 + step]
            torch.testing.assert_close(seen[step][i], expected, rtol=0, atol=1e-5)


def test_an_answer_ends_with_its_eos_and_the_others_go_on():
    model = tiny_llama(torch.float32)
    free = greedy(model, ROWS, 12)
    eos = next(t for t in free[0][2:] if t not in free[0][:2])  # row 0 gives it in the middle
    stopped = greedy(model, ROWS, 12, eos)
    for answer, whole in zip(stopped, free, strict=True):
        expected = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert answer == expected
    assert len(stopped[0]) < 12 and stopped[0][-1] == eos
    assert max(map(len, stopped)) == 12


def test_no_more_tokens_than_asked_for_and_than_the_model_has_positions():
    model = tiny_llama(torch.float32, max_position_embeddings=10)
    assert [len(a) for a in greedy(model, [ROWS[0]], 5)] == [5]
    assert [len(a) for a in greedy(model, [ROWS[0]], 50)] == [7]
    assert greedy(model, [ROWS[0]], 0) == [[]]
    # Each row has its own room, whatever its neighbours have: 10 - 3, none, 10 - 1, 10 - 6.
    rows = [ROWS[0], [1] * 12, ROWS[2], ROWS[3]]
    together = greedy(model, rows, 8)
    assert [len(a) for a in together] == [7, 0, 8, 4]
    alone = [greedy(model, [row], 8)[0] for row in rows]
    assert together == alone
    assert greedy(model, [[1] * 11], 5) == [[]]


def probabilities(top_p, p, temperature=1.0, n=20_000):
    """How often `choose` takes each token, whose probabilities are p at temperature 1."""
    logits = torch.tensor(p).log().expand(n, -1).clone()
    generator = torch.Generator().manual_seed(0)
    ids = choose(logits, temperature, top_p, generator)
    return [(ids == i).float().mean().item() for i in range(len(p))]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0.1, 0.5, 0.15, 0.25]),
        (0.95, [0.1, 0.5, 0.15, 0.25]),  # 0.5 + 0.25 + 0.15 = 0.9 does not reach it
        (0.85, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (0.7, [0, 2 / 3, 0, 1 / 3]),
        (0.45, [0, 1, 0, 0]),
        (0.01, [0, 1, 0, 0]),  # the likeliest token always stays
    ],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p, expected):
    shares = probabilities(top_p, [0.1, 0.5, 0.15, 0.25])
    for share, p in zip(shares, expected, strict=True):
        # five standard deviations, and never a token that was left out
        assert abs(share - p) <= 5 * (p * (1 - p) / 20_000) ** 0.5


def test_temperature_divides_the_logits():
    # At temperature 1/2 probabilities are squared: 0.2, 0.8 become 1/17, 16/17.
    shares = probabilities(1.0, [0.2, 0.8], temperature=0.5)
    assert abs(shares[0] - 1 / 17) < 5 * (16 / 17**2 / 20_000) ** 0.5


def test_a_chooser_has_the_settings_that_it_is_made_with():
    logits = torch.tensor([0.3, 0.6, 0.1]).log().expand(300, -1)
    assert set(make_chooser(seed=0)(logits).tolist()) == {0, 1, 2}
    assert set(make_chooser(top_p=0.8, seed=0)(logits).tolist()) == {0, 1}
    cold = make_chooser(temperature=0.01, seed=0)  # 2^-100 for the next
    assert set(cold(logits).tolist()) == {1}
    first = make_chooser(seed=7)(logits)
    assert torch.equal(first, make_chooser(seed=7)(logits))
    assert not torch.equal(first, make_chooser(seed=8)(logits))


def test_samples_follow_the_model_and_come_again_with_the_same_seed(tokenizer, model_folder):
    model = load_llama(model_folder, quantize=None)
    prompts = ["What is it?", "Why?"] * 40  # more than one batch

    def ids(seed, temperature=1.0):
        return sample_answers(model, tokenizer, prompts, 6, temperature, seed=seed)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = ids(1)
    torch.testing.assert_close(torch.get_rng_state(), state)  # training's is not touched
    assert ids(1) == first and ids(2) != first and len(first) == 80
    assert ids(None) != ids(None)
    assert len({tuple(answer) for answer in first[::2]}) > 30  # equal prompts, different samples
    assert ids(1, 0) == ids(2, 0)


def test_generate_is_the_decoded_answer_to_the_template(tokenizer, model_folder):
    model = load_llama(model_folder, quantize=None)
    row = tokenizer.encode(format_prompt("What is it?"), bos=True)
    expected = greedy_without_cache(model, row, 10, tokenizer.eos_id)
    assert generate(model, tokenizer, "What is it?", 10, temperature=0) == (
        tokenizer.decode(expected).strip()
    )


def test_dropout_is_off_while_sampling_and_the_mode_is_kept(tokenizer):
    model = quantize_model(tiny_llama(torch.float32, vocab_size=420))
    add_adapter(model, "sft", r=2, dropout=0.5, targets="all")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.fill_(0.1)
    for training in (True, False):
        model.train(training)
        one, two = (generate(model, tokenizer, "Why?", 12, temperature=0) for _ in range(2))
        assert one == two and model.training == training


def ask(*flags, stdin=None):
    """Run the command line; returns the finished process."""
    command = [sys.executable, "-m", "dpo_minimal.generate", *map(str, flags)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, input=stdin, capture_output=True, text=True)


def test_the_command_line_answers_a_prompt(tokenizer, model_folder):
    done = ask("--model", model_folder, "--prompt", "What is it?", "--max-new-tokens", 10)
    model = load_llama(model_folder, quantize=None)
    expected = generate(model, tokenizer, "What is it?", 10, temperature=0)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_the_command_line_with_an_adapter_answers_on_the_4_bit_base(
    tmp_path, tokenizer, model_folder
):
    model = load_llama(model_folder, quantize="nf4")
    torch.manual_seed(1)
    add_adapter(model, "sft", r=2, targets="all")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    save_adapter(model, ["sft"], tmp_path / "sft")
    flags = ["--model", model_folder, "--adapter", tmp_path / "sft", "--max-new-tokens", 10]
    done = ask(*flags, stdin="What is it?\nWhy?\n\n")  # a conversation, ended by an empty line
    answers = [generate(model, tokenizer, q, 10, temperature=0) for q in ("What is it?", "Why?")]
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == (
        f"Ask a question; an empty line or Ctrl-D ends.\n> {answers[0]}\n> {answers[1]}\n> "
    )
    assert answers[0] != answers[1]
    plain = load_llama(model_folder, quantize="nf4")
    assert generate(plain, tokenizer, "Why?", 10, temperature=0) != answers[1]


def test_the_command_line_refuses_what_is_not_there_in_one_line(tmp_path):
    done = ask("--model", tmp_path / "nothing", "--prompt", "What?")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- what makes it fast changes nothing ----------------------------------------------------------


def test_a_cache_returns_all_that_it_was_given_in_order():
    cache, given = Cache(), torch.randn(2, 3, 2, 250, 4)  # k and v, [B, G, S, K] each
    at = 0
    for size in (70, 1, 1, 60, 1, 117):  # it grows twice
        k, v = cache.extend(*given[:, :, :, at : at + size])
        at += size
        assert torch.equal(k, given[0, :, :, :at]) and torch.equal(v, given[1, :, :, :at])
    cache.keep([2, 0])
    k, _ = cache.extend(*torch.zeros(2, 2, 2, 1, 4))
    assert torch.equal(k[:, :, :250], given[0, [2, 0]]) and not k[:, :, 250:].any()


def test_a_rows_sampled_tokens_do_not_depend_on_when_another_row_ends():
    model = tiny_llama(torch.float32)

    def sampled(eos):
        return sample(model, ROWS, 20, eos, make_chooser(seed=1))

    free = sampled(NEVER)
    eos = free[1][4]
    assert eos not in free[3], "choose another seed: row 3 was to go on"
    stopped = sampled(eos)
    assert [len(answer) for answer in stopped].count(20) < len(ROWS)
    for answer, whole in zip(stopped, free, strict=True):
        assert answer == whole[: len(answer)]


def quantized_llama():
    """A tiny NF4 Llama with an adapter that does something."""
    model = quantize_model(tiny_llama(torch.float32))
    add_adapter(model, "sft")
    fill_adapter(model, "sft")
    return model


# 2 to 128 are multiplied the other way round, 13 with three more rows of zeros.
@pytest.mark.parametrize("rows", [1, 2, 13, 128, 129])
def test_unpacked_weights_give_the_same_results_and_are_packed_again(rows):
    model = quantized_llama()
    kinds = [type(m) for m in model.modules()]
    tokens = random_tokens(rows, 1)
    with torch.no_grad():
        expected = model(tokens)
        with pytest.raises(KeyError), ready_to_sample(model):
            assert not any(isinstance(m, NF4Linear) for m in model.modules())
            if rows in (1, 129):
                assert torch.equal(model(tokens), expected)
            # Sums of 24 products of float32 numbers, in two blocks of four layers.
            assert torch.allclose(model(tokens), expected, rtol=1e-5, atol=1e-6)
            raise KeyError("something goes wrong in between")
    assert [type(m) for m in model.modules()] == kinds
    assert NF4Linear in kinds


def test_compiled_blocks_run_as_they_are_written_while_sampling():
    model = quantized_llama()
    calls = [lambda x: x, None]
    for block, call in zip(model.model.layers, calls, strict=True):
        block._compiled_call_impl = call  # where `block.compile()` puts it
    with pytest.raises(KeyError), ready_to_sample(model):
        assert [block._compiled_call_impl for block in model.model.layers] == [None, None]
        raise KeyError("something goes wrong in between")
    assert [block._compiled_call_impl for block in model.model.layers] == calls


@pytest.mark.parametrize(("free", "packed"), [(None, 14), (0, 14), (2 * 4 * (24 * 16 + 20), 13)])
def test_weights_are_unpacked_into_half_of_the_free_memory_at_most(monkeypatch, free, packed):
    now = None if free is None else (0, free)
    monkeypatch.setattr("dpo_minimal.extras.sampling.memory_now", lambda device: now)
    model = quantized_llama()
    with ready_to_sample(model):
        assert sum(isinstance(m, NF4Linear) for m in model.modules()) == packed


def test_each_weight_is_dequantized_once_for_all_tokens(monkeypatch):
    from dpo_minimal import nf4

    calls = []
    right = nf4.dequantize_nf4
    monkeypatch.setattr(nf4, "dequantize_nf4", lambda q: calls.append(1) or right(q))
    model = quantized_llama()
    with ready_to_sample(model):
        greedy(model, ROWS, 6)
    assert len(calls) == 14
    greedy(model, ROWS, 6)
    assert len(calls) == 14 + 6 * 14


def test_an_answer_appears_as_its_tokens_come_and_never_half_a_character(monkeypatch, capsys):
    from dpo_minimal.extras import ask

    pieces = [b" H", b"\xc3", b"\xa9", b" ", b" \xe3", b"\x81", b"\x8a", b"\n"]  # é and お in bytes
    expected_after = ["H", "H", "Hé", "Hé", "Hé", "Hé", "Hé  お", "Hé  お"]
    screen = []

    def steps(model, rows, *rest, **named):
        answer = []
        for piece in pieces:
            answer.append(piece)
            yield [answer]
            screen.append(capsys.readouterr().out)  # what the last token brought

    class Bytes:
        eos_id = NEVER

        def decode(self, ids):
            return b"".join(ids).decode("utf-8", "replace")

    monkeypatch.setattr(ask, "sample_steps", steps)
    monkeypatch.setattr(ask, "check_room", lambda *rest: [1])
    args = SimpleNamespace(max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0)
    assert ask.print_answer(args, tiny_llama(), Bytes(), ()) == "Hé  お"
    assert list(itertools.accumulate(screen)) == expected_after
    assert capsys.readouterr().out == "\n"
