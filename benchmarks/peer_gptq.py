"""GPTQ: error feedback as published, on networks of Linear and Conv2d layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from fitcompress.model import compressible_layers
from peer_files import (
    Coded,
    Compressed,
    bits_of,
    largest_code,
    scales,
    set_weight,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DAMPING = 0.01  # over the mean diagonal of H


def gptq(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    bits: int | Mapping[str, int],
    *,
    clip: bool = True,
    norms: bool = False,
    sequential: bool = True,
) -> Compressed:
    """Quantize layer after layer by error feedback (Frantar et al. 2022, 2210.17323).

    Fixed point as in :func:`rounded_to_bits`; :func:`error_feedback` has the method.
    The target of every layer is its dense weight: drift of its inputs is not corrected.

    Args:
        model: The trained network of Linear and Conv2d layers; unchanged.
        inputs: Calibration batches.
        bits: b, for all layers or by the layer's name.
        clip: Take the scale of least squared error instead of max|w| / q.
        norms: Re-estimate the batch norms afterwards, which is not in the publication.
        sequential: H from the inputs of the network quantized so far, as published;
            otherwise from those of the dense network.
    """
    small, layers = copy.deepcopy(model).eval(), {}
    dense = {layer.name: layer for layer in compressible_layers(model)}
    source = small if sequential else copy.deepcopy(model).eval()
    for name in _order_of_use(small, list(dense), inputs[0]):
        matrix, b = dense[name].matrix().double(), bits_of(bits, name)
        scale = scales(matrix, b, clip)
        moments = _second_moments(source, name, inputs)
        groups = len(moments)
        parts = zip(matrix.chunk(groups), moments, scale.chunk(groups), strict=True)
        codes = torch.cat(
            [error_feedback(w, h, s, max_code=largest_code(b)) for w, h, s in parts]
        )
        layers[name] = Coded(codes, scale, b)
        set_weight(small, name, layers[name])
    return store(model, layers, inputs if norms else None)


def error_feedback(
    matrix: torch.Tensor,
    h: torch.Tensor,
    scale: torch.Tensor,
    *,
    max_code: int,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Return the codes of one layer, each column's error fed into the later columns.

    With U the upper Cholesky factor of (H + δI)⁻¹, columns in falling order of H_jj:
    k_j = clip(round(w_j / Δ), ±q);  w_j' −= (w_j − Δ k_j) U_jj' / U_jj  for j' > j.

    Args:
        matrix: The weight, float64 [rows, columns].
        h: E[x xᵀ] of the layer's inputs, float64 [columns, columns].
        scale: Δ, [rows].
        max_code: q.
        damping: δ over the mean diagonal of H.

    Returns:
        Integers, float64 [rows, columns].
    """
    w, h = matrix.clone(), h.clone()
    dead = h.diagonal() == 0  # inputs that are always zero
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True, stable=True)
    h.diagonal().add_(damping * h.diagonal().mean())
    w, h = w[:, order], h[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    step = torch.where(scale > 0, scale, 1.0).double()
    codes = torch.empty_like(w)
    for j in range(w.shape[1]):
        code = (w[:, j] / step).round().clamp(-max_code, max_code)
        error = (w[:, j] - code * step) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        codes[:, order[j]] = code
    return codes


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


@torch.no_grad()
def _second_moments(
    model: nn.Module, name: str, inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return E[x xᵀ] of a layer's inputs, float64 [groups, columns, columns]."""
    module, caught = model.get_submodule(name), []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        caught.append(args[0])
        raise _ReachedError

    handle, total, rows = module.register_forward_pre_hook(catch), None, 0
    try:
        for x in inputs:
            try:
                model(x)
            except _ReachedError:
                columns = _columns(module, caught.pop().double())
                product = columns.transpose(1, 2) @ columns
                total = product if total is None else total + product
                rows += columns.shape[1]
    finally:
        handle.remove()
    assert total is not None
    return total / rows


def _columns(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return inputs as the rows that the weight multiplies, [groups, rows, columns]."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        message = f"wanted Linear or zero-padded Conv2d layers; got {module}"
        raise TypeError(message)
    assert not isinstance(module.padding, str)
    unfolded = F.unfold(
        x, module.kernel_size, module.dilation, module.padding, module.stride
    )
    groups = unfolded.unflatten(1, (module.groups, -1))
    return groups.permute(1, 0, 3, 2).flatten(1, 2)


@torch.no_grad()
def _order_of_use(model: nn.Module, names: list[str], x: torch.Tensor) -> list[str]:
    """Return the layers in the order in which a forward pass calls them first."""
    used: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, __, name=name: used.append(name)
        )
        for name in names
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(used))
