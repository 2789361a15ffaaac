"""Fisher information for ``measure_shards``, in any form in which it is given."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fitcompress.data.batches import digest
from fitcompress.errors import FormatError, OptionError
from fitcompress.sensitivity.moments import FisherMoments
from fitcompress.sensitivity.shards import Shards, ShardTensor

if TYPE_CHECKING:
    import os

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

    def of(self, layer: ShardTensor) -> tuple[torch.Tensor | float | None, float]:
        """Return the diagonal or trace of a layer for its table, and its trace.

        Raises:
            OptionError: There is none.
            FormatError: Its shape is not that of the weight.
        """
        name, rows = layer_name(layer), layer.shape[0]
        try:
            if self.moments is not None:
                trace = self.moments.mean_trace(name)
                if name not in self.moments.squares:
                    return trace, trace
                return self.moments.diagonal(name).view(rows, -1), trace
            if self._traces is not None:
                return float(self._traces[name]), float(self._traces[name])
            if self._shards is None:
                return None, float(layer.size)
            diagonal = self._shards.read(layer.name)
        except KeyError as error:
            raise OptionError("a layer has no Fisher information", got=name) from error
        if tuple(diagonal.shape) != layer.shape:
            raise FormatError(
                f"the diagonal of {name} has another shape",
                got=tuple(diagonal.shape),
                wanted=layer.shape,
            )
        diagonal = diagonal.reshape(rows, -1).float()
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
