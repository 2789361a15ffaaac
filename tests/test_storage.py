"""The packed file: what is loaded is what was saved, bit for bit."""

import copy
import dataclasses

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fitcompress as fc
from fitcompress.errors import (
    BudgetExceededError,
    FormatError,
    NonFiniteError,
    OutputError,
    PlanMismatchError,
)
from fitcompress.files import write_atomically
from fitcompress.quantize import attach_plan, grid_of, plan_of
from fitcompress.storage import container
from fitcompress.storage.save_load import layer_bytes, packed_bytes, read
from fitcompress.storage.tensors import DTYPES, from_bytes, smallest_exact, to_bytes
from packed_models import (
    assert_same,
    fresh,
    rounded,
    weights,
)


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(
    small, net, images, tmp_path, trainable
) -> None:
    file = tmp_path / "small.safetensors"
    size = fc.save(small, file)
    assert file.stat().st_size == size <= plan_of(small).limit_bytes
    assert list(tmp_path.iterdir()) == [file]
    other = fresh(net).train()
    loaded = fc.load(file, other, trainable=trainable)
    assert loaded is other
    assert not loaded.training
    assert torch.equal(loaded(images), small(images))
    assert_same(weights(loaded), weights(small))
    if trainable:
        again = tmp_path / "again"
        fc.save(loaded, again)
        content, before = read(again), read(file)
        assert_same(content.state(), before.state())
        assert content.plan.limit_bytes == before.plan.limit_bytes
    else:
        assert not any(grid_of(m) for m in loaded.modules())


def test_the_plan_comes_back(small, tmp_path) -> None:
    file = tmp_path / "small"
    size = fc.save(small, file)
    plan, stored = plan_of(small), read(file).plan
    assert list(stored.levels) == list(plan.levels)
    assert (stored.method, stored.status) == (plan.method, plan.status)
    assert (stored.limit_bytes, stored.size_bytes) == (plan.limit_bytes, size)
    assert stored.distortion == pytest.approx(plan.distortion, rel=1e-3)
    for name, level in plan.levels.items():
        other = stored.levels[name]
        assert (other.grid, other.shape, other.bops) == (
            level.grid,
            level.shape,
            level.bops,
        )
        assert other.sparsity == pytest.approx(level.sparsity, abs=1e-4)
    assert sum(layer_bytes(small).values()) < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [fc.Grid(bits=5), fc.Grid(step=0.02)], ids=str)
def test_models_of_any_precision(net, images, tmp_path, dtype, grid) -> None:
    net, x = net.to(dtype), images.to(dtype)
    small = rounded(net, grid, sparsity=0.3)
    fc.save(small, tmp_path / "f")
    loaded = fc.load(tmp_path / "f", fresh(net))
    assert_same(weights(loaded), weights(small))
    assert torch.equal(loaded(x), small(x))


