"""Hold the size of the file while weights are trained.

One λ for the network prices bits against squared error in steps (``quantize.rate``); it is
bisected so that the entropy of all codes stays at a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.errors import BudgetExceededError
from fitcompress.quantize import WeightGrid, grid_of, plan_of
from fitcompress.quantize.rate import REACH, Rate, code_lengths
from fitcompress.storage.save_load import packed_bytes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RateControl"]

HALVINGS = 10
LARGEST = 4.0  # λ, squared steps per bit
FIT_ATTEMPTS = 24


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

    def finish(self) -> None:
        """Put the latent weights on their grids, within the limit, and drop the prices.

        Raises:
            BudgetExceededError: Even the highest price leaves the file too large.
        """
        latents = [self.latent(module).detach().clone() for module, _ in self.layers]
        low, high, fits = self.weight, LARGEST, False
        self._price()
        for attempt in range(FIT_ATTEMPTS):
            weight = self.weight if not attempt else (low + high) / 2
            self._set_weight(weight)
            size = self._harden(latents)
            if size <= self.limit:
                high, fits = weight, True
                if not attempt or high - low < 1e-3 * high:
                    break
            else:
                low = weight
        if not fits or size > self.limit:
            self._set_weight(high)
            size = self._harden(latents)
        for _, grid in self.layers:
            grid.rate = None
        if size > self.limit:
            raise BudgetExceededError(
                "the fine-tuned file cannot meet its budget",
                size_bytes=size,
                got=f"{size} bytes",
                wanted=f"at most {self.limit} bytes",
                fix="compress with a smaller budget first",
            )

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
