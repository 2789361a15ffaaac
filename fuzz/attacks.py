"""Packed files with right checksums that lie: whole files built to break a reader.

    python fuzz/attacks.py FOLDER

writes one file for each attack, and ``good``, the file that they were made of.
"""

from __future__ import annotations

import copy
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import fitcompress as fc
from fitcompress import _core
from fitcompress.quantize import ActivationQuantizer, attach_activation
from fitcompress.storage.container import open_index
from fitcompress.storage.save_load import packed_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]
DEEP = "[" * 900 + "]" * 900
NUMBER = 10**400  # larger than any float


def network() -> nn.Module:
    """Return a network with every kind of section and of leftover."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.LayerNorm(5),
    ).eval()


def compressed() -> nn.Module:
    """Return the network on grids of bits and steps, one input quantized."""
    net = network()
    shapes = {"0": (4, 2, 3, 3), "2": (4, 3, 2, 2), "4": (5, 24)}
    grids = {"0": fc.Grid(bits=4), "2": fc.Grid(step=0.05), "4": fc.Grid(bits=12)}
    levels = {n: fc.Level(grids[n], 0.25, shape) for n, shape in shapes.items()}
    small = fc.apply(net, fc.Plan(levels), progress=False)
    quantizer = ActivationQuantizer(4, dynamic=True)
    attach_activation(small.get_submodule("4"), quantizer)
    return small


def good(coding: str = "static") -> bytes:
    """Return a whole packed file."""
    return packed_bytes(compressed(), coding=coding)


def parts_of(data: bytes) -> tuple[Json, list[bytes]]:
    """Return the index of a file, with lengths, and its payloads."""
    index = open_index(memoryview(data))
    sections = [s.entry | {"bytes": len(s.body) - 4} for s in index.sections]
    whole = {"version": index.version, "plan": index.plan, "sections": sections}
    return copy.deepcopy(whole), [bytes(s.body[:-4]) for s in index.sections]


def joined(payloads: list[bytes]) -> bytes:
    """Return payloads, each with its checksum."""
    return b"".join(p + struct.pack("<I", zlib.crc32(p)) for p in payloads)


def container(index: bytes, payload: bytes, header: str | None = None) -> bytes:
    """Return a container of a compressed index and payloads, or with that header."""
    n, m = len(index), len(index) + len(payload)
    if header is None:
        header = json.dumps(
            {
                "__metadata__": {"format": "fitcompress"},
                "index": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]},
                "payload": {"dtype": "U8", "shape": [m - n], "data_offsets": [n, m]},
            }
        )
    head = header.encode()
    return struct.pack("<Q", len(head)) + head + index + payload


def rebuilt(index: Json, payloads: list[bytes], *, measure: bool = True) -> bytes:
    """Return the file of an index and payloads, lengths and checksums right."""
    sections = index.get("sections")
    if measure and isinstance(sections, list):
        sections = list(sections)
        for number, (entry, payload) in enumerate(
            zip(sections, payloads, strict=False)
        ):
            if isinstance(entry, dict):
                sections[number] = entry | {"bytes": len(payload)}
        index = index | {"sections": sections}
    return container(zlib.compress(json.dumps(index).encode(), 9), joined(payloads))


def entry_attacks() -> dict[str, Callable[[list[Json]], object]]:
    """Return changes of the index's entries: three codes, leftovers, activations."""

    def first(**values: object) -> Callable[[list[Json]], object]:
        return lambda s: s[0].update(values)

    def rest(**values: object) -> Callable[[list[Json]], object]:
        return lambda s: s[3].update(values)

    def rest_row(key: str, row: int, place: int, value: object) -> Any:
        return lambda s: s[3][key][row].__setitem__(place, value)

    def row(**values: object) -> Callable[[list[Json]], object]:
        places = ("name", "bits", "type", "per_channel", "lo", "hi", "scales")

        def change(sections: list[Json]) -> None:
            for key, value in values.items():
                sections[4]["layers"][0][places.index(key)] = value

        return change

    return {
        "codes-shape-negative": first(shape=[-4, -2, 3, 3]),
        "codes-shape-gigantic": first(shape=[2**30, 2, 3, 3]),
        "codes-shape-larger": first(shape=[4, 2, 3, 4]),
        "codes-shape-nothing": first(shape=[4, 0, 3, 3]),
        "codes-bits-too-few": first(bits=2),
        "codes-loss-huge-integer": first(loss=NUMBER),
        "codes-sparsity-huge-integer": first(sparsity=NUMBER),
        "codes-step-for-each-row": lambda s: s[0].pop("bits"),
        "codes-name-deep": first(name=json.loads(DEEP)),
        "codes-twice": lambda s: s[1].update(name="0"),
        "leftovers-tensor-twice": lambda s: s[3]["tensors"][1].__setitem__(0, "2.bias"),
        "leftovers-norm-twice": lambda s: s[3].update(
            norms=s[3]["norms"] + [["1", "f2", 0, 0.5, True]]
        ),
        "leftovers-norm-is-a-tensor": rest_row("norms", 0, 0, "5"),
        "leftovers-number-as-key": rest_row("tensors", 0, 0, 7),
        "leftovers-list-as-key": rest_row("tensors", 0, 0, ["2.bias"]),
        "leftovers-eps-huge-integer": rest_row("norms", 0, 3, NUMBER),
        "leftovers-eps-as-text": rest_row("norms", 0, 3, "0.5"),
        "leftovers-eps-true": rest_row("norms", 0, 3, False),
        "leftovers-counted-as-text": rest_row("norms", 0, 4, "no"),
        "leftovers-alias-number": rest(aliases={"x": 5}),
        "leftovers-alias-of-itself": rest(aliases={"x": "x"}),
        "leftovers-strides-overflow": lambda s: s[3]["tensors"].append(
            ["x", "f4", "f4", [0, 2**39, 2**39]]
        ),
        "leftovers-nothing-of-2^39": lambda s: s[3]["tensors"].append(
            ["x", "f4", "f4", [0, 2**39]]
        ),
        "leftovers-float-as-integer": lambda s: s[3]["tensors"][0].__setitem__(2, "i8"),
        "leftovers-float-as-half": lambda s: s[3]["tensors"][0].__setitem__(2, "f2"),
        "leftovers-bytes-as-booleans": lambda s: s[3]["tensors"].__setitem__(
            0, ["2.bias", "b1", "b1", [24]]
        ),
        "activations-name-twice": lambda s: s[4]["layers"].append(s[4]["layers"][0]),
        "activations-bits-true": row(bits=True),
        "activations-bits-17": row(bits=17),
        "activations-scales-of-dynamic": row(scales=1),
        "activations-range-reversed": row(type="static", lo=1, hi=0, scales=1),
        "activations-scales-gigantic": row(
            type="static", per_channel=True, lo=0, hi=15, scales=2**23
        ),
        "activations-none": lambda s: s[4].update(layers=[]),
        "section-unknown": first(kind="pickle"),
        "section-later-version": lambda s: s.append({"kind": "later"}),
        "sections-swapped": lambda s: s.insert(0, s.pop(1)),
    }


