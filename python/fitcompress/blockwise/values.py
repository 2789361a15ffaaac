"""The values of the two networks: dense ones from shards, compressed ones from stages.

Computed in float32 on either side, as the file's dtype holds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fitcompress.errors import FormatError, NonFiniteError
from fitcompress.quantize import to_half
from fitcompress.storage.coded_weight import dense_weights, read_coded
from fitcompress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fitcompress.blockwise.work import Coded
    from fitcompress.sensitivity.shards import Shards

__all__ = ["Values", "fill"]

NAMES = {"F32": "f4", "BF16": "bf2", "F16": "f2"}


class Values:
    """Tensors of both networks by name.

    Args:
        shards: Of the dense network.
        shapes: Name → shape that the model wants of it.

    Raises:
        FormatError: A tensor is missing, of another shape, or of a type that cannot be
            read.
    """

    def __init__(self, shards: Shards, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shards = shards
        self._coded: dict[str, Coded] = {}
        for name, shape in shapes.items():
            found = shards.tensors.get(name)
            if found is None or found.shape != shape:
                raise FormatError(
                    f"the files do not hold the model of the config: {name}",
                    got="no such tensor" if found is None else found.shape,
                    wanted=shape,
                    fix="download the model again",
                )
            shards.readable(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the files."""
        return DTYPES[NAMES[self._shards.tensors[name].dtype]]

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor of the dense network, float32, of its own.

        Raises:
            NonFiniteError: It is not finite.
        """
        read = self._shards.read(name)
        value = read.clone() if read.dtype == torch.float32 else read.float()
        return self._finite(name, value)

    def dense_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Return rows of a tensor of the dense network, float32.

        Raises:
            NonFiniteError: They are not finite.
        """
        return self._finite(name, self._shards.read(name)[index].float())

    def _finite(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"{name} has values that are NaN or infinite",
                wanted="finite numbers only",
                fix="download the model again",
            )
        return value

    def know(self, layers: dict[str, Coded]) -> None:
        """Take the layers of finished stages; forget those known before."""
        self._coded = layers

    def leftover(self, name: str, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor of the compressed network that is on no grid, as stored.

        Args:
            name: Its name.
            shift: What a bias takes on.
        """
        value = self.dense(name)
        if self.dtype(name) != torch.float32:
            value = value.to(self.dtype(name))
        else:
            value = to_half(value)
        if shift is None:
            return value
        moved = (value.double() + shift.double()).float()
        return to_half(moved).to(value.dtype)

    def small(self, name: str) -> torch.Tensor:
        """Return a tensor of the compressed network, float32."""
        layer, _, kind = name.rpartition(".")
        coded = self._coded.get(layer)
        if coded is not None and kind == "weight":
            (weight,) = dense_weights([read_coded(coded.section)])
            return weight.float()
        shift = coded.shift if coded is not None else None
        return self.leftover(name, shift).float()


def fill(
    module: nn.Module,
    prefix: str,
    value: Callable[[str], torch.Tensor],
    names: Iterable[str] | None = None,
) -> nn.Module:
    """Give the parameters of a module without values theirs, in place.

    Args:
        module: On the meta device.
        prefix: Its name in the model.
        value: Returns the value of a name.
        names: Only these parameters of it; None for all.
    """
    wanted = None if names is None else set(names)
    for path, child in module.named_modules():
        for name in [n for n, p in child._parameters.items() if p is not None]:
            own = f"{path}.{name}" if path else name
            if wanted is None or own in wanted:
                child._parameters[name] = nn.Parameter(
                    value(f"{prefix}.{own}"), requires_grad=False
                )
    return module.eval()
