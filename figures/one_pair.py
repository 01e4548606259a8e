"""One pair of the forum, followed from its row in a file to its gradient.

    python figures/one_pair.py [--draw]

The JSON file has every station: the row, the text, the tokens, the row that both answers share, the
log-probability of each token, the four sums, delta, the loss (beta 1) and the gradient; before DPO,
after one step on this pair alone, and after 100 steps of 16 pairs, this one among them. The pair
was chosen because it is short and goes well; so the file also has delta of all votes of its kind.
It takes about two minutes. Base and SFT are made first if they are not there, in some minutes more.
"""

import tempfile
from pathlib import Path

import court
import torch
import tuning as t
import world as w
from drawing import BLUE, GREY, main

from dpo_minimal import forum
from dpo_minimal.batches import answer_rows, pair_batch
from dpo_minimal.data import EncodedPair, PreferencePair, encode_pair, format_prompt
from dpo_minimal.extras.losses import LossSettings
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import dpo_loss, preference_logps, sequence_logps, token_logps
from dpo_minimal.reference import batch_logps, new_table, reference_logps

ROW = 239  # of the votes: right but plain won against polite but wrong, which SFT finds likelier
BETA = 1.0
LOSS = LossSettings("sigmoid", BETA)
CASES = {  # policies: how long each was tuned, on how many votes
    "before": court.Case(LOSS, count=1, steps=0),
    "after one step": court.Case(LOSS, count=1, steps=1, batch_size=1),
    "after 100 steps": court.Case(LOSS, count=1600, steps=100, batch_size=16),
}


def compute() -> dict:
    """The pair at every station; see the top of this file."""
    world = w.open_world()
    rows = forum.make_forum(0)["rl"]
    row = rows[ROW]
    pair = PreferencePair(row["question"], row["response_j"], row["response_k"])
    encoded = encode_pair(world.tokenizer, pair, max_length=128)
    votes = [as_vote(row) for row in rows]
    kind = [i for i, vote in enumerate(votes) if vote[1:] == votes[ROW][1:]]
    stations = {}
    for name, case in CASES.items():
        given = votes[: case.count] if case.steps > 1 else [votes[ROW]]
        model = tuned(world, case, given)
        stations[name] = measure(model, encoded) | {
            "votes": len(given),
            "deltas_of_its_kind": [delta_of(world, model, votes[i]) for i in kind],
        }
    return {
        "row": row,
        "true_scores": {
            "chosen": forum.judge(pair.prompt, pair.chosen),
            "rejected": forum.judge(pair.prompt, pair.rejected),
        },
        "beta": BETA,
        "text": {
            "prompt": format_prompt(pair.prompt),
            "chosen": f" {pair.chosen}",
            "rejected": f" {pair.rejected}",
        },
        "tokens": {name: tokens_of(world, ids) for name, ids in encoded._asdict().items()},
        "shared_row": shared_row(encoded),
        "rows_of_its_kind": kind,
    } | stations


def tuned(world, case, votes):
    """The policy after the case's steps on these votes, without dropout from now on."""
    with tempfile.TemporaryDirectory() as folder:
        return court.tune(world, case, votes, new_table(len(votes)), Path(folder)).eval()


def as_vote(row: dict) -> tuple[str, int, int]:
    """A row of the votes as (question, number of the winner, number of the loser)."""
    answers = forum.candidates(row["question"])
    return row["question"], answers.index(row["response_j"]), answers.index(row["response_k"])


def delta_of(world, model, vote) -> float:
    """delta of any vote, with the adapter sft as the reference."""
    batch = pair_batch(t.encoded(world, [vote]), [0], "cpu")
    chosen, rejected = (batch_logps(model, batch) - reference_logps(model, batch))[0]
    return float(chosen - rejected)


def tokens_of(world, ids: list[int]) -> dict[str, list]:
    """Token ids, and the pieces of text that they stand for."""
    return {"ids": ids, "pieces": [world.tokenizer.model.id_to_piece(i) for i in ids]}


def shared_row(pair: EncodedPair) -> dict[str, list]:
    """The row that prompt, chosen and rejected share, as `pair_batch` makes it; T tokens.

    mask: T strings of T digits, 1 where the token of the line sees the token of the column.
    """
    batch = pair_batch([pair], [0], "cpu")
    segments = [name for name, ids in pair._asdict().items() for _ in ids]
    return {
        "tokens": batch.tokens[0].tolist(),
        "segments": segments,
        "positions": batch.positions[0].tolist(),
        "loss_mask": batch.loss_mask[0].int().tolist(),
        "rejected": batch.rejected[0].int().tolist(),
        "sources": batch.sources[0].tolist(),
        "mask": ["".join(map(str, line)) for line in batch.mask[0, 0].int().tolist()],
    }


