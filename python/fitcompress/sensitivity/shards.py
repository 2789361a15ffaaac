"""Tensors of a model in ``.safetensors`` files, read one at a time."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import safetensors
import torch

from fitcompress.errors import FormatError

if TYPE_CHECKING:
    import os

logger = logging.getLogger(__name__)

__all__ = ["ShardTensor", "Shards", "WeightSource"]

INDEX = "model.safetensors.index.json"
OURS = {
    "fitcompress.sensitivity": "a sensitivity",
    "fitcompress-fisher": "Fisher moments",
    "fitcompress.shards": "the checkpoint of a measurement",
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class ShardTensor:
    """Where a tensor is, without its values.

    Attributes:
        name: Its name.
        path: The file that holds it.
        dtype: As safetensors spells it: F32, BF16, F16, …
        shape: Its shape.
        start: Where its bytes begin in the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of its bytes, if it can be read."""
        return self.size * (4 if self.dtype == "F32" else 2)


class WeightSource(Protocol):
    """Where weights come from, one at a time: files, or what makes them up.

    Attributes:
        tensors: Name → what is known of it; its ``path`` and ``start`` are for messages
            only, unless it is read from there.
        files: The files that are read, which nothing may be written to.
    """

    tensors: dict[str, ShardTensor]
    files: tuple[Path, ...]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, of float32, bfloat16 or float16; the same every time.

        It may be in the memory of the one before, which is let go of.
        """
        ...

    def reserve(self, size: int) -> None:
        """Make room for tensors of up to ``size`` bytes."""
        ...


class Shards:
    """The tensors of one file, of a folder, or of an index.

    Args:
        path: A ``.safetensors`` file, a folder with some, or the ``.index.json`` that
            names them. A folder's own index comes before its files. Of a folder
            without one, files that this package wrote are no part.

    Attributes:
        tensors: Name → where it is, sorted by name.
        files: The files that hold them.

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
        if path.is_dir():
            files = [file for file in files if _written_by_us(file) is None]
        if not files:
            raise FormatError(f"{path} has no tensors", wanted=".safetensors files")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.tensors: dict[str, ShardTensor] = {}
        self.files = tuple(files)
        for file in files:
            self._list(file)
        self.tensors = dict(sorted(self.tensors.items()))
        if expected is not None:
            self._check(path, expected)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of float32, bfloat16 or float16, until the next is read.

        All share one buffer, which does not fall to pieces as memory that is freed and
        taken again does; and only the tensor's own bytes are read, since the pages of a
        mapped file would count as memory of this process.

        Raises:
            FormatError: The file is damaged, or the tensor of another type.
        """
        found = self.readable(name)
        self.reserve(found.bytes)
        data = self._buffer[: found.bytes]
        left = memoryview(cast("bytearray", data.numpy()))
        try:
            with found.path.open("rb") as file:
                file.seek(found.start)
                while len(left) and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise FormatError(
                f"{name} in {found.path} cannot be read: {error}"
            ) from error
        if len(left):
            raise FormatError(f"{found.path} ends within {name}")
        return data.view(DTYPES[found.dtype]).view(found.shape)

    def readable(self, name: str) -> ShardTensor:
        """Return where a tensor is that can be read.

        Raises:
            KeyError: There is none of that name.
            FormatError: It is of another type.
        """
        found = self.tensors[name]
        if found.dtype not in DTYPES:
            raise FormatError(
                f"{name} in {found.path} has another type",
                got=found.dtype,
                wanted=", ".join(DTYPES),
            )
        return found

    def reserve(self, size: int) -> None:
        """Make room for tensors of up to ``size`` bytes."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one first
            self._buffer = torch.empty(size, dtype=torch.uint8)

    def release(self) -> None:
        """Give the memory of the buffer back, and with it what was read last."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _list(self, path: Path) -> None:
        try:
            starts = _starts(path)
            with safetensors.safe_open(path, framework="pt") as file:
                if (ours := _kind(file.metadata())) is not None:
                    raise FormatError(f"{path} holds no tensors of a model", got=ours)
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
                    dtype, start = part.get_dtype(), starts[name]
                    self.tensors[name] = ShardTensor(name, path, dtype, shape, start)
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


def _kind(metadata: dict[str, str] | None) -> str | None:
    """Return what a file that this package wrote is; None of any other."""
    found = metadata or {}
    if found.get("format") == "fitcompress":
        return "a packed model"
    return next((OURS[key] for key in found if key in OURS), None)


def _written_by_us(path: Path) -> str | None:
    """Return what this package wrote to ``path``, or None; damage is found later."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            kind = _kind(file.metadata())
    except (safetensors.SafetensorError, OSError):
        return None
    if kind is not None:
        logger.info("%s is %s, and no part of the model", path, kind)
    return kind


def _starts(path: Path) -> dict[str, int]:
    """Return where the bytes of every tensor begin; safetensors checks the header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            return {}
        header = file.read(size)
    try:
        known = json.loads(header)
        return {
            name: 8 + size + int(about["data_offsets"][0])
            for name, about in known.items()
            if name != "__metadata__"
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ):
        return {}


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise FormatError(
            f"{path} is no index", wanted="weight_map: tensor → file"
        ) from error
    for file in names.values():
        if Path(file).name != file or "\0" in file:
            raise FormatError(f"{path} names a file elsewhere", got=repr(file))
    return dict(names)
