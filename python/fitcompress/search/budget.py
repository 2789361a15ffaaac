"""What a plan may cost."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from fitcompress.errors import FitcompressError
from fitcompress.search.rules import Rule

__all__ = ["Budget", "BudgetError", "Cost"]

Cost = Literal["size", "bops", "latency"]

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
    """Upper bounds on costs of the compressed network, one to three at once.

    Attributes:
        size: Bytes of the packed file, everything counted: a number of bytes,
            ``"40KB"``, ``"1.5MiB"``, ``"5%"`` of the float32 parameters, or
            ``"2.1bpw"``, bits of file per weight.
        bops: Bit operations, MACs · weight bits · activation bits: a number or ``"2%"``
            of those in float32.
        latency_ms: Milliseconds, by the table that the search is given.
        rules: What single layers may be given.
        groups: Names of layers that must share grid and sparsity, a tuple a group;
            :func:`fitcompress.fused_groups` finds those that runtimes fuse.
        latency: The same as ``latency_ms`` as ``"4ms"``, or ``"50%"`` of the float
            network's latency in a table of ``measure_latency``; or a number of
            milliseconds.

    Example:
        >>> Budget(size="5%").size_bytes(dense_bytes=1_000_000)
        50000
        >>> str(Budget(size="5%", bops="2%"))
        'size ≤ 5% and bops ≤ 2%'
    """

    size: int | float | str | None = None
    bops: int | float | str | None = None
    latency_ms: float | None = None
    rules: tuple[Rule, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    latency: int | float | str | None = None

    def __post_init__(self) -> None:
        if not self.costs:
            raise BudgetError(
                "a budget bounds a cost",
                got="none",
                wanted="size, bops, latency or latency_ms, or several of them",
                fix='write Budget(size="5%") or Budget(bops="10%")',
            )
        for name, value in (("size", self.size), ("bops", self.bops)):
            if value is not None:
                _bound(name, value, 10**6, 10**6)
        if self.latency_ms is not None and self.latency is not None:
            raise BudgetError(
                "the latency is bounded twice",
                got=f"latency_ms={self.latency_ms!r} and latency={self.latency!r}",
                wanted="one of them",
            )
        if "latency" in self.costs:
            self.latency_ns(1.0)
        object.__setattr__(self, "rules", _rules(self.rules))
        object.__setattr__(self, "groups", _groups(self.groups))

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The bounded costs, of ``"size"``, ``"bops"`` and ``"latency"``."""
        bounds: tuple[tuple[Cost, object], ...] = (
            ("size", self.size),
            ("bops", self.bops),
            ("latency", self.latency if self.latency_ms is None else self.latency_ms),
        )
        return tuple(cost for cost, bound in bounds if bound is not None)

    def size_bytes(self, dense_bytes: int) -> int:
        """Return the bound in bytes for a model of ``dense_bytes`` float32 bytes."""
        if self.size is None:
            raise BudgetError("this budget does not bound the size", got=self)
        return _bound("size", self.size, dense_bytes, dense_bytes // 4)

    def bops_limit(self, dense_bops: int) -> int:
        """Return the bound in bit operations for a model of ``dense_bops``."""
        if self.bops is None:
            raise BudgetError("this budget does not bound the bit operations", got=self)
        return _bound("bops", self.bops, dense_bops, 0)

    def latency_ns(self, float_ms: float | None = None) -> int:
        """Return the bound in whole nanoseconds.

        Args:
            float_ms: Latency of the float network, which shares refer to.

        Raises:
            BudgetError: There is no bound, or it is a share and nothing is known that
                it could refer to.
        """
        bound = self.latency_ms
        if self.latency is not None:
            number, unit = _parse_latency(self.latency)
            if unit == "%":
                if float_ms is None:
                    raise BudgetError(
                        "a share of a latency refers to that of the float network",
                        got=repr(self.latency),
                        wanted="a table of measure_latency, or milliseconds",
                        fix="search(…, latency=measure_latency(…))",
                    )
                number *= Fraction(str(float(float_ms))) / 100
            return min(int(number * 10**6), LARGEST)
        if bound is None:
            raise BudgetError("this budget does not bound the latency", got=self)
        return _milliseconds(bound)

    def __str__(self) -> str:
        bounds = {"size": self.size, "bops": self.bops, "latency": self.latency}
        if "latency" in self.costs and not isinstance(self.latency, str):
            milliseconds = self.latency if self.latency_ms is None else self.latency_ms
            bounds["latency"] = f"{milliseconds} ms"
        return " and ".join(f"{cost} ≤ {bounds[cost]}" for cost in self.costs)


def _rules(rules: Any) -> tuple[Rule, ...]:
    found = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    wrong = [rule for rule in found if not isinstance(rule, Rule)]
    if wrong or isinstance(rules, str) or not isinstance(rules, Iterable):
        raise BudgetError(
            "rules are no Rule objects",
            got=repr(rules if isinstance(rules, str) or not wrong else wrong[0]),
            wanted="a tuple of rules",
            fix='write rules=(Rule("fc", min_bits=6),)',
        )
    return found


def _groups(groups: Any) -> tuple[tuple[str, ...], ...]:
    outer = tuple(groups) if isinstance(groups, Iterable) else (groups,)
    loose = [g for g in outer if isinstance(g, str) or not isinstance(g, Iterable)]
    found = () if loose else tuple(tuple(group) for group in outer)
    named = [name for group in found for name in group]
    typed = all(isinstance(name, str) for name in named)
    if loose or not typed or len(set(named)) < len(named):
        raise BudgetError(
            "a layer can be in one group only",
            got=repr(groups if loose else found),
            wanted="tuples of names, each name once",
            fix='write groups=(("conv1", "conv2"),)',
        )
    return found


def _bound(name: str, value: float | str, reference: int, weights: int) -> int:
    number, unit = _parse(value)
    if unit == "%":
        return min(int(reference * number / 100), LARGEST)
    if name == "bops":
        if unit:
            raise _bad(value, 'a positive number of bit operations, or "5%" of float32')
        return min(int(number), LARGEST)
    if unit == "BPW":
        return min(int(weights * number / 8), LARGEST)
    return min(int(number * _UNITS[unit or "B"]), LARGEST)


def _milliseconds(bound: Any) -> int:
    real = isinstance(bound, numbers.Real) and not isinstance(bound, bool)
    if not real or not 0 < bound < math.inf:
        raise _bad_latency(bound, "a positive number of milliseconds")
    if bound > LARGEST:
        return LARGEST
    # The decimal that was written, not the binary fraction next to it.
    return min(int(Fraction(str(float(bound))) * 10**6), LARGEST)


def _parse_latency(bound: object) -> tuple[Fraction, str]:
    """Return a bound on the latency as milliseconds, or per cent and ``"%"``."""
    if not isinstance(bound, str):
        return Fraction(_milliseconds(bound), 10**6), ""
    match = re.fullmatch(
        r"\s*([0-9]{0,12}\.?[0-9]{1,12})\s*(ms|us|µs|s|%)?\s*", bound, re.ASCII
    )
    if match is None or not Fraction(match[1]):
        wanted = 'a positive number of milliseconds, "4ms", "300us" or "50%"'
        raise _bad_latency(bound, wanted)
    if match[2] == "%":
        return Fraction(match[1]), "%"
    factors = {"s": Fraction(1000), "us": Fraction(1, 1000), "µs": Fraction(1, 1000)}
    return Fraction(match[1]) * factors.get(match[2], Fraction(1)), ""


def _bad_latency(bound: object, wanted: str) -> BudgetError:
    what = "this bound on the latency cannot be understood"
    return BudgetError(what, got=repr(bound), wanted=wanted)


def _parse(value: float | str) -> tuple[Fraction, str]:
    try:
        text = str(value).strip().upper().replace("_", "")
    except ValueError as error:
        raise _bad(value) from error
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:E[+-]?[0-9]+)?)\s*([A-Z%]*)", text)
    if match is None:
        raise _bad(value)
    unit = match[2]
    if unit not in {"", "%", "BPW", *_UNITS} or not 1e-18 < float(match[1]) < 1e30:
        raise _bad(value)
    return Fraction(match[1]), unit


SIZES = 'a positive number of bytes, or "5%", "40KB", "1.5MiB", "2.1bpw"'


def _bad(value: object, wanted: str = SIZES) -> BudgetError:
    try:
        got = repr(value)
    except ValueError:  # an integer of thousands of digits
        got = "a number that is far too large"
    return BudgetError("this budget cannot be understood", got=got, wanted=wanted)
