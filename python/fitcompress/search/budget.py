"""What a plan may cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from fitcompress.errors import FitcompressError

__all__ = ["Budget", "BudgetError"]

_UNITS = {
    "B": 1,
    "KB": 1000,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1024,
    "MIB": 2**20,
    "GIB": 2**30,
}
LARGEST = 2**59  # more is no bound at all, and bits of it fit into 64


class BudgetError(FitcompressError, ValueError):
    """A budget that cannot be understood."""


@dataclass(frozen=True)
class Budget:
    """An upper bound on exactly one cost of the compressed network.

    Attributes:
        size: Bytes of the packed file, everything counted: a number of bytes,
            ``"40KB"``, ``"1.5MiB"``, ``"5%"`` of the float32 parameters, or
            ``"2.1bpw"``, bits of file per weight.
        bops: Bit operations, MACs · weight bits · activation bits: a number or ``"2%"``
            of those in float32.

    Example:
        >>> Budget(size="5%").size_bytes(dense_bytes=1_000_000)
        50000
    """

    size: int | float | str | None = None
    bops: int | float | str | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bops is None):
            raise BudgetError(
                "a budget bounds one cost",
                got=f"size={self.size!r}, bops={self.bops!r}",
                wanted="either size or bops",
                fix='write Budget(size="5%") or Budget(bops="10%")',
            )
        self._resolve(10**6, 10**6)

    @property
    def kind(self) -> str:
        """``"size"`` or ``"bops"``."""
        return "bops" if self.size is None else "size"

    def size_bytes(self, dense_bytes: int) -> int:
        """Return the bound in bytes for a model of ``dense_bytes`` float32 bytes."""
        if self.size is None:
            raise BudgetError("this budget does not bound the size", got=self)
        return self._resolve(dense_bytes, dense_bytes // 4)

    def bops_limit(self, dense_bops: int) -> int:
        """Return the bound in bit operations for a model of ``dense_bops``."""
        if self.bops is None:
            raise BudgetError("this budget does not bound the bit operations", got=self)
        return self._resolve(dense_bops, 0)

    def _resolve(self, reference: int, weights: int) -> int:
        value = self.size if self.size is not None else self.bops
        number, unit = _parse(value)
        if unit == "%":
            return min(int(reference * number / 100), LARGEST)
        if self.bops is not None:
            if unit:
                raise _bad(value)
            return min(int(number), LARGEST)
        if unit == "BPW":
            return min(int(weights * number / 8), LARGEST)
        return min(int(number * _UNITS[unit or "B"]), LARGEST)

    def __str__(self) -> str:
        return f"{self.kind} ≤ {self.size if self.size is not None else self.bops}"


def _parse(value: int | float | str | None) -> tuple[Fraction, str]:
    text = str(value).strip().upper().replace("_", "")
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:E[+-]?[0-9]+)?)\s*([A-Z%]*)", text)
    if match is None:
        raise _bad(value)
    unit = match[2]
    if unit not in {"", "%", "BPW", *_UNITS} or not 1e-18 < float(match[1]) < 1e30:
        raise _bad(value)
    return Fraction(match[1]), unit


def _bad(value: object) -> BudgetError:
    return BudgetError(
        "this budget cannot be understood",
        got=repr(value),
        wanted='a positive number of bytes, or "5%", "40KB", "1.5MiB", "2.1bpw"',
    )
