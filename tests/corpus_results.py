"""What becomes of an entry of the corpus: a refusal, or the digest of what it holds."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from fitcompress import _core
from fitcompress.errors import FormatError
from fitcompress.storage.save_load import read

HEADER = 8  # bytes before a stream, as fuzz/codec_fuzz.cpp reads them
MOST_WEIGHTS = 1 << 19


def file_result(file: Path) -> str:
    """Why a packed file is refused, or the digest of its state dict."""
    try:
        state = read(file).state()
    except FormatError as error:
        return "refused: " + str(error).split("; got")[0].split(". To fix")[0]
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        raw = value.detach().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().tobytes() if len(raw) else b"")
    return digest.hexdigest()


def stream_parts(data: bytes) -> tuple[bytes, int, int, int, np.ndarray]:
    """Stream, rows, columns, largest code and scales."""
    rows = data[0] | data[1] << 8
    columns = data[2] | data[3] << 8 | (data[7] & 15) << 16
    columns = min(columns, MOST_WEIGHTS // max(rows, 1))
    largest = (1 << data[4] % 31) - (data[4] >= 31)
    count = rows if data[6] & 1 else 1
    steps = 1 + (data[6] + np.arange(count)) % 7
    return data[HEADER:], rows, columns, largest, np.float32(0.125) * steps.astype("f4")


def stream_result(data: bytes) -> str:
    """Why a stream is refused, or the digest of its codes."""
    stream, rows, columns, largest, _ = stream_parts(data)
    try:
        codes = _core.decode(stream, rows, columns, largest=largest)
    except ValueError as error:
        return f"refused: {error}"
    return hashlib.sha256(codes.tobytes()).hexdigest()
