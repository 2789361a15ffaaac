"""Ways to put a weight on a grid in training, ours and what others have.

| name | mask | gradient of Δ | how |
|---|---|---|---|
| `ours` | 1 bit a weight | yes | `ops.fake_quantize_prune` |
| `composed` | multiplied | yes | clamp, straight-through round, in plain torch |
| `compiled` | multiplied | yes | the same under `torch.compile` |
| `affine` | multiplied | no | `torch.fake_quantize_per_channel_affine` |
| `learnable` | multiplied | yes | `torch._fake_quantize_learnable_per_channel_affine` |
| `torchao` | multiplied | no | torchao's fake quantization per group or channel |
| `brevitas` | multiplied | yes | Brevitas' `IntQuant` with a straight-through round |

Each is a function () → ŵ of a case. Masks that are multiplied have the weight's type:
a mask of bools is slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fitcompress import ops, reference

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PEERS", "Case", "build"]

MAX_CODE = 7  # 4 bits


@dataclass(frozen=True)
class Case:
    """A weight, its grid and its mask.

    Attributes:
        weight: [rows, columns], a leaf that wants a gradient.
        scale: Δ, float32 [rows] or [rows · columns/group], a leaf as well.
        mask: Which weights stay, in the type of the weight.
        bits: The same mask from `ops.pack_mask`.
        grad: The gradient that comes in, in the type of the weight.
        group: Columns that share a Δ, 0 for the whole row.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    mask: torch.Tensor
    bits: torch.Tensor
    grad: torch.Tensor
    group: int

    def runs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the weight's shape as [scales, columns of a scale]."""
        return tensor.view(len(self.scale), -1)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ŵ and the gradients of weight and scale of the twin."""
        weight, scale = self.weight.detach(), self.scale.detach()
        result = reference.fake_quantize_prune(
            weight, scale, self.bits, MAX_CODE, group=self.group
        )
        grads = reference.fake_quantize_prune_backward(
            self.grad, weight, scale, self.bits, MAX_CODE, group=self.group
        )
        return (result, *grads)


def build(rows: int, columns: int, dtype: torch.dtype, group: int) -> Case:
    """Return a random case: half of the weights stay, about 5 % are clipped."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < 0.5
    scales = rows * (columns // group) if group else rows
    return Case(
        weight=weight.to(dtype).requires_grad_(),
        scale=torch.full((scales,), 2 / MAX_CODE).requires_grad_(),
        mask=keep.to(dtype),
        bits=ops.pack_mask(keep),
        grad=torch.randn(rows, columns, generator=generator).to(dtype),
        group=group,
    )


def ours(case: Case) -> Callable[[], torch.Tensor]:
    return lambda: ops.fake_quantize_prune(
        case.weight, case.scale, case.bits, MAX_CODE, group=case.group
    )


def _compose(
    weight: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return ŵ of runs [scales, columns], with the gradients of LSQ."""
    x = weight / scale[:, None]
    codes = x.detach().round()
    bounded = codes.clamp(-MAX_CODE, MAX_CODE)
    inside = torch.where(codes == bounded, x, bounded)
    codes = inside + (bounded - inside).detach()
    return (codes * scale[:, None]).to(weight.dtype) * mask


def composed(case: Case) -> Callable[[], torch.Tensor]:
    return lambda: _compose(
        case.runs(case.weight), case.scale, case.runs(case.mask)
    ).view_as(case.weight)


def compiled(case: Case) -> Callable[[], torch.Tensor]:
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # the graph is kept: backward runs again and again
    function = torch.compile(_compose, fullgraph=True, dynamic=False)
    return lambda: function(
        case.runs(case.weight), case.scale, case.runs(case.mask)
    ).view_as(case.weight)


def affine(case: Case) -> Callable[[], torch.Tensor]:
    scale = case.scale.detach()
    zero = torch.zeros(len(scale), dtype=torch.int32)

    def run() -> torch.Tensor:
        result = torch.fake_quantize_per_channel_affine(
            case.runs(case.weight), scale, zero, 0, -MAX_CODE, MAX_CODE
        )
        return result.view_as(case.weight) * case.mask

    return run


def learnable(case: Case) -> Callable[[], torch.Tensor]:
    zero = torch.zeros(len(case.scale))

    def run() -> torch.Tensor:
        result = torch._fake_quantize_learnable_per_channel_affine(
            case.runs(case.weight), case.scale, zero, 0, -MAX_CODE, MAX_CODE, 1.0
        )
        return result.view_as(case.weight) * case.mask

    return run


def torchao(case: Case) -> Callable[[], torch.Tensor]:
    from torchao.quantization.qat.utils import _fake_quantize_per_channel_group

    scale = case.scale.detach().view(len(case.weight), -1)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    group = case.group or case.weight.shape[1]

    def run() -> torch.Tensor:
        result = _fake_quantize_per_channel_group(
            case.weight, scale, zero, -MAX_CODE, MAX_CODE, group
        )
        return result * case.mask

    return run


def brevitas(case: Case) -> Callable[[], torch.Tensor]:
    from brevitas.core.function_wrapper import RoundSte, TensorClamp
    from brevitas.core.quant import IntQuant

    quantizer = IntQuant(
        narrow_range=True,
        signed=True,
        input_view_impl=torch.nn.Identity(),
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
    )
    zero, bits = torch.zeros(1), torch.tensor(float(MAX_CODE.bit_length() + 1))

    def run() -> torch.Tensor:
        result = quantizer(case.scale[:, None], zero, bits, case.runs(case.weight))
        return result.to(case.weight.dtype).view_as(case.weight) * case.mask

    return run


PEERS: dict[str, Callable[[Case], Callable[[], torch.Tensor]]] = {
    "ours": ours,
    "composed": composed,
    "compiled": compiled,
    "affine": affine,
    "learnable": learnable,
    "torchao": torchao,
    "brevitas": brevitas,
}
