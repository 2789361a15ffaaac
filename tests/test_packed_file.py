"""Packed files opened lazily, described, and written in either coding."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import BudgetExceededError, FormatError, OptionError
from fitcompress.storage import coded_weight
from fitcompress.storage.save_load import packed_bytes, read


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A compressed network of several kinds of layers, one with a mask."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 40)
    ).eval()
    levels = {
        "0": fc.Level(fc.Grid(bits=4), 0.5, (16, 3, 3, 3)),
        "3": fc.Level(fc.Grid(step=0.02), 0.0, (40, 64)),
    }
    return fc.apply(model, fc.Plan(levels))


@pytest.fixture(params=["smallest", "static", "adaptive"])
def file(small, tmp_path, request):
    fc.save(small, tmp_path / "f", coding=request.param)
    return tmp_path / "f"


def test_either_coding_loads_the_same(small, file) -> None:
    fresh = fc.load(file, fc.remove(small))
    x = torch.rand(5, 3, 4, 4)
    assert torch.equal(fresh(x), small.eval()(x))
    again = fc.load(file, fc.remove(small), trainable=True)
    assert torch.equal(again[0].weight, small[0].weight)
    assert torch.equal(again[3].weight, small[3].weight)


def test_codings_are_what_they_say(small) -> None:
    sizes = {c: len(packed_bytes(small, coding=c)) for c in coded_weight.CODINGS}
    assert sizes["smallest"] <= min(sizes["static"], sizes["adaptive"])
    with pytest.raises(OptionError, match=r"coding.*quick"):
        packed_bytes(small, coding="quick")


def test_coding_and_threads_leave_no_trace(small) -> None:
    once = packed_bytes(small, coding="static")
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert packed_bytes(small, coding="static") == once
    finally:
        torch.set_num_threads(before)


def test_static_coding_keeps_the_budget(small, tmp_path) -> None:
    import dataclasses

    from fitcompress.quantize import attach_plan, plan_of

    plan, size = plan_of(small), len(packed_bytes(small))
    static = len(packed_bytes(small, coding="static"))
    assert static >= size
    attach_plan(small, dataclasses.replace(plan, limit_bytes=static - 1))
    try:
        with pytest.raises(BudgetExceededError):
            fc.save(small, tmp_path / "f", coding="static")
        assert not (tmp_path / "f").exists()
    finally:
        attach_plan(small, plan)


def test_layers_one_by_one(small, file) -> None:
    with fc.PackedFile(file) as packed:
        assert packed.names == ["0", "3"]
        assert packed.size_bytes == file.stat().st_size
        for name in packed.names:
            assert torch.equal(packed.weight(name), small[int(name)].weight)
        assert torch.equal(packed.leftovers.tensors["3.bias"], small[3].bias)
        assert packed.plan.levels["0"].sparsity == 0.5
        with pytest.raises(KeyError):
            packed.weight("1")
    whole = read(file)
    assert packed.plan == whole.plan


def test_what_was_decoded_outlives_the_file(small, file) -> None:
    with fc.PackedFile(file) as packed:
        weight = packed.weight("3")
    file.unlink()
    assert torch.equal(weight, small[3].weight)


def test_opening_reads_no_layer(small, tmp_path) -> None:
    # Damage in one layer is found when that layer is asked for, and in no other.
    data = bytearray(packed_bytes(small, coding="adaptive"))
    with fc.PackedFile(_written(tmp_path, bytes(data))) as packed:
        first, second = packed.coded_bytes("0"), packed.coded_bytes("3")
        left = packed.section_bytes()[0]
    place = len(data) - left - second // 2
    data[place] ^= 64
    with fc.PackedFile(_written(tmp_path, bytes(data))) as packed:
        assert torch.equal(packed.weight("0"), small[0].weight)
        with pytest.raises(FormatError, match=r"checksum of section '3'"):
            packed.weight("3")
    assert first > 8
    with pytest.raises(FormatError):
        read(tmp_path / "f")


def _written(folder, data: bytes):
    (folder / "f").write_bytes(data)
    return folder / "f"


def test_an_empty_file_is_refused(tmp_path) -> None:
    with pytest.raises(FormatError, match="0 bytes"):
        fc.PackedFile(_written(tmp_path, b""))
    with pytest.raises(FileNotFoundError):
        fc.PackedFile(tmp_path / "missing")


def test_a_wrong_model_is_told_before_anything_is_decoded(
    small, file, monkeypatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(coded_weight._core, "dequantize", refuse)
    with pytest.raises(fc.errors.PlanMismatchError):
        fc.load(file, nn.Sequential(nn.Linear(2, 2)))


def test_description(small, file) -> None:
    found = fc.inspect(file)
    assert [each.name for each in found.tensors] == ["0", "3"]
    conv, linear = found.tensors
    codes = read(file).weights["3"].codes.numpy()
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size / 8
    assert linear.entropy_bytes == pytest.approx(entropy)
    assert linear.levels == len(share)
    assert linear.sparsity == pytest.approx((codes == 0).mean())
    assert 0.5 <= conv.sparsity < 0.7
    assert conv.weights == 16 * 27 and conv.scales in (1, 16)
    parts = sum(each.bytes for each in found.tensors)
    parts += found.leftover_bytes + found.activation_bytes + found.container_bytes
    assert parts == found.size_bytes == file.stat().st_size
    assert 200 < found.container_bytes < 800
    text = str(found)
    for word in ("4 bit", "16×3×3×3", f"{found.size_bytes:,} bytes", conv.coding):
        assert word in text
    assert json.loads(json.dumps(found.to_dict()))["tensors"][0]["name"] == "0"


def test_description_of_a_constant_layer(tmp_path) -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    plan = fc.Plan({"": fc.Level(fc.Grid(bits=3), 0.0, (4, 4))})
    fc.save(fc.apply(layer, plan), tmp_path / "f")
    (found,) = fc.inspect(tmp_path / "f").tensors
    assert (found.sparsity, found.levels, found.entropy_bytes) == (1.0, 1, 0.0)


def test_many_layers_on_many_threads_are_each_their_own(tmp_path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(5 + i, 6 + i) for i in range(20)))
    levels = {
        str(i): fc.Level(fc.Grid(bits=2 + i % 5), 0.0, (6 + i, 5 + i))
        for i in range(20)
    }
    small = fc.apply(model, fc.Plan(levels))
    fc.save(small, tmp_path / "f", coding="static")
    loaded = fc.load(tmp_path / "f", fc.remove(small))
    for before, after in zip(small, loaded, strict=True):
        assert torch.equal(before.weight, after.weight)
    assert math.isclose(fc.inspect(tmp_path / "f").tensors[3].weights, 72)