def measure(model, pair: EncodedPair) -> dict:
    """Log-probabilities per token and in sum, and what the loss and its gradient make of them.

    The names in `sums` are those of `dpo_loss`'s arguments; their gradients are autograd's.
    """
    batch = pair_batch([pair], [0], "cpu")
    with torch.no_grad():
        policy = by_answer(model, batch)
        with active_adapters(model, ["sft"]):
            ref = by_answer(model, batch)
        alone = sequence_logps(model, *answer_rows([(pair.prompt, a) for a in pair[1:]], "cpu"))
    sums = {
        f"{who}_{answer}_logps": logps.double().sum().requires_grad_()
        for who, found in (("policy", policy), ("ref", ref))
        for answer, logps in found.items()
    }
    loss, chosen_reward, rejected_reward = dpo_loss(**sums, beta=BETA)
    loss.backward()
    delta = (chosen_reward - rejected_reward) / BETA
    return {
        "token_logps": {
            "policy": {answer: logps.tolist() for answer, logps in policy.items()},
            "ref": {answer: logps.tolist() for answer, logps in ref.items()},
        },
        "sums": {name: float(logps) for name, logps in sums.items()},
        "policy_sums_in_rows_of_their_own": alone.tolist(),
        "delta": float(delta),
        "rewards": {"chosen": float(chosen_reward), "rejected": float(rejected_reward)},
        "probability_of_the_vote": float(torch.sigmoid(BETA * delta)),
        "loss": float(loss),
        "weight": float(BETA * torch.sigmoid(-BETA * delta)),
        "gradient_of_sums": {
            name: float(logps.grad) for name, logps in sums.items() if name.startswith("policy")
        },
        "gradient_norms": gradient_norms(model, batch, ref),
    }


def by_answer(model, batch) -> dict[str, torch.Tensor]:
    """The log-probability of each scored token of a batch with one pair, by answer: [C] and [R]."""
    logps = token_logps(
        model, batch.tokens, batch.loss_mask, batch.positions, batch.mask, batch.sources
    )
    is_rejected = batch.rejected[batch.loss_mask]
    return {"chosen": logps[~is_rejected], "rejected": logps[is_rejected]}


def gradient_norms(model, batch, ref) -> dict[str, float]:
    """Norms of gradients by the adapter's weights: of log pi of each answer, and of the loss.

    By (7) the last one is the weight times the norm of `difference`, the first minus the second.
    """
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradient(value):
        parts = torch.autograd.grad(value, weights, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    chosen, rejected = preference_logps(model, batch)  # [1] each
    ref_chosen, ref_rejected = ref["chosen"].sum(), ref["rejected"].sum()
    loss, _, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA)
    gradients = {"chosen": gradient(chosen), "rejected": gradient(rejected)}
    gradients["difference"] = gradients["chosen"] - gradients["rejected"]
    gradients["loss"] = gradient(loss)
    return {name: float(value.norm()) for name, value in gradients.items()}


def draw(data, plt):
    """A panel per answer: the log-probability of each token before and after tuning."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 3.6), sharey=True, layout="constrained", width_ratios=(9, 12)
    )
    stages = (("before", GREY), ("after 100 steps", BLUE))
    for axis, answer in zip(axes, ("chosen", "rejected"), strict=True):
        pieces = data["tokens"][answer]["pieces"]
        for stage, colour in stages:
            logps = data[stage]["token_logps"]["policy"][answer]
            total = data[stage]["sums"][f"policy_{answer}_logps"]
            axis.plot(logps, "o-", color=colour, linewidth=1, markersize=5)
            axis.plot([], [], "o-", color=colour, label=f"{stage}: sum {total:.2f}")
        axis.set_xticks(
            range(len(pieces)), [piece.replace("▁", "␣") for piece in pieces], rotation=60
        )
        axis.legend(loc="lower center", frameon=False, fontsize=8.5)
        axis.set_title(f"{answer}: “{data['text'][answer].strip()}”", fontsize=9.5)
    axes[0].set_ylabel("log π of the token, nats")
    figure.suptitle("One pair, token by token: a few tokens decide, and the sums follow")
    return figure


if __name__ == "__main__":
    main("one_pair", __doc__, compute, draw, digits=7)
