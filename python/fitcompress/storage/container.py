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
from typing import TYPE_CHECKING, Any

from fitcompress.errors import FormatError
from fitcompress.storage.strict_json import MAX_MARKS, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "Index",
    "Outline",
    "Packed",
    "Section",
    "StoredSection",
    "open_index",
    "pack",
    "pack_parts",
    "packed_size",
    "unpack",
]

VERSIONS = (1, 2, 3, 4)
STATIC_CODES = 4  # the first version with codes that the static coder made
TRANSPOSED_GROUPS = "transposed_groups"  # a key that readers of version 1 must not skip
NORM_BYTES = "norm_bytes"  # a key of leftovers with coded norms, since version 4
ACTIVATIONS = "activations"  # a kind of section since version 3
MAGIC = {"format": "fitcompress"}
CHECKSUM = 4  # bytes behind every payload
MAX_HEADER = 1 << 16  # bytes; ours have 200
MAX_INDEX_RATIO = 100  # of the index's text to its compressed bytes; real ones reach 30
MAX_INDEX = 1 << 25  # bytes of that text; 100 000 layers take 20 million


@dataclass(frozen=True)
class Section:
    """One payload and what the index says of it.

    Attributes:
        entry: JSON-serialisable description, without the payload's length.
        payload: Its bytes.
        version: Of the format: of the file that it comes from, or the first that has
            what the payload needs.
    """

    entry: dict[str, Any]
    payload: bytes
    version: int = 1


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
    """Return the file's bytes.

    Raises:
        FormatError: There are more layers than an index can describe.
    """
    outlines = [Outline.of(section) for section in packed.sections]
    payloads = (section.payload for section in packed.sections)
    return b"".join(pack_parts(packed.plan, outlines, payloads))


@dataclass(frozen=True)
class Outline:
    """A section without its payload.

    Attributes:
        entry: As in :class:`Section`.
        size: Bytes of the payload.
        version: As in :class:`Section`.
    """

    entry: dict[str, Any]
    size: int
    version: int = 1

    @classmethod
    def of(cls, section: Section) -> Outline:
        """Return that of a section."""
        return cls(section.entry, len(section.payload), section.version)


def packed_size(plan: dict[str, Any], outlines: Sequence[Outline]) -> int:
    """Return the size of the file.

    Raises:
        FormatError: There are more layers than an index can describe.
    """
    head = _head(plan, outlines)
    return len(head) + sum(outline.size + CHECKSUM for outline in outlines)


def pack_parts(
    plan: dict[str, Any], outlines: Sequence[Outline], payloads: Iterable[bytes]
) -> Iterator[bytes]:
    """Yield the file's bytes part by part, so that one payload is in memory at a time.

    Args:
        plan: What the index says about the plan.
        outlines: Of all sections, in the order of the file.
        payloads: Theirs.

    Raises:
        FormatError: There are more layers than an index can describe.
    """
    yield _head(plan, outlines)
    for payload in payloads:
        yield payload
        yield struct.pack("<I", zlib.crc32(payload))


