"""Hold the size of the file while weights are trained.

One λ for the network prices bits against squared error in steps (``quantize.rate``); it is
bisected so that the entropy of all codes stays at a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.quantize import WeightGrid, grid_of, plan_of
from fitcompress.quantize.rate import REACH, Rate, code_lengths
from fitcompress.storage.save_load import packed_bytes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RateControl"]

HALVINGS = 10
LARGEST = 4.0  # λ, squared steps per bit
WIDENINGS = 40  # of one per cent each


class RateControl:
    """Prices bits so that a model under training stays within its file size.

    Args:
        model: A compressed model; its grids get their ``rate``.
        limit_bytes: What the packed file may take.
    """

    def __init__(self, model: nn.Module, limit_bytes: int) -> None:
        self.model, self.limit = model, limit_bytes
        self.weight = 0.0
        modules = dict(model.named_modules())
        self.layers: list[tuple[nn.Module, WeightGrid]] = []
        for name in plan_of(model).levels:
            grid = grid_of(modules[name])
            assert grid is not None
            self.layers.append((modules[name], grid))
        self.start = self.entropy_bits()
        size = len(packed_bytes(model))
        coded = 8 * (size - self._overhead())
        # The coder's bits per bit of entropy, and what the limit leaves in entropy.
        self.target = self.start * (1 + 8 * (limit_bytes - size) / max(coded, 1))
        self._price()

    def latent(self, module: nn.Module) -> torch.Tensor:
        """Return the latent weight of a module, [rows, columns]."""
        original: torch.Tensor = module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        return original.flatten(1)

    @torch.no_grad()
    def entropy_bits(self) -> float:
        """Return the order-0 entropy of all codes as they are now, in bits."""
        total = 0.0
        for module, grid in self.layers:
            total += _entropy(grid.round(self.latent(module)))
        return total

    def adjust(self, share: float = 1.0) -> None:
        """Learn the codes' lengths anew and bisect λ.

        Args:
            share: Where between the first size and the target to be, in [0, 1].
        """
        target = self.target
        if self.start > target:
            target += (1 - share) * (self.start - target)
        self._price()
        self._bisect(target)

    def finish(self) -> bool:
        """Put the latent weights on their grids and drop the prices.

        The price is raised until the file is within the limit; if no price is high enough,
        as in layers of a few weights, the steps are widened by up to a half.

        Returns:
            Whether the file is within the limit.
        """
        latents = [self.latent(module).detach().clone() for module, _ in self.layers]
        self._price()
        fits = self._raise_price(latents) or self._widen_steps(latents)
        for _, grid in self.layers:
            grid.rate = None
        return fits

    def _raise_price(self, latents: list[torch.Tensor]) -> bool:
        first = self.weight
        if self._harden(latents) <= self.limit:
            return True
        low, high = first, LARGEST
        self._set_weight(high)
        if self._harden(latents) > self.limit:
            self._set_weight(first)
            return False
        while high - low > 0.01 * high:
            self._set_weight((low + high) / 2)
            if self._harden(latents) > self.limit:
                low = self.weight
            else:
                high = self.weight
        self._set_weight(high)
        return self._harden(latents) <= self.limit

    def _widen_steps(self, latents: list[torch.Tensor]) -> bool:
        for _ in range(WIDENINGS):
            for _, grid in self.layers:
                if not grid.max_code:
                    grid.scale.mul_(1.01)
            if self._harden(latents) <= self.limit:
                return True
        return False

    @torch.no_grad()
    def _harden(self, latents: list[torch.Tensor]) -> int:
        """Set the weights to what their latent values round to; return the file's size."""
        for (module, grid), latent in zip(self.layers, latents, strict=True):
            self.latent(module).copy_(grid.round(latent) * grid.scale.reshape(-1, 1))
        rates = [grid.rate for _, grid in self.layers]
        for _, grid in self.layers:
            grid.rate = None
        size = len(packed_bytes(self.model))
        for (_, grid), rate in zip(self.layers, rates, strict=True):
            grid.rate = rate
        return size

    @torch.no_grad()
    def _price(self) -> None:
        for module, grid in self.layers:
            grid.rate = Rate(code_lengths(grid.round(self.latent(module))), self.weight)

    def _bisect(self, target: float) -> None:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            self._set_weight(middle)
            if self.entropy_bits() > target:
                low = middle
            else:
                high = middle
        self._set_weight(high)

    def _set_weight(self, weight: float) -> None:
        self.weight = weight
        for _, grid in self.layers:
            assert grid.rate is not None
            grid.rate = Rate(grid.rate.lengths, weight)

    def _overhead(self) -> int:
        from fitcompress.storage.save_load import layer_bytes

        return len(packed_bytes(self.model)) - sum(layer_bytes(self.model).values())


def _entropy(codes: torch.Tensor) -> float:
    shifted = codes.flatten().clamp(-REACH, REACH).long() + REACH
    counts = torch.bincount(shifted).double()
    p = counts[counts > 0] / counts.sum()
    return -float((p * p.log2()).sum()) * codes.numel()
