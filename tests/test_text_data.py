"""Sentences and sequences of tokens as data sets."""

import numpy as np
import pytest
import torch

import fitcompress as fc
from fitcompress.data.text import load_sentences, load_tokens
from fitcompress.hugging_face import load_tokenizer
from hugging_face_nets import bert, save_folder, save_sentences, save_tokens


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(save_folder(tmp_path / "bert", bert()))


def rows(batches) -> list[tuple[int, ...]]:
    """All samples without padding, with their labels."""
    return sorted(
        (*ids[mask > 0].tolist(), int(label))
        for batch in batches
        for ids, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    )


def test_sentences_are_split_shuffled_and_padded_by_the_batch(
    tmp_path, tokenizer
) -> None:
    data = load_sentences(save_sentences(tmp_path / "sst2"), tokenizer)
    around = load_sentences(tmp_path, tokenizer)  # the folder around it
    assert data.train == around.train
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [
        54,
        6,
        24,
    ]
    loader = data.training(4)
    first, again = list(loader), list(loader)
    assert len(loader) == len(first) == 14
    assert all(
        torch.equal(a[key], b[key])
        for a, b in zip(first, again, strict=True)
        for key in a
    )
    loader.epoch = 1
    assert any(
        not torch.equal(a["labels"], b["labels"])
        for a, b in zip(first, loader, strict=True)
    )
    assert rows(loader) == rows(first) == rows(data.calibration())
    # Sentences of like length stand together; in order there is more padding.
    sizes = [
        sum(batch["input_ids"].numel() for batch in each)
        for each in (first, data._batches(data.train, 4))
    ]
    assert sizes[0] < 0.9 * sizes[1]
    assert set(data.example()) == {"input_ids", "attention_mask"}
    longest = load_sentences(tmp_path, tokenizer, longest=3)
    assert max(b["input_ids"].shape[1] for b in longest.testing()) == 3


def test_tokens_are_labelled_by_themselves(tmp_path) -> None:
    data = load_tokens(save_tokens(tmp_path / "t.npy"))
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [
        20,
        4,
        8,
    ]
    saved = torch.from_numpy(np.load(tmp_path / "t.npy").astype(np.int64))
    (batch,) = data.testing()
    assert torch.equal(batch["input_ids"], saved[24:])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert [len(b["labels"]) for b in data.training(8)] in (
        [8, 8, 4],
        [8, 4, 8],
        [4, 8, 8],
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sentence\tlabel\n", "0 rows"),
        ("text\tlabel\ngood\t1\n", "sentence"),
        ("sentence\tlabel\ngood\n", "another layout"),
        ("sentence\tlabel\ngood\tyes\n", "yes"),
        ("sentence\tlabel\ngood\t-1\n", "from 0 on"),
        ("", "another layout"),
    ],
)
def test_files_of_another_layout(tmp_path, text, told) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(fc.errors.DataError, match=told):
        load_sentences(tmp_path, None)


def test_files_that_are_missing_or_hold_no_tokens(tmp_path) -> None:
    for load in (lambda path: load_sentences(path, None), load_tokens):
        for path in (None, tmp_path):
            with pytest.raises(fc.errors.DataError, match=r"npy|missing|a folder"):
                load(path)
    (tmp_path / "t.npy").write_bytes(b"no array")
    with pytest.raises(fc.errors.DataError, match="cannot be read"):
        load_tokens(tmp_path / "t.npy")
    (tmp_path / "t.npy").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(fc.errors.DataError, match="cannot be read"):
        load_tokens(tmp_path / "t.npy")
    for wrong in (np.full((9, 9), -1), np.full((9, 9), 2**63, np.uint64)):
        np.save(tmp_path / "t.npy", wrong)
        with pytest.raises(fc.errors.DataError, match="does not have"):
            load_tokens(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", np.zeros((9, 9), int))
    with pytest.raises(fc.errors.DataError, match="an archive"):
        load_tokens(tmp_path / "t.npz")
    for wrong in (np.zeros((9, 9)), np.zeros(9, int), np.zeros((2, 9), int)):
        np.save(tmp_path / "t.npy", wrong)
        with pytest.raises(fc.errors.DataError, match="no sequences"):
            load_tokens(tmp_path / "t.npy")