def plan_attacks() -> dict[str, Json]:
    """Return changes of the plan."""
    return {
        "plan-distortion-huge-integer": {"distortion": NUMBER},
        "plan-gap-huge-integer": {"gap": NUMBER},
        "plan-limit-huge-integer": {"limit_bytes": NUMBER},
        "plan-distortion-as-text": {"distortion": "0.5"},
        "plan-gap-nan": {"gap": float("nan")},
        "plan-method-missing": {"method": None},
        "plan-status-number": {"status": 3},
        "plan-limit-true": {"limit_bytes": True},
    }


def index_attacks(index: Json) -> dict[str, bytes]:
    """Return texts of the index."""
    text = json.dumps(index)
    digits = "9" * 4300
    return {
        "index-key-twice": text.replace('"plan"', '"plan": {}, "plan"', 1).encode(),
        "index-utf-16": text.encode("utf-16"),
        "index-byte-order-mark": b"\xef\xbb\xbf" + text.encode(),
        "index-surrogate": text.replace('"name": "0"', '"name": "\\ud800"').encode(),
        "index-nan": text.replace('"plan": {', '"plan": {"more": NaN, ').encode(),
        "index-length-of-4300-digits": text.replace(
            '"bytes": ', f'"bytes": {digits}, "was": ', 1
        ).encode(),
        "index-version-of-5000-digits": b'{"version": ' + b"9" * 5000 + b"}",
        "index-deep": b"[" * 100_000,
        "index-closed-deep": text.replace(
            '"kind": "codes"', f'"kind": {DEEP}', 1
        ).encode(),
        "index-later-version": text.replace('"version": 4', '"version": 5').encode(),
        "index-earlier-version": text.replace('"version": 4', '"version": 3').encode(),
        "index-version-true": text.replace('"version": 4', '"version": true').encode(),
        "index-empty": b"{}",
        "index-no-sections": b'{"version": 4, "plan": {}, "sections": []}',
    }


