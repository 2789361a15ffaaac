"""Writes tests/corpus: attacks, and of fuzzed streams the shortest of each behaviour.

    python fuzz/corpus.py SAVED…

with folders of inputs that ``codec_fuzz`` saved. The differences in ``expected.json``
are to be read: a file that was refused and is read now is news.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from attacks import all_attacks

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from corpus_results import file_result, stream_parts, stream_result  # noqa: E402

FOLDER = TESTS / "corpus"
MOST_BYTES, MOST_WEIGHTS = 400, 1 << 16  # of a stream
# Attacks that tests/test_storage.py or test_stored_activations.py have in other words,
# or that differ from others in a number.
LEFT_OUT = re.compile(
    r"activations-(?!byte)|codes-(shape|bits|twice|spars)|section-|file-(of|cut|empty|with)"
    r"|index-(empty|no-|version|deep|and|not)|plan-(gap-h|status|limit-t)|scales|scale-i"
    r"|header-(key|gap|length-of|length-0|other|third|tensors-a)|leftovers-(byte-|list|alias-of|eps-t)"
    r"|stream-(shares-of-z|byte|word|codec-1|limit|shares-l|state-l|with)|zeros-2.39|blocks-length-a"
)


def behaviour(data: bytes) -> str:
    """Return what decides whether two streams are alike."""
    stream = stream_parts(data)[0]
    result = stream_result(data)
    codec = f"codec {stream[0] if stream and stream[0] in (1, 2) else 'other'}"
    if result.startswith("refused"):
        return f"{codec} {re.sub('[0-9]+', 'n', result)}"[:100]
    flags = stream[1] & 0xF0 if stream[0] == 2 else min(stream[1], 1)
    return f"{codec} {flags} decoded"


def main() -> None:
    """Write the corpus."""
    shortest: dict[str, bytes] = {}
    for folder in sys.argv[1:]:
        for path in sorted(Path(folder).iterdir()):
            data = path.read_bytes()
            _, rows, columns, *_ = stream_parts(data)
            if len(data) > MOST_BYTES or rows * columns > MOST_WEIGHTS:
                continue
            kind = behaviour(data)
            if kind not in shortest or len(data) < len(shortest[kind]):
                shortest[kind] = data
    shutil.rmtree(FOLDER, ignore_errors=True)
    expected: dict[str, dict[str, str]] = {"files": {}, "streams": {}}
    (FOLDER / "files").mkdir(parents=True)
    (FOLDER / "streams").mkdir()
    for name, data in all_attacks().items():
        if LEFT_OUT.match(name):
            continue
        safe = name.replace("^", "-")
        (FOLDER / "files" / safe).write_bytes(data)
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "file").write_bytes(data)
            expected["files"][safe] = file_result(Path(place) / "file")
    for kind, data in sorted(shortest.items()):
        name = re.sub(r"[^a-z0-9]+", "-", kind.replace("coded weights", ""))[:60]
        (FOLDER / "streams" / name.strip("-")).write_bytes(data)
        expected["streams"][name.strip("-")] = stream_result(data)
    text = json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
