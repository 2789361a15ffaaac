"""What is not on a grid: norms, biases and buffers, made small without training.

Evaluation needs two numbers per channel of a batch norm, not four: y = a·x + c with
a = γ/√(σ²+ε) and c = β − μa. Everything else goes to 16 bits where that is safe.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch.nn.modules.batchnorm import _BatchNorm

    from fitcompress.search.plan import Plan

__all__ = [
    "MOST_DIGITS",
    "fold_norms_",
    "is_folded",
    "norm_digits",
    "round_leftovers_",
    "shorten",
    "shorten_norms_",
    "thaw_norms_",
    "to_half",
]

TOLERANCE = 1e-3  # relative error in the norm of a tensor that 16 bits may make
FEWEST_DIGITS, MOST_DIGITS = 5, 10  # behind the first; float16 has 10
FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def to_half(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` rounded to values that float16 holds, where that is safe.

    Left alone when a value would overflow or the error in norm exceeds 0.1 %.
    """
    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    rounded = tensor.half().float()
    error = (rounded - tensor).norm()
    safe = torch.isfinite(rounded).all() and error <= TOLERANCE * tensor.norm()
    return rounded if bool(safe) else tensor


def shorten(tensor: torch.Tensor, digits: int) -> torch.Tensor:
    """Return values that float16 holds, with so many binary digits behind the first.

    An error of at most 2^−(digits + 1) of each value. Values that float16 does not hold
    stay as they are.
    """
    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    fraction, exponent = torch.frexp(tensor)
    scale = 2.0 ** (digits + 1)
    rounded = torch.ldexp((fraction * scale).round() / scale, exponent)
    safe = (tensor.half().float() == tensor) & (rounded.half().float() == rounded)
    return torch.where(safe, rounded, tensor)


def norm_digits(plan: Plan) -> int:
    """Return how precise norms must be so that their rounding costs no loss.

    Three binary digits more than weights have bits on average: their rounding errors
    are then some 30 dB below those of the weights. 5 to 10, the digits of float16.
    """
    bits = sum(level.size_bits for level in plan.levels.values())
    weights = sum(math.prod(level.shape) for level in plan.levels.values())
    if not bits or not weights:
        return MOST_DIGITS
    return min(max(math.ceil(bits / weights) + 3, FEWEST_DIGITS), MOST_DIGITS)


@torch.no_grad()
def shorten_norms_(model: nn.Module, digits: int) -> None:
    """Round the numbers of folded norms, in place, see :func:`shorten`."""
    for module in model.modules():
        if isinstance(module, FOLDABLE) and is_folded(module):
            module.weight.copy_(shorten(module.weight, digits))
            module.bias.copy_(shorten(module.bias, digits))


def is_folded(norm: nn.Module) -> bool:
    """Whether a batch norm is the affine map that :func:`fold_norms_` leaves."""
    if not (isinstance(norm, FOLDABLE) and _complete(norm)):
        return False
    assert norm.running_mean is not None and norm.running_var is not None
    count = norm.num_batches_tracked
    return (
        bool((norm.running_mean == 0).all())
        and bool((norm.running_var == _unit_variance(norm)).all())
        and (count is None or int(count) == 0)
    )


def fold_norms_(model: nn.Module) -> None:
    """Make every batch norm the affine map that it is in evaluation, in place.

    Afterwards mean 0, variance 1 − ε, weight a, bias c: half the numbers to store.
    Train such a model with its norms in eval mode, as :func:`fitcompress.finetune`
    does; batch statistics are gone.
    """
    for module in model.modules():
        if (
            not isinstance(module, FOLDABLE)
            or not _complete(module)
            or is_folded(module)
        ):
            continue
        mean, variance = module.running_mean, module.running_var
        assert mean is not None and variance is not None
        with torch.no_grad():
            a = module.weight.double() / (variance.double() + module.eps).sqrt()
            c = module.bias.double() - mean.double() * a
            module.weight.copy_(to_half(a.float()))
            module.bias.copy_(to_half(c.float()))
            mean.zero_()
            variance.fill_(_unit_variance(module))
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.zero_()


@torch.no_grad()
def thaw_norms_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give folded norms the statistics of their inputs back, in place.

    The reverse of :func:`fold_norms_`: outputs in eval mode stay the same, and training
    with batch statistics becomes possible again.

    Args:
        model: With folded norms.
        batches: Inputs from the training distribution.
    """
    folded = {
        m: None for m in model.modules() if isinstance(m, FOLDABLE) and is_folded(m)
    }
    sums: dict[nn.Module, list[torch.Tensor | float]] = {
        m: [0.0, 0.0, 0.0] for m in folded
    }

    def catch(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        total = sums[norm]
        total[0] += x.shape[1]
        total[1] = total[1] + x.sum(1)
        total[2] = total[2] + x.square().sum(1)

    handles = [norm.register_forward_pre_hook(catch) for norm in folded]
    training = model.training
    model.eval()
    try:
        for x in batches:
            call_model(model, x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for norm in folded:
        assert isinstance(norm, FOLDABLE)
        assert norm.running_mean is not None and norm.running_var is not None
        count, first, second = sums[norm]
        if not count:
            continue
        mean = torch.as_tensor(first) / count
        variance = (torch.as_tensor(second) / count - mean.square()).clamp_min(0)
        a = norm.weight.double()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(a * (variance + norm.eps).sqrt())
        norm.bias.copy_(norm.bias.double() + a * mean)


def round_leftovers_(
    model: nn.Module, except_for: Collection[torch.Tensor] = ()
) -> None:
    """Round parameters that are on no grid to 16 bits, in place; buffers stay.

    Args:
        model: With or without grids.
        except_for: Parameters that will be on one.
    """
    left_alone = {id(tensor) for tensor in except_for}
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if name != "original" and id(tensor) not in left_alone:  # on a grid
                with torch.no_grad():
                    tensor.copy_(to_half(tensor))


def _complete(norm: _BatchNorm) -> bool:
    stats = norm.running_mean is not None and norm.running_var is not None
    return stats and norm.weight is not None and norm.bias is not None


def _unit_variance(norm: _BatchNorm) -> float:
    """Return 1 − ε as the norm's dtype holds it."""
    dtype = torch.float32 if norm.running_var is None else norm.running_var.dtype
    return float(torch.tensor(1.0 - norm.eps, dtype=dtype))
