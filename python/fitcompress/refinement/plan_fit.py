"""From the loss rises of whole plans to factors on a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress import ops
from fitcompress.refinement.regression import (
    Fit,
    cross_validated,
    rank_correlation,
    simplest,
)
from fitcompress.sensitivity.mask_rules import importance_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fitcompress.model import Layer
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.table import Sensitivity

    Reals = NDArray[np.float64]
    Indices = NDArray[np.int64]

__all__ = ["Drawn", "Fitted", "fit_plans", "squared_error"]


@dataclass(frozen=True)
class Drawn:
    """Cells of random plans, indices into a table, [P, L] each.

    Attributes:
        grids: Grid of every layer.
        masks: Sparsity.
        inputs: Activation bits, or None where inputs stay as they are.
    """

    grids: Indices
    masks: Indices
    inputs: Indices | None = None

    @property
    def stages(self) -> int:
        """How many loss rises a plan has: of its weights, and with its inputs."""
        return 1 if self.inputs is None else 2


@dataclass(frozen=True)
class Fitted:
    """A table in the units of the loss rises that it was fitted to.

    Attributes:
        distortion: [L, G, S].
        inputs: Activation distortion, [L, A]; that of the table where no plan has any.
        report: How well plans are predicted that were not fitted to.
    """

    distortion: Reals
    inputs: Reals
    report: dict[str, Any]


def squared_error(
    layers: Sequence[Layer], table: Sensitivity, masks: MaskRule | None
) -> Reals:
    """Return ½ Σ (θ − θ̂)² of all cells of a table, [L, G, S]."""
    bits = [g.bits for g in table.grids if g.bits is not None]
    steps = [g.step for g in table.grids if g.step is not None]
    by_name = {layer.name: layer for layer in layers}
    return np.stack(
        [
            ops.distortion_table(
                by_name[name].matrix(),
                None,
                bits,
                steps,
                shares.tolist(),
                importance=None
                if masks is None
                else importance_of(masks, by_name[name]),
            ).distortion.numpy()
            for name, shares in zip(table.names, table.sparsity, strict=True)
        ]
    )


def _bases(table: Sensitivity, kind: str, squared: Reals) -> dict[str, Reals]:
    """Return what D' may be proportional to in a layer, [L, G, S] each."""
    bases = {
        "table": table.distortion,
        "squared error": squared,
        "both": np.sqrt(table.distortion * squared),
    }
    if kind == "step":
        steps = np.array([grid.step or 0.0 for grid in table.grids])
        law = table.sizes[:, None, None] * np.square(steps)[:, None] / 24
        bases["step law"] = np.broadcast_to(law, squared.shape)
    return bases


def fit_plans(
    table: Sensitivity, kind: str, squared: Reals, drawn: Drawn, y: Reals
) -> Fitted:
    """Return the table of the bases that predict best, in the units of y.

    Args:
        table: The sensitivity.
        kind: Family of grids that the plans are of.
        squared: What ``squared_error`` returned.
        drawn: P plans.
        y: Their loss rises, positive, [P, stages].
    """
    layers = np.arange(len(table.names))
    grids, masks = drawn.grids, drawn.masks
    bases = _bases(table, kind, squared)
    plain = {name: base[:, :, :1] for name, base in bases.items()}
    rest = {name: np.maximum(base - plain[name], 0.0) for name, base in bases.items()}
    masked = bool(masks.any())
    pairs = [(a, b) for a in bases for b in (bases if masked else (a,))]
    parts = 1 + masked + (drawn.inputs is not None)
    groups = np.repeat(np.arange(parts), len(layers))
    fits: list[Fit] = []
    origins: list[tuple[str, str]] = []
    for one, other in pairs:
        columns = [plain[one][layers, grids, 0], rest[other][layers, grids, masks]]
        x = _with_inputs(columns[: 1 + masked], table, drawn)
        if not (x > 0).any(1).all():
            continue
        found = cross_validated(x, y.ravel(), groups, together=drawn.stages)
        fits += found
        origins += [(one, other)] * len(found)
    if not fits:  # nothing hurts: zero weights
        nothing = {"plans": len(y), "base": "none"}
        return Fitted(table.distortion, table.activation_distortion, nothing)
    chosen = simplest(fits)
    fit, (one, other) = fits[chosen], origins[chosen]
    factors = fit.factors.reshape(parts, -1)
    before = [table.distortion[layers, grids, masks]]
    report = {
        "plans": len(y),
        "base": one,
        "ridge": fit.ridge,
        "spearman_before": rank_correlation(
            _with_inputs(before, table, drawn).sum(1), y.ravel()
        ),
        "spearman": rank_correlation(fit.predicted, y.ravel()),
        "log_error": fit.error,
        "factors": _relative(factors[0]),
    }
    distortion = factors[0][:, None, None] * plain[one]
    if masked:
        report |= {"mask_base": other, "mask_factors": _relative(factors[1])}
        distortion = distortion + factors[1][:, None, None] * rest[other]
    inputs = table.activation_distortion
    if drawn.inputs is not None:
        report["input_factors"] = _relative(factors[-1])
        inputs = factors[-1][:, None] * inputs
    return Fitted(np.broadcast_to(distortion, table.distortion.shape), inputs, report)


def _with_inputs(columns: list[Reals], table: Sensitivity, drawn: Drawn) -> Reals:
    """Return all columns, [P · stages, M]: a plan's stages lie together."""
    weights = np.concatenate(columns, axis=1)
    if drawn.inputs is None:
        return weights
    inputs = table.activation_distortion[np.arange(len(table.names)), drawn.inputs]
    stages = [[weights, np.zeros_like(inputs)], [weights, inputs]]
    both = np.stack([np.concatenate(stage, axis=1) for stage in stages], axis=1)
    return both.reshape(-1, both.shape[-1])


def _relative(factors: Reals) -> list[float]:
    """Return factors over their geometric mean."""
    logs = np.log(factors.ravel())
    return [float(f) for f in np.exp(logs - logs.mean()).round(4)]
