"""The packed file: nothing but a typed error when it is damaged or lies."""

import dataclasses
import json
import random

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fitcompress as fc
from fitcompress.errors import (
    FormatError,
)
from fitcompress.storage.save_load import read
from fitcompress.storage.tensors import to_bytes
from packed_models import (
    assert_same,
    forged,
    reindexed,
    set_code,
    tiny_file,
)


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return tiny_file()


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
