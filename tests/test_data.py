"""Batches, augmentation, and data sets read from files."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from fitcompress.data import Batches, load_dataset, split_batch, take
from fitcompress.data.augment import random_crop
from fitcompress.data.cifar10 import FOLDER, MEAN, RECORD, STD
from fitcompress.errors import DataError, EmptyLoaderError


def test_take_cuts_the_last_batch() -> None:
    x = torch.arange(10)
    taken = list(take(zip(x.split(4), x.split(4), strict=True), 6))
    assert [b.tolist() for b, _ in taken] == [[0, 1, 2, 3], [4, 5]]
    assert all(torch.equal(b, y) for b, y in taken)
    assert [len(b) for b, _ in take(x.split(4), None)] == [4, 4, 2]
    assert [len(b) for b, _ in take(x.split(4), 8)] == [4, 4]


def test_take_reads_no_further_than_it_needs() -> None:
    batches = iter(torch.arange(12).split(4))
    list(take(batches, 4))
    assert next(batches).tolist() == [4, 5, 6, 7]


def test_take_cuts_inside_targets_of_several_parts() -> None:
    Boxes = collections.namedtuple("Boxes", ["box", "label"])
    x, y = torch.arange(6), torch.arange(6)
    [(_, pair)] = take([(x, (y, y + 1))], 3)
    assert [p.tolist() for p in pair] == [[0, 1, 2], [1, 2, 3]]
    [(_, named)] = take([(x, {"a": y, "b": ["u", "v", "w", "x", "y", "z"]})], 2)
    assert named["a"].tolist() == [0, 1]
    assert named["b"] == ["u", "v"]
    [(_, boxes)] = take([(x, Boxes(y, y))], 1)
    assert boxes == Boxes(torch.tensor([0]), torch.tensor([0]))


def test_take_skips_empty_batches() -> None:
    x = torch.zeros(3, 2)
    assert [len(b) for b, _ in take([x[:0], x, x[:0]], None)] == [3]


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 2)]])
def test_a_loader_without_samples_is_an_error(loader) -> None:
    with pytest.raises(EmptyLoaderError, match=r"got 0 batches.*To fix it"):
        list(take(loader, None))


@pytest.mark.parametrize("samples", [0, -1])
def test_at_least_one_sample_is_wanted(samples) -> None:
    with pytest.raises(DataError, match=f"got {samples}"):
        list(take([torch.zeros(4, 2)], samples))


def test_a_batch_is_a_tensor_or_starts_with_one() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert split_batch(x) == (x, None)
    assert split_batch((x,)) == (x, None)
    assert split_batch([x, y, "more"]) == (x, y)
    for bad in ({"x": 1}, {}, {"labels": y}, (1, y), [], "text"):
        with pytest.raises(DataError, match=r"got .*wanted a tensor.*To fix it"):
            split_batch(bad)


def test_batches_are_the_same_for_the_same_seed_and_epoch() -> None:
    x = torch.arange(10.0)

    def epoch(number: int, seed: int = 0) -> list[list[float]]:
        batches = Batches(
            x,
            batch_size=4,
            shuffle=True,
            augment=lambda x, g: x + torch.rand(len(x), generator=g),
            seed=seed,
        )
        batches.epoch = number
        assert len(batches) == 3
        return [b.tolist() for b, _ in batches]

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    assert sorted(int(v) for b in epoch(3) for v in b) == list(range(10))


def test_batches_keep_inputs_and_targets_together() -> None:
    x = torch.arange(7)
    for a, b in Batches(x, x * 10, batch_size=3, shuffle=True):
        assert torch.equal(b, a * 10)


def test_crops_are_shifts_over_black() -> None:
    # Every crop is a window of the padded image, whose border shows the fill.
    x = torch.rand(40, 2, 4, 5) + 2
    fill = torch.tensor([-1.0, -3.0])
    crops = random_crop(
        x, torch.Generator().manual_seed(0), padding=1, fill=fill, flip=False
    )
    padded = fill.view(1, 2, 1, 1).repeat(40, 1, 6, 7)
    padded[:, :, 1:5, 1:6] = x
    seen = set()
    for i, crop in enumerate(crops):
        places = [
            (t, s)
            for t in range(3)
            for s in range(3)
            if torch.allclose(crop, padded[i, :, t : t + 4, s : s + 5], atol=1e-6)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9  # every shift occurs


def test_flips_mirror_half_of_the_images() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(200, 1, 1, 1)
    crops = random_crop(
        x, torch.Generator().manual_seed(0), padding=0, fill=torch.zeros(1), flip=True
    )
    mirrored = [torch.equal(c, x[0].flip(2)) for c in crops]
    assert 70 < sum(mirrored) < 130
    assert all(m or torch.equal(c, x[0]) for m, c in zip(mirrored, crops, strict=True))


def write_cifar(folder: Path, records: int = 410) -> np.ndarray:
    """Five training files and a test file of random images; return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        raw = rng.integers(0, 256, (records, RECORD), np.uint8)
        raw[:, 0] %= 10
        raw.tofile(folder / name)
    return raw


