"""Moments of the inputs of a group of layers, on disk as soon as they are complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fitcompress import ops
from fitcompress.blockwise.rows import Rows, RowWriter
from fitcompress.errors import NonFiniteError

if TYPE_CHECKING:
    from fitcompress.blockwise.work import Work

__all__ = ["GroupSums", "names_of", "read_cross", "read_second"]

PARTS = ("fitted", "held_out")
ONE = (1, 1, 1)


@dataclass
class GroupSums:
    """Σ x̂ x̂ᵀ and Σ z x̂ᵀ of one group over some of the calibration tokens.

    x̂ are the inputs in the compressed network with a 1 appended. z are those in the
    dense one if the group has several layers, or one with more rows than columns: then
    W Σ z x̂ᵀ is what a layer needs. Else they are the layer's dense outputs. Products in
    float32, sums in float64.

    Attributes:
        second: float64 [columns + 1, columns + 1].
        cross: float64 [columns or rows, columns + 1].
    """

    second: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def zeros(cls, columns: int, others: int) -> GroupSums:
        """Return sums over nothing."""
        return cls(
            torch.zeros(columns + 1, columns + 1, dtype=torch.float64),
            torch.zeros(others, columns + 1, dtype=torch.float64),
        )

    def add_(self, now: torch.Tensor, other: torch.Tensor) -> None:
        """Add some tokens.

        Args:
            now: x̂ without the 1, float32 [tokens, columns].
            other: z, float32 [tokens, columns or rows].
        """
        ops.input_moments_(
            self.second[None],
            self.cross[None],
            now.reshape(*now.shape, *ONE),
            other.reshape(*other.shape, *ONE),
            ONE,
            ONE,
            ONE,
            (0, 0, 0),
            ONE,
        )

    def write(self, work: Work, stage: str, part: str) -> None:
        """Write the sums to the folder.

        Raises:
            NonFiniteError: They are NaN or infinite.
        """
        for kind, tensor in (("second", self.second), ("cross", self.cross)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"an input of the layers of {stage} is not finite",
                    wanted="finite activations in float32",
                    fix="look for NaN in the model, or for tokens that overflow",
                )
            path = work.rows(_name(stage, part, kind))
            count, width = tensor.shape
            with RowWriter(path, count, width, torch.float64) as file:
                file.write(0, tensor)


def names_of(stage: str, *, held_out: bool) -> list[str]:
    """Return the names of the files of rows that hold the sums of a stage."""
    parts = PARTS if held_out else PARTS[:1]
    return [_name(stage, p, kind) for p in parts for kind in ("second", "cross")]


def read_second(work: Work, stage: str, part: str, columns: int) -> torch.Tensor:
    """Return Σ x̂ x̂ᵀ of ``"fitted"`` or ``"held_out"`` tokens."""
    path = work.rows(_name(stage, part, "second"))
    return Rows(path, columns + 1, torch.float64).read()


def read_cross(work: Work, stage: str, part: str, columns: int) -> torch.Tensor:
    """Return Σ z x̂ᵀ of ``"fitted"`` or ``"held_out"`` tokens."""
    path = work.rows(_name(stage, part, "cross"))
    return Rows(path, columns + 1, torch.float64).read()


def _name(stage: str, part: str, kind: str) -> str:
    return f"{stage}.{part}.{kind}"
