"""Ways to damage a packed file, with or without repairing its checksums."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

from attacks import container, joined, parts_of, rebuilt

if TYPE_CHECKING:
    import random

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 17, 255, 2**31, 2**40, 2**63, 10**400,
    0.5, -0.5, 1e308, 1e-320, "", "0", "2", "4", "weight", "f2", "bf2", "f4", "f8",
    "i8", "b1", "u1", "codes", "leftovers", "activations", "static", "symmetric",
    "dynamic", "é", "\0", [], {}, [[]], [0], [1, 2], [2**39, 0], [2**14, 2**14],
    [4, 2, 3, 3], {"a": "0.weight"},
]  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> tuple[bytes, bool]:
    """Return a damaged file, and whether checksums and index were repaired."""
    kind = draw.randrange(8)
    if kind == 0:
        return flipped(data, draw), False
    if kind == 1:
        return spliced(data, draw), False
    if kind == 2:
        head = data[:8] + flipped(data[8 : 8 + data[0]], draw) + data[8 + data[0] :]
        return head, True  # names and offsets may change places
    index, payloads = parts_of(data)
    if kind == 3:
        return rebuilt(index, changed_payload(payloads, draw)), True
    if kind == 4:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            edit(index, draw)
        return rebuilt(index, payloads, measure=draw.random() < 0.3), True
    if kind == 5:
        swap(index, payloads, draw)
        return rebuilt(index, payloads, measure=draw.random() < 0.5), True
    if kind == 6:
        text = spliced(json.dumps(index).encode(), draw)
        return container(zlib.compress(text, 9), joined(payloads)), True
    for _ in range(draw.randint(1, 2)):
        edit(index, draw)
    return rebuilt(index, changed_payload(payloads, draw)), True


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some bits flipped."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def spliced(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with pieces overwritten, deleted, inserted, or moved."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 40))
        piece = draw.choice((draw.randbytes(length), bytes(length), b"\xff" * length))
        kind = draw.randrange(5)
        if kind == 0:
            changed[start : start + length] = piece
        elif kind == 1:
            del changed[start : start + length]
        elif kind == 2:
            changed[start:start] = piece
        elif kind == 3:
            other = draw.randrange(len(changed) + 1)
            changed[start:start] = changed[other : other + length]
        else:
            number = struct.pack("<Q", draw.choice((0, 1, 255, 2**16, 2**32, 2**63)))
            changed[start : start + 8] = number
    return bytes(changed)


def changed_payload(payloads: list[bytes], draw: random.Random) -> list[bytes]:
    """Return payloads of which one is damaged; checksums are made later."""
    payloads = list(payloads)
    place = draw.randrange(len(payloads))
    change = draw.choice((flipped, spliced))
    payloads[place] = change(payloads[place] or b"\0", draw)
    return payloads


def swap(index: dict[str, Any], payloads: list[bytes], draw: random.Random) -> None:
    """Swap, double or drop sections, or only their payloads or descriptions."""
    sections = index["sections"]
    a, b = draw.randrange(len(payloads)), draw.randrange(len(payloads))
    kind = draw.randrange(5)
    if kind in (0, 1):
        payloads[a], payloads[b] = payloads[b], payloads[a]
    if kind in (0, 2):
        sections[a], sections[b] = sections[b], sections[a]
    if kind == 3:
        sections.insert(a, copy.deepcopy(sections[b]))
        payloads.insert(a, payloads[b])
    if kind == 4:
        del sections[a], payloads[a]


def edit(value: Any, draw: random.Random) -> None:
    """Change something inside a list or an object: one place, at any depth."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = draw.choice(places)
        inner = value[place]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.15:
            break
        value = inner
    kind = draw.randrange(6)
    if kind == 0:
        del value[place]
    elif kind == 1 and isinstance(value, list):
        value.insert(place, copy.deepcopy(inner))
    elif kind == 2 and type(inner) in (int, float):
        value[place] = draw.choice(
            (inner + 1, inner - 1, -inner, 2 * inner, str(inner))
        )
    elif kind == 3:
        value[place] = copy.deepcopy(value[draw.choice(places)])
    else:
        value[place] = copy.deepcopy(draw.choice(NASTY))