def _head(plan: dict[str, Any], outlines: Sequence[Outline]) -> bytes:
    """Return what stands before the payloads: header and index."""
    entries = [{**o.entry, "bytes": o.size} for o in outlines]
    needed = [max(_version(o.entry), o.version) for o in outlines]
    version = max(needed, default=1)
    index = {"version": version, "plan": plan, "sections": entries}
    text = json.dumps(index, separators=(",", ":")).encode()
    compressed = zlib.compress(text, 9)
    marks = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if len(text) > _most_text(len(compressed)) or marks > MAX_MARKS:
        raise FormatError(
            "the index of the file would be too long",
            got=f"{len(text)} bytes, {marks} values",
            wanted=f"at most {_most_text(len(compressed))} bytes, {MAX_MARKS} values",
            fix="save parts of the model as files of their own",
        )
    end = len(compressed) + sum(o.size + CHECKSUM for o in outlines)
    offsets = {"index": (0, len(compressed)), "payload": (len(compressed), end)}
    header = {"__metadata__": MAGIC} | {
        name: {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}
        for name, (first, last) in offsets.items()
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + compressed


@dataclass(frozen=True)
class StoredSection:
    """One payload that still lies in the file.

    Attributes:
        entry: What the index says of it.
        number: Its place in the index.
        version: Of the file's format.
        body: Payload and checksum, in the file's buffer.
    """

    entry: dict[str, Any]
    number: int
    version: int
    body: memoryview

    def load(self) -> Section:
        """Return the payload, its checksum verified.

        Raises:
            FormatError: It is wrong.
        """
        payload = bytes(self.body[:-4])
        (stored,) = struct.unpack("<I", self.body[-4:])
        if zlib.crc32(payload) != stored:
            name = self.entry.get("name", self.number)
            raise _damaged(f"the checksum of section {name!r} is wrong")
        return Section(self.entry, payload, self.version)


@dataclass(frozen=True)
class Index:
    """What the index of a packed file says, its payloads not read yet.

    Attributes:
        plan: What it says about the plan.
        sections: The sections in the order of the file.
        version: Of the format.
        index_bytes: Size of the compressed index.
    """

    plan: dict[str, Any]
    sections: list[StoredSection]
    version: int
    index_bytes: int


def unpack(data: bytes) -> Packed:
    """Return the content of a file's bytes, every checksum verified.

    Raises:
        FormatError: The bytes are damaged, truncated, or something else.
    """
    index = open_index(memoryview(data))
    return Packed(index.plan, [section.load() for section in index.sections])


def open_index(data: memoryview) -> Index:
    """Return what a file's bytes hold, only container and index read.

    Raises:
        FormatError: They are damaged, truncated, or something else.
    """
    found = _container(data)
    index = _index(bytes(found["index"]))
    payload = found["payload"]
    sections, start = [], 0
    for number, entry in enumerate(index["sections"]):
        if not isinstance(entry, dict):
            raise _damaged(f"section {number} has no description")
        if _version(entry) > index["version"]:
            raise _damaged(f"section {number} is of a later version than the file")
        length = entry.pop("bytes", None)
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise _damaged(f"section {number} has no valid length", got=_short(length))
        end = start + length + 4
        if end > len(payload):
            raise _damaged(
                f"section {number} ends outside the file",
                got=f"{_short(length)} bytes",
                wanted=f"at most {len(payload) - start - 4}",
            )
        body = payload[start:end]
        sections.append(StoredSection(entry, number, index["version"], body))
        start = end
    if start != len(payload):
        raise _damaged("bytes follow the last section", got=len(payload), wanted=start)
    return Index(index["plan"], sections, index["version"], len(found["index"]))


def _container(data: memoryview) -> dict[str, memoryview]:
    """Return the two tensors of the container, as parts of ``data``."""
    if len(data) < 8:
        raise _damaged("this is no .safetensors file", got=f"{len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER, len(data) - 8):
        raise _damaged(
            "this is no packed file",
            got=f"a header of {length} bytes",
            wanted="index and payload",
        )
    start = 8 + length
    try:
        header = read_json(bytes(data[8:start]))
    except (ValueError, RecursionError) as error:
        raise _damaged("this is no .safetensors file", got=str(error)[:200]) from error
    if not isinstance(header, dict):
        raise _damaged("this is no .safetensors file", got=type(header).__name__)
    header.pop("__metadata__", None)
    if set(header) != {"index", "payload"}:
        raise _damaged(
            "this is no packed file",
            got=f"tensors {', '.join(sorted(header)[:5]) or 'none'}"[:200],
            wanted="index and payload",
        )
    found, ends = {}, []
    for name, value in header.items():
        begin, end = _offsets(value, len(data) - start)
        found[name] = data[start + begin : start + end]
        ends.append((begin, end))
    (first, middle), (after, last) = sorted(ends)
    if first != 0 or middle != after or last != len(data) - start:
        raise _damaged(
            "the tensors of the container overlap or leave gaps",
            got=str(ends),
            wanted=f"0 to {len(data) - start}",
        )
    return found


def _offsets(entry: Any, most: int) -> tuple[int, int]:
    """Return where a tensor lies, if its entry in the header is one of ours."""
    try:
        begin, end = entry["data_offsets"]
        whole = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        good = type(begin) is type(end) is int and 0 <= begin <= end <= most
    except (TypeError, ValueError, KeyError):
        good = False
    if not good or entry != whole:
        raise _damaged(
            "this is no packed file: a tensor is not what one holds",
            got=str(entry)[:100],
            wanted="one-dimensional U8 inside the file",
        )
    return begin, end


def _short(value: object) -> str:
    """Return a value from a file as text for a message."""
    large = type(value) is int and abs(value) >= 1 << 64
    return "more than 2^64" if large else str(value)[:100]


def _most_text(compressed: int) -> int:
    """Return how long the text of an index of so many bytes may be."""
    return min(MAX_INDEX_RATIO * compressed + 65536, MAX_INDEX)


def _index(data: bytes) -> dict[str, Any]:
    try:
        decoder = zlib.decompressobj()
        text = decoder.decompress(data, _most_text(len(data)))
        if not decoder.eof or decoder.unused_data:
            raise _damaged("the index is truncated, too long or followed by something")
        index = read_json(text)
    except (zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise _damaged("the index cannot be read", got=str(error)[:200]) from error
    if not isinstance(index, dict) or not _known(index.get("version")):
        got = index.get("version") if isinstance(index, dict) else type(index).__name__
        raise FormatError(
            "a packed file of another version",
            got=_short(got),
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
    if NORM_BYTES in entry:
        return 4
    return 2 if TRANSPOSED_GROUPS in entry else 1


def _known(version: Any) -> bool:
    return type(version) is int and version in VERSIONS


def _damaged(what: str, *, got: object = None, wanted: object = None) -> FormatError:
    return FormatError(
        what, got=got, wanted=wanted, fix="copy the file again or pack the model again"
    )
