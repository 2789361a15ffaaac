"""The packed file as bytes: an index and payloads in a ``.safetensors`` container.

The container holds two uint8 tensors, so that any safetensors reader can open it:

``index``    zlib-compressed JSON: version, plan, and for every tensor its name, kind,
             shape and payload length. One compressed index instead of one container
             entry per tensor saves 80 bytes each, 0.5 % of a small network's file.
``payload``  the payloads one after another, each followed by its CRC-32.

A reader checks every length, shape and checksum before it allocates or decodes, and
answers with :class:`FormatError` to anything that is not exactly what a writer wrote.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fitcompress.errors import FormatError

__all__ = ["Packed", "Section", "pack", "unpack"]

VERSIONS = (1, 2, 3)
TRANSPOSED_GROUPS = "transposed_groups"  # a key that readers of version 1 must not skip
ACTIVATIONS = "activations"  # a kind of section since version 3
MAGIC = {"format": "fitcompress"}
MAX_INDEX_RATIO = 100  # of the index's text to its compressed bytes; real ones reach 30


@dataclass(frozen=True)
class Section:
    """One payload and what the index says of it.

    Attributes:
        entry: JSON-serialisable description, without the payload's length.
        payload: Its bytes.
    """

    entry: dict[str, Any]
    payload: bytes


@dataclass(frozen=True)
class Packed:
    """The content of a packed file.

    Attributes:
        plan: What the index says about the plan.
        sections: The sections in the order of the file.
    """

    plan: dict[str, Any]
    sections: list[Section] = field(default_factory=list)


def pack(packed: Packed) -> bytes:
    """Return the file's bytes."""
    entries = [{**s.entry, "bytes": len(s.payload)} for s in packed.sections]
    version = max(_version(entry) for entry in entries) if entries else 1
    index = {"version": version, "plan": packed.plan, "sections": entries}
    text = json.dumps(index, separators=(",", ":")).encode()
    payload = b"".join(
        s.payload + struct.pack("<I", zlib.crc32(s.payload)) for s in packed.sections
    )
    tensors = {
        "index": np.frombuffer(zlib.compress(text, 9), np.uint8),
        "payload": np.frombuffer(payload, np.uint8),
    }
    return bytes(safetensors.numpy.save(tensors, MAGIC))


def unpack(data: bytes) -> Packed:
    """Return the content of a file's bytes, every checksum verified.

    Raises:
        FormatError: The bytes are damaged, truncated, or something else.
    """
    tensors = _container(data)
    index = _index(tensors["index"])
    payload = tensors["payload"]
    sections, start = [], 0
    for number, entry in enumerate(index["sections"]):
        if not isinstance(entry, dict):
            raise _damaged(f"section {number} has no description")
        if _version(entry) > index["version"]:
            raise _damaged(f"section {number} is of a later version than the file")
        length = entry.pop("bytes", None)
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise _damaged(f"section {number} has no valid length", got=length)
        end = start + length + 4
        if end > len(payload):
            raise _damaged(
                f"section {number} ends outside the file", got=end, wanted=len(payload)
            )
        body = payload[start : start + length]
        (stored,) = struct.unpack("<I", payload[end - 4 : end])
        if zlib.crc32(body) != stored:
            name = entry.get("name", number)
            raise _damaged(f"the checksum of section {name!r} is wrong")
        sections.append(Section(entry, body))
        start = end
    if start != len(payload):
        raise _damaged("bytes follow the last section", got=len(payload), wanted=start)
    return Packed(index["plan"], sections)


def _container(data: bytes) -> dict[str, bytes]:
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (
        safetensors.SafetensorError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:
        raise _damaged("this is no .safetensors file", got=str(error)[:200]) from error
    found = {
        name: bytes(value["data"]) for name, value in tensors if value["dtype"] == "U8"
    }
    if set(found) != {"index", "payload"} or len(tensors) != 2:
        raise _damaged(
            "this is no packed file",
            got=f"tensors {', '.join(sorted(n for n, _ in tensors)[:5]) or 'none'}",
            wanted="index and payload",
        )
    return found


def _index(data: bytes) -> dict[str, Any]:
    try:
        decoder = zlib.decompressobj()
        text = decoder.decompress(data, MAX_INDEX_RATIO * len(data) + 65536)
        if not decoder.eof or decoder.unused_data:
            raise _damaged("the index is truncated, too long or followed by something")
        index = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise _damaged("the index cannot be read", got=str(error)[:200]) from error
    if not isinstance(index, dict) or not _known(index.get("version")):
        got = index.get("version") if isinstance(index, dict) else type(index).__name__
        raise FormatError(
            "a packed file of another version",
            got=got,
            wanted=f"version {' or '.join(map(str, VERSIONS))}",
            fix="read it with the version of fitcompress that wrote it",
        )
    if not isinstance(index.get("plan"), dict) or not isinstance(
        index.get("sections"), list
    ):
        raise _damaged("the index has no plan or no sections")
    return index


def _version(entry: dict[str, Any]) -> int:
    """Return the first version of the format that has this kind of section."""
    if entry.get("kind") == ACTIVATIONS:
        return 3
    return 2 if TRANSPOSED_GROUPS in entry else 1


def _known(version: Any) -> bool:
    return type(version) is int and version in VERSIONS


def _damaged(what: str, *, got: object = None, wanted: object = None) -> FormatError:
    return FormatError(
        what, got=got, wanted=wanted, fix="copy the file again or pack the model again"
    )
