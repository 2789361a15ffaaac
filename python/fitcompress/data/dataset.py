"""Named data sets, split into training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitcompress.data.batches import Batches
from fitcompress.errors import DataError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import torch

__all__ = ["DATASETS", "Dataset", "load_dataset"]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: Its name.
        train: Inputs and labels to train, calibrate and measure on.
        validation: Held out from training; choices are made on it.
        test: Reported only.
        augment: What training applies to a batch of inputs.
    """

    name: str
    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor]

    def training(self, batch_size: int = 64, seed: int = 0) -> Batches:
        """Return shuffled, augmented training batches."""
        return Batches(
            *self.train,
            batch_size=batch_size,
            shuffle=True,
            augment=self.augment,
            seed=seed,
        )

    def calibration(self, seed: int = 0, *, augment: bool = True) -> Batches:
        """Return training batches to calibrate and measure with.

        Args:
            seed: Of the order and the augmentation.
            augment: Whether to augment as in training. On plain training images, which
                the network has memorised, sensitivities come out far too small.
        """
        return Batches(
            *self.train,
            batch_size=128,
            shuffle=True,
            augment=self.augment if augment else None,
            seed=seed + 17,
        )

    def validating(self) -> Batches:
        """Return the validation batches."""
        return Batches(*self.validation, batch_size=500)

    def testing(self) -> Batches:
        """Return the test batches."""
        return Batches(*self.test, batch_size=500)

    def example(self) -> torch.Tensor:
        """Return the inputs of one sample."""
        return self.test[0][:1]


def load_dataset(name: str, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a data set by name.

    Args:
        name: ``"digits"`` (bundled with scikit-learn) or ``"cifar10"``.
        folder: Where the files lie, for data sets that are not bundled.

    Raises:
        DataError: Unknown name, or files are missing or damaged.
        MissingDependencyError: scikit-learn is needed and not installed.
    """
    if name not in DATASETS:
        raise DataError(
            "unknown data set", got=name, wanted=" or ".join(sorted(DATASETS))
        )
    return DATASETS[name](folder)


def _digits(_: str | os.PathLike[str] | None) -> Dataset:
    from fitcompress.data.digits import load_digits

    return load_digits()


def _cifar10(folder: str | os.PathLike[str] | None) -> Dataset:
    from fitcompress.data.cifar10 import load_cifar10

    return load_cifar10(folder)


DATASETS: dict[str, Callable[[str | os.PathLike[str] | None], Dataset]] = {
    "cifar10": _cifar10,
    "digits": _digits,
}
