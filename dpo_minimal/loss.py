"""Log-probabilities of responses, the SFT loss, and the DPO loss with its implicit rewards.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), eq. 7:

    loss = -log sigmoid(beta * delta)
    delta = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))

log pi(y|x) is a sum over the response's tokens, its EOS included, never over the prompt's.
Shapes: B rows, T tokens per row, D hidden size, V vocabulary, N scored tokens of all rows together.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dpo_minimal.llama import at_least_float32

CHUNK = 1024  # scored tokens per call of the head: 1,024 x 32,000 float32 logits are 131 MB


def chunk_logps(hidden, head, targets):
    """log softmax(head(hidden))[target], [N]; hidden [N, D], targets int64 [N]."""
    logits = head(hidden)  # [N, V]
    logps = logits.log_softmax(dim=1, dtype=at_least_float32(logits))  # in 16 bits it would drift
    return logps.gather(1, targets[:, None])[:, 0]


def token_logps(model, tokens, loss_mask, positions=None, mask=None, sources=None):
    """The log-probability of each scored token: [N], row after row, float32 or wider.

    tokens int64 [B, T]; loss_mask bool [B, T], True at tokens to score (never the first of a row).
    positions and mask are handed to `Llama.hidden`. sources int64 [B, T]: the place in its row
    whose state predicts each token, if that is not simply the one before it. The head runs on
    scored positions only, in chunks that backward recomputes, so that the [N, V] logits never exist
    all at once.
    """
    rows, places = loss_mask.nonzero(as_tuple=True)  # [N] each
    hidden = model.hidden(tokens, positions, mask)  # [B, T, D]
    # The state at position t - 1 predicts the token at t.
    before = places - 1 if sources is None else sources[rows, places]
    states = hidden[rows, before].split(CHUNK)
    targets = tokens[rows, places].split(CHUNK)
    logps = []
    for i in range(len(states)):
        if i < len(states) - 1:
            args = (states[i], model.lm_head, targets[i])
            logps.append(checkpoint(chunk_logps, *args, use_reentrant=False))
        else:  # backward begins with the last chunk, so recomputing it would save nothing
            logps.append(chunk_logps(states[i], model.lm_head, targets[i]))
    return torch.cat(logps)


def sequence_logps(model, tokens, loss_mask):
    """log pi(y|x) of each row: the SUM over its scored tokens, [B]. See `token_logps`."""
    logps = token_logps(model, tokens, loss_mask)  # [N]
    grid = logps.new_zeros(loss_mask.shape).masked_scatter(loss_mask, logps)  # [B, T]
    return grid.sum(dim=1)


def preference_logps(model, batch):
    """(log pi(y_w|x), log pi(y_l|x)), [B] each, of pairs as `pair_batch` lays them out.

    Equal up to rounding to `sequence_logps` of each answer in a row of its own; here each prompt is
    computed once.
    """
    logps = token_logps(
        model, batch.tokens, batch.loss_mask, batch.positions, batch.mask, batch.sources
    )  # [N]
    grid = logps.new_zeros(batch.tokens.shape).masked_scatter(batch.loss_mask, logps)  # [B, T]
    return (grid * ~batch.rejected).sum(dim=1), (grid * batch.rejected).sum(dim=1)


def sft_loss(model, tokens, loss_mask, positions=None, mask=None):
    """-log pi of each scored token, [N]; its mean over tokens is the loss of SFT."""
    return -token_logps(model, tokens, loss_mask, positions, mask)


# --- preference losses ------------------------------------------------------------------------


def sigmoid_loss(delta, beta: float, label_smoothing: float):
    """DPO: -log sigmoid(beta * delta); with --label-smoothing it is cDPO.

    Rafailov et al. 2023, eq. 7. The conservative DPO of Mitchell 2023 assumes that a share e of the
    votes is wrong: (1 - e) * -log sigmoid(beta * delta) + e * -log sigmoid(-beta * delta).
    """
    losses = -F.logsigmoid(beta * delta) * (1 - label_smoothing)
    return losses - F.logsigmoid(-beta * delta) * label_smoothing


def ipo_loss(delta, beta: float, label_smoothing: float):
    """IPO: (delta - 1 / (2 beta))^2, with delta from summed log-probabilities.

    Azar et al. 2023, eq. 17. Some implementations take means over tokens instead of sums.
    """
    return (delta - 1 / (2 * beta)) ** 2


def hinge_loss(delta, beta: float, label_smoothing: float):
    """SLiC: max(0, 1 - beta * delta) (Zhao et al. 2023)."""
    return torch.relu(1 - beta * delta)


# Each takes (delta [B], beta, label_smoothing) and returns losses [B]. `--loss` and its help read
# this table and the first lines of the docstrings, so a new loss is a function and an entry. Losses
# that need more than delta are in extras/losses.py, for `--loss` likewise.
LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
):
    """DPO's loss and implicit rewards from summed log-probabilities, all [B].

    kind: a key of LOSSES. Returns (losses [B], chosen_rewards [B], rejected_rewards [B]); rewards
    are beta * (log pi - log ref), in nats, and carry no gradient. ValueError for another kind, or
    if a kind other than sigmoid gets label smoothing.
    """
    if kind not in LOSSES or (label_smoothing and kind != "sigmoid"):
        raise ValueError(f"no DPO loss of kind {kind!r} with label smoothing {label_smoothing}")
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    delta = chosen_logratios - rejected_logratios
    losses = LOSSES[kind](delta, beta, label_smoothing)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def reward_metrics(
    policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
) -> dict[str, torch.Tensor]:
    """TRL's reward metrics of each pair, {name: [B]}, detached; their means are what is logged.

    A pair counts as accurate if its chosen reward is strictly greater, so accuracy is 0 where
    policy = reference; ties are reported apart.
    """
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins > 0).float(),
        "rewards/ties": (margins == 0).float(),
        "rewards/margins": margins,
        "logps/chosen": policy_chosen_logps.detach(),
        "logps/rejected": policy_rejected_logps.detach(),
    }
