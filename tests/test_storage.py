"""The packed file: exact, and never anything but a typed error when it is damaged."""

import copy
import dataclasses
import json
import random
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
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
from fitcompress.quantize import attach_plan, grid_of, plan_of
from fitcompress.storage.container import Packed, Section, pack, unpack
from fitcompress.storage.save_load import layer_bytes, packed_bytes, read
from fitcompress.storage.tensors import DTYPES, from_bytes, smallest_exact, to_bytes


def levels_for(model: nn.Module, grid: fc.Grid, sparsity: float = 0.0) -> fc.Plan:
    from fitcompress.model import compressible_layers

    return fc.Plan(
        {x.name: fc.Level(grid, sparsity, x.shape) for x in compressible_layers(model)}
    )


def rounded(model: nn.Module, grid: fc.Grid, sparsity: float = 0.0) -> nn.Module:
    return fc.apply(model, levels_for(model, grid, sparsity), progress=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All values of a model, as a plain one has them."""
    return fc.remove(copy.deepcopy(model)).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


def fresh(net: nn.Module) -> nn.Module:
    """Another model of the same architecture, with other values."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.fill_(3)
    return other


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


# Damage


@pytest.fixture(scope="module")
def tiny() -> bytes:
    """A packed file of a few hundred bytes with every kind of section."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return packed_bytes(rounded(model.eval(), fc.Grid(bits=4)), coding="adaptive")


@pytest.fixture
def tiny_content(tiny, tmp_path) -> dict[str, torch.Tensor]:
    (tmp_path / "good").write_bytes(tiny)
    return read(tmp_path / "good").state()


def check_damaged(file, data: bytes, content: dict[str, torch.Tensor]) -> bool:
    """Whether damaged bytes are refused; if not, they must mean the same."""
    file.write_bytes(data)
    try:
        state = read(file).state()
    except FormatError:
        return True
    assert_same(state, content)
    return False


def test_every_truncation_is_refused(tiny, tiny_content, tmp_path) -> None:
    for length in range(len(tiny)):
        assert check_damaged(tmp_path / "f", tiny[:length], tiny_content)
    assert check_damaged(tmp_path / "f", tiny + b"\0", tiny_content)


def test_every_flipped_bit_is_refused_or_harmless(tiny, tiny_content, tmp_path) -> None:
    harmless = 0
    for place in range(len(tiny)):
        data = bytearray(tiny)
        data[place] ^= 1 << (place % 8)
        if not check_damaged(tmp_path / "f", bytes(data), tiny_content):
            harmless += 1
    assert harmless < 20  # the container's own label, "format: fitcompress"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_damage_is_refused_or_harmless(data, tiny, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "good").write_bytes(tiny)
    content = read(folder / "good").state()
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    changed = bytearray(tiny)
    for _ in range(draw.randint(1, 6)):
        start = draw.randrange(len(changed))
        length = draw.choice((1, 2, 8, 40))
        kind = draw.choice(("overwrite", "delete", "insert", "move"))
        if kind == "overwrite":
            changed[start : start + length] = draw.randbytes(length)
        elif kind == "delete":
            del changed[start : start + length]
        elif kind == "insert":
            changed[start:start] = draw.randbytes(length)
        else:
            changed[start:start] = changed[:length]
    check_damaged(folder / "bad", bytes(changed), content)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_other_bytes_are_refused(tmp_path_factory, data) -> None:
    file = tmp_path_factory.getbasetemp() / "noise"
    assert check_damaged(file, data, {})


def test_other_files_are_refused(tmp_path) -> None:
    file = tmp_path / "f"
    with pytest.raises(FileNotFoundError):
        fc.load(file, nn.Linear(2, 2))
    for tensors in (
        {},
        {"weight": np.zeros(3, np.float32)},
        {"index": np.zeros(3, np.uint8)},
        {"index": np.zeros(3, np.uint8), "payload": np.zeros(3, np.int8)},
    ):
        file.write_bytes(safetensors.numpy.save(tensors))
        with pytest.raises(FormatError, match=r"no packed file.*To fix it"):
            read(file)


def forged(tiny: bytes, change) -> bytes:
    """A file whose checksums are right and whose index says something else."""
    packed = unpack(tiny)
    sections = [
        Section(copy.deepcopy(s.entry), bytes(s.payload)) for s in packed.sections
    ]
    plan = dict(packed.plan)
    sections = change(sections, plan) or sections
    return pack(Packed(plan, sections))


def set_code(**values):
    """Change the description of the first coded weight."""
    return lambda sections, plan: sections[0].entry.update(values)


def set_rest(**values):
    """Change the description of the leftovers."""
    return lambda sections, plan: sections[-1].entry.update(values)


def set_plan(**values):
    return lambda sections, plan: plan.update(values)


def longer(sections, plan):
    sections[0] = dataclasses.replace(
        sections[0], payload=sections[0].payload + bytes(9)
    )


def shorter(sections, plan):
    sections[0] = dataclasses.replace(sections[0], payload=sections[0].payload[:3])


INF, NAN = float("inf"), float("nan")
LIES = {
    "shape too long": set_code(shape=[2**39, 3]),
    "shape overflows": set_code(shape=[2**40, 2**40]),
    "shape of nothing": set_code(shape=[]),
    "shape without weights": set_code(shape=[0, 4]),
    "negative shape": set_code(shape=[-3, -4]),
    "shape as floats": set_code(shape=[3.0, 4.0]),
    "shape as text": set_code(shape="34"),
    "more codes": set_code(shape=[3, 5]),
    "many more codes": set_code(shape=[3, 60_000]),
    "fewer codes": set_code(shape=[3, 3]),
    "other rows": set_code(shape=[2, 6]),
    "no name": set_code(name=None),
    "unknown dtype": set_code(dtype="f3"),
    "dtype as a list": set_code(dtype=["f4"]),
    "codes as booleans": set_code(dtype="b1"),
    "codes as integers": set_code(dtype="i4"),
    "scale of integers": set_code(scale="i4"),
    "scale as a list": set_code(scale=["f4"]),
    "scales 2": set_code(scales=2),
    "scales true": set_code(scales=True),
    "scales 1.0": set_code(scales=1.0),
    "scales as text": set_code(scales="3"),
    "bits 1": set_code(bits=1),
    "bits 4.5": set_code(bits=4.5),
    "bits as text": set_code(bits="4"),
    "fewer bits than codes": set_code(bits=2),
    "sparsity": set_code(sparsity=1.5),
    "sparsity NaN": set_code(sparsity=NAN),
    "loss infinite": set_code(loss=INF),
    "loss as a list": set_code(loss=[1]),
    "bops infinite": set_code(bops=INF),
    "bops NaN": set_code(bops=NAN),
    "unknown kind": set_code(kind="magic"),
    "kind as a list": set_code(kind=["codes"]),
    "twice": lambda s, p: [s[0], *s],
    "no leftovers": lambda s, p: s[:-1],
    "two leftovers": lambda s, p: [*s, s[-1]],
    "no codes": lambda s, p: s[-1:],
    "longer": longer,
    "shorter": shorter,
    "limit infinite": set_plan(limit_bytes=INF),
    "limit as text": set_plan(limit_bytes="many"),
    "limit negative": set_plan(limit_bytes=-5),
    "gap as text": set_plan(gap="none"),
    "distortion NaN": set_plan(distortion=NAN),
    "no tensors": set_rest(tensors=None),
    "tensors as numbers": set_rest(tensors=[1, 2]),
    "tensor too long": set_rest(tensors=[["a", "f2", "f4", [2**38]]]),
    "tensor of unknown dtype": set_rest(tensors=[["a", "f3", "f4", [3]]]),
    "tensor dtype as a list": set_rest(tensors=[["a", ["f2"], "f4", [3]]]),
    "fewer tensors": set_rest(tensors=[]),
    "no norms": set_rest(norms=[]),
    "norm of floats": set_rest(norms=[["1", "f2", 3.0, 1e-5, True]]),
    "norm of unknown dtype": set_rest(norms=[["1", "f9", 3, 1e-5, True]]),
    "eps as text": set_rest(norms=[["1", "f2", 3, "small", True]]),
    "eps NaN": set_rest(norms=[["1", "f2", 3, NAN, True]]),
    "alias of nothing": set_rest(aliases={"a": "b"}),
    "aliases as a list": set_rest(aliases=["a"]),
    "alias of an alias": set_rest(aliases={"a": "b", "b": "a"}),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused(tiny, tmp_path, change) -> None:
    file = tmp_path / "f"
    file.write_bytes(forged(tiny, lambda s, p: None))
    read(file)
    file.write_bytes(forged(tiny, change))
    with pytest.raises(FormatError):
        read(file).state()


@pytest.mark.parametrize("scale", [NAN, INF, -1.0])
def test_scales_that_are_no_steps_are_refused(tiny, tmp_path, scale) -> None:
    def change(sections, plan) -> None:
        first = sections[0]
        bad = to_bytes(torch.tensor([1.0, scale, 1.0]), "f2")
        sections[0] = dataclasses.replace(first, payload=bad + first.payload[6:])
        assert first.entry["scale"] == "f2"

    (tmp_path / "f").write_bytes(forged(tiny, change))
    with pytest.raises(FormatError, match="scale"):
        read(tmp_path / "f")


def reindexed(tiny: bytes, text: bytes) -> bytes:
    """A file with another index."""
    parts = dict(safetensors.deserialize(tiny))
    tensors = {
        "index": np.frombuffer(zlib.compress(text), np.uint8),
        "payload": np.frombuffer(bytes(parts["payload"]["data"]), np.uint8),
    }
    return safetensors.numpy.save(tensors)


INDICES = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "nothing": b"",
    "version 2": b'{"version": 2, "plan": {}, "sections": []}',
    "version 3": b'{"version": 3, "plan": {}, "sections": []}',
    "version true": b'{"version": true, "plan": {}, "sections": []}',
    "no plan": b'{"version": 1, "sections": []}',
    "no sections": b'{"version": 1, "plan": {}}',
    "empty": b'{"version": 1, "plan": {}, "sections": []}',
    "sections of numbers": b'{"version": 1, "plan": {}, "sections": [1]}',
    "deep": b"[" * 100_000,
    "huge number": b'{"version": ' + b"9" * 10_000 + b"}",
    "no length": b'{"version": 1, "plan": {}, "sections": [{"kind": "codes"}]}',
} | {
    f"length {n}": b'{"version": 1, "plan": {}, "sections": [{"bytes": %s}]}' % n
    for n in (b"-1", b"true", b"1e3", b'"9"', b"99999999999999999999", b"null", b"1000")
}


@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
def test_an_index_of_nonsense_is_refused(tiny, tmp_path, text) -> None:
    (tmp_path / "f").write_bytes(reindexed(tiny, text))
    with pytest.raises(FormatError):
        read(tmp_path / "f")


def test_an_index_that_explodes_is_refused(tiny, tmp_path) -> None:
    text = json.dumps({"version": 1, "plan": {}, "sections": [], "x": " " * 10**6})
    (tmp_path / "f").write_bytes(reindexed(tiny, text.encode()))
    with pytest.raises(FormatError, match="too long"):
        read(tmp_path / "f")


# Transposed convolutions


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
        small.out.bias[0] = NAN
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
