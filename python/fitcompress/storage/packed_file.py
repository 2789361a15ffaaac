"""A packed file, opened: layers decoded when they are asked for."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcompress.errors import FormatError
from fitcompress.search.plan import Plan
from fitcompress.storage.activations import StoredActivation, read_activations
from fitcompress.storage.coded_weight import StoredWeight, dense_weights, read_coded
from fitcompress.storage.container import ACTIVATIONS, Index, StoredSection, open_index
from fitcompress.storage.sections import Leftovers, read_leftovers
from fitcompress.storage.tensors import is_number

if TYPE_CHECKING:
    import os
    from types import TracebackType

    import torch

__all__ = ["PackedFile"]


class PackedFile:
    """What a packed file holds, mapped into memory and decoded layer by layer.

    Opening reads the index only. A layer's checksum is verified when it is first asked
    for, its codes are decoded each time: nothing but the index stays in memory. ::

        with fc.PackedFile("small.safetensors") as packed:
            for name in packed.names:
                weight = packed.weight(name)

    The file must not be changed or shortened while it is open; replacing it, as
    ``save`` does, is fine.

    Args:
        path: What ``save`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: Container or index are damaged or something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with Path(path).open("rb") as file:
            try:
                self._map: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise FormatError("this is no packed file", got="0 bytes") from error
        self._view = memoryview(self._map)
        self.size_bytes: int = len(self._view)
        self.index: Index | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        index = self.index = open_index(self._view)
        self._info, self._version = index.plan, index.version
        self._coded: dict[str, StoredSection] = {}
        others: dict[str, StoredSection] = {}
        for section in index.sections:
            kind, name = section.entry.get("kind"), section.entry.get("name")
            if kind == "codes" and isinstance(name, str):
                if name in self._coded:
                    raise FormatError(
                        "a weight stands in the file twice", got=name[:100]
                    )
                self._coded[name] = section
            elif kind in ("leftovers", ACTIVATIONS) and kind not in others:
                others[str(kind)] = section
            else:
                raise FormatError("an unknown or repeated section", got=str(kind)[:50])
        if "leftovers" not in others or not self._coded:
            raise FormatError("the file has no coded weight or no leftovers")
        self._others = others

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back. What was decoded stays valid."""
        # A traceback may still hold parts of the map; then it closes with the last one.
        with contextlib.suppress(BufferError):
            for section in self.index.sections if self.index else []:
                section.body.release()
            self._view.release()
            self._map.close()

    @property
    def names(self) -> list[str]:
        """Qualified names of the modules whose weights are coded, in order."""
        return list(self._coded)

    @property
    def version(self) -> int:
        """Version of the format."""
        return self._version

    def coded_bytes(self, name: str) -> int:
        """Return the bytes of a coded weight, its checksum included.

        Raises:
            KeyError: No weight of this module is coded.
        """
        return len(self._coded[name].body)

    def section_bytes(self) -> tuple[int, int]:
        """Return the bytes of the leftovers and of the quantizers of inputs."""
        inputs = self._others.get(ACTIVATIONS)
        left = len(self._others["leftovers"].body)
        return left, 0 if inputs is None else len(inputs.body)

    def stored(self, name: str) -> StoredWeight:
        """Return a weight as it is stored, its checksum verified.

        Raises:
            KeyError: No weight of this module is coded.
            FormatError: It is damaged.
        """
        return read_coded(self._coded[name].load())

    def weight(self, name: str) -> torch.Tensor:
        """Return the dense weight of a module, bit for bit the compressed model's.

        Raises:
            KeyError: No weight of this module is coded.
            FormatError: It is damaged.
        """
        (weight,) = dense_weights([self.stored(name)])
        return weight

    @cached_property
    def leftovers(self) -> Leftovers:
        """Everything that is not coded.

        Raises:
            FormatError: It is damaged, or contradicts the coded weights.
        """
        left = read_leftovers(self._others["leftovers"].load())
        coded = {f"{name}.weight" if name else "weight" for name in self._coded}
        others, aliases = set(left.state()), left.aliases
        twice = (coded & others) | (set(aliases) & (coded | others))
        unknown = set(aliases.values()) - coded - others
        if unknown:
            raise FormatError(
                "a tensor shares another that is missing", got=sorted(unknown)[0][:100]
            )
        if twice:
            raise FormatError(
                "a tensor stands in the file twice", got=sorted(twice)[0][:100]
            )
        return left

    @cached_property
    def activations(self) -> dict[str, StoredActivation]:
        """Module name → quantizer of its input.

        Raises:
            FormatError: A quantizer is damaged.
        """
        section = self._others.get(ACTIVATIONS)
        return {} if section is None else read_activations(section.load())

    @cached_property
    def plan(self) -> Plan:
        """The plan with the levels as stored.

        Raises:
            FormatError: A level or the plan is impossible.
        """
        return self.plan_with({name: self.stored(name) for name in self._coded})

    def plan_with(self, weights: dict[str, StoredWeight]) -> Plan:
        """Return the plan of weights that were read already."""
        inputs, info = self.activations, self._info
        levels = {
            name: replace(w.level, activation_bits=inputs[name].bits)
            if name in inputs
            else w.level
            for name, w in weights.items()
        }
        gap, limit = info.get("gap"), info.get("limit_bytes")
        distortion = info.get("distortion", 0.0)
        try:
            if not all(n is None or is_number(n) for n in (gap, limit, distortion)):
                raise ValueError
            return Plan(
                levels=levels,
                method=info["method"],
                distortion=float(distortion),
                size_bytes=self.size_bytes,
                bops=sum(level.bops for level in levels.values()),
                limit_bytes=limit,
                status=info["status"],
                gap=None if gap is None else float(gap),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                "the plan in the file is impossible", got=str(info)[:200]
            ) from error
