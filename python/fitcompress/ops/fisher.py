"""Squares and squared norms of per-sample weight gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.ops.library import fake_in_place, register_fake

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ghost_norms_", "square_accumulate_", "winograd_norms_"]


def square_accumulate_(
    moment: Tensor | None,
    norms: Tensor | None,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squares of per-sample weight gradients, element by element and in all.

    With e = output_grad and x = input, the gradient of sample b for output o and input
    channel c at kernel offset k is a sum over the places p of all images n of b:

        G_b[o, (c, k)] = Σ_n Σ_p e[n, o, p] · x[n, c, stride·p + dilation·k]

        moment += scale · Σ_b G_b ∘ G_b,    norms[b] += scale · ‖G_b‖².

    Products are summed in float32; no per-sample gradient is stored as a whole. Costs
    B·P·O·I multiply-adds, with P places and I = C · kernel volume inputs.

    Args:
        moment: [G·O, I] float32 or float64; changed in place. None: not needed.
        norms: [B] float64; changed in place. None: not needed.
        output_grad: [N, G·O, D', H', W'], float32, bfloat16 or float16, any strides.
        input: [N, G·C, D, H, W] of the same type, padded already, with any strides. A
            linear map's P positions lie along the last dimension: [N, C, 1, 1, P].
        kernel: Size of the kernel in depth, height and width.
        stride: Stride of the windows.
        dilation: Dilation of the kernel.
        groups: G.
        images: Consecutive rows of both tensors that make up one sample, N = B·images.
        scale: Factor of all squares.

    Raises:
        ValueError: If shapes, types, devices or values do not fit.

    Source: the empirical Fisher diagonal as used by FIT (Zandonati et al., 2022,
    arXiv 2210.08502).
    """
    torch.ops.fitcompress.square_accumulate_(
        moment,
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


def ghost_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squared norms of per-sample weight gradients, without the gradients.

    For the G_b of `square_accumulate_`,

        ‖G_b‖² = Σ_{p,q} (Σ_o e[o, p] e[o, q]) (Σ_k Σ_c x[c, s p + d k] x[c, s q + d k])

    over all pairs of the sample's positions: cheap where these are few. The right
    factor comes from products of the input's own places, shifted by d k and summed, so
    a kernel of any size costs no more products than one of size 1. Costs about
    ½ B P² (O + C) multiply-adds.

    Args:
        norms: [B] float64; changed in place.
        output_grad: As in `square_accumulate_`.
        input: As in `square_accumulate_`.
        kernel: Size of the kernel in depth, height and width.
        stride: Stride of the windows.
        dilation: Dilation of the kernel.
        groups: G.
        images: Consecutive rows of both tensors that make up one sample.
        scale: Factor of all norms.

    Raises:
        ValueError: If shapes, types, devices or values do not fit.

    Source: Goodfellow, 2015, Efficient per-example gradient computations,
    arXiv 1510.01799; for sequences Li et al., 2021, arXiv 2110.05679.
    """
    torch.ops.fitcompress.ghost_norms_(
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


def winograd_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 3, 3),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squared norms of per-sample gradients of a 3×3 convolution, on the CPU.

    The G_b of `square_accumulate_` by minimal filtering: with the gradient cut into
    tiles e_t of 4 × 4 places, and x_t the 6 × 6 inputs that such a tile sees,

        G_b = A (Σ_t (C e_t Cᵀ) ∘ (D x_t Dᵀ)) Aᵀ,    norms[b] += scale · ‖G_b‖²,

    where A, C and D interpolate and evaluate at the points 0, ±1, ±2 and ∞. The sum
    over tiles is 36 products of matrices. Costs 36·B·T·O·C multiply-adds for T = P/16
    tiles, a quarter of those of the direct form, and the transforms; individual
    elements of G_b are a few times less exact than there, their norm is not.

    Args:
        norms: [B] float64; changed in place.
        output_grad: As in `square_accumulate_`, with D' = 1.
        input: As in `square_accumulate_`.
        kernel: (1, 3, 3).
        stride: (1, 1, 1).
        dilation: (1, 1, 1).
        groups: 1.
        images: Consecutive rows of both tensors that make up one sample.
        scale: Factor of all norms.

    Raises:
        ValueError: If shapes, types, devices or values do not fit, or a tensor is not
            on the CPU.

    Source: Winograd, 1980, Arithmetic complexity of computations; for convolutional
    networks Lavin and Gray, 2016, arXiv 1509.09308.
    """
    for name, tensor in (
        ("norms", norms),
        ("output_grad", output_grad),
        ("input", input),
    ):
        if tensor.device.type != "cpu":
            message = (
                f"winograd_norms_: {name} must be on the CPU, the only device of this "
                f"op, got {tensor.device}"
            )
            raise ValueError(message)
    torch.ops.fitcompress.winograd_norms_(
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


for _name in __all__:
    register_fake(_name, fake_in_place)