def test_cifar10_is_read_as_its_format_says(tmp_path) -> None:
    raw = write_cifar(tmp_path / FOLDER)
    data = load_dataset("cifar10", tmp_path)
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [
        5 * 410 - 2000,
        2000,
        410,
    ]
    x, y = data.test
    assert y.tolist() == raw[:, 0].tolist()
    # Red of the first image's second row, third pixel: one label, 32 a row.
    red = (raw[0, 1 + 32 + 2] / 255 - 0.485) / 0.229
    assert float(x[0, 0, 1, 2]) == pytest.approx(red, abs=1e-5)
    blue = (raw[7, 1 + 2 * 1024] / 255 - 0.406) / 0.225
    assert float(x[7, 2, 0, 0]) == pytest.approx(blue, abs=1e-5)
    same = load_dataset("cifar10", tmp_path / FOLDER)  # the folder itself
    assert torch.equal(same.train[0], data.train[0])


def test_cifar10_is_augmented_over_black() -> None:
    white = ((1 - MEAN) / STD).expand(8, 3, 32, 32)
    from fitcompress.data.cifar10 import _augment

    shifted = _augment(white, torch.Generator().manual_seed(0))
    values = shifted[:, 0].unique()
    expected = torch.tensor([-0.485 / 0.229, (1 - 0.485) / 0.229])
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), "data_batch_3.bin is missing"),
        (lambda f: (f / "test_batch.bin").write_bytes(b""), "got 0 bytes"),
        (lambda f: (f / "test_batch.bin").write_bytes(bytes(RECORD + 1)), "multiple"),
        (lambda f: (f / "test_batch.bin").write_bytes(b"\xff" * RECORD), "label 255"),
        (lambda f: write_cifar(f, 3), r"got 15 .*2000"),
    ],
    ids=["missing", "empty", "cut", "label", "short"],
)
def test_damaged_cifar10_is_an_error(tmp_path, damage, message) -> None:
    write_cifar(tmp_path, 401)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", tmp_path)


def test_cifar10_needs_a_folder_and_data_sets_have_names(tmp_path) -> None:
    with pytest.raises(DataError, match=r"needs a folder.*To fix it"):
        load_dataset("cifar10")
    with pytest.raises(DataError, match="is missing"):
        load_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match="got mnist; wanted cifar10 or digits"):
        load_dataset("mnist")


@pytest.mark.data
def test_the_real_cifar10(data_folder) -> None:
    data = load_dataset("cifar10", data_folder)
    parts = (data.train, data.validation, data.test)
    assert [len(part[0]) for part in parts] == [48_000, 2000, 10_000]
    assert all(sorted(y.unique().tolist()) == list(range(10)) for _, y in parts)
    assert abs(float(data.train[0].mean())) < 0.2


def test_the_digits_come_in_three_disjoint_parts() -> None:
    data = load_dataset("digits")
    parts = (data.train, data.validation, data.test)
    assert [len(part[0]) for part in parts] == [1097, 200, 500]
    images = torch.cat([x for x, _ in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 1797
    assert float(data.train[0].mean()) == pytest.approx(0, abs=0.01)
    assert float(data.train[0].std()) == pytest.approx(1, abs=0.01)
    again = load_dataset("digits")
    assert torch.equal(again.test[0], data.test[0])


def test_calibration_is_augmented_and_repeatable() -> None:
    data = load_dataset("digits")
    first, second = (next(iter(data.calibration(seed=1)))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(next(iter(data.calibration(seed=2)))[0], first)
    black = data.augment(data.train[0][:64] + 5, torch.Generator().manual_seed(0))
    assert float(black.min()) < 0  # borders moved in
