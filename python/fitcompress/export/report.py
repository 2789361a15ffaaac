"""What became of each layer in an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fitcompress.export.agreement import Agreement

__all__ = ["ExportReport", "ExportedLayer"]


@dataclass(frozen=True)
class ExportedLayer:
    """One compressed layer in the file.

    Attributes:
        name: Qualified name of the module.
        shape: Shape of the weight in the file, channels removed and in the layout in
            which the graph uses it.
        weight: ONNX's type of its numbers: INT2, INT4, INT8, INT16; FLOAT, FLOAT16 or
            BFLOAT16 where no integer holds the codes; "unused" if the traced forward
            does not use the layer.
        scales: How many scales it has.
        input: ONNX's type of the quantized input, or None.
        size_bytes: Bytes of the numbers and scales.
    """

    name: str
    shape: tuple[int, ...]
    weight: str
    scales: int
    input: str | None
    size_bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What :func:`fitcompress.export_onnx` wrote.

    Attributes:
        path: The file.
        opset: Version of its operator set.
        bytes_before: What the file would take with the same graph in float.
        bytes_after: What it takes.
        layers: What became of every compressed layer.
        folded_norms: Batch norms that went into the layer before them.
        removed_channels: Layer → output channels that are gone.
        integer_sums: Sums that were rounded to 8 bits.
        agreement: With the model in PyTorch, where sums were rounded; else None.
    """

    path: Path
    opset: int
    bytes_before: int
    bytes_after: int
    layers: tuple[ExportedLayer, ...]
    folded_norms: int
    removed_channels: dict[str, int]
    integer_sums: int = 0
    agreement: Agreement | None = None

    def summary(self) -> str:
        """Return one line: bytes before ⇒ after, types of the weights."""
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[layer.weight] = kinds.get(layer.weight, 0) + 1
        parts = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
        inputs = sum(layer.input is not None for layer in self.layers)
        parts += [f"{inputs} quantized inputs"] if inputs else []
        parts += [f"{self.folded_norms} norms folded"] if self.folded_norms else []
        removed = sum(self.removed_channels.values())
        parts += [f"{removed} channels removed"] if removed else []
        parts += [f"{self.integer_sums} integer sums"] if self.integer_sums else []
        share = 100 * self.bytes_after / max(self.bytes_before, 1)
        return (
            f"{self.bytes_before:,} ⇒ {self.bytes_after:,} bytes ({share:.1f} %), "
            f"opset {self.opset}: {', '.join(parts)}"
        )

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [self.summary()]
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            line = f"  {layer.name:<{width}}  {layer.weight:<8}  {shape:<14}"
            line += f"  {layer.scales:>5} scales  {layer.size_bytes:>10,} bytes"
            line += f"  input {layer.input}" if layer.input else ""
            if gone := self.removed_channels.get(layer.name):
                line += f"  {gone} channels removed"
            lines.append(line)
        if self.agreement is not None:
            lines.append(f"against PyTorch: {self.agreement}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "opset": self.opset,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "folded_norms": self.folded_norms,
            "removed_channels": self.removed_channels,
            "integer_sums": self.integer_sums,
            "agreement": None if self.agreement is None else vars(self.agreement),
            "layers": [
                vars(layer) | {"shape": [*layer.shape]} for layer in self.layers
            ],
        }
