"""Hold the size of the file while weights are trained.

One λ for the network prices bits against squared error in steps (``quantize.rate``); it
is set so that the entropy of all codes stays at a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.model import MatrixView
from fitcompress.quantize import WeightGrid, grid_of, plan_of
from fitcompress.quantize.rate import Rate, code_lengths
from fitcompress.storage.save_load import layer_bytes, packed_bytes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RateControl", "code_entropy"]

FIRST, LARGEST = 0.01, 4.0  # λ, squared steps per bit
PRECISION = 0.005  # of λ, relative
WIDER = 1.25  # factor between two λ tried until the target lies between them
CLOSE = 0.001  # below the target, relative: close enough
WIDENINGS = 40  # of one per cent each
DENSE_CODES = 1 << 20  # a wider range of codes is counted by sorting


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
        coded = 8 * sum(layer_bytes(model).values())
        # The coder's bits per bit of entropy, and what the limit leaves in entropy.
        self.target = self.start * (1 + 8 * (limit_bytes - size) / max(coded, 1))
        self._price()

    def latent(self, module: nn.Module) -> torch.Tensor:
        """Return the latent weight of a module, [rows, columns]; maybe a copy."""
        return MatrixView.of(module).matrix_of(self._original(module))

    def _original(self, module: nn.Module) -> torch.Tensor:
        original: torch.Tensor = module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        return original

    @torch.no_grad()
    def spread(self, width: float) -> None:
        """Move latent weights at random by up to ``width`` steps."""
        for module, grid in self.layers:
            original = self._original(module)
            shape = grid.view.shape(original.shape)
            rows = torch.rand(shape).to(original.device) * 2 - 1
            moved = rows * width * grid.scale.reshape(-1, 1)
            moved = grid.view.weight_of(moved, original.shape)
            original.add_(moved.to(original.dtype))

    def step_sizes(self) -> dict[torch.Tensor, float]:
        """Return latent weight → mean step of its grid."""
        return {self._original(m): float(grid.scale.mean()) for m, grid in self.layers}

    @torch.no_grad()
    def entropy_bits(self) -> float:
        """Return the order-0 entropy of all codes as they are now, in bits."""
        codes = (grid.round(self.latent(module)) for module, grid in self.layers)
        return sum(code_entropy(c) for c in codes)

    def adjust(self, share: float = 1.0) -> None:
        """Learn the codes' lengths anew and set λ.

        Args:
            share: Where between the first size and the target to be, in [0, 1].
        """
        target = self.target
        if self.start > target:
            target += (1 - share) * (self.start - target)
        self._price()
        self._search(target)

    def finish(self) -> bool:
        """Put the latent weights on their grids and drop the prices.

        The price is raised until the file is within the limit; if no price is high
        enough, as in layers of a few weights, the steps are widened by up to a half.

        Returns:
            Whether the file is within the limit.
        """
        latents = [self.latent(module).detach().clone() for module, _ in self.layers]
        self._price()
        fits = self._raise_price(latents) or self._widen_steps(latents)
        self.release()
        return fits

    def release(self) -> None:
        """Drop the prices."""
        for _, grid in self.layers:
            grid.rate = None

    def _raise_price(self, latents: list[torch.Tensor]) -> bool:
        low = high = self.weight
        while self._harden(latents) > self.limit:
            if high >= LARGEST:
                self._set_weight(low)
                return False
            low, high = high, min(LARGEST, max(FIRST, high * WIDER))
            self._set_weight(high)
        while high - low > PRECISION * high:
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
        """Set weights to what their latent values round to; return the file's size."""
        for (module, grid), latent in zip(self.layers, latents, strict=True):
            rows = grid.round(latent) * grid.scale.reshape(-1, 1)
            original = self._original(module)
            original.copy_(grid.view.weight_of(rows, original.shape))
        rates = [grid.rate for _, grid in self.layers]
        self.release()
        size = len(packed_bytes(self.model))
        for (_, grid), rate in zip(self.layers, rates, strict=True):
            grid.rate = rate
        return size

    @torch.no_grad()
    def _price(self) -> None:
        for module, grid in self.layers:
            lengths = code_lengths(grid.round(self.latent(module)))
            grid.rate = Rate(lengths, self.weight)

    def _search(self, target: float) -> None:
        """Set the least λ, to half a per cent, whose codes fit into ``target`` bits.

        Starts from the last one, which is rarely far off, and is content with codes
        within a thousandth below the target.
        """
        low, high = 0.0, self.weight or FIRST
        bits = self._entropy_at(high)
        while bits > target and high < LARGEST:
            low, high = high, WIDER * high
            bits = self._entropy_at(high)
        if bits < (1 - CLOSE) * target and not low:
            if self._entropy_at(0.0) <= target:
                return
            while not low:
                if (found := self._entropy_at(high / WIDER)) > target:
                    low = high / WIDER
                else:
                    high, bits = high / WIDER, found
        while bits < (1 - CLOSE) * target and high > (1 + PRECISION) * low:
            middle = (low * high) ** 0.5
            if (found := self._entropy_at(middle)) > target:
                low = middle
            else:
                high, bits = middle, found
        self._set_weight(high)

    def _entropy_at(self, weight: float) -> float:
        self._set_weight(weight)
        return self.entropy_bits()

    def _set_weight(self, weight: float) -> None:
        self.weight = weight
        for _, grid in self.layers:
            assert grid.rate is not None
            grid.rate = Rate(grid.rate.lengths, weight)


def code_entropy(codes: torch.Tensor) -> float:
    """Return the bits of integral codes at their order-0 entropy, n · H."""
    whole = codes.flatten().long()
    if not whole.numel():
        return 0.0
    low, high = int(whole.min()), int(whole.max())
    if high - low < DENSE_CODES:
        counts = torch.bincount(whole - low)
    else:
        _, counts = torch.unique(whole, return_counts=True)
    counts = counts[counts > 0].double()
    return float((counts * (whole.numel() / counts).log2()).sum())
