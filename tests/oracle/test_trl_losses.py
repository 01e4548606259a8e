"""Each further loss against TRL's code, from log-probabilities to loss and gradient, in float64.

TRL's trainers compute their losses in the middle of a step. So a trainer is stood in for by the few
values that the step reads of it, and its model by one that returns log-probabilities of tokens
which we made up. Brought to one convention: TRL's NLL is a mean over all tokens of a batch and
ours one per pair, so here all chosen answers are of one length; KTO's mean is over answers, ours
over pairs, and the two halves of a pair have each their reference point (`kto_pair`, as TRL had
it); ORPO's NLL is over prompt and answer there, so only the odds ratio is compared.
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from oracles import NO_ORACLE, transformers_llama

from dpo_minimal.extras.losses import LossSettings, preference_loss

trl = pytest.importorskip("trl", reason=NO_ORACLE)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CLOSE = 1e-10
P, C, R = 3, 5, (2, 7, 5, 4)  # tokens of the prompts, the chosen and the rejected answers
B = len(R)
LENGTHS = torch.tensor([[C, r] for r in R])


def rows():
    """(mask [2B, T] of answers, made-up log-probabilities [2B, T - 1], the reference's [2B])."""
    ends = torch.tensor([P + C] * B + [P + r for r in R])
    places = torch.arange(max(ends))
    mask = (places >= P) & (places < ends[:, None])
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2 * B, len(places) - 1)
    policy, ref = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return mask, (policy * mask[:, 1:]).requires_grad_(), (ref * mask[:, 1:]).sum(dim=1)


def stand_in(**values):
    """What a trainer's `_compute_loss` reads of itself."""
    same = lambda value: value  # noqa: E731
    usual = dict(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SimpleNamespace(**usual | values)


def answering(logps):
    """A model whose answer is these log-probabilities, whatever it is asked."""
    rest = {name: torch.zeros(logps.shape) for name in ("entropy", "mean_logits", "is_top1")}
    rest["is_top1"] = rest["is_top1"].bool()
    return lambda **_: SimpleNamespace(log_probs=logps, **rest)


def gradient_of(loss, logps):
    """The loss's gradient for log-probabilities of tokens, where there are tokens."""
    return torch.autograd.grad(loss, logps)[0] * (logps != 0)


def our_gradient(settings, logps, ref):
    """(mean loss, its gradient for the tokens' log-probabilities) by our code."""
    policy = logps.sum(dim=1)
    losses, *_ = preference_loss(
        *policy.chunk(2), *ref.chunk(2), lengths=LENGTHS, settings=settings
    )
    return losses, gradient_of(losses.mean(), logps)


def largest(ours, theirs):
    """The largest difference, printed for the record."""
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference {difference:.1e}")
    return difference


DPO_TRAINER = {  # TRL's loss types and weights, and our settings
    "robust": (["robust"], [1.0], LossSettings("robust", 0.3, label_smoothing=0.2)),
    "apo_zero": (["apo_zero"], [1.0], LossSettings("apo_zero", 0.3)),
    "RPO": (["sigmoid", "sft"], [1.0, 0.7], LossSettings("sigmoid", 0.3, nll_weight=0.7)),
    "hinge and NLL": (["hinge", "sft"], [1.0, 0.2], LossSettings("hinge", 0.3, nll_weight=0.2)),
}


@pytest.mark.parametrize("name", DPO_TRAINER)
def test_losses_of_the_dpo_trainer(name):
    kinds, weights, settings = DPO_TRAINER[name]
    mask, logps, ref = rows()
    trainer = stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=kinds,
        loss_weights=weights,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        use_weighting=False,
    )
    inputs = {"input_ids": mask.long(), "completion_mask": mask.long(), "attention_mask": mask}
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref.chunk(2), strict=True))
    loss = trl.DPOTrainer._compute_loss(trainer, answering(logps), inputs, False)
    theirs = loss.detach(), gradient_of(loss, logps)
    losses, gradient = our_gradient(settings, logps, ref)
    assert largest((losses.mean().detach(), gradient), theirs) < CLOSE


