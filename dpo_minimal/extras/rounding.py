"""How far a passport's numbers may be off, from what rounding does; `passport.py` says why."""

import torch

TIMES = 3
NAMES = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies", "loss")


@torch.no_grad()
def round_again(model, seed: int = 0):
    """Move weights that are in bfloat16's steps by as much as rounding to them did, in place.

    Rounding errors are uniform within half a step, so their variance is 1/12 of a squared step. One
    weight in 12 is moved by a whole step, up or down, which has the same variance. Zeros stay.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        exponent = weight.float().frexp().exponent.cpu()
        step = torch.ldexp(torch.ones(weight.shape), exponent - 8)  # 8 bits
        drawn = torch.rand(weight.shape, generator=generator)
        moved = step * ((drawn < 1 / 24).float() - (drawn > 23 / 24).float())
        moved[weight.cpu() == 0] = 0
        weight.add_(moved.to(weight.device, weight.dtype))


def tolerances(values: dict, moved: dict) -> dict[str, float]:
    """How far each mean over pairs may be off; moved: the values after another rounding."""
    bounds = {}
    for name in NAMES:
        bounds[name] = TIMES * float((moved[name] - values[name]).square().mean().sqrt())
    # A pair's rank may change where its margin is as small as that.
    unsure = values["rewards/margins"].abs() <= bounds["rewards/margins"]
    bounds["rewards/accuracies"] = float(unsure.float().mean())
    return bounds


def same_arithmetic(bounds: dict, values: dict, width: int, dtype) -> dict[str, float]:
    """The tolerances of the adapter, from those of rounded weights. width: of the widest sum."""
    if dtype == torch.bfloat16:  # there activations are rounded as coarsely as weights
        return bounds
    narrower = width**0.5 * 2**-15
    last_place = 8 * 2**-24 * float(values["logps/chosen"].abs().max())  # sums of many tokens
    narrow = {name: bound * narrower + last_place for name, bound in bounds.items()}
    unsure = values["rewards/margins"].abs() <= narrow["rewards/margins"]
    return narrow | {"rewards/accuracies": float(unsure.float().mean())}
