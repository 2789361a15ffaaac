"""What a path search asks a metric that changes along the path."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PathMetric", "Steps"]


class Steps(NamedTuple):
    """Lengths of the steps from a node, and norms, under the Fisher diagonal F there.

    θ̂ are the node's weights. Where a layer has no coarser grid, or the network no
    higher sparsity, the numbers of that step are not read.
    """

    grid_length: NDArray[np.float64]
    """Σ F (θ̂ − θ̂')² per layer, [L], θ̂' on the next grid."""
    norm: NDArray[np.float64]
    """Σ F θ̂² per layer, [L]."""
    norm_after: NDArray[np.float64]
    """Σ F θ̂'² per layer, [L], θ̂' on the next grid."""
    prune_length: float
    """Σ F (θ̂ − θ̂')² over all layers, θ̂' at the next sparsity."""
    norm_pruned: float
    """Σ F θ̂'² over all layers, θ̂' at the next sparsity."""


class PathMetric(Protocol):
    """A metric that is measured anew along the path."""

    @property
    def exact(self) -> bool:
        """Whether every child's norm is to be measured at that child.

        If not, it is the norm of the child's weights under F at its parent.
        """
        ...

    def steps(self, grids: NDArray[np.int64], sparsity: int) -> Steps:
        """Return the steps from a node.

        Args:
            grids: Indices of ``Sensitivity.grids``, [L].
            sparsity: Index of a sparsity.
        """
        ...
