"""Weights held on a grid by a parametrization.

    ŵ = mask ∘ Δ · clip(round(w / Δ), −q, q)

with w the latent weight as a matrix [rows, columns] (see ``model.matrix_view``), one Δ
for the tensor or one per row, and q = ∞ for entropy-coded steps. Any model,
``torch.compile``, ``state_dict`` and every training loop keep working; :func:`remove`
gives plain modules back with exactly the same weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fitcompress import ops
from fitcompress.model.matrix_view import MatrixView
from fitcompress.quantize.activations import detach_activation
from fitcompress.quantize.rate import Rate, rate_aware_codes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fitcompress.search.plan import Level

__all__ = ["WeightGrid", "attach_grid", "grid_of", "half_up", "remove", "row_scales"]


class WeightGrid(nn.Module):
    """Parametrization that puts a weight on a grid, with straight-through gradients.

    Args:
        scale: Δ, float32, one number or one per row; 0 makes a row zero.
        max_code: q, the largest |code|; 0 for unbounded.
        mask: What stays, bool in the order of the matrix, or None for everything.

    Attributes:
        view: How the weight is a matrix; :func:`attach_grid` sets it.
        rate: What a bit costs while fine-tuning holds the size of the file; None
            otherwise.
    """

    scale: torch.Tensor
    mask: torch.Tensor | None
    holds_grid = (
        True  # tells it from other parametrizations, see ``compressible_layers``
    )

    def __init__(
        self, scale: torch.Tensor, max_code: int = 0, mask: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().reshape(-1).clone())
        self.register_buffer("mask", None if mask is None else ops.pack_mask(mask))
        self.max_code = max_code
        self.view = MatrixView()
        self.rate: Rate | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight on the grid."""
        rows = self.view.matrix_of(weight)
        if self.rate is None:
            rows = ops.fake_quantize_prune(rows, self.scale, self.mask, self.max_code)
            return self.view.weight_of(rows, weight.shape)
        quantized = self.round(rows) * self.scale.reshape(-1, 1)
        straight = rows + (quantized - rows).detach()
        if self.mask is not None:
            straight = straight * ops.unpack_mask(self.mask, rows.shape)
        return self.view.weight_of(straight.to(weight.dtype), weight.shape)

    @torch.no_grad()
    def round(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes of latent weights [rows, columns], as integral floats."""
        scale = self.scale.reshape(-1, 1)
        safe = torch.where(scale > 0, scale, torch.inf)
        scaled = rows.detach().float() / safe
        codes = (
            scaled.round() if self.rate is None else rate_aware_codes(scaled, self.rate)
        )
        if self.max_code:
            codes = codes.clamp(-self.max_code, self.max_code)
        if self.mask is not None:
            codes = codes * ops.unpack_mask(self.mask, rows.shape)
        return codes

    def codes(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the integers k of a weight Δ·k on the grid, int32 [rows, columns]."""
        rows = self.view.matrix_of(quantized.detach()).float()
        scale = self.scale.reshape(-1, 1)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        return torch.where(
            scale > 0, (rows / safe).round(), torch.zeros_like(rows)
        ).int()

    def extra_repr(self) -> str:
        """Describe the grid for ``print(model)``."""
        masked = "" if self.mask is None else ", masked"
        return f"scales={self.scale.numel()}, max_code={self.max_code or '∞'}{masked}"


def attach_grid(
    module: nn.Module,
    grid: WeightGrid,
    weight: torch.Tensor,
    tied: Iterable[nn.Module] = (),
) -> None:
    """Put ``module.weight`` on ``grid``.

    Args:
        module: Its class tells how its weight is a matrix.
        grid: From now on of this weight.
        weight: The latent value, in the weight's shape or as its matrix.
        tied: Modules that use the same weight, now and from now on.
    """
    parameter = cast("nn.Parameter", module.weight)
    grid.view = MatrixView.of(module)
    if weight.dim() == 2:
        weight = grid.view.weight_of(weight, parameter.shape)
    with torch.no_grad():
        parameter.copy_(weight.reshape(parameter.shape).to(parameter.dtype))
    others = list(tied)
    for other in others:
        other.weight = parameter
    for each in (module, *others):
        # unsafe: the op returns the same shape and dtype, a trial would cost a pass.
        parametrize.register_parametrization(each, "weight", grid, unsafe=True)


def grid_of(module: nn.Module) -> WeightGrid | None:
    """Return the grid of ``module.weight``, or None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = cast("nn.ModuleDict", module.parametrizations)["weight"]
    return next(
        (p for p in cast("nn.ModuleList", chain) if isinstance(p, WeightGrid)), None
    )


def remove(model: nn.Module, *, activations: bool = False) -> nn.Module:
    """Make the weights of ``model`` plain again, in place, with the same values.

    Args:
        model: With weights on grids.
        activations: Take the quantizers of the layers' inputs away as well. They are
            part of what the network computes: without them its outputs change.

    Returns:
        The same model, without parametrizations of this package.
    """
    seen: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        if activations:
            detach_activation(module)
        if grid_of(module) is not None:
            # torch deletes the weight's property from the class, and copies of a module
            # share its class: without one of its own, the copies would lose their
            # weight.
            own = type(module)
            space = {
                k: v
                for k, v in vars(own).items()
                if k not in ("__dict__", "__weakref__")
            }
            module.__class__ = type(own.__name__, own.__bases__, space)
            latent = module.get_submodule("parametrizations.weight").original
            assert isinstance(latent, torch.Tensor)
            # A shared weight is on its grid from the first of its modules on.
            parametrize.remove_parametrizations(
                module, "weight", leave_parametrized=id(latent) not in seen
            )
            seen[id(latent)] = latent
    return model


def row_scales(matrix: torch.Tensor, level: Level) -> tuple[torch.Tensor, int]:
    """Return the scales and the largest code of a level for one weight matrix.

    Args:
        matrix: The weight, [rows, columns].
        level: The level. A step is the scale itself; for b bits the scale of a row is
            max|w| / (2^(b−1) − 1), rounded up to 16 bits as it is stored.

    Returns:
        Scales, float32 [1] or [rows], and q (0 for unbounded).
    """
    if level.grid.step is not None:
        return torch.tensor([level.grid.step], dtype=torch.float32), 0
    assert level.grid.bits is not None
    q = 2 ** (level.grid.bits - 1) - 1
    return half_up(matrix.abs().amax(1) / q), q


def half_up(scale: torch.Tensor) -> torch.Tensor:
    """Round numbers ≥ 0 up to 16 bits, so that no weight leaves the range by rounding.

    To float16 if all of them are normal numbers there, else to bfloat16: less exact,
    but of any size.
    """
    positive = scale[scale > 0]
    info = torch.finfo(torch.float16)
    fits = not len(positive) or (
        positive.min() >= info.tiny and positive.max() < info.max
    )
    rounded = scale.to(torch.float16 if fits else torch.bfloat16)
    more = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, more, rounded).float()
