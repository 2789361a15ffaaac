"""The forms in which norms of per-sample gradients can be computed, and their costs.

With P positions of a sample, I inputs and O outputs of the weight:

=========  ==========================================  ==============================
form       ‖G‖²                                        multiply-adds of a sample
=========  ==========================================  ==============================
outer      ‖e‖² ‖a‖², one position only                I + O
ghost      Σ_pq (E Eᵀ)_pq (A Aᵀ)_pq                    ½ P² (O + C), and more
direct     Σ (Eᵀ A)², which the diagonal needs anyway  P I O
winograd   the same, of a 3×3 kernel, by tiles of 4×4  ¼ P I O, and more
rows       Σ over the entries of an embedding          P · columns
=========  ==========================================  ==============================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress import ops

if TYPE_CHECKING:
    from fitcompress.sensitivity.contraction import Contraction, Entries


__all__ = ["accumulate", "accumulate_entries", "choose_form", "form_costs"]

NORMS_ONLY = {"ghost": ops.ghost_norms_, "winograd": ops.winograd_norms_}
SQUARE = 3  # squaring an element of the gradient, in multiply-adds


def form_costs(c: Contraction) -> dict[str, float]:
    """Return what each form that can be used costs for a sample.

    In multiply-adds at the rate of a matrix product; the constants were fitted to
    measured times.
    """
    positions, inputs, outputs = c.positions, c.inputs, c.outputs
    products = c.groups * inputs * outputs
    costs = {"direct": float(products * (positions + SQUARE)), "ghost": _ghost_cost(c)}
    if positions == 1 and c.groups == 1:
        costs["outer"] = float(inputs + outputs)
    if _is_plain_3x3(c):
        tiles = c.images * -(-c.rows.shape[3] // 4) * -(-c.rows.shape[4] // 4)
        products = 36 * tiles * outputs * c.channels
        transforms = 364 * tiles * (outputs + c.channels) + 186 * outputs * c.channels
        costs["winograd"] = 1.13 * products + transforms
    return costs


def _is_plain_3x3(c: Contraction) -> bool:
    """Whether :func:`ops.winograd_norms_` takes it."""
    ones = (1, 1, 1)
    return (
        c.kernel == (1, 3, 3)
        and c.stride == c.dilation == ones
        and c.groups == c.rows.shape[2] == 1
        and c.rows.device.type == "cpu"
    )


def _ghost_cost(c: Contraction) -> float:
    """Return the cost of :func:`ops.ghost_norms_`; see csrc/fisher/ghost_norms.h."""
    # Offsets of the kernel that differ by multiples of the stride read one part of the
    # input, and share the products of its places.
    parts = shifted = 1.0
    offsets = 1
    for place, k, s, d in zip(
        c.rows.shape[2:], c.kernel, c.stride, c.dilation, strict=True
    ):
        parts *= len({d * i % s for i in range(k)})
        shifted = (place + d * (k - 1) // s) / max(place, 1)  # of the last dimension
        offsets *= k
    p = c.positions
    rounded = -(-p // 16) * 16
    pairs = rounded * (rounded + 16) / 2
    features = c.outputs + parts * c.channels
    return c.groups * (
        (pairs + 10 * p) * features
        + 1.5 * offsets * p * p * shifted
        + 750 * p * (1 + 2 * parts)
        + 45_000 * (1 + parts)
    )


def choose_form(c: Contraction) -> str:
    """Return the cheapest form for the norms."""
    costs = form_costs(c)
    return min(costs, key=lambda form: costs[form])


def accumulate(
    c: Contraction, squares: torch.Tensor | None, norms: torch.Tensor
) -> str:
    """Add the squares of every sample's gradient.

    Args:
        c: The gradient.
        squares: [groups·O, I] float32, Σ_i G_i ∘ G_i; None if only norms are wanted.
        norms: [B] float64, ‖G_i‖².

    Returns:
        The form that was used for the norms.
    """
    form = choose_form(c)
    shape = (c.kernel, c.stride, c.dilation, c.groups, c.images)
    if form == "outer":
        _outer(c, squares, norms)
    elif form in NORMS_ONLY and squares is None:
        NORMS_ONLY[form](norms, c.rows, c.columns, *shape)
    else:
        form = "direct"
        ops.square_accumulate_(squares, norms, c.rows, c.columns, *shape)
    return form


def _outer(c: Contraction, squares: torch.Tensor | None, norms: torch.Tensor) -> None:
    """A single position: G_i = e aᵀ, so that squares are products of squares."""
    e = c.rows.flatten(1).float().square()
    a = c.columns.flatten(1).float().square()
    norms += e.sum(1, dtype=torch.float64) * a.sum(1, dtype=torch.float64)
    if squares is not None:
        squares += e.mT @ a


def accumulate_entries(
    e: Entries, squares: torch.Tensor | None, norms: torch.Tensor, rows: int
) -> str:
    """Add the squares of an embedding's gradients, entry by entry that occurs."""
    values = e.values.flatten(0, 1).float()
    batch = len(e.indices)
    # One number for a sample and an entry; few of all possible ones occur.
    sample = torch.arange(batch, device=e.indices.device)
    pairs = (e.indices + rows * sample[:, None]).flatten()
    found, place = torch.unique(pairs, return_inverse=True)
    sums = values.new_zeros(len(found), values.shape[1])
    sums.index_add_(0, place, values)
    added = sums.square_()
    norms.index_add_(0, found // rows, added.sum(1, dtype=torch.float64))
    if squares is not None:
        squares.index_add_(0, found % rows, added)
    return "rows"
