"""What is not on a grid: norms, biases and buffers, made small without training.

Evaluation needs two numbers per channel of a batch norm, not four: y = a·x + c with
a = γ/√(σ²+ε) and c = β − μa. Everything else goes to 16 bits where that is safe.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.quantize.weights import WeightGrid

__all__ = ["fold_norms_", "is_folded", "round_leftovers_", "to_half"]

TOLERANCE = 1e-3  # relative error in the norm of a tensor that 16 bits may make
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
    """Make every batch norm the affine map that it is in evaluation, in 16 bits, in place.

    Afterwards mean 0, variance 1 − ε, weight a, bias c: half the numbers to store. Train
    such a model with its norms in eval mode, as :func:`fitcompress.finetune` does; batch
    statistics are gone.
    """
    for module in model.modules():
        if not isinstance(module, FOLDABLE) or not _complete(module) or is_folded(module):
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


def round_leftovers_(model: nn.Module) -> None:
    """Round parameters and buffers that are on no grid to 16 bits, in place."""
    for module in model.modules():
        if isinstance(module, WeightGrid) or isinstance(module, FOLDABLE) and is_folded(module):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if name == "original":  # the latent weight of a grid
                continue
            with torch.no_grad():
                tensor.copy_(to_half(tensor))


def _complete(norm: _BatchNorm) -> bool:
    stats = norm.running_mean is not None and norm.running_var is not None
    return stats and norm.weight is not None and norm.bias is not None


def _unit_variance(norm: _BatchNorm) -> float:
    return float(torch.tensor(1.0 - norm.eps, dtype=torch.float32))
