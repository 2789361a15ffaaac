"""Tensors of a model in ``.safetensors`` files, read one at a time."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from fitcompress.errors import FormatError

if TYPE_CHECKING:
    import os

    import torch

__all__ = ["ShardTensor", "Shards"]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardTensor:
    """Where a tensor is, without its values.

    Attributes:
        name: Its name.
        path: The file that holds it.
        dtype: As safetensors spells it: F32, BF16, F16, …
        shape: Its shape.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


class Shards:
    """The tensors of one file, of a folder, or of an index.

    Args:
        path: A ``.safetensors`` file, a folder with some, or the ``.index.json`` that
            names them. A folder's own index comes before its files.

    Attributes:
        tensors: Name → where it is, sorted by name.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        FormatError: A file is damaged or missing, a tensor is in two files, or an index
            does not fit its files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.exists():
            message = f"no such file or folder: {path}"
            raise FileNotFoundError(message)
        if path.is_dir() and (path / INDEX).exists():
            path = path / INDEX
        expected = _read_index(path) if path.suffix == ".json" else None
        if expected is not None:
            files = sorted({path.parent / file for file in expected.values()})
        else:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FormatError(f"{path} has no tensors", wanted=".safetensors files")
        self.tensors: dict[str, ShardTensor] = {}
        for file in files:
            self._list(file)
        self.tensors = dict(sorted(self.tensors.items()))
        if expected is not None:
            self._check(path, expected)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; nothing else of its file stays in memory.

        Raises:
            FormatError: The file is damaged.
        """
        path = self.tensors[name].path
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(f"{name} in {path} cannot be read: {error}") from error
        return tensor

    def _list(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in self.tensors:
                        raise FormatError(
                            f"{name} is in two files",
                            got=f"{self.tensors[name].path.name} and {path.name}",
                            wanted="every tensor once",
                            fix="point at the index, or remove files of another model",
                        )
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found = ShardTensor(name, path, part.get_dtype(), shape)
                    self.tensors[name] = found
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error

    def _check(self, index: Path, expected: dict[str, str]) -> None:
        for name, file in expected.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.path != index.parent / file:
                raise FormatError(
                    f"{index} does not fit its files",
                    got=f"no {name} in {file}",
                    fix="download the model again",
                )


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} is no index", wanted="weight_map: tensor → file"
        ) from error
    for file in names.values():
        if Path(file).name != file:
            raise FormatError(f"{path} names a file elsewhere", got=file)
    return dict(names)
