"""Text: labelled sentences from TSV files, sequences of tokens from .npy files."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.errors import DataError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "LONGEST",
    "TextBatches",
    "TextDataset",
    "load_sentences",
    "load_tokens",
]

VALIDATION = 1000  # sentences held out from training, or a tenth if there are few
CHUNK = 16  # batches whose sentences are sorted by length before they are cut
FEWEST = 8
LONGEST = 64
TRAIN, DEV = "train.tsv", "dev.tsv"


class TextBatches:
    """Batches of sequences as dicts, the same for the same seed and epoch.

    Args:
        items: Sentences, or rows of tokens.
        labels: One for each, or None.
        collate: (items, labels or None) → dict of tensors, as a model takes it.
        batch_size: Sequences per batch; the last one may be shorter.
        shuffle: Draw a new order each epoch; sentences of like length then stand in one
            batch, so that little of it is padding.
        seed: Seeds the order together with the epoch.

    Attributes:
        epoch: Which epoch the next iteration yields; not advanced by iterating.
    """

    def __init__(
        self,
        items: Sequence[Any],
        labels: Sequence[int] | None,
        collate: Callable[[list[Any], list[int] | None], dict[str, torch.Tensor]],
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.items, self.labels, self.collate = items, labels, collate
        self.batch_size, self.shuffle = batch_size, shuffle
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in self._cut():
            labels = None if self.labels is None else [self.labels[i] for i in index]
            yield self.collate([self.items[i] for i in index], labels)

    def _cut(self) -> list[list[int]]:
        order, size = list(range(len(self.items))), self.batch_size
        if not self.shuffle:
            return [order[i : i + size] for i in range(0, len(order), size)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(order), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), CHUNK * size):
            chunk = order[start : start + CHUNK * size]
            chunk.sort(key=lambda i: len(self.items[i]))  # stable
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


@dataclass(frozen=True)
class TextDataset:
    """Sequences, split; the counterpart of :class:`fitcompress.data.Dataset`.

    Attributes:
        name: Its name.
        train: Items and labels, to train, calibrate and measure on.
        validation: Held out from training; choices are made on it.
        test: Reported only.
        collate: Makes a batch, see :class:`TextBatches`.
        largest_batch: Sequences in a batch of those that are not trained on.
    """

    name: str
    train: tuple[Sequence[Any], Sequence[int] | None]
    validation: tuple[Sequence[Any], Sequence[int] | None]
    test: tuple[Sequence[Any], Sequence[int] | None]
    collate: Callable[[list[Any], list[int] | None], dict[str, torch.Tensor]]
    largest_batch: int = 128

    def training(self, batch_size: int = 64, seed: int = 0) -> TextBatches:
        """Return shuffled training batches."""
        return self._batches(self.train, batch_size, seed)

    def calibration(self, seed: int = 0, *, augment: bool = True) -> TextBatches:
        """Return shuffled training batches to calibrate and measure with.

        Args:
            seed: Of the order.
            augment: Text is never augmented.
        """
        del augment
        return self._batches(self.train, self.largest_batch, seed + 17)

    def validating(self) -> TextBatches:
        """Return the validation batches."""
        return self._batches(self.validation, self.largest_batch)

    def testing(self) -> TextBatches:
        """Return the test batches."""
        return self._batches(self.test, self.largest_batch)

    def example(self) -> dict[str, torch.Tensor]:
        """Return the inputs of one sample."""
        return self.collate(list(self.test[0][:1]), None)

    def _batches(
        self,
        part: tuple[Sequence[Any], Sequence[int] | None],
        size: int,
        seed: int | None = None,
    ) -> TextBatches:
        return TextBatches(
            *part,
            self.collate,
            batch_size=size,
            shuffle=seed is not None,
            seed=seed or 0,
        )


def load_sentences(
    folder: str | os.PathLike[str] | None,
    tokenizer: Callable[..., Any],
    *,
    longest: int = LONGEST,
) -> TextDataset:
    """Return labelled sentences in the layout of GLUE.

    ``train.tsv`` and ``dev.tsv`` have a header line and the columns ``sentence`` and
    ``label``, whole numbers from 0 on. A thousand sentences of ``train.tsv``, or a
    tenth if there are few, are held out for validation; ``dev.tsv`` is the test set.

    Args:
        folder: Where the two files lie, or the folder around a folder ``sst2``.
        tokenizer: Of the model, as transformers has them.
        longest: Tokens of a sentence, at most the ``model_max_length`` of the
            tokenizer; further ones are cut off.

    Raises:
        DataError: A file is missing or has another layout, or the tokenizer has no
            token to pad with.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        raise DataError(
            "the tokenizer cannot pad sentences to one length",
            got="no pad_token",
            wanted="a token that stands for nothing",
            fix="set its pad_token, as the model was trained, and save it again",
        )
    longest = min(longest, getattr(tokenizer, "model_max_length", longest))
    if folder is None:
        raise DataError(
            "sentences need a folder",
            wanted=f"the folder of {TRAIN} and {DEV}",
            fix="pass --data DIR, or set FITCOMPRESS_DATA",
        )
    root = Path(folder)
    root = root / "sst2" if (root / "sst2").is_dir() else root
    sentences, labels = _read_tsv(root / TRAIN)
    order = np.random.default_rng(0).permutation(len(labels))
    held = min(VALIDATION, len(labels) // 10)

    def part(index: np.ndarray[Any, Any]) -> tuple[list[str], list[int]]:
        return [sentences[i] for i in index], [labels[i] for i in index]

    def collate(items: list[str], given: list[int] | None) -> dict[str, torch.Tensor]:
        made = tokenizer(
            items,
            padding=True,
            truncation=True,
            max_length=longest,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        batch: dict[str, torch.Tensor] = dict(made)
        return batch if given is None else batch | {"labels": torch.tensor(given)}

    return TextDataset(
        name=f"{root.name}/*.tsv",
        train=part(order[held:]),
        validation=part(order[:held]),
        test=_read_tsv(root / DEV),
        collate=collate,
    )


def load_tokens(
    path: str | os.PathLike[str] | None,
    *,
    largest_batch: int = 16,
    vocabulary: int | None = None,
) -> TextDataset:
    """Return sequences of tokens for a language model, each labelled by itself.

    The last quarter is the test set, the eighth before it is held out for validation.

    Args:
        path: A ``.npy`` file of whole numbers, [sequences, tokens].
        largest_batch: Sequences in a batch; logits take vocabulary × 4 bytes a token.
        vocabulary: Number of tokens that there are; None if it is not known.

    Raises:
        DataError: There is no such file, it holds something else, or a token in it is
            negative or not below ``vocabulary``.
    """
    if path is None or not Path(path).is_file():
        raise DataError(
            "there is no file of tokens",
            got=path,
            wanted="a .npy file of whole numbers, [sequences, tokens]",
            fix="pass --data FILE.npy",
        )
    try:  # np.load leaves archives that are cut off open
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read",
            got=str(error)[:200],
            wanted="one array in a .npy file, not an archive of arrays",
            fix="save it with numpy.save",
        ) from error
    if (
        found.ndim != 2
        or found.dtype.kind not in "iu"
        or min(found.shape, default=0) < FEWEST
    ):
        raise DataError(
            f"{path} holds no sequences of tokens",
            got=f"{found.dtype} {found.shape}",
            wanted=f"whole numbers, [sequences, tokens], at least {FEWEST} of both",
        )
    least, most = int(found.min()), int(found.max())
    largest = np.iinfo(np.int64).max if vocabulary is None else vocabulary - 1
    if least < 0 or most > largest:
        raise DataError(
            f"{path} holds tokens that the model does not have",
            got=f"{least} to {most}",
            wanted=f"0 to {largest}",
            fix="use the tokenizer of the model",
        )
    tokens = list(torch.from_numpy(found.astype(np.int64)))
    test, held = len(tokens) // 4, len(tokens) // 8
    train = len(tokens) - test - held

    def collate(rows: list[torch.Tensor], _: list[int] | None) -> dict[str, Any]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids}

    return TextDataset(
        name=Path(path).name,
        train=(tokens[:train], None),
        validation=(tokens[train : train + held], None),
        test=(tokens[train + held :], None),
        collate=collate,
        largest_batch=largest_batch,
    )


def _read_tsv(path: Path) -> tuple[list[str], list[int]]:
    if not path.is_file():
        raise DataError(
            f"{path} is missing",
            wanted=f"{TRAIN} and {DEV} with the columns sentence and label",
            fix="name the folder that holds them: --data DIR",
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(reader, [])
            places = header.index("sentence"), header.index("label")
            rows = [(row[places[0]], int(row[places[1]])) for row in reader if row]
    except (ValueError, IndexError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} has another layout",
            got=str(error)[:200],
            wanted="a header and tab-separated columns sentence and label",
        ) from error
    if not rows or min(label for _, label in rows) < 0:
        raise DataError(
            f"{path} has no labelled sentences",
            got=f"{len(rows)} rows",
            wanted="labels from 0 on",
        )
    return [sentence for sentence, _ in rows], [label for _, label in rows]
