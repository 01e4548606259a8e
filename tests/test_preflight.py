"""What a run says before each stage: its steps, tokens, weights and memory, and its warnings."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama
from test_train import command, preference_rows, write_rows

from dpo_minimal import InputError
from dpo_minimal.batches import pack, packed_order, pair_order
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import machine, memory, preflight
from dpo_minimal.extras.progress import duration
from dpo_minimal.loop import Settings, Stage
from dpo_minimal.lora import add_adapter

ARGS = SimpleNamespace(
    max_length=20,
    lora_r=2,
    lora_dropout=0.0,
    target_modules="q_proj,v_proj",
    gradient_checkpointing=False,
    no_quantize=True,
    resume=False,
)
RUN = SimpleNamespace(args=ARGS, device="cpu", dtype=torch.float32)
PAIRS = [EncodedPair([1, 2, 3], [4, 5], [6, 7, 8, 9])] * 40  # prompt 3, chosen 2, rejected 4


def plan(name, examples, settings, order):
    """The lines that are told of a stage, and the model."""
    model, said = tiny_llama(torch.float32), []
    add_adapter(model, "dpo", r=2)
    stage = Stage(name, None, order, None)
    preflight.tell_plan(RUN, model, stage, examples, settings, said.append)
    return said, model


def test_the_plan_of_dpo_is_what_a_hand_counts():
    settings = Settings(learning_rate=1, batch_size=4, grad_accum=2, epochs=2)
    said, model = plan("dpo", PAIRS, settings, pair_order(PAIRS, 4, 0))
    assert said[0] == "dpo       40 pairs"
    # 40 pairs, 8 per step, twice; each pair counts 2 * 3 + 2 + 4 = 12 tokens
    assert said[1].strip() == "10 steps of 4 x 2 pairs: 2 epochs, about 960 tokens"
    # two layers; q 16 -> 24, v 16 -> 12: rank 2 times both ends of each
    assert (
        said[2].strip().startswith(f"trains {2 * 2 * (16 + 24 + 16 + 12)} weights; the model has")
    )
    assert len(said) == 4


def test_examples_are_looked_at_from_everywhere(monkeypatch):
    monkeypatch.setattr(preflight, "SAMPLE", 10)
    some = preflight.some_of([*range(99), None])
    assert 10 <= len(some) <= 20 and max(some) >= 90 and None not in some
    assert preflight.some_of([1, None, 2]) == [1, 2]
    with pytest.raises(InputError, match="all 3 examples looked at are longer than --max-length"):
        preflight.some_of([None] * 3)


def test_the_plan_of_sft_counts_packed_rows():
    texts = [([1, 2, 3], [4, 5])] * 40  # 5 tokens each, so 4 to a row of 20
    assert len(pack([5] * 40, 20)) == 10
    settings = Settings(learning_rate=1, batch_size=2, max_steps=3)
    said, _ = plan("sft", texts, settings, packed_order(texts, 20, 40, 0))
    assert said[0] == "sft       40 texts in 10 rows of up to 20 tokens"
    assert said[1].strip() == "3 steps of 2 rows: 0.6 epochs, about 120 tokens"


def test_too_few_examples_and_steps_larger_than_the_data_are_warned_of():
    few, settings = PAIRS[:1], Settings(learning_rate=1, batch_size=1)
    said, _ = plan("dpo", few, settings, pair_order(few, 1, 0))
    assert said[-1] == "warning   1 pairs are too few to learn much from"
    settings = Settings(learning_rate=1, batch_size=8, grad_accum=6)
    said, _ = plan("dpo", PAIRS, settings, pair_order(PAIRS, 8, 0))
    assert said[-1].startswith("warning   a step takes more pairs than there are")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_memory_is_what_is_held_and_what_a_step_adds(monkeypatch, stage):
    """Two ends: the smallest a step can add, and the warning if that is not free."""
    asked = []

    def add(config, step):
        asked.append(step)
        return {}

    monkeypatch.setattr(preflight, "predict_training", add)
    monkeypatch.setattr(preflight, "predict_peak", lambda config, step, parts: 3 * 10**9)
    monkeypatch.setattr(preflight, "peak_memory_gb", lambda: 1.0)
    examples = PAIRS if stage == "dpo" else [([1, 2, 3], [4, 5])] * 400
    order = pair_order(PAIRS, 4, 0) if stage == "dpo" else packed_order(examples, 20, 400, 0)
    for free, lines in ((4 * 10**9, 4), (2 * 10**9, 5)):
        monkeypatch.setattr(preflight, "memory_now", lambda device, free=free: (5 * 10**9, free))
        said, _ = plan(stage, examples, Settings(learning_rate=1, batch_size=4), order)
        wanted = f"memory: 8.00 GB predicted, {(5e9 + free) / 1e9:.1f} GB available"
        assert said[3].strip() == wanted and len(said) == lines
    assert said[4].startswith("warning   that may not fit")
    # DPO's rows are as long as the longest pair, 3 + 2 + 4; packed ones as long as --max-length
    assert asked[0].width == (9 if stage == "dpo" else 20)
    assert asked[0].tokens == 4 * asked[0].width and asked[0].adapters == (1 + (stage == "dpo"))


def test_a_stop_that_no_evaluation_can_find_is_warned_of():
    order = pair_order(PAIRS, 4, 0)  # 10 steps
    for every, limit, warned in ((10, 5.0, True), (0, None, False), (9, 5.0, False)):
        settings = Settings(learning_rate=1, batch_size=4, eval_every=every, stop_when=limit)
        said = plan("dpo", PAIRS, settings, order)[0]
        assert ("warning   --stop-when never looks: --eval-every 10, 10 steps" in said) == warned


def test_memory_that_the_system_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr(preflight, "memory_now", lambda device: None)
    settings = Settings(learning_rate=1, batch_size=4)
    assert len(plan("dpo", PAIRS, settings, pair_order(PAIRS, 4, 0))[0]) == 3


def test_a_gradient_takes_4_bytes_a_moment_4_and_no_more_is_trained_than_the_adapter():
    model = tiny_llama(torch.float32)
    step = memory.Step(
        tokens=40, width=20, scored=30, adapters=2, r=2, targets="q_proj,v_proj", dropout=0.0,
        dtype=torch.float32, on_gpu=False, gradient_checkpointing=False, quantized=False,
    )  # fmt: skip
    parts = memory.predict_training(model.config, step)
    add_adapter(model, "dpo", r=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    tokens = torch.ones(2, 20, dtype=torch.int64)
    model(tokens).sum().backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    assert parts["gradients"] == sum(p.grad.nbytes for p in trained)
    assert parts["AdamW"] == sum(t.nbytes for t in state)
    assert parts["dequantized weights"] == 0


@pytest.mark.skipif(not machine.memory_now("cpu"), reason="only Linux tells")
def test_what_is_held_and_free_follows_what_is_taken():
    before = machine.memory_now("cpu")
    taken = torch.ones(50_000_000)  # 200 MB
    after = machine.memory_now("cpu")
    assert 190e6 < after[0] - before[0] < 230e6
    del taken


def test_the_few_pairs_of_a_small_file_are_warned_of(tmp_path, capsys, model_folder):
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows()[:17])
    flags = ["--max-length", 96, "--max-steps", 1, "--stage", "sft"]
    command("--model", model_folder, "--data", data, "--out", tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert "sft       1 texts in 1 rows" in said and "warning   1 texts are too few" in said


def test_durations_are_said_as_people_say_them():
    said = {0.4: "0 s", 99: "99 s", 100: "2 min", 5_930: "99 min", 5_999: "1 h 40 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