def test_kto_is_that_of_the_kto_trainer_with_each_halfs_reference_point():
    mask, logps, ref = rows()
    # Made larger, so that one mean gain is positive and the other is not.
    ref = ref - torch.tensor([2.0] * B + [-2.0] * B)
    settings, gains = LossSettings("kto", 0.3), logps.sum(dim=1) - ref
    assert gains[:B].mean() > 0 > gains[B:].mean()
    halves = []
    for is_chosen in (True, False):
        trainer = stand_in(
            beta=settings.beta,
            loss_type="kto",
            calculate_KL=True,
            desirable_weight=1.0,
            undesirable_weight=1.0,
            _compute_kl_logps=lambda *_, other=not is_chosen: logps.sum(dim=1).chunk(2)[1 - other],
        )
        half, other = (slice(0, B), slice(B, None))[:: 1 if is_chosen else -1]
        answers = {"input_ids": mask[half].long(), "completion_mask": mask[half].long()}
        answers |= {"attention_mask": mask[half], "label": torch.tensor([is_chosen] * B)}
        answers |= {"ref_logps": ref[half], "ref_KL_logps": ref[other]}
        loss = trl.KTOTrainer._compute_loss(trainer, answering(logps[half]), answers, False)
        halves.append(loss)
    theirs = sum(halves).detach(), gradient_of(sum(halves), logps)
    losses, gradient = our_gradient(settings, logps, ref)
    assert largest((losses.mean().detach(), gradient), theirs) < CLOSE


def test_simpo_is_that_of_the_cpo_trainer():
    cpo = pytest.importorskip("trl.experimental.cpo", reason=NO_ORACLE)
    _, logps, ref = rows()
    settings = LossSettings("simpo", 2.0, simpo_gamma=0.7)
    named = dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7, alpha=0.0, label_smoothing=0.0)
    means = logps.sum(dim=1) / LENGTHS.T.flatten()
    theirs, *rewards = cpo.CPOTrainer.cpo_loss(stand_in(**named), *means.chunk(2))
    theirs = theirs.detach(), gradient_of(theirs.mean(), logps), *rewards
    losses, gradient = our_gradient(settings, logps, ref)
    ours = preference_loss(
        *logps.sum(dim=1).chunk(2), *ref.chunk(2), lengths=LENGTHS, settings=settings
    )
    assert largest((losses.detach(), gradient, *ours[1:]), theirs) < CLOSE


def test_orpos_odds_ratio_is_that_of_the_orpo_trainer(monkeypatch):
    orpo = pytest.importorskip("trl.experimental.orpo", reason=NO_ORACLE)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it would go to 32 bits
    _, logps, ref = rows()
    means = logps.sum(dim=1) / LENGTHS.T.flatten()
    found = orpo.ORPOTrainer.odds_ratio_loss(stand_in(beta=0.4), *means.chunk(2))
    theirs = means[:B].neg() - found[0]  # the NLL of the answers, and minus beta log sigmoid
    theirs = theirs.detach(), gradient_of(theirs.mean(), logps), *found[1:3]
    settings = LossSettings("orpo", 0.4)
    losses, gradient = our_gradient(settings, logps, ref)
    ours = preference_loss(
        *logps.sum(dim=1).chunk(2), *ref.chunk(2), lengths=LENGTHS, settings=settings
    )
    assert largest((losses.detach(), gradient, *ours[1:]), theirs) < CLOSE


def test_20_steps_of_simpo_agree_with_the_cpo_trainer(tmp_path):
    # Nothing is common to the two but the initial weights: its own rows, collator and means.
    cpo = pytest.importorskip("trl.experimental.cpo", reason=NO_ORACLE)
    steps = pytest.importorskip("test_trl", reason=NO_ORACLE)

    class Trainer(steps.InOrder, cpo.CPOTrainer):
        def tokenize_row(self, row, model=None):
            prompt, *answers = (json.loads(row[n]) for n in ("prompt", "chosen", "rejected"))
            found = {}
            for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                found[f"{name}_input_ids"] = prompt + answer
                found[f"{name}_attention_mask"] = [1] * len(prompt + answer)
                found[f"{name}_labels"] = [-100] * len(prompt) + answer
            return found

    transformers_llama(tmp_path / "base")
    pairs = steps.random_pairs(12)
    rows = [{name: json.dumps(ids) for name, ids in pair._asdict().items()} for pair in pairs]
    shared = steps.trainer_settings(1, tmp_path / "trl")
    named = dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    trainer = Trainer(
        steps.trl_model(tmp_path / "base", quantize=False),
        args=cpo.CPOConfig(**named, **shared),
        train_dataset=steps.datasets.Dataset.from_list(rows),
        processing_class=steps.word_tokenizer(),
        peft_config=steps.new_adapter(),
    )
    trainer.remove_callback(steps.transformers.PrinterCallback)
    model = steps.our_model(tmp_path / "base", trainer, quantize=False)
    ours = steps.train_ours(model, pairs, "simpo", 2.0, 1, tmp_path)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(theirs) == steps.STEPS
    compared = [name for name in steps.COMPARED if name in theirs[0] and "logps" not in name]
    differences = {name: steps.difference(ours, theirs, name) for name in compared}
    print(f"largest difference {max(differences.values()):.1e} of {len(compared)} metrics")
    assert len(compared) == 7 and max(differences.values()) < steps.CLOSE, differences
    assert ours[-1]["rewards/margins"] > 1 and ours[-1]["loss"] < 0.8 * ours[0]["loss"]
