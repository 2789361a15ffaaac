"""What single layers may be given, by name."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from fitcompress.errors import OptionError
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Rule", "allowed_cells"]


@dataclass(frozen=True)
class Rule:
    """Restricts the levels of all layers whose name matches a pattern.

    All rules that match a layer hold together.

    Attributes:
        pattern: Of names, with ``*``, ``?`` and ``[…]``: ``"layer1.*"``.
        min_bits: Fewest bits of a fixed-point grid; steps have none and stay.
        max_bits: Most of them.
        min_sparsity: Least share of weights that the mask drops.
        max_sparsity: Largest one; 0 keeps the layer dense.
        grid: The only grid allowed, for a layer that is fixed.

    Example:
        >>> Rule("fc", min_bits=6, max_sparsity=0.5).matches("fc")
        True
    """

    pattern: str
    min_bits: int | None = None
    max_bits: int | None = None
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise OptionError("pattern", got=repr(self.pattern), wanted="a string")
        for name, bits in (("min_bits", self.min_bits), ("max_bits", self.max_bits)):
            whole = isinstance(bits, numbers.Integral) and not isinstance(bits, bool)
            if bits is not None and not (whole and bits >= 1):
                raise OptionError(name, got=repr(bits), wanted="an integer from 1 on")
        for name in ("min_sparsity", "max_sparsity"):
            share = getattr(self, name)
            if share is not None and not (
                isinstance(share, float | int | np.floating) and 0 <= share <= 1
            ):
                raise OptionError(name, got=repr(share), wanted="a share, 0 to 1")
        if self.grid is not None and not isinstance(self.grid, Grid):
            raise OptionError("grid", got=repr(self.grid), wanted="a Grid")
        for low, high in (
            (self.min_bits, self.max_bits),
            (self.min_sparsity, self.max_sparsity),
        ):
            if low is not None and high is not None and low > high:
                raise OptionError(
                    f"the rule for {self.pattern!r} allows nothing",
                    got=f"at least {low} and at most {high}",
                    wanted="a minimum up to the maximum",
                )

    def matches(self, name: str) -> bool:
        """Tell whether a layer of this name is meant."""
        return fnmatchcase(name, self.pattern)

    def allows_grid(self, grid: Grid) -> bool:
        """Tell whether a matching layer may have this grid."""
        if self.grid is not None and grid != self.grid:
            return False
        if grid.bits is None:
            return True
        most = grid.bits if self.max_bits is None else self.max_bits
        return (self.min_bits or 0) <= grid.bits <= most

    def allowed_sparsities(self, sparsity: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which of these shares of dropped weights a matching layer may have."""
        low = 0.0 if self.min_sparsity is None else self.min_sparsity
        high = 1.0 if self.max_sparsity is None else self.max_sparsity
        within: NDArray[np.bool_] = (sparsity >= low - 1e-9) & (sparsity <= high + 1e-9)
        return within


def allowed_cells(
    rules: tuple[Rule, ...],
    sensitivity: Sensitivity,
    grids: NDArray[np.int64],
    kept: int,
) -> NDArray[np.bool_]:
    """Return which cells of a problem the rules leave, [L, G', S].

    Args:
        rules: The rules.
        sensitivity: The measured table.
        grids: Indices of the grids that may be used, [G'].
        kept: S, the number of sparsities that may be used, the first ones.

    Raises:
        OptionError: A pattern matches no layer, or a layer is left without a level.
    """
    allowed = np.ones((len(sensitivity.names), len(grids), kept), dtype=np.bool_)
    for rule in rules:
        matched = [i for i, name in enumerate(sensitivity.names) if rule.matches(name)]
        if not matched:
            raise OptionError(
                f"the pattern {rule.pattern!r} matches no layer",
                got=", ".join(sensitivity.names[:6]),
                fix="use the names of the sensitivity; * matches any characters",
            )
        by_grid = np.array(
            [rule.allows_grid(sensitivity.grids[g]) for g in grids], dtype=np.bool_
        )
        for i in matched:
            dropped = rule.allowed_sparsities(sensitivity.sparsity[i, :kept])
            allowed[i] &= by_grid[:, None] & dropped[None, :]
    for empty in np.flatnonzero(~allowed.any(axis=(1, 2))):
        name = sensitivity.names[int(empty)]
        raise OptionError(
            f"the rules leave layer {name!r} no level",
            got=", ".join(repr(r.pattern) for r in rules if r.matches(name)),
            wanted="grids and sparsities that were measured",
            fix="relax the rules, or measure more levels",
        )
    return allowed