def container_attacks(index: bytes, payload: bytes) -> dict[str, bytes]:
    """Return containers that lie, or are no such containers."""
    whole = container(index, payload)
    n, m = len(index), len(index) + len(payload)

    def header(first: str, second: str, more: str = "") -> bytes:
        text = f'{{"index": {first}, "payload": {second}{more}}}'
        return container(index, payload, text)

    def one(begin: int, end: int, kind: str = "U8") -> str:
        shape = f'"shape": [{end - begin}]'
        return f'{{"dtype": "{kind}", {shape}, "data_offsets": [{begin}, {end}]}}'

    first, second = one(0, n), one(n, m)
    return {
        "header-length-2^63": struct.pack("<Q", 1 << 63) + whole[8:],
        "header-length-of-the-file": struct.pack("<Q", len(whole)) + whole[8:],
        "header-length-one-less": struct.pack("<Q", whole[0] - 1) + whole[1:],
        "header-length-0": bytes(8) + whole[8:],
        "header-tensors-overlap": header(one(0, n), one(n - 9, m - 9)),
        "header-tensors-alike": header(one(0, m), one(0, m)),
        "header-gap": header(one(0, n), one(n + 1, m)),
        "header-offset-negative": header(one(-5, n), second),
        "header-offset-2^70": header(first, one(n, 2**70)),
        "header-offset-4300-digits": header(
            f'{{"data_offsets": [-{"9" * 4300}, {"9" * 4300}]}}', second
        ),
        "header-other-dtype": header(one(0, n, "I8"), second),
        "header-key-twice": header(first, second, f', "index": {first}'),
        "header-third-tensor": header(first, second, f', "x": {one(m, m)}'),
        "header-deep": container(index, payload, '{"index": ' + DEEP * 9),
        "file-empty": b"",
        "file-of-seven-bytes": whole[:7],
        "file-cut-in-the-index": whole[: 8 + whole[0] + n // 2],
        "file-cut-in-the-payload": whole[:-5],
        "file-with-one-byte-more": whole + b"\0",
        "index-bomb": container(
            zlib.compress(b"[" + b"0," * 10**6 + b"0]", 9), payload
        ),
        "index-not-ended": container(index[:-4], payload),
        "index-and-more": container(index + b"more", payload),
        "index-no-zlib": container(b"not compressed", payload),
    }


def payload_attacks(payloads: list[bytes]) -> dict[str, list[bytes]]:
    """Return payloads whose checksums will be right and whose content lies.

    The first is four scales as ``f2``, then codec, flags, the length of the shares,
    shares, the state of the only block and its words.
    """
    scales, stream = payloads[0][:8], payloads[0][8:]
    shares = stream[2]
    block = 3 + shares

    def first(data: bytes) -> list[bytes]:
        return [data, *payloads[1:]]

    def coded(data: bytes) -> list[bytes]:
        return first(scales + data)

    def third(stream: bytes) -> list[bytes]:
        return [*payloads[:2], payloads[2][:20] + stream, *payloads[3:]]

    large = payloads[2][20:]  # classes with extra bits behind the words
    return {
        "scale-nan": first(struct.pack("<e", float("nan")) + payloads[0][2:]),
        "scale-infinite": first(struct.pack("<e", float("inf")) + payloads[0][2:]),
        "scale-negative": first(struct.pack("<e", -1.0) + payloads[0][2:]),
        "step-zero": [payloads[0], bytes(4) + payloads[1][4:], *payloads[2:]],
        "scales-only": first(scales),
        "scales-cut": first(scales[:5]),
        "stream-codec-3": coded(b"\3" + stream[1:]),
        "stream-codec-1": coded(b"\1" + stream[1:]),
        "stream-flags-mean-nothing": coded(stream[:1] + b"\xff" + stream[2:]),
        "stream-limit-means-nothing": coded(stream[:1] + b"\x06" + stream[2:]),
        "stream-shares-longer": coded(stream[:2] + bytes([shares + 1]) + stream[3:]),
        "stream-shares-gigantic": coded(stream[:2] + b"\xff" * 9 + stream[3:]),
        "stream-shares-length-padded": coded(
            stream[:2] + bytes([shares | 128, 0]) + stream[3:]
        ),
        "stream-shares-of-ones": coded(stream[:3] + b"\xff" * shares + stream[block:]),
        "stream-shares-of-zeros": coded(stream[:3] + bytes(shares) + stream[block:]),
        "stream-state-impossible": coded(
            stream[:block] + bytes(4) + stream[block + 4 :]
        ),
        "stream-state-largest": coded(
            stream[:block] + b"\xff" * 4 + stream[block + 4 :]
        ),
        "stream-without-words": coded(stream[: block + 4]),
        "stream-word-missing": coded(stream[:-2]),
        "stream-byte-missing": coded(stream[:-1]),
        "stream-byte-more": coded(stream + b"\0"),
        "stream-all-zero-and-more": coded(b"\1\0\0"),
        "stream-extra-bits-missing": third(large[:-1]),
        "stream-extra-bits-follow": third(large + b"\0"),
        "stream-extra-bits-padded": third(large[:-1] + bytes([large[-1] | 128])),
        "leftovers-byte-more": [*payloads[:3], payloads[3] + b"\0", *payloads[4:]],
        "activations-byte-more": [*payloads[:4], b"\0"],
    }


def block_attacks(index: Json, payloads: list[bytes]) -> dict[str, bytes]:
    """Return files whose first weight has two blocks, or is gigantic."""

    def file(shape: list[int], stream: bytes) -> bytes:
        other = copy.deepcopy(index)
        other["sections"][0].update(shape=shape, scales=1, scale="f2")
        first = struct.pack("<e", 0.5) + stream
        return rebuilt(other, [first, *payloads[1:]])

    rows, columns = 2, 132_000
    stream = _core.encode(np.ones((rows, columns), np.int32), coding="static")
    place = 3 + stream[2]  # of the length of the first block, 16: four states
    assert stream[place] == 16

    def length(*values: int) -> bytes:
        return file(
            [rows, columns], stream[:place] + bytes(values) + stream[place + 1 :]
        )

    return {
        "good-two-blocks": file([rows, columns], stream),
        "blocks-length-shorter": length(15),
        "blocks-length-longer": length(17),
        "blocks-length-all": length(32),
        "blocks-length-0": length(0),
        "blocks-length-gigantic": length(255, 255, 255, 255, 255, 127),
        "blocks-length-padded": length(144, 0),
        "blocks-of-other-shape": file([2, 262_144], stream),
        "zeros-2^29": file([2**15, 2**14], b"\1\0"),
        "zeros-2^39": file([2**20, 2**19], b"\1\0"),
        "adaptive-2^27": file([2**14, 2**13], b"\1\5\1" + bytes(3000)),
        "static-2^29": file([2**15, 2**14], stream + bytes(2**13)),
    }


def main() -> None:
    """Write all of them."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in all_attacks().items():
        (folder / name).write_bytes(data)


def all_attacks() -> dict[str, bytes]:
    """Return name → bytes."""
    data = good()
    index, payloads = parts_of(data)
    made = {"good": data, "good-adaptive": good("adaptive")}
    for name, change in entry_attacks().items():
        other = copy.deepcopy(index)
        change(other["sections"])
        made[name] = rebuilt(other, payloads, measure=False)
    for name, values in plan_attacks().items():
        made[name] = rebuilt(index | {"plan": index["plan"] | values}, payloads)
    for name, changed in payload_attacks(payloads).items():
        made[name] = rebuilt(index, changed)
    made |= block_attacks(index, payloads)
    for name, text in index_attacks(index).items():
        made[name] = container(zlib.compress(text, 9), joined(payloads))
    compressed_index = zlib.compress(json.dumps(index).encode(), 9)
    return made | container_attacks(compressed_index, joined(payloads))


if __name__ == "__main__":
    main()
