"""The metric of the paper: the Fisher information of the network as it is at a node."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fitcompress import ops
from fitcompress.data.batches import take
from fitcompress.errors import OptionError, PlanMismatchError
from fitcompress.model import compressible_layers
from fitcompress.model.modes import evaluating
from fitcompress.ranks import Ranks
from fitcompress.search.path_metric import Steps
from fitcompress.sensitivity.estimate import estimate
from fitcompress.sensitivity.fisher import MEMORY, FisherEstimator
from fitcompress.sensitivity.shares import numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.model import Layer
    from fitcompress.sensitivity.table import Grid, Sensitivity

__all__ = ["MovingMetric"]


class MovingMetric:
    """Fisher diagonals of the quantized, pruned network at every node of a path.

    At a node with weights θ̂ the diagonal F(θ̂) = (1/N) Σ_i G_i ∘ G_i is estimated from
    per-sample gradients of the network *with these weights*; the lengths
    Σ_j F_j (θ̂_j − θ̂'_j)² of the steps from there and the norms Σ_j F_j θ̂_j² use it.
    θ̂ always comes from the weights of the model, masked and then rounded, as in the
    table: never from weights that were rounded before, and what rounds to zero counts
    as kept.

    A call costs one Fisher estimate over all batches and four small tables a layer.
    Each node is measured once. ``kind="refresh"`` measures the expanded nodes: a path
    of P steps costs P estimates at least. ``kind="exact"`` measures every child too,
    L + 1 times as many.

    Zandonati et al. 2023, arXiv 2302.07612, section 3.

    Args:
        model: The network that the sensitivity was measured of. Its weights are
            replaced during a call and restored to the bit afterwards, whatever happens.
        batches: Inputs or (inputs, targets), kept in memory.
        sensitivity: The table that is searched; its grids and masks are meant.
        loss_fn: (output, targets) → mean loss of the samples. None: cross-entropy with
            labels sampled from the network at the node.
        kind: ``"refresh"`` or ``"exact"``.
        samples: How many samples to use, None for all.
        memory: Bytes that activations may take; larger batches are cut.
        seed: Seeds the sampled labels.

    Raises:
        OptionError: The kind is unknown.
        PlanMismatchError: The sensitivity is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sensitivity: Sensitivity,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        *,
        kind: Literal["refresh", "exact"] = "refresh",
        samples: int | None = None,
        memory: int = MEMORY,
        seed: int = 0,
    ) -> None:
        if kind not in ("refresh", "exact"):
            raise OptionError(
                "the metric is unknown", got=repr(kind), wanted="refresh or exact"
            )
        self._model, self._loss_fn, self._table = model, loss_fn, sensitivity
        self._layers = compressible_layers(model)
        found = [(layer.name, layer.shape) for layer in self._layers]
        wanted = list(zip(sensitivity.names, sensitivity.shapes, strict=True))
        if found != wanted:
            differing = sorted({str(n) for n, _ in set(found) ^ set(wanted)})
            raise PlanMismatchError(
                "the sensitivity is of another model",
                got=f"layers that differ, such as {', '.join(differing[:3])}",
                fix="measure this model again",
            )
        self._batches = list(take(iter(batches), samples))
        self._samples, self._memory, self._seed = samples, memory, seed
        self._known: dict[tuple[int, ...], Steps] = {}
        self.kind = kind
        self.estimates = 0

    @property
    def exact(self) -> bool:
        """Whether children are measured, too."""
        return self.kind == "exact"

    def __repr__(self) -> str:
        """Name the kind; a model is no part of a method's name."""
        return f"MovingMetric(kind={self.kind!r})"

    def steps(self, grids: NDArray[np.int64], sparsity: int) -> Steps:
        """Return lengths and norms under F of the network at these levels.

        Args:
            grids: Indices of the table's grids, [L].
            sparsity: Index of the table's sparsities.

        Raises:
            NonFiniteError: The loss or a gradient is not finite at this node.
            CalibrationError: The loss does not depend on a layer.
        """
        key = (*grids.tolist(), sparsity)
        if key not in self._known:
            self._known[key] = self._measured(grids.tolist(), sparsity)
        return self._known[key]

    def _measured(self, grids: list[int], sparsity: int) -> Steps:
        """Estimate F with the node's weights in the model, then tabulate."""
        self.estimates += 1
        estimator = FisherEstimator(self._model, self._layers, memory=self._memory)
        with evaluating(self._model), self._weights(grids, sparsity):
            moments = estimate(
                estimator,
                numbered(self._batches),
                self._loss_fn,
                samples=None,
                checkpoint=None,
                seed=self._seed,
                progress=False,
                ranks=Ranks.single(),
            )
        rows = [
            self._row(i, moments.diagonal(layer.name).view(layer.shape), grid, sparsity)
            for i, (layer, grid) in enumerate(zip(self._layers, grids, strict=True))
        ]
        length, norm, after, prune, pruned = np.array(rows).T
        return Steps(length, norm, after, float(prune.sum()), float(pruned.sum()))

    def _row(
        self, index: int, diagonal: torch.Tensor, grid: int, sparsity: int
    ) -> tuple[float, ...]:
        """Return a layer's grid_length, norm, norm_after, prune_length, norm_pruned."""
        layer, table = self._layers[index], self._table
        chosen = _neighbours(table.grids, grid)
        shares = table.sparsity[index, sparsity : sparsity + 2].tolist()
        cells = ops.distortion_table(
            layer.matrix(),
            layer.matrix_of(diagonal).contiguous(),
            [g.bits for g in chosen if g.bits is not None],
            [g.step for g in chosen if g.step is not None],
            shares,
        )
        return (
            float(cells.grid_length[0, 0]),
            float(cells.norm[0, 0]),
            float(cells.norm[-1, 0]),
            float(cells.prune_length[0, 0]),
            float(cells.norm[0, -1]),
        )

    @contextlib.contextmanager
    def _weights(self, grids: list[int], sparsity: int) -> Iterator[None]:
        """Run a block with the weights of a node in the model."""
        saved = [layer.weight.detach().clone() for layer in self._layers]
        try:
            with torch.no_grad():
                for i, (layer, grid) in enumerate(
                    zip(self._layers, grids, strict=True)
                ):
                    share = float(self._table.sparsity[i, sparsity])
                    rounded = _rounded(layer, self._table.grids[grid], share)
                    layer.weight.copy_(layer.weight_of(rounded))
            yield
        finally:
            with torch.no_grad():
                for layer, weight in zip(self._layers, saved, strict=True):
                    layer.weight.copy_(weight)


def _neighbours(grids: tuple[Grid, ...], index: int) -> list[Grid]:
    """Return a grid and the next coarser one of its family, if there is one."""
    chosen = grids[index : index + 2]
    return [g for g in chosen if g.family == chosen[0].family]


def _rounded(layer: Layer, grid: Grid, share: float) -> torch.Tensor:
    """Return θ̂ as a matrix: the mask of a share, and rounding, as in the table."""
    weight = layer.matrix()
    bits = [grid.bits] if grid.bits is not None else []
    steps = [grid.step] if grid.step is not None else []
    table = ops.distortion_table(weight, None, bits, steps, [share])
    largest = 0
    if grid.bits is not None:
        largest = 2 ** (grid.bits - 1) - 1
        scale = table.range / largest
    else:
        scale = torch.full_like(table.range[:1], grid.step or 0.0)
    mask = ops.pack_mask(ops.level_mask(table, 0, weight))
    return ops.fake_quantize_prune(weight, scale, mask, largest)
