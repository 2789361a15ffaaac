"""``inspect``: what a packed file holds, layer by layer, without a model."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fitcompress.storage.packed_file import PackedFile

if TYPE_CHECKING:
    import os

    from fitcompress.search.plan import Plan
    from fitcompress.storage.coded_weight import Coding, StoredWeight

__all__ = ["FileContents", "TensorContents", "inspect"]

WIDTH = 110


@dataclass(frozen=True)
class TensorContents:
    """One coded weight in a file.

    Attributes:
        name: Qualified name of the module.
        shape: Of the weight.
        dtype: Of the weight, as in the model.
        grid: Its levels: bits or a step.
        scales: How many there are.
        sparsity: Share of its codes that are 0, masked or rounded.
        levels: How many different codes occur.
        bytes: In the file: scales, stream and checksum.
        entropy_bytes: Order-0 entropy of its codes, Σ −log2 p(k), in bytes.
        coding: How the codes are coded.
        activation_bits: Of its quantized input, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: str
    scales: int
    sparsity: float
    levels: int
    bytes: int
    entropy_bytes: float
    coding: Coding
    activation_bits: int | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileContents:
    """A packed file, described.

    Attributes:
        tensors: The coded weights, in order.
        plan: What chose the levels.
        version: Of the format.
        size_bytes: Of the file.
        leftover_bytes: Everything that is not coded: norms, biases, buffers.
        activation_bytes: Steps of quantized inputs.
        container_bytes: Header and index.
    """

    tensors: tuple[TensorContents, ...]
    plan: Plan
    version: int
    size_bytes: int
    leftover_bytes: int
    activation_bytes: int
    container_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        plan = self.plan
        return {
            "version": self.version,
            "bytes": self.size_bytes,
            "leftover_bytes": self.leftover_bytes,
            "activation_bytes": self.activation_bytes,
            "container_bytes": self.container_bytes,
            "plan": {
                "method": plan.method,
                "status": plan.status,
                "gap": plan.gap,
                "distortion": plan.distortion,
                "bops": plan.bops,
                "limit_bytes": plan.limit_bytes,
            },
            "tensors": [vars(tensor) for tensor in self.tensors],
        }

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for name in ("shape", "levels", "zeros", "bytes", "bit/weight", "entropy"):
            table.add_column(name, justify="right")
        table.add_column("coding")
        for each in self.tensors:
            inputs = each.activation_bits
            table.add_row(
                each.name,
                "×".join(map(str, each.shape)),
                each.grid + ("" if inputs is None else f", input {inputs} bits"),
                f"{100 * each.sparsity:.1f} %",
                f"{each.bytes:,}",
                f"{8 * each.bytes / each.weights:.3f}",
                f"{8 * each.entropy_bytes / each.weights:.3f}",
                each.coding,
            )
        stream = io.StringIO()
        Console(file=stream, width=WIDTH, color_system=None).print(table)
        return "\n".join([*self._totals(), "", stream.getvalue().rstrip()])

    def _totals(self) -> list[str]:
        weights = sum(each.weights for each in self.tensors)
        coded = sum(each.bytes for each in self.tensors)
        entropy = sum(each.entropy_bytes for each in self.tensors)
        rest = [
            f"weights {coded:,} ({8 * coded / weights:.3f} bit each, order-0 entropy "
            f"{8 * entropy / weights:.3f})",
            f"norms, biases and buffers {self.leftover_bytes:,}",
        ]
        if self.activation_bytes:
            rest.append(f"steps of inputs {self.activation_bytes:,}")
        rest.append(f"header and index {self.container_bytes:,}")
        lines = [
            f"packed file, format {self.version}: {self.size_bytes:,} bytes, "
            f"{len(self.tensors)} coded weights of {weights:,} numbers",
            "bytes: " + ", ".join(rest),
            self.plan.summary(),
        ]
        if self.plan.limit_bytes is not None:
            lines.append(f"made for a budget of {self.plan.limit_bytes:,} bytes")
        return lines


def inspect(path: str | os.PathLike[str]) -> FileContents:
    """Describe a packed file; every checksum and every code is verified.

    One layer at a time is decoded, so memory is that of the largest.

    Args:
        path: What ``save`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is damaged, truncated, or something else.
    """
    with PackedFile(path) as file:
        plan = file.plan
        tensors = tuple(_tensor(file.stored(name), file, plan) for name in file.names)
        left, inputs = file.section_bytes()
        return FileContents(
            tensors,
            plan,
            file.version,
            file.size_bytes,
            left,
            inputs,
            file.size_bytes - left - inputs - sum(each.bytes for each in tensors),
        )


def _tensor(weight: StoredWeight, file: PackedFile, plan: Plan) -> TensorContents:
    codes = weight.codes
    counts = torch.unique(codes, return_counts=True)[1].double()
    entropy = -(counts * (counts / counts.sum()).log2()).sum() / 8
    return TensorContents(
        weight.name,
        weight.level.shape,
        weight.dtype,
        str(weight.level.grid),
        weight.scale.numel(),
        1 - int(codes.count_nonzero()) / codes.numel(),
        len(counts),
        file.coded_bytes(weight.name),
        max(float(entropy), 0.0),
        weight.coding,
        plan.levels[weight.name].activation_bits,
    )
