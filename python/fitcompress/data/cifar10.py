"""CIFAR-10 from its official binary files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fitcompress.data.augment import random_crop
from fitcompress.data.dataset import Dataset
from fitcompress.errors import DataError

if TYPE_CHECKING:
    import os

__all__ = ["load_cifar10"]

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
FOLDER = "cifar-10-batches-bin"
RECORD = 1 + 3 * 32 * 32
VALIDATION = 2000


def load_cifar10(folder: str | os.PathLike[str] | None) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009), normalised as ImageNet's means prescribe.

    The last 2000 training images are held out for validation. Augmentation: shifts of
    up to 4 pixels over *black* padding, and flips.

    Args:
        folder: ``cifar-10-batches-bin`` or the folder around it, with
            ``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``.

    Raises:
        DataError: The folder or a file is missing or of the wrong length.
    """
    if folder is None:
        raise DataError(
            "CIFAR-10 needs a folder",
            wanted=f"the folder {FOLDER} (binary version), or the one around it",
            fix="pass --data DIR, or set FITCOMPRESS_DATA",
        )
    root = Path(folder)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    parts = [_read(root / f"data_batch_{i}.bin") for i in range(1, 6)]
    x = torch.cat([p[0] for p in parts])
    y = torch.cat([p[1] for p in parts])
    if len(x) <= VALIDATION:
        raise DataError(
            f"the training files in {root} are too short",
            got=f"{len(x)} images",
            wanted=f"more than the {VALIDATION} that are held out for validation",
            fix="unpack cifar-10-binary.tar.gz again",
        )
    return Dataset(
        name="cifar10",
        train=(x[:-VALIDATION], y[:-VALIDATION]),
        validation=(x[-VALIDATION:], y[-VALIDATION:]),
        test=_read(root / "test_batch.bin"),
        augment=_augment,
    )


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise DataError(
            f"{path} is missing",
            wanted="the official binary version of CIFAR-10",
            fix=f"point --data at the folder that holds {FOLDER}",
        )
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % RECORD:
        raise DataError(
            f"{path} is damaged",
            got=f"{len(raw)} bytes",
            wanted=f"a multiple of {RECORD}",
        )
    records = torch.from_numpy(raw.reshape(-1, RECORD))
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise DataError(
            f"{path} is damaged", got=f"label {int(labels.max())}", wanted="0 … 9"
        )
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return (images - MEAN) / STD, labels


def _augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    black = (-MEAN / STD).flatten()
    return random_crop(x, generator, padding=4, fill=black, flip=True)
