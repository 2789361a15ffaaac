"""JSON from a file that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["read_json"]

MAX_DEPTH = 32  # of lists and objects in each other; ours have 6
MAX_MARKS = 1 << 21  # each a value in memory; 100 000 layers have 1.7 million


def read_json(text: bytes) -> Any:
    """Return what a JSON text says, if it has one meaning and is no burden.

    Args:
        text: Its bytes, as many as one is willing to read.

    Raises:
        ValueError: It is no UTF-8 or JSON; has a key twice, a number that is none, or
            half of a surrogate pair; or more or deeper values than can be right.
        RecursionError: It is much too deep.
    """
    if sum(text.count(mark) for mark in (b"[", b"{", b",")) > MAX_MARKS:
        msg = f"more than {MAX_MARKS} of the characters [ {{ ,"
        raise ValueError(msg)
    result = json.loads(
        text.decode(), object_pairs_hook=_once, parse_constant=_no_constant
    )
    level = _inside([result])
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        msg = f"more than {MAX_DEPTH} lists or objects lie in each other"
        raise ValueError(msg)
    if b"\\u" in text:
        json.dumps(result, ensure_ascii=False).encode()
    return result


def _inside(value: Any) -> list[Any]:
    """Return the lists and objects directly in one."""
    items = value.values() if isinstance(value, dict) else value
    return [x for x in items if isinstance(x, (list, dict))]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless a key stands in it twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        msg = "a key stands in an object twice"
        raise ValueError(msg)
    return result


def _no_constant(name: str) -> None:
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)
