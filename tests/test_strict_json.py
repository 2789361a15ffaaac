"""JSON of strangers: one meaning, and no burden."""

import json

import pytest

from fitcompress.storage.strict_json import MAX_DEPTH, MAX_MARKS, read_json


@pytest.mark.parametrize(
    "value", [None, 3, "é", [], {}, {"a": [1, 2.5, {"b": None}], "c": True}, [[[]]]]
)
def test_what_json_means(value) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[1,]",
        b'{"a": 1, "a": 1}',
        b'[{"b": {"a": 1, "\\u0061": 2}}]',
        b"[NaN]",
        b"[-Infinity]",
        b'"\\ud800"',
        b'{"\\udfff": 1}',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf[]",
        "[]".encode("utf-16"),
        b"1" * 5000,
        b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2),
        b"[" + b"[]," * (MAX_MARKS // 2) + b"[]]",
    ],
    ids=lambda text: text[:20].hex(),
)
def test_what_is_refused(text) -> None:
    with pytest.raises(ValueError):
        read_json(text)


def test_pairs_of_surrogates_and_depths_that_are_allowed() -> None:
    assert read_json(b'"\\ud83d\\ude00"') == "\U0001f600"
    read_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
