"""Numbers of norms in few bytes: coded without loss, and rounded to few digits."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fitcompress as fc
from fitcompress.errors import FormatError
from fitcompress.quantize import fold_norms_, norm_digits, shorten, shorten_norms_
from fitcompress.storage.container import pack, unpack
from fitcompress.storage.norm_codes import decode_norms, encode_norms
from fitcompress.storage.save_load import packed_bytes, read


def bits(values: torch.Tensor) -> list[int]:
    return values.contiguous().view(torch.int16).flatten().tolist()


@given(
    st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=2, max_size=40),
    st.integers(0, 12),
)
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_bits(patterns, cut) -> None:
    # NaN, infinities, −0 and subnormals among them.
    half = len(patterns) // 2
    both = torch.tensor(patterns[: 2 * half], dtype=torch.int16).reshape(2, half)
    values = (both & ~((1 << cut) - 1)).view(torch.float16)
    data = encode_norms(values)
    assert bits(decode_norms(data, half)) == bits(values)


def test_fewer_digits_take_fewer_bytes() -> None:
    values = torch.rand(2, 600, generator=torch.Generator().manual_seed(0)) + 0.5
    sizes = [
        len(encode_norms(shorten(values.half().float(), d).half()))
        for d in (10, 8, 6, 5)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert 100 * 2 < sizes[0] - sizes[1] < 200 * 2  # 1200 numbers, two digits
    assert sizes[0] < 2 * values.numel()


@given(st.floats(-60000, 60000, width=16), st.integers(5, 10))
@settings(max_examples=300, deadline=None)
def test_shortened_numbers(value, digits) -> None:
    x = torch.tensor([value])
    short = shorten(x, digits)
    assert torch.equal(short.half().float(), short)
    assert abs(float(short) - value) <= 2.0 ** -(digits + 1) * abs(value)
    if value and torch.finfo(torch.float16).tiny <= abs(value):
        fraction = float(torch.frexp(short)[0]) * 2 ** (digits + 1)
        assert fraction == round(fraction)
    assert torch.equal(shorten(short, digits), short)


def test_what_float16_does_not_hold_stays() -> None:
    odd = torch.tensor([1e-9, 0.1, 1e6, float("inf"), 65504.0, 0.0])
    kept = shorten(odd, 5)
    assert torch.equal(kept, odd)
    whole = torch.arange(3)
    assert shorten(whole, 5) is whole
    assert shorten(torch.zeros(0), 5).numel() == 0


def levels(bits_per_weight: float) -> fc.Plan:
    level = fc.Level(
        fc.Grid(step=0.1), 0.0, (10, 10), size_bits=int(100 * bits_per_weight)
    )
    return fc.Plan({"layer": level})


@pytest.mark.parametrize(
    ("weight_bits", "digits"),
    [(0, 10), (0.5, 5), (1.07, 5), (2.1, 6), (3.8, 7), (4, 7), (8, 10), (16, 10)],
)
def test_digits_follow_the_bits_of_the_weights(weight_bits, digits) -> None:
    assert norm_digits(levels(weight_bits)) == digits


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A network with three norms, one of them beyond 16 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 80, 3),
        nn.BatchNorm2d(80),
        nn.Conv2d(80, 5, 3),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4),
    ).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    nn.init.constant_(model[5].weight, 1e6)
    plan = fc.Plan(
        {
            name: fc.Level(
                fc.Grid(bits=4),
                0.0,
                tuple(model[int(name)].weight.shape),
                0,
                3 * model[int(name)].weight.numel(),
            )
            for name in ("0", "2", "4")
        }
    )
    return fc.apply(model, plan)


def test_norms_of_a_file(small, tmp_path) -> None:
    fc.save(small, tmp_path / "f")
    state, own = read(tmp_path / "f").state(), small.state_dict()
    for name in ("1", "3", "5"):
        for key in ("weight", "bias", "running_var"):
            assert torch.equal(state[f"{name}.{key}"], own[f"{name}.{key}"])
    # Three bits a weight leave six digits.
    assert torch.equal(shorten(own["1.weight"], 6), own["1.weight"])
    assert not torch.equal(shorten(own["1.weight"], 5), own["1.weight"])
    assert float(own["5.weight"][0]) > 9e5


def test_shortening_reaches_folded_norms_only(small) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    nn.init.uniform_(model[1].weight)
    before = copy.deepcopy(model.state_dict())
    shorten_norms_(model, 5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fold_norms_(model)
    shorten_norms_(model, 5)
    fraction = torch.frexp(model[1].weight)[0] * 64
    assert torch.equal(fraction, fraction.round())
    assert torch.equal(model[0].weight, before["0.weight"])


def test_a_few_channels_stay_as_they_are(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    made = fc.apply(model, fc.Plan({"0": fc.Level(fc.Grid(bits=4), 0.0, (4, 3))}))
    assert "norm_bytes" not in unpack(packed_bytes(made)).sections[-1].entry


def changed(small, **values):
    packed = unpack(packed_bytes(small))
    left = packed.sections[-1]
    left.entry.update({k: v for k, v in values.items() if v is not None})
    for key in [k for k, v in values.items() if v is None]:
        del left.entry[key]
    return pack(packed)


@pytest.mark.parametrize("length", [0, -1, 1, 12, 10**9, True, 3.0, "9", None])
def test_lengths_that_lie(small, tmp_path, length) -> None:
    (tmp_path / "f").write_bytes(changed(small, norm_bytes=length))
    with pytest.raises(FormatError):
        read(tmp_path / "f")


@pytest.mark.parametrize("channels", [0, 1, 79, 81, -80, 2**40])
def test_channels_that_lie(small, tmp_path, channels) -> None:
    norms = unpack(packed_bytes(small)).sections[-1].entry["norms"]
    norms[0][2] = channels
    (tmp_path / "f").write_bytes(changed(small, norms=norms))
    with pytest.raises(FormatError):
        read(tmp_path / "f")


def test_no_coded_norms_in_a_file_of_an_earlier_version(small, monkeypatch) -> None:
    import dataclasses

    from fitcompress.storage import container

    packed = unpack(packed_bytes(small))
    with monkeypatch.context() as patch:
        patch.setattr(container, "_version", lambda entry: 3)
        old = [dataclasses.replace(s, version=1) for s in packed.sections]
        data = pack(dataclasses.replace(packed, sections=old))
    with pytest.raises(FormatError, match="later version"):
        unpack(data)


def test_damage_of_the_block() -> None:
    values = torch.randn(2, 30, generator=torch.Generator().manual_seed(1)).half()
    data = encode_norms(values)
    refused = 0
    for place in range(len(data)):
        for bad in (data[:place], _flipped(data, place)):
            try:
                assert decode_norms(bad, 30).shape == (2, 30)
            except FormatError:
                refused += 1
    assert refused > len(data)
    with pytest.raises(FormatError):
        decode_norms(data + b"\0", 30)
    assert np.isfinite(decode_norms(data, 30).float().numpy()).all()


def _flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << (place % 8)
    return bytes(changed)
