"""The rule for masks that removes whole filters, chosen beforehand."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fitcompress.errors import PlanMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from fitcompress.model import Layer

__all__ = ["KeptFilters", "kept_filters", "removed_share"]

DETAIL = "kept_filters"


@dataclass(frozen=True)
class KeptFilters:
    """Filters that stay; all weights of the others go first.

    A level whose sparsity is :func:`removed_share` then drops these filters exactly.

    Attributes:
        kept: Layer name → rows of the weight that stay; other layers go by |θ|.
    """

    kept: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """``kept_filters``."""
        return DETAIL

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return 1 for filters that stay and 0 for others, float32 [rows, columns].

        Raises:
            PlanMismatchError: The layer has no filter of that number.
        """
        if layer.name not in self.kept:
            return layer.matrix().abs()
        rows = self.kept[layer.name]
        if any(not 0 <= row < layer.rows for row in rows):
            raise PlanMismatchError(
                f"layer {layer.name!r} lacks a filter that is to stay",
                got=f"{layer.rows} filters",
                wanted=f"filters {min(rows)} … {max(rows)}",
                fix="use the plan with the model that it was made for",
            )
        found = torch.zeros(layer.rows, layer.columns, device=layer.weight.device)
        found[list(rows)] = 1
        return found

    def digest(self) -> str:
        """Return a hash of the filters."""
        text = json.dumps({name: list(rows) for name, rows in self.kept.items()})
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_filters(details: Mapping[str, Any]) -> KeptFilters | None:
    """Return the rule for the filters that the details of a plan keep, if they do.

    Raises:
        PlanMismatchError: They are no lists of numbers.
    """
    given = details.get(DETAIL)
    if not given:
        return None
    fair = isinstance(given, dict) and all(
        isinstance(rows, (list, tuple)) and rows and all(type(r) is int for r in rows)
        for rows in given.values()
    )
    if not fair:
        raise PlanMismatchError(
            f"the plan's {DETAIL} cannot be used",
            got=str(given)[:100],
            wanted="layer name → numbers of filters",
            fix="make the plan again",
        )
    return KeptFilters({name: tuple(rows) for name, rows in given.items()})


def removed_share(rows: int, kept: int, columns: int) -> float:
    """Return the sparsity that drops ``rows − kept`` whole filters, not a weight less.

    A mask drops ⌊s · n⌋ of n weights; the quotient of two integers may round down.
    """
    dropped, size = (rows - kept) * columns, rows * columns
    share = dropped / max(size, 1)
    while int(share * size) < dropped:
        share = math.nextafter(share, 1.0)
    return share
