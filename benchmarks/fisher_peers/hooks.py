"""Hooks, strided copies and batched products: what can be done in plain torch.

Inputs A_i and output gradients E_i of a layer are caught and multiplied per sample, for
the trace by whichever of two forms takes fewer operations:

    ‖G_i‖² = ‖E_i A_iᵀ‖²                 P·I·O operations, the product itself
           = Σ (E_iᵀ E_i) ∘ (A_iᵀ A_i)   P²·(I + O), Gram matrices of P positions

No weight gets a gradient from autograd, so that the backward pass is 2/3 of a plain
one. Each layer is done, and its input let go, as soon as its gradient arrives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fisher_peers.candidate import Candidate, frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.model import Layer

__all__ = ["Hooks"]

# Numbers in what a chunk of samples is unfolded or multiplied to: stays in the cache.
CHUNK = 2**18


class Hooks(Candidate):
    """Gram matrices or products per sample; layers are used once in a forward pass.

    Linear layers, embeddings and Conv2d with zeros around, any groups and strides.
    """

    def add(self) -> None:
        """Run forward and backward; the hooks on outputs do the rest."""
        handles = [
            layer.module.register_forward_hook(self._catch(layer))
            for layer in self.case.layers
        ]
        try:
            with frozen(self.case.model):
                (self.case.mean_loss() * len(self.case.x)).backward()
        finally:
            for handle in handles:
                handle.remove()

    def _catch(self, layer: Layer) -> Callable[..., torch.Tensor]:
        def caught(
            _: nn.Module, args: tuple[Any, ...], out: torch.Tensor
        ) -> torch.Tensor:
            if not out.requires_grad:  # the first layers, all is frozen before them
                out = out.detach().requires_grad_()
            held = [args[0].detach()]
            out.register_hook(lambda e: self._arrived(layer, held.pop(), e))
            return out

        return caught

    def _arrived(self, layer: Layer, a: torch.Tensor, e: torch.Tensor) -> None:
        with torch.no_grad():
            if layer.one_hot:
                self._embedding(layer, a.flatten(1), e.flatten(1, -2))
            elif isinstance(layer.module, nn.Conv2d):
                module = layer.module
                width = layer.columns * layer.groups
                chunk = max(1, CHUNK // (width * e[0, 0].numel()))
                for x, y in zip(a.split(chunk), e.split(chunk), strict=True):
                    self._products(layer, _unfold(module, x), y.flatten(2))
            else:
                a, e = (t.reshape(len(t), -1, t.shape[-1]).mT for t in (a, e))
                self._products(layer, a, e)

    def _products(self, layer: Layer, a: torch.Tensor, e: torch.Tensor) -> None:
        """Square the products of inputs [B, G·I, P] and gradients [B, G·O, P]."""
        groups = layer.groups
        inputs, outputs, places = a.shape[1] // groups, e.shape[1] // groups, e.shape[2]
        if places == 1:
            self._outer(
                layer, a.unflatten(1, (groups, -1)), e.unflatten(1, (groups, -1))
            )
            return
        gram = places * (inputs + outputs) < inputs * outputs
        gram = gram and not self.diagonal
        size = places * places if gram else inputs * outputs
        total = self.totals[layer.name]
        chunk = max(1, CHUNK // (size * groups))
        for x, y in zip(a.split(chunk), e.split(chunk), strict=True):
            x = x.reshape(-1, inputs, places)  # samples and groups
            y = y.reshape(-1, outputs, places)
            if gram:
                total += torch.bmm(y.mT, y).mul_(torch.bmm(x.mT, x)).sum()
            elif self.diagonal:
                gradients = torch.bmm(y, x.mT).reshape(-1, *total.shape)
                for gradient in gradients:
                    total.addcmul_(gradient, gradient)
            else:
                total += torch.bmm(y, x.mT).square_().sum()

    def _outer(self, layer: Layer, a: torch.Tensor, e: torch.Tensor) -> None:
        """Square outer products of [B, G, I, 1] and [B, G, O, 1]."""
        a, e = a.square().squeeze(3), e.square().squeeze(3)
        total = self.totals[layer.name]
        if self.diagonal:
            squares = torch.bmm(e.permute(1, 2, 0), a.transpose(0, 1))
            total += squares.reshape(total.shape)
        else:
            total += (a.sum(2) * e.sum(2)).sum()

    def _embedding(self, layer: Layer, index: torch.Tensor, e: torch.Tensor) -> None:
        """Square sums over positions of the same entry: [B, P] and [B, P, I]."""
        total = self.totals[layer.name]
        if not self.diagonal:
            same = index[:, :, None] == index[:, None, :]
            total += torch.bmm(e, e.mT).mul_(same).sum()
            return
        pairs = index + layer.rows * torch.arange(len(index))[:, None]
        found, place = torch.unique(pairs.flatten(), return_inverse=True)
        sums = e.new_zeros(len(found), layer.columns)
        sums.index_add_(0, place, e.flatten(0, 1))
        total.index_add_(0, found % layer.rows, sums.square_())


def _unfold(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return [B, C·kernel, P]: one strided copy, several times as fast as F.unfold."""
    (high, wide), (down, right) = module.padding, module.stride
    x = F.pad(x, (wide, wide, high, high)) if high or wide else x
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(
            x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]
    batch, channels, row, column = x.stride()
    windows = x.as_strided(
        (*x.shape[:2], *module.kernel_size, *sizes),
        (
            batch,
            channels,
            row * module.dilation[0],
            column * module.dilation[1],
            row * down,
            column * right,
        ),
    )
    return windows.reshape(len(x), -1, sizes[0] * sizes[1])
