"""Scikit-learn's bundled handwritten digits: real data, no network."""

from __future__ import annotations

import numpy as np
import torch

from fitcompress.data.augment import random_crop
from fitcompress.data.dataset import Dataset
from fitcompress.errors import MissingDependencyError

__all__ = ["load_digits"]

VALIDATION, TEST = 200, 500
MEAN, STD = 4.884, 6.017  # of the training images, pixel values 0 … 16


def load_digits() -> Dataset:
    """Return 1797 digits of 8×8 pixels (Alpaydin and Kaynak, UCI 1998).

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed",
            fix="pip install 'fitcompress[demo]'",
        ) from error
    raw = bundled()
    order = np.random.default_rng(0).permutation(len(raw.target))
    x = torch.from_numpy(raw.images[order].astype(np.float32)).unsqueeze(1)
    x = (x - MEAN) / STD
    y = torch.from_numpy(raw.target[order].astype(np.int64))
    train = len(y) - VALIDATION - TEST

    def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[start:stop].clone(), y[start:stop].clone()

    return Dataset(
        name="digits",
        train=part(0, train),
        validation=part(train, train + VALIDATION),
        test=part(train + VALIDATION, len(y)),
        augment=_augment,
    )


def _augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    black = torch.tensor([-MEAN / STD])
    return random_crop(x, generator, padding=1, fill=black, flip=False)
