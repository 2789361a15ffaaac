"""Calibration tokens, cut into parts that run at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.compensate.calibration import BATCHES, HELD_OUT, LARGEST_BATCH, PASSES
from fitcompress.errors import DataError, EmptyLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Chunk", "Tokens", "checked_tokens"]

AT_A_TIME = 2048  # tokens, or one sequence


@dataclass(frozen=True)
class Chunk:
    """Some whole sequences.

    Attributes:
        first: The first of them.
        sequences: Their number.
        length: Tokens of each.
    """

    first: int
    sequences: int
    length: int

    @property
    def row(self) -> int:
        """Row of the first token in files of rows."""
        return self.first * self.length

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.sequences * self.length

    def shaped(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [tokens, width] as [sequences, length, width]."""
        return rows.reshape(self.sequences, self.length, -1)


@dataclass(frozen=True)
class Tokens:
    """Sequences of one length.

    Attributes:
        ids: int64 [sequences, length].
    """

    ids: torch.Tensor

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.ids.numel()

    @property
    def held_out(self) -> bool:
        """Whether some are kept from the fit of corrections, to judge them."""
        return any(self._held(i) for i in range(len(self.ids)))

    def chunks(self, *, held_out: bool) -> list[Chunk]:
        """Return the sequences that are held out, or the others, in parts."""
        length = self.ids.shape[1]
        most = max(1, AT_A_TIME // max(length, 1))
        wanted = [i for i in range(len(self.ids)) if self._held(i) == held_out]
        return [
            Chunk(first, count, length) for first, count in _neighbours(wanted, most)
        ]

    def _held(self, sequence: int) -> bool:
        """Whether it is of every fourth batch, as ``apply`` would cut them."""
        samples = len(self.ids)
        size = max(
            min(LARGEST_BATCH, math.ceil(samples / BATCHES)),
            math.ceil(samples / PASSES),
        )
        return sequence // size % HELD_OUT == HELD_OUT - 1


def checked_tokens(tokens: Any, vocabulary: int) -> Tokens:
    """Return calibration tokens as they are used.

    Args:
        tokens: Integers [sequences, length].
        vocabulary: Number of tokens that there are.

    Raises:
        DataError: They are something else, or not below ``vocabulary``.
        EmptyLoaderError: There are none.
    """
    ids, got = _converted(tokens)
    if ids is None:
        raise DataError(
            "the calibration tokens cannot be used",
            got=got,
            wanted="integers [sequences, length], without padding",
            fix="cut the text into sequences of one length",
        )
    if not ids.numel():
        raise EmptyLoaderError(
            "there are no calibration tokens",
            got=tuple(ids.shape),
            wanted="some ten thousand",
        )
    ids = ids.detach().cpu().long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(
            "a calibration token is none of the model's",
            got=f"{int(ids.min())} to {int(ids.max())}",
            wanted=f"0 to {vocabulary - 1}",
            fix="use the tokenizer of the model",
        )
    return Tokens(ids)


def _converted(tokens: Any) -> tuple[torch.Tensor | None, str]:
    """Return tokens as a matrix of integers or None, and what they are."""
    try:
        if not torch.is_tensor(tokens):
            tokens = torch.from_numpy(np.array(tokens, order="C"))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        return None, f"{type(tokens).__name__}: {error}"[:200]
    number = tokens.is_floating_point() or tokens.is_complex()
    if tokens.dim() != 2 or number or tokens.dtype == torch.bool:
        return None, f"{tokens.dtype} of shape {tuple(tokens.shape)}"
    return tokens, ""


def _neighbours(wanted: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of runs of neighbours, up to ``most`` in each."""
    start = 0
    for end in range(1, len(wanted) + 1):
        whole = end - start == most or end == len(wanted)
        if whole or wanted[end] != wanted[end - 1] + 1:
            yield wanted[start], end - start
            start = end
