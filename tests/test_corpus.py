"""Files and streams that broke a reader, or were made to: the same answer for ever.

``corpus/expected.json`` has, for each, the beginning of its refusal or a digest of what
it holds. ``fuzz/corpus.py`` writes it.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import fitcompress as fc
from corpus_results import file_result, stream_parts, stream_result
from fitcompress import _core
from fitcompress.errors import FormatError, PlanMismatchError
from fitcompress.model.matrix_view import MatrixView
from fitcompress.storage import range_coder_reference as reference
from fitcompress.storage.packed_file import PackedFile

CORPUS = Path(__file__).parent / "corpus"
EXPECTED = json.loads((CORPUS / "expected.json").read_text(encoding="utf-8"))


def test_the_corpus_is_complete_and_small() -> None:
    size = 0
    for kind, names in EXPECTED.items():
        found = sorted((CORPUS / kind).iterdir())
        assert [p.name for p in found] == sorted(names)
        size += sum(p.stat().st_size for p in found)
    assert size < 200_000


@pytest.mark.parametrize("name", EXPECTED["files"])
def test_files(name) -> None:
    file = CORPUS / "files" / name
    assert file_result(file) == EXPECTED["files"][name]
    # Layer by layer, and into a model, there is no other kind of error.
    with contextlib.suppress(FormatError), PackedFile(file) as packed:
        for layer in packed.names:
            packed.weight(layer)
    with pytest.raises((FormatError, PlanMismatchError)):
        fc.load(file, nn.Linear(2, 2))


@pytest.mark.parametrize("name", EXPECTED["streams"])
def test_streams(name) -> None:
    data = (CORPUS / "streams" / name).read_bytes()
    wanted = EXPECTED["streams"][name]
    assert stream_result(data) == wanted
    stream, rows, columns, largest, scales = stream_parts(data)
    if wanted.startswith("refused"):
        with pytest.raises(ValueError, match="coded weights"):
            _core.dequantize(stream, rows, columns, scales, largest=largest)
        return
    codes = _core.decode(stream, rows, columns, largest=largest, threads=3)
    values = _core.dequantize(stream, rows, columns, scales, largest=largest)
    assert np.array_equal(values, codes.astype(np.float32) * scales[:, None])
    if stream[0] == 1:
        assert np.array_equal(codes, reference.decode(stream, rows, columns))


def test_missing_memory_is_a_typed_error(monkeypatch) -> None:
    def weight_of(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(MatrixView, "weight_of", weight_of)
    with (
        PackedFile(CORPUS / "files" / "good") as packed,
        pytest.raises(FormatError, match="no memory for '0'"),
    ):
        packed.weight("0")


def in_a_process(program: str, *arguments: str) -> str:
    """What a Python program prints that may take one gigabyte of memory."""
    start = (
        "import sys, resource, torch\n"
        f"sys.path.insert(0, {str(CORPUS.parent)!r})\n"
        "from corpus_results import *\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (1 << 30)\n"
        "torch.set_num_threads(1)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
    )
    command = [sys.executable, "-c", start + program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


linux = pytest.mark.skipif(
    sys.platform != "linux" or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="measures memory in /proc, which sanitizers take for themselves",
)


@linux
def test_what_declares_gigabytes_is_refused_without_them() -> None:
    names = ["adaptive-2-27", "index-bomb", "static-2-29", "zeros-2-29"]
    program = "for name in sys.argv[1:]: print(file_result(Path(name)))"
    results = in_a_process(program, *(str(CORPUS / "files" / name) for name in names))
    assert results.splitlines() == [EXPECTED["files"][name] for name in names]


@linux
def test_decoding_takes_at_most_twice_the_matrix() -> None:
    # One row is the worst: the adaptive coder has a sum for each of its columns.
    program = """
from fitcompress import _core
def resident(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
codes = np.zeros((1, 1 << 22), np.int32)
codes[0, 0] = 1
for coding in ("adaptive", "static"):
    stream = _core.encode(codes, coding=coding)
    for decode in (_core.decode, _core.dequantize):
        scales = [np.ones(1, np.float32)] if decode is _core.dequantize else []
        open("/proc/self/clear_refs", "w").write("5")
        before = resident("VmRSS")
        decode(stream, *codes.shape, *scales)
        print((resident("VmHWM") - before) / codes.nbytes)
"""
    ratios = [float(line) for line in in_a_process(program).split()]
    assert len(ratios) == 4
    assert max(ratios) < 2.2
