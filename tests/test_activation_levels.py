"""Activation bits of a plan: applied, trained, reported, saved and loaded."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.data import Batches
from fitcompress.errors import (
    CalibrationError,
    FormatError,
    PlanMismatchError,
    UnsupportedLayerError,
)
from fitcompress.model import compressible_layers
from fitcompress.model.costs import count_macs
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    MSEObserver,
    activation_of,
    activations,
    attach_activation,
    channel_of,
    plan_of,
)
from fitcompress.storage import container
from fitcompress.storage.container import pack, unpack
from fitcompress.storage.save_load import packed_bytes, read

BITS = {"conv": 8, "deep": 6, "head": 4, "out": None}


def plan_for(model: nn.Module, bits: dict[str, int | None] = BITS, **more) -> fc.Plan:
    grid = more.pop("grid", fc.Grid(bits=6))
    return fc.Plan(
        {
            x.name: fc.Level(grid, 0.0, x.shape, activation_bits=bits.get(x.name))
            for x in compressible_layers(model)
        },
        **more,
    )


@pytest.fixture
def quantized(net, images) -> nn.Module:
    return fc.apply(net, plan_for(net), [images], progress=False)


def packed_of(model: nn.Module):
    return unpack(packed_bytes(model))


def damaged(model: nn.Module, tmp_path, row=None, payload=None, **entry):
    """The file of ``model`` with another section of activations."""
    packed = packed_of(model)
    section = packed.sections[-1]
    assert section.entry["kind"] == "activations"
    if row is not None:
        section.entry["layers"][0] = row
    section.entry.update(entry)
    if payload is not None:
        packed.sections[-1] = dataclasses.replace(section, payload=payload)
    file = tmp_path / "damaged"
    file.write_bytes(pack(packed))
    return file


def test_apply_quantizes_the_inputs_of_the_plan(net, images, quantized) -> None:
    found = dict(activations(quantized))
    assert {name: q.bits for name, q in found.items()} == {
        name: bits for name, bits in BITS.items() if bits
    }
    assert found["conv"].min_code < 0  # images have both signs
    assert found["deep"].min_code == found["head"].min_code == 0  # behind a ReLU
    assert all(q.calibrated for q in found.values())
    assert dict(activations(net)) == {}
    assert plan_of(quantized).levels["deep"].activation_bits == 6


def test_ranges_come_from_the_compressed_network(net, images, quantized) -> None:
    plain = fc.remove(copy.deepcopy(quantized), activations=True)
    observer = MSEObserver()
    handle = plain.head.register_forward_pre_hook(lambda _, x: observer.observe(x[0]))
    with torch.no_grad():
        plain(images)
    handle.remove()
    own = activation_of(quantized.head)
    expected = observer.range(4)
    assert own.max_code == expected.max_code
    # Batches of another size: the last bits of convolutions may differ.
    assert torch.allclose(own.scale, expected.scale, rtol=1e-3)


def test_weights_do_not_depend_on_activation_bits(net, images, quantized) -> None:
    dense = fc.apply(net, plan_for(net, {}), [images], progress=False)
    expected = fc.remove(dense).state_dict()
    own = fc.remove(quantized, activations=True).state_dict()
    assert set(own) == set(expected)
    assert all(torch.equal(own[key], value) for key, value in expected.items())


def test_more_bits_are_nearer(net, images, quantized) -> None:
    dense = fc.apply(net, plan_for(net, {}), [images], progress=False)
    errors = []
    for bits in (2, 4, 8, 12):
        plan = plan_for(net, dict.fromkeys(BITS, bits))
        small = fc.apply(net, plan, [images], progress=False)
        with torch.no_grad():
            errors.append(float((small(images) - dense(images)).square().mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0
    assert errors[3] < 1e-4 * errors[0]


def test_bytes_of_quantizers_count_for_the_budget(net, images) -> None:
    plan = plan_for(net, grid=fc.Grid(step=0.1), limit_bytes=1500)
    small = fc.apply(net, plan, [images], progress=False)
    assert 0.97 * 1500 < len(packed_bytes(small)) <= 1500
    assert len(dict(activations(small))) == 3


def test_applying_again_replaces_quantizers(net, images, quantized) -> None:
    again = fc.apply(quantized, plan_for(net, {"out": 5}), [images], progress=False)
    assert [name for name, _ in activations(again)] == ["out"]
    assert len(dict(activations(quantized))) == 3


def test_activation_bits_need_data_and_numbers(net, images) -> None:
    with pytest.raises(CalibrationError, match="pass calibrate="):
        fc.apply(net, plan_for(net), progress=False)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    ids = torch.arange(20).view(10, 2) % 5
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        fc.apply(model, plan_for(model, {"0": 4}), [ids], progress=False)
    small = fc.apply(model, plan_for(model, {"1": 4}), [ids], progress=False)
    assert activation_of(small[1]).bits == 4


@pytest.mark.parametrize("trainable", [False, True])
def test_saved_and_loaded_networks_agree_bit_for_bit(
    net, images, quantized, tmp_path, trainable
) -> None:
    file, again = tmp_path / "small", tmp_path / "again"
    size = fc.save(quantized, file)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(2)
    for _ in range(2):  # the second time the model has quantizers already
        fc.load(file, other, trainable=trainable)
        assert torch.equal(other(images), quantized(images))
    for name, quantizer in activations(quantized):
        loaded = activation_of(other.get_submodule(name))
        assert torch.equal(loaded.scale, quantizer.scale)
        assert (loaded.bits, loaded.min_code, loaded.max_code) == (
            quantizer.bits,
            quantizer.min_code,
            quantizer.max_code,
        )
    levels = read(file).plan.levels
    assert {n: x.activation_bits for n, x in levels.items()} == BITS
    if trainable:
        assert fc.save(other, again) == size
        assert again.read_bytes() == file.read_bytes()


def test_loading_takes_quantizers_away_that_the_file_lacks(
    net, images, quantized, tmp_path
) -> None:
    dense = fc.apply(net, plan_for(net, {}), [images], progress=False)
    fc.save(dense, tmp_path / "dense")
    loaded = fc.load(tmp_path / "dense", quantized)
    assert not dict(activations(loaded))
    assert torch.equal(loaded(images), dense(images))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_every_kind_of_quantizer_is_stored(
    net, images, quantized, tmp_path, wide, dynamic, symmetric
) -> None:
    for name in ("conv", "deep", "out"):
        module = quantized.get_submodule(name)
        channel = channel_of(module) if wide else None
        observer = None if dynamic else MinMaxObserver(channel)
        made = ActivationQuantizer(
            5, observer, channel=channel, dynamic=dynamic, symmetric=symmetric
        )
        attach_activation(module, made)
    quantized(images)
    for _, quantizer in activations(quantized):
        quantizer.freeze()
    fc.save(quantized, tmp_path / "small")
    loaded = fc.load(tmp_path / "small", copy.deepcopy(net))
    assert torch.equal(loaded(images), quantized(images))


def test_files_without_activations_are_as_before(net, images, quantized) -> None:
    dense = fc.apply(net, plan_for(net, {}), [images], progress=False)
    plain = packed_of(dense)
    assert [s.entry["kind"] for s in plain.sections] == ["codes"] * 4 + ["leftovers"]
    fc.remove(quantized)  # grids are needed to save: take only the quantizers
    with pytest.raises(PlanMismatchError):
        packed_bytes(quantized)
    again = fc.apply(net, plan_for(net), [images], progress=False)
    for _, module in again.named_modules():
        if activation_of(module) is not None:
            fc.quantize.detach_activation(module)
    assert packed_bytes(again) == packed_bytes(dense)


def test_a_file_with_activations_is_of_version_three(quantized) -> None:
    packed = packed_of(quantized)
    assert packed.sections[-1].entry == {
        "kind": "activations",
        "layers": [
            ["conv", 8, "static", False, *bounds(quantized.conv), 1],
            ["deep", 6, "static", False, 0, 63, 1],
            ["head", 4, "static", False, 0, 15, 1],
        ],
    }
    assert len(packed.sections[-1].payload) == 12
    data = pack(packed)
    assert data == packed_bytes(quantized)


def test_no_activations_in_a_file_of_an_earlier_version(
    quantized, tmp_path, monkeypatch
) -> None:
    packed = packed_of(quantized)
    with monkeypatch.context() as patch:
        patch.setattr(container, "_version", lambda entry: 2)
        old = [dataclasses.replace(s, version=1) for s in packed.sections]
        data = pack(dataclasses.replace(packed, sections=old))
    with pytest.raises(FormatError, match="later version"):
        unpack(data)


def bounds(module: nn.Module) -> tuple[int, int]:
    quantizer = activation_of(module)
    return quantizer.min_code, quantizer.max_code


GOOD = ["conv", 8, "static", False, -100, 155, 1]
BAD_ROWS = [
    (0, 5),
    (1, 1),
    (1, 17),
    (1, 8.0),
    (1, True),
    (1, 7),  # more codes than bits
    (2, "other"),
    (2, ["static"]),
    (2, "symmetric"),  # other bounds than ±q
    (2, "dynamic"),  # with bounds and steps
    (3, 0),
    (4, 1),
    (4, -1.0),
    (5, 0),
    (5, None),
    (6, 0),
    (6, 2),
    (6, -1),
    (6, 2**40),
]


@pytest.mark.parametrize(("place", "value"), BAD_ROWS)
def test_impossible_quantizers_are_refused(quantized, tmp_path, place, value) -> None:
    row = list(GOOD)
    read(damaged(quantized, tmp_path, row=list(row)))  # fine before
    row[place] = value
    with pytest.raises(FormatError):
        read(damaged(quantized, tmp_path, row=row))


def test_damaged_sections_are_refused(quantized, tmp_path) -> None:
    good = packed_of(quantized).sections[-1].payload
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        payload = torch.tensor([bad]).numpy().tobytes() + good[4:]
        with pytest.raises(FormatError, match="positive and finite"):
            read(damaged(quantized, tmp_path, payload=payload))
    for payload in (good[:-1], good[:-4], good + b"\0"):
        with pytest.raises(FormatError):
            read(damaged(quantized, tmp_path, payload=payload))
    for layers in ([], None, {"conv": 1}, ["conv"], [GOOD, GOOD], [GOOD[:-1]]):
        with pytest.raises(FormatError):
            read(damaged(quantized, tmp_path, layers=layers, payload=good[:8]))
    packed = packed_of(quantized)
    packed.sections.append(packed.sections[-1])
    (tmp_path / "twice").write_bytes(pack(packed))
    with pytest.raises(FormatError, match="repeated section"):
        read(tmp_path / "twice")


def test_files_for_other_models_are_refused_untouched(net, quantized, tmp_path) -> None:
    before = copy.deepcopy(net.state_dict())
    for name in ("norm", "nowhere"):
        file = damaged(quantized, tmp_path, row=[name, *GOOD[1:]])
        with pytest.raises(PlanMismatchError, match=name):
            fc.load(file, net)
    wide = ["conv", 8, "static", True, -100, 155, 3]
    payload = torch.ones(5).numpy().tobytes()
    file = damaged(quantized, tmp_path, row=wide, payload=payload)
    with pytest.raises(PlanMismatchError, match="2 channels"):
        fc.load(file, net)
    assert all(torch.equal(before[key], v) for key, v in net.state_dict().items())


def test_an_uncalibrated_quantizer_is_not_saved(quantized, tmp_path) -> None:
    attach_activation(quantized.out, ActivationQuantizer(4, MinMaxObserver()))
    with pytest.raises(CalibrationError, match="'out' is not calibrated"):
        fc.save(quantized, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_the_report_shows_activation_bits(net, images, quantized) -> None:
    with torch.no_grad():
        labelled = [(images, net(images).argmax(1))]
    report = fc.report(net, quantized, labelled, progress=False)
    assert {row.name: row.activation_bits for row in report.layers} == BITS
    macs = count_macs(net, images[:1])
    weights = {row.name: row.weight_bits for row in report.layers}
    expected = sum(weights[n] * (BITS[n] or 32) * m for n, m in macs.items())
    assert report.after["bops"] == expected
    text = str(report)
    assert "input" in text
    for row in report.layers:
        line = next(x for x in text.splitlines() if f" {row.name} " in x)
        shown = f"{BITS[row.name]} bit" if BITS[row.name] else "float"
        assert line.rstrip(" │").endswith(shown)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["activation_bits"] == 8
    dense = fc.apply(net, plan_for(net, {}), [images], progress=False)
    assert "input" not in str(fc.report(net, dense, progress=False))


def test_the_page_shows_activation_bits(net, quantized, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    fc.report(net, quantized, progress=False).html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<th>input</th>" in page
    assert "<td>4 bit</td>" in page and "<td>float</td>" in page


def test_finetuning_learns_the_steps(net, images, tmp_path) -> None:
    plan = plan_for(net, {"deep": 2, "head": 3}, grid=fc.Grid(step=0.1))
    small = fc.apply(net, plan, [images], progress=False)
    with torch.no_grad():
        for _, quantizer in activations(small):
            quantizer.scale.mul_(0.3)  # clips most of what it sees
    before = {name: q.scale.detach().clone() for name, q in activations(small)}
    size = len(packed_bytes(small))
    twin = copy.deepcopy(small)
    loader = Batches(images, batch_size=32, shuffle=True)
    options = {"teacher": net, "epochs": 5, "float_lr": 0.02, "progress": False}
    result = fc.finetune(small, loader, validation=loader, **options)
    assert result.kept and result.after < result.before
    for name, quantizer in activations(small):
        growth = float(quantizer.scale.detach() / before[name])
        assert 1.02 < growth < 1.02**15  # a share of Δ a step, so many steps
    assert len(packed_bytes(small)) <= size
    fc.save(small, tmp_path / "small")
    loaded = fc.load(tmp_path / "small", copy.deepcopy(net))
    assert torch.equal(loaded(images), small(images))
    fc.finetune(twin, loader, validation=loader, **options)  # the same again
    assert torch.equal(twin(images), small(images))
