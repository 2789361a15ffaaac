"""Fisher information for ``measure_shards``, in any form in which it is given."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fitcompress.data.batches import digest
from fitcompress.errors import (
    FitcompressError,
    FormatError,
    NonFiniteError,
    OptionError,
)
from fitcompress.sensitivity.moments import FisherMoments
from fitcompress.sensitivity.shards import Shards, ShardTensor

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["SUFFIX", "ShardFisher", "layer_name"]

SUFFIX = ".weight"


def layer_name(tensor: ShardTensor) -> str:
    """Return the name of the layer that a weight belongs to."""
    return tensor.name.removesuffix(SUFFIX)


class ShardFisher:
    """What is known of the Fisher information of layers.

    Args:
        given: Layer → trace; moments; where shards with diagonals are; or None for
            F = 1.

    Attributes:
        kind: What was given, in a word.
        moments: The moments, or None if something else was given.
    """

    def __init__(
        self,
        given: Mapping[str, float] | FisherMoments | str | os.PathLike[str] | None,
    ) -> None:
        self.moments = given if isinstance(given, FisherMoments) else None
        self._traces = given if isinstance(given, Mapping) else None
        self._shards: Shards | None = None
        if given is not None and self.moments is None and self._traces is None:
            self._shards = Shards(given)  # type: ignore[arg-type]
            self.kind = "Shards"
        else:
            self.kind = "none" if given is None else type(given).__name__

    def check(self, layers: Sequence[ShardTensor]) -> None:
        """Raise unless every layer has Fisher information of its shape.

        Numbers in files are looked at when they are read.

        Raises:
            OptionError: A layer has none, or a trace is negative or no number.
            NonFiniteError: A trace is NaN or infinite.
            FormatError: A diagonal has another shape or type than numbers of a weight.
        """
        if self.moments is not None and self.moments.samples < 1:
            raise OptionError("the Fisher moments are of no sample")
        for layer in layers:
            name, rows = layer_name(layer), layer.shape[0]
            shapes = {layer.shape, (rows, layer.size // rows)}
            shape = layer.shape
            try:
                if self.moments is not None:
                    _check_values(name, self.moments.mean_trace(name))
                    if name in self.moments.squares:
                        shape = tuple(self.moments.squares[name].shape)
                elif self._traces is not None:
                    _check_values(name, float(self._traces[name]))
                elif self._shards is not None:
                    shapes = {layer.shape}
                    shape = self._shards.readable(layer.name).shape
            except KeyError as error:
                raise OptionError(
                    "a layer has no Fisher information", got=name
                ) from error
            except (TypeError, ValueError) as error:
                if isinstance(error, FitcompressError):
                    raise
                raise OptionError(
                    f"the Fisher trace of {name} is no number", got=str(error)[:200]
                ) from error
            if shape not in shapes:
                raise FormatError(
                    f"the diagonal of {name} has another shape",
                    got=shape,
                    wanted=layer.shape,
                )

    def of(self, layer: ShardTensor) -> tuple[torch.Tensor | float | None, float]:
        """Return the diagonal or trace of a layer for its table, and its trace.

        Raises:
            NonFiniteError: The diagonal has values that are NaN or infinite.
            OptionError: It has values that are negative.
            FormatError: It cannot be read.
        """
        name, rows = layer_name(layer), layer.shape[0]
        if self.moments is not None:
            trace = self.moments.mean_trace(name)
            if name not in self.moments.squares:
                return trace, trace
            diagonal = self.moments.diagonal(name).view(rows, -1)
            _check_values(name, diagonal)
            return diagonal, trace
        if self._traces is not None:
            trace = float(self._traces[name])
            return trace, trace
        if self._shards is None:
            return None, float(layer.size)
        diagonal = self._shards.read(layer.name).reshape(rows, -1).float()
        _check_values(name, diagonal)
        return diagonal, float(diagonal.sum(dtype=torch.float64))

    def key(self) -> str:
        """Return what differs between all that could be given.

        Of files: names, sizes and times; of all else: every number, to the last bit.
        """
        if self._shards is not None:
            found = [(file, file.stat()) for file in self._shards.files]
            return repr([(str(f), s.st_size, s.st_mtime_ns) for f, s in found])
        if self._traces is not None:
            return repr(sorted((k, float(v).hex()) for k, v in self._traces.items()))
        if self.moments is None:
            return "none"
        check = zlib.crc32(repr((self.moments.samples, self.moments.loss)).encode())
        for kind in (self.moments.trace, self.moments.squares):
            for name, values in sorted(kind.items()):
                check = zlib.crc32(name.encode(), check)
                check = digest(values, check)
        return f"{check:08x}"


def _check_values(name: str, values: torch.Tensor | float) -> None:
    """Raise unless Fisher information is finite and not negative.

    Raises:
        NonFiniteError: It is NaN or infinite.
        OptionError: It is negative.
    """
    tensor = torch.as_tensor(values)
    low, high = (float(bound) for bound in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(
            f"the Fisher information of {name} is not finite", got=f"{low} … {high}"
        )
    if low < 0:
        raise OptionError(f"the Fisher information of {name} is negative", got=low)
