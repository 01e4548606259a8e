"""figures/results/one_pair.json, recomputed from its rows and its numbers per token, in NumPy.

The package computes none of the sums here, so that the file, which the tutorial walks through, is
checked by a second hand. Each check is then given files with a mistake in them.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from dpo_minimal import forum
from dpo_minimal.tokenizer import train_tokenizer

FILE = Path(__file__).parents[1] / "figures" / "results" / "one_pair.json"
DATA = json.loads(FILE.read_text("utf-8"))
STAGES = ("before", "after one step", "after 100 steps")
NAMES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def close(found, expected, tolerance=2e-6) -> bool:
    """Whether two numbers or arrays agree to this tolerance, absolute or relative."""
    return np.allclose(found, expected, rtol=tolerance, atol=tolerance)


def right_text(data) -> bool:
    """The text is that of the row, and the pieces spell it, with <s> in front and </s> behind."""
    row, text = data["row"], data["text"]
    wanted = {
        "prompt": "Question: " + row["question"] + "\n\nAnswer:",
        "chosen": " " + row["response_j"],
        "rejected": " " + row["response_k"],
    }
    spelled = {
        name: "".join(part["pieces"]).replace("▁", " ").replace("<0x0A>", "\n")
        for name, part in data["tokens"].items()
    }
    return text == wanted and spelled == {
        "prompt": "<s> " + wanted["prompt"],
        "chosen": wanted["chosen"] + "</s>",
        "rejected": wanted["rejected"] + "</s>",
    }


def right_tokens(data) -> bool:
    """One id per piece, the same id wherever the piece stands, and the row has all three parts."""
    ids, pieces = [], []
    for name in ("prompt", "chosen", "rejected"):
        ids += data["tokens"][name]["ids"]
        pieces += data["tokens"][name]["pieces"]
    pairs = set(zip(ids, pieces, strict=True))
    one_to_one = len(pairs) == len({i for i, _ in pairs}) == len({piece for _, piece in pairs})
    return one_to_one and data["shared_row"]["tokens"] == ids


def right_row(data) -> bool:
    """Segments, positions, what is scored, which state predicts each token, who sees whom."""
    row = data["shared_row"]
    P, C, R = (len(data["tokens"][name]["ids"]) for name in ("prompt", "chosen", "rejected"))
    names = ["prompt"] * P + ["chosen"] * C + ["rejected"] * R
    mask = np.array([[int(digit) for digit in line] for line in row["mask"]])
    expected, sources, positions = np.zeros_like(mask), [], []
    for i in range(P + C + R):
        for j in range(i + 1):
            expected[i, j] = names[j] == "prompt" or names[j] == names[i]
        positions.append(int(expected[i].sum()) - 1)  # as many as it sees before it
        before = [j for j in range(i) if expected[i, j]]
        sources.append(before[-1] if before else -1)
    return (
        row["segments"] == names
        and row["loss_mask"] == [int(name != "prompt") for name in names]
        and row["rejected"] == [int(name == "rejected") for name in names]
        and row["positions"] == positions
        and row["sources"] == sources
        and np.array_equal(mask, expected)
    )


def sums_of(stage) -> dict[str, float]:
    """The four sums, from the numbers per token, float64."""
    return {
        name: np.sum(np.array(stage["token_logps"][name.split("_")[0]][name.split("_")[1]]))
        for name in NAMES
    }


def right_sums(data) -> bool:
    """Sums over all tokens of an answer and its end, also in the layout without sharing."""
    right = []
    for stage in (data[name] for name in STAGES):
        sums = sums_of(stage)
        right += [close(stage["sums"][f"{name}_logps"], sums[name]) for name in NAMES]
        policy = [sums["policy_chosen"], sums["policy_rejected"]]
        right.append(close(stage["policy_sums_in_rows_of_their_own"], policy, 1e-5))
        for who in ("policy", "ref"):
            for answer in ("chosen", "rejected"):
                count = len(data["tokens"][answer]["ids"])
                right.append(len(stage["token_logps"][who][answer]) == count)
    return all(right)


def right_loss(data) -> bool:
    """delta, rewards, loss, weight and gradients by the equations (5), (6) and (7)."""
    right, beta = [], data["beta"]
    for stage in (data[name] for name in STAGES):
        policy_w, policy_l, ref_w, ref_l = sums_of(stage).values()
        delta = (policy_w - ref_w) - (policy_l - ref_l)
        weight = beta / (1 + np.exp(beta * delta))
        norms = stage["gradient_norms"]
        right += [
            close(stage["delta"], delta, 1e-5),
            close(stage["rewards"]["chosen"], beta * (policy_w - ref_w), 1e-5),
            close(stage["rewards"]["rejected"], beta * (policy_l - ref_l), 1e-5),
            close(stage["probability_of_the_vote"], 1 / (1 + np.exp(-beta * delta)), 1e-5),
            close(stage["loss"], np.log1p(np.exp(-beta * delta)), 1e-5),
            close(stage["weight"], weight, 1e-5),
            close(stage["gradient_of_sums"]["policy_chosen_logps"], -weight, 1e-5),
            close(stage["gradient_of_sums"]["policy_rejected_logps"], weight, 1e-5),
            close(norms["loss"], weight * norms["difference"], 1e-4),
            norms["difference"] <= norms["chosen"] + norms["rejected"],
        ]
    return all(right)


def right_start(data) -> bool:
    """Before DPO policy and reference are equal: delta 0, a loss of ln 2, a weight of beta / 2."""
    start = data["before"]
    return (
        start["token_logps"]["policy"] == start["token_logps"]["ref"]
        and start["delta"] == 0
        and start["loss"] == float(f"{np.log(2):.7g}")
        and start["weight"] == data["beta"] / 2
        and all(
            data[stage]["token_logps"]["ref"] == start["token_logps"]["ref"] for stage in STAGES
        )
    )


CHECKS = [right_text, right_tokens, right_row, right_sums, right_loss, right_start]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_pair_of_the_tutorial_is_right_at_every_station(check):
    assert check(DATA)


def test_the_pair_is_a_vote_of_the_forum_and_its_scores_are_those_of_the_rules():
    assert DATA["row"] == forum.make_forum(0)["rl"][DATA["row"]["qid"]]
    # Right +2 and plain; wrong -1 and polite +1.
    assert DATA["true_scores"] == {"chosen": 2, "rejected": 0}
    assert DATA["row"]["response_k"].startswith("Good question!")


def test_the_ids_are_those_of_the_tokenizer_that_train_py_makes(tmp_path):
    threads = [row["text"] for row in forum.make_forum(0)["pretrain"]]
    tokenizer = train_tokenizer(threads, 1024, tmp_path / "tokenizer.model")
    for name, part in DATA["tokens"].items():
        assert tokenizer.decode(part["ids"]) == DATA["text"][name].strip()
        assert [tokenizer.model.id_to_piece(i) for i in part["ids"]] == part["pieces"]


def test_a_step_on_the_pair_moves_it_the_right_way_and_its_kind_has_it_in_its_list():
    before, after = DATA["before"]["sums"], DATA["after one step"]["sums"]
    assert after["policy_chosen_logps"] > before["policy_chosen_logps"]
    assert after["policy_rejected_logps"] < before["policy_rejected_logps"]
    place = DATA["rows_of_its_kind"].index(DATA["row"]["qid"])
    for stage in (DATA[name] for name in STAGES):
        assert close(stage["deltas_of_its_kind"][place], stage["delta"], 1e-5)


def put(data, value, *keys):
    """Replace the value at data[key][key]..."""
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value


LAST = DATA["after 100 steps"]
MISTAKES = [
    (right_text, " " + DATA["text"]["prompt"], ("text", "prompt")),
    (right_text, "▁not", ("tokens", "chosen", "pieces", 0)),
    (right_tokens, 5, ("tokens", "rejected", "ids", 0)),
    (right_row, 1, ("shared_row", "loss_mask", 0)),
    (right_row, 29, ("shared_row", "positions", -1)),
    (right_row, DATA["shared_row"]["mask"][-1].replace("0", "1"), ("shared_row", "mask", -1)),
    (right_row, len(DATA["shared_row"]["tokens"]), ("shared_row", "sources", -1)),
    (right_sums, LAST["token_logps"]["policy"]["chosen"][:-1],  # without the end
     ("after 100 steps", "token_logps", "policy", "chosen")),
    (right_sums, LAST["sums"]["policy_chosen_logps"] / 9,  # a mean
     ("after 100 steps", "sums", "policy_chosen_logps")),
    (right_loss, -LAST["delta"], ("after 100 steps", "delta")),
    (right_loss, LAST["loss"] * 1.001, ("after 100 steps", "loss")),
    (right_loss, LAST["weight"], ("after 100 steps", "gradient_of_sums", "policy_chosen_logps")),
    (right_loss, LAST["gradient_norms"]["chosen"], ("after 100 steps", "gradient_norms", "loss")),
    (right_start, 0.7, ("before", "loss")),
]  # fmt: skip


@pytest.mark.parametrize("check, value, place", MISTAKES)
def test_a_mistake_is_noticed(check, value, place):
    data = copy.deepcopy(DATA)
    put(data, value, *place)
    assert not check(data)
