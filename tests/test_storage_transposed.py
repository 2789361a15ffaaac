"""Weights of transposed convolutions in a packed file."""

import json
import zlib

import pytest
import safetensors.numpy
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import (
    FormatError,
    PlanMismatchError,
)
from fitcompress.storage.save_load import packed_bytes, read
from packed_models import (
    assert_same,
    forged,
    fresh,
    reindexed,
    rounded,
    tiny_file,
    weights,
)


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return tiny_file()


def upsampler(groups: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, bias=False),
    )


@pytest.fixture
def upsampling() -> bytes:
    small = rounded(upsampler(), fc.Grid(bits=4), sparsity=0.3)
    return packed_bytes(small, coding="adaptive")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("grid", [fc.Grid(bits=4), fc.Grid(step=0.03)], ids=str)
def test_transposed_convolutions_are_loaded_bit_for_bit(
    tmp_path, grid, trainable
) -> None:
    small = rounded(upsampler(), grid, sparsity=0.3)
    fc.save(small, tmp_path / "f")
    loaded = fc.load(tmp_path / "f", fresh(upsampler()), trainable=trainable)
    assert_same(weights(loaded), weights(small))
    coded = read(tmp_path / "f").weights["1"]
    assert coded.codes.shape == (6, 2 * 9)
    assert coded.scale.numel() == (6 if grid.bits else 1)
    if trainable:
        assert packed_bytes(loaded) == packed_bytes(small)


def version(data: bytes) -> int:
    parts = dict(safetensors.deserialize(data))
    return json.loads(zlib.decompress(bytes(parts["index"]["data"])))["version"]


def test_only_files_with_transposed_convolutions_need_a_new_reader(
    tiny, upsampling, tmp_path
) -> None:
    assert (version(tiny), version(upsampling)) == (1, 2)
    parts = dict(safetensors.deserialize(upsampling))
    text = zlib.decompress(bytes(parts["index"]["data"]))
    text = text.replace(b'"version":2', b'"version":1')
    (tmp_path / "f").write_bytes(reindexed(upsampling, text))
    with pytest.raises(FormatError, match="later version"):
        read(tmp_path / "f")


@pytest.mark.parametrize("groups", [0, -1, 3, 5, True, 2.0, "2", None, 2**40])
def test_impossible_groups_are_refused(upsampling, tmp_path, groups) -> None:
    def change(sections, plan) -> None:
        sections[1].entry["transposed_groups"] = groups

    (tmp_path / "f").write_bytes(forged(upsampling, change))
    with pytest.raises(FormatError, match="groups"):
        read(tmp_path / "f")


@pytest.mark.parametrize(
    "shape", [[4, 3, 0, 9], [0, 3, 3, 3], [4, 27], [], [4, 3, 3, 3, 1, 1]], ids=str
)
def test_impossible_shapes_of_transposed_convolutions_are_refused(
    upsampling, tmp_path, shape
) -> None:
    def change(sections, plan) -> None:
        sections[1].entry["shape"] = shape

    (tmp_path / "f").write_bytes(forged(upsampling, change))
    with pytest.raises(FormatError):
        read(tmp_path / "f")


def test_another_kind_of_convolution_is_refused(upsampling, tmp_path) -> None:
    (tmp_path / "f").write_bytes(upsampling)
    plain = upsampler()
    plain[1] = nn.Conv2d(3, 4, 3, bias=False)  # a weight of the same shape
    other = upsampler(groups=1)
    other[1] = nn.ConvTranspose2d(4, 3, 3, bias=False)
    for model in (plain, other):
        with pytest.raises(PlanMismatchError, match=r"kind of layer '1'"):
            fc.load(tmp_path / "f", model)
