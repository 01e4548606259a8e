"""Preference losses beyond `dpo_loss`: each is its paper's equation beside a statement or three.

`LOSSES` in loss.py has the losses of delta alone: DPO, cDPO, IPO, SLiC. `MORE_LOSSES` has those
that need more: a share of wrong votes, lengths, each log-ratio by itself. `--loss` reads both, and
`preference_loss` computes what the flags ask for.

SimPO and ORPO take the mean log-probability per token, s = log pi(y|x) / |y| with the EOS counted,
where all others take the sum. They know no reference: none is computed for them, and their implicit
rewards are beta * s, as TRL logs them. Elsewhere rewards are beta * (log pi - log ref).

beta is the strength of the pull towards the reference, as in DPO, but for two: in SimPO it scales s
(the paper has 2 to 10), in ORPO it is the weight of the odds ratio beside the NLL (lambda, 0.1).
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dpo_minimal import InputError
from dpo_minimal.loss import LOSSES, dpo_loss

SMALLEST = 2**-24  # float32 has no probability nearer to 1 than that


@dataclass(frozen=True)
class LossSettings:
    """What flags say of a preference loss; the fields have the flags' names."""

    loss: str = "sigmoid"  # a key of LOSSES or MORE_LOSSES
    beta: float = 0.1
    label_smoothing: float = 0.0  # the share of votes that are wrong
    simpo_gamma: float = 0.5  # the margin that SimPO asks for
    nll_weight: float = 0.0


class PairLogps(NamedTuple):
    """What a loss knows of B pairs, [B] each: summed log-probabilities, and answers' lengths."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_length: torch.Tensor  # tokens, the EOS included
    rejected_length: torch.Tensor

    def log_ratios(self):
        """(log pi(y_w|x) - log ref(y_w|x), the same of y_l), [B] each."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def means(self):
        """(s_w, s_l): the policy's mean log-probability per token, [B] each."""
        return self.chosen / self.chosen_length, self.rejected / self.rejected_length


def robust_loss(pairs: PairLogps, settings: LossSettings):
    """Robust DPO: as if none of the --label-smoothing wrong votes were there.

    Chowdhury et al. 2024 (arXiv:2403.00409): with a share e of the votes flipped,
    ((1 - e) * -log sigmoid(beta delta) - e * -log sigmoid(-beta delta)) / (1 - 2e) is, on average
    over the flips, DPO's loss of the votes as they were. It has no lower bound.
    """
    chosen, rejected = pairs.log_ratios()
    margin, e = settings.beta * (chosen - rejected), settings.label_smoothing
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


def apo_zero_loss(pairs: PairLogps, settings: LossSettings):
    """APO-zero: the chosen answer up and the rejected one down, each for itself.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, with h = log pi - log ref:
    -sigmoid(beta h_w) + sigmoid(beta h_l), here with TRL's 1 added, so that it is above 0.
    """
    chosen, rejected = pairs.log_ratios()
    return 1 - torch.sigmoid(settings.beta * chosen) + torch.sigmoid(settings.beta * rejected)


def kto_loss(pairs: PairLogps, settings: LossSettings):
    """KTO of pairs: APO-zero, with the batch's mean gain in place of zero.

    Ethayarajh et al. 2024 (arXiv:2402.01306), with weights 1:
    1 - sigmoid(beta (h_w - z_l)) + 1 - sigmoid(beta (z_w - h_l)). The reference point z, an
    estimate of KL(pi || ref) without a gradient, is the mean of h over the answers of the other
    kind in the batch (at least 0). So this loss alone depends on which pairs share a forward pass:
    --batch-size, --grad-accum and several processes change it, and an evaluation is one batch.
    """
    chosen, rejected = pairs.log_ratios()
    chosen_kl, rejected_kl = (h.detach().mean().clamp(min=0) for h in (chosen, rejected))
    chosen_value = torch.sigmoid(settings.beta * (chosen - rejected_kl))
    rejected_value = torch.sigmoid(settings.beta * (chosen_kl - rejected))
    return 2 - chosen_value - rejected_value


def simpo_loss(pairs: PairLogps, settings: LossSettings):
    """SimPO: without a reference, by means per token, a margin of --simpo-gamma.

    Meng et al. 2024 (arXiv:2405.14734), eq. 6: -log sigmoid(beta s_w - beta s_l - gamma).
    """
    chosen, rejected = pairs.means()
    return -F.logsigmoid(settings.beta * chosen - settings.beta * rejected - settings.simpo_gamma)


