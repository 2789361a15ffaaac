"""What a call that multiplies by a weight says about its gradient.

A reader takes the arguments of one function of torch and returns a :class:`Call`. All
of them are products of the weight with an input that is read in windows, so one form
fits all: G[row, (column, offset)] = Σ_p rows[row, p] · columns[column, s p + d offset].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fitcompress.sensitivity.weights import Part

__all__ = ["READERS", "Call"]


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        kind: ``matrix`` (x W with W [inputs, outputs]), ``linear`` (x Wᵀ), ``window``
            (convolution), ``transposed`` (convolution) or ``entries`` (embedding).
        weight: The weight argument.
        input: The input; of an embedding, the indices. None once it has been used.
        stride: Of a convolution, in its dimensions.
        padding: Zeros before and after, by dimension.
        dilation: Of a convolution.
        groups: Of a convolution.
        part: What of which weight it uses; set when that is known.
    """

    kind: str
    weight: torch.Tensor
    input: torch.Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    part: Part = field(default=None)  # type: ignore[assignment]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of a convolution's kernel."""
        return tuple(self.weight.shape[2:])


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Call | None:
    return Call("linear", weight, input) if weight.dim() == 2 else None


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    return Call("entries", weight, input)


def _torch_embedding(
    weight: torch.Tensor,
    indices: torch.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    return None if scale_grad_by_freq else Call("entries", weight, indices)


def _matmul(input: torch.Tensor, other: torch.Tensor) -> Call | None:
    if not isinstance(other, torch.Tensor) or other.dim() != 2 or input.dim() < 2:
        return None
    return Call("matrix", other, input)


def _addmm(
    input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **scales: Any
) -> Call | None:
    if scales.get("alpha", 1) != 1:
        return None
    return Call("matrix", mat2, mat1)


def _convolution(dims: int) -> Callable[..., Call | None]:
    def read(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Call | None:
        apart = _each(dilation, dims)
        if padding == "valid":
            padding = 0
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(apart, weight.shape[2:], strict=True)]
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((p, p) for p in _each(padding, dims))
        return Call("window", weight, input, _each(stride, dims), sides, apart, groups)

    return read


def _transposed(dims: int) -> Callable[..., Call | None]:
    def read(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Call | None:
        # It is the gradient of a convolution for its input: that convolution reads the
        # output in windows, and output_padding is what its stride leaves over.
        sides = tuple((p, p) for p in _each(padding, dims))
        apart = _each(dilation, dims)
        return Call(
            "transposed", weight, input, _each(stride, dims), sides, apart, groups
        )

    return read


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Return an argument that may be one number for all dimensions."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


READERS: dict[Callable[..., Any], Callable[..., Call | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed(1),
    F.conv_transpose2d: _transposed(2),
    F.conv_transpose3d: _transposed(3),
}