class Shared(nn.Module):
    """A tied weight, one module under two names, and buffers of many types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.BatchNorm1d(4)
        self.same_norm = self.norm
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.last = nn.Linear(6, 3)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("whole", torch.tensor([2**40, -1]))
        self.register_buffer("precise", torch.tensor([[0.1]], dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(1e-9))
        self.register_buffer("no", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(self.embed(x).mean(1)).relu()))
        return self.last(self.out(self.same_norm(x)))


def test_shared_tensors_and_modules_stay_shared(tmp_path) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    small = rounded(model, fc.Grid(bits=6))
    fc.save(small, tmp_path / "f")
    loaded = fc.load(tmp_path / "f", Shared())
    x = torch.randint(6, (5, 3))
    assert torch.equal(loaded(x), small(x))
    assert_same(weights(loaded), weights(small))
    assert loaded.out.weight is loaded.embed.weight
    assert torch.equal(loaded.precise, model.precise)
    again = fc.load(tmp_path / "f", Shared(), trainable=True)
    assert torch.equal(again(x), small(x))
    # The state alone, as `unpack` writes it, has every key.
    plain = Shared()
    plain.load_state_dict(read(tmp_path / "f").state())
    assert torch.equal(plain.eval()(x), small(x))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(5, 3),
        nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2, affine=False)),
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
        nn.Sequential(nn.Linear(1, 1, bias=False)),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)
        ),
    ],
    ids=[
        "a layer",
        "conv, norm",
        "3d",
        "batch statistics",
        "one weight",
        "attention",
        "weight norm",
    ],
)
@pytest.mark.parametrize("grid", [fc.Grid(bits=4), fc.Grid(step=0.05)], ids=str)
def test_small_models_of_many_kinds(model, grid, tmp_path) -> None:
    small = rounded(model.eval(), grid)
    fc.save(small, tmp_path / "f")
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert_same(weights(fc.load(tmp_path / "f", other)), weights(small))
    assert_same(
        weights(fc.load(tmp_path / "f", copy.deepcopy(model), trainable=True)),
        weights(small),
    )


# Other models, budgets and places


def another_bias(net: nn.Module) -> nn.Module:
    net.out = nn.Linear(7, 5, bias=False)
    return net


def another_width(net: nn.Module) -> nn.Module:
    net.out = nn.Linear(7, 6)
    return net


def another_layer(net: nn.Module) -> nn.Module:
    net.more = nn.Linear(2, 2)
    return net


@pytest.mark.parametrize(
    "change",
    [another_bias, another_width, another_layer, lambda net: net.bfloat16()],
    ids=["no bias", "wider", "one more", "bfloat16"],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_another_architecture_is_refused_and_left_alone(
    small, net, tmp_path, change, trainable
) -> None:
    fc.save(small, tmp_path / "f")
    other = change(fresh(net)).train()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanMismatchError, match=r"differ in tensor.*To fix it"):
        fc.load(tmp_path / "f", other, trainable=trainable)
    assert_same(other.state_dict(), before)
    assert other.training


def test_a_compressed_model_that_does_not_fit_keeps_its_grids(small, tmp_path) -> None:
    fc.save(small, tmp_path / "f")
    other = another_width(copy.deepcopy(small))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanMismatchError):
        fc.load(tmp_path / "f", other)
    assert_same(other.state_dict(), before)
    assert grid_of(other.conv) is not None


def test_a_compressed_model_can_be_loaded_into(small, images, tmp_path) -> None:
    fc.save(small, tmp_path / "f")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.head.parametrizations.weight.original.zero_()
    loaded = fc.load(tmp_path / "f", other)
    assert torch.equal(loaded(images), small(images))
    assert grid_of(loaded.head) is None


def test_codes_of_a_layer_that_is_not_compressible_are_refused(tmp_path) -> None:
    # The file has codes of a Linear, the model an embedding of that name and shape that
    # renormalises its entries.
    class Net(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first, self.last = first, nn.Linear(4, 2)

    small = rounded(Net(nn.Linear(4, 3, bias=False)), fc.Grid(bits=4))
    fc.save(small, tmp_path / "f")
    other = Net(nn.Embedding(3, 4, max_norm=1.0))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanMismatchError, match=r"'first'.*To fix it"):
        fc.load(tmp_path / "f", other, trainable=True)
    assert_same(other.state_dict(), before)


def test_a_file_over_its_budget_is_not_written(small, tmp_path) -> None:
    size = len(packed_bytes(small))
    plan = plan_of(small)
    attach_plan(small, dataclasses.replace(plan, limit_bytes=size - 30))
    with pytest.raises(BudgetExceededError, match=r"not written.*To fix it") as e:
        fc.save(small, tmp_path / "f")
    assert abs(e.value.size_bytes - size) <= 3
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_to(small, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for place in (tmp_path / "no" / "f", tmp_path, tmp_path / "file" / "f"):
        with pytest.raises(
            OutputError, match=r"cannot write .*got .*wanted.*To fix it"
        ):
            fc.save(small, place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch) -> None:
    from fitcompress import files

    file = tmp_path / "f"
    file.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        fc.save(small, file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_only_compressed_and_finite_models_are_saved(small, net, tmp_path) -> None:
    with pytest.raises(PlanMismatchError, match=r"not compressed.*To fix it"):
        fc.save(net, tmp_path / "f")
    with torch.no_grad():
        small.out.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"out.bias.*got 1 of 5"):
        fc.save(small, tmp_path / "f")
    fc.remove(small)
    with pytest.raises(PlanMismatchError, match=r"on no grid.*To fix it"):
        small.out.bias.data.zero_()
        fc.save(small, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_gives_the_same_bytes(small) -> None:
    assert packed_bytes(small) == packed_bytes(copy.deepcopy(small))


@given(st.integers(0, 2**32), st.sampled_from(sorted(DTYPES)), st.integers(0, 9))
def test_tensors_come_back_bit_for_bit(seed, name, count) -> None:
    dtype = DTYPES[name]
    raw = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    if dtype == torch.bool:
        raw = bytes(b & 1 for b in raw)
    tensor = from_bytes(raw, name, name, (count,))
    if dtype.is_floating_point and not tensor.isfinite().all():
        return
    stored = smallest_exact(tensor)
    back = from_bytes(to_bytes(tensor, stored), stored, name, (count,))
    assert to_bytes(back, name) == raw


def test_floats_are_stored_in_16_bits_where_that_is_exact() -> None:
    assert smallest_exact(torch.tensor([0.5, -1.25])) == "f2"
    assert smallest_exact(torch.tensor([2.0**100])) == "bf2"
    assert smallest_exact(torch.tensor([0.1])) == "f4"
    with pytest.raises(FormatError, match=r"got torch.complex64.*To fix it"):
        smallest_exact(torch.zeros(2, dtype=torch.complex64))


def test_the_container_is_as_safetensors_writes_it(small, tmp_path) -> None:
    data = packed_bytes(small)
    with safetensors.safe_open(_file(tmp_path, data), framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert safetensors.numpy.save(tensors, file.metadata()) == data


def test_a_file_written_part_by_part_is_the_same(tmp_path) -> None:
    sections = [
        container.Section({"kind": "codes", "name": f"{i}"}, bytes(range(i)), 1 + i % 2)
        for i in range(9)
    ]
    whole = container.pack(container.Packed({"method": "given"}, sections))
    outlines = [container.Outline.of(section) for section in sections]
    parts = container.pack_parts(
        {"method": "given"}, outlines, (section.payload for section in sections)
    )
    write_atomically(tmp_path / "f", parts)
    assert (tmp_path / "f").read_bytes() == whole
    assert container.packed_size({"method": "given"}, outlines) == len(whole)


def _file(folder, data):
    path = folder / "f.safetensors"
    path.write_bytes(data)
    return path


def test_nothing_is_left_of_a_file_whose_parts_end_in_an_error(tmp_path) -> None:
    def parts():
        yield b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "f", parts())
    assert not list(tmp_path.iterdir())