def orpo_loss(pairs: PairLogps, settings: LossSettings):
    """ORPO: without a reference, NLL + beta times an odds ratio, by means per token.

    Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7, with log odds = log(e^s / (1 - e^s)):
    -s_w + beta * -log sigmoid(log odds_w - log odds_l). The NLL is the answer's alone.
    """
    chosen, rejected = (s.clamp(max=-SMALLEST) for s in pairs.means())
    chosen_odds, rejected_odds = (s - torch.log(-torch.expm1(s)) for s in (chosen, rejected))
    return -chosen - settings.beta * F.logsigmoid(chosen_odds - rejected_odds)


# Each takes (PairLogps, LossSettings) and returns losses [B]. The first lines are --loss's help.
MORE_LOSSES = {
    "robust": robust_loss,
    "apo_zero": apo_zero_loss,
    "kto": kto_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
REFERENCE_FREE = ("simpo", "orpo")


def preference_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    *,
    lengths,
    settings: LossSettings,
):
    """`dpo_loss` or another: (losses, chosen_rewards, rejected_rewards), [B] each.

    From summed log-probabilities [B] and lengths int64 [B, 2] of chosen and rejected answers. With
    nll_weight w (RPO: Pang et al. 2024, arXiv:2404.19733) each loss gets w * -s_w, the mean
    negative log-probability of the chosen answer's tokens. Rewards carry no gradient.
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = PairLogps(*logps, *lengths.to(policy_chosen_logps.device).T)
    if settings.loss in MORE_LOSSES:
        losses = MORE_LOSSES[settings.loss](pairs, settings)
        scores = pairs.means() if settings.loss in REFERENCE_FREE else pairs.log_ratios()
        rewards = [settings.beta * score.detach() for score in scores]
    else:
        losses, *rewards = dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            kind=settings.loss,
        )
    if settings.nll_weight:
        losses = losses - settings.nll_weight * pairs.means()[0]
    return losses, *rewards


# --- flags and lengths ------------------------------------------------------------------------


def loss_kinds() -> dict[str, str]:
    """{kind: the first line of its docstring} of every loss."""
    table = LOSSES | MORE_LOSSES
    return {kind: (loss.__doc__ or "?").splitlines()[0] for kind, loss in table.items()}


def loss_settings(flags: dict) -> LossSettings:
    """The settings in a run's flags; older runs lack some, and had none of what they ask for."""
    names = [field.name for field in fields(LossSettings)]
    return LossSettings(**{name: flags[name] for name in names if name in flags})


def describe_loss(settings: LossSettings) -> str:
    """The settings in words, leaving out what is not used."""
    words, usual = f"{settings.loss}, beta {settings.beta:g}", LossSettings()
    for name in ("label_smoothing", "simpo_gamma", "nll_weight"):
        value = getattr(settings, name)
        if value != getattr(usual, name):
            words += f", {name.replace('_', ' ')} {value:g}"
    return words


def check_loss(settings: LossSettings):
    """InputError for flags of a loss that say nothing together."""
    kind = settings.loss
    if settings.label_smoothing and kind not in ("sigmoid", "robust"):
        raise InputError(f"--label-smoothing goes with --loss sigmoid or robust, not {kind}")
    if kind == "robust" and not settings.label_smoothing:
        raise InputError("--loss robust needs --label-smoothing, the share of wrong votes")
    if settings.simpo_gamma != LossSettings.simpo_gamma and kind != "simpo":
        usual = f"leave it at {LossSettings.simpo_gamma}"
        raise InputError(f"--simpo-gamma goes with --loss simpo, not {kind}: {usual}")
    if settings.nll_weight and kind == "orpo":
        raise InputError("--nll-weight does not go with --loss orpo, which has that term already")


def batch_lengths(batch) -> torch.Tensor:
    """Tokens of each pair's answers in a batch, int64 [B, 2]: chosen, rejected."""
    rejected = batch.rejected.sum(dim=1)
    return torch.stack((batch.loss_mask.sum(dim=1) - rejected, rejected), dim=1)


def pair_lengths(pairs) -> torch.Tensor:
    """Tokens of each EncodedPair's answers, int64 [n, 2]: chosen, rejected."""
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
