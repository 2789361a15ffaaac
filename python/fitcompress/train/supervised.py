"""Ordinary training, for the demo's network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fitcompress.progress import Bar
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.data.batches import Batches

__all__ = ["train"]


def train(
    model: nn.Module,
    loader: Batches,
    *,
    epochs: int,
    lr: float = 0.2,
    progress: bool = True,
) -> None:
    """Train a classifier in place: SGD, Nesterov momentum, one cycle; then eval mode.

    Args:
        model: With fresh weights.
        loader: Yields (inputs, labels).
        epochs: Passes over the data.
        lr: Peak learning rate.
        progress: Show a bar with the time left.
    """
    with threads(FIXED):
        _train(model, loader, epochs, lr, progress=progress)
    model.eval()


def _train(
    model: nn.Module, loader: Batches, epochs: int, lr: float, *, progress: bool
) -> None:
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    with Bar("train", steps, enabled=progress) as bar:
        for epoch in range(epochs):
            loader.epoch = epoch
            for x, y in loader:
                assert y is not None
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.advance(note=f"loss {float(loss.detach()):.3f}")
