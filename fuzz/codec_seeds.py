"""Streams of many kinds of matrices, as the first inputs of the fuzz target."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fitcompress import _core

SHAPES = [(1, 1), (3, 4), (1, 40), (16, 27), (8, 72), (40, 1), (64, 576), (2, 132_000)]


def matrix(rng: np.random.Generator, shape: tuple[int, int], kind: int) -> np.ndarray:
    """Return codes: zeros, few, sparse, wide, wider than a byte, or huge ones."""
    wide = (0.0, 0.3, 1.0, 30.0, 3e3, 2e8)[kind]
    codes = np.rint(rng.laplace(scale=1, size=shape) * wide)
    return np.clip(codes, -(1 << 30), 1 << 30).astype(np.int32)


def header(rows: int, columns: int, number: int) -> bytes:
    """Return what the target reads before the stream."""
    low = columns & 0xFFFF
    sizes = rows.to_bytes(2, "little") + low.to_bytes(2, "little")
    return sizes + bytes([30, number & 3, number & 7, columns >> 16])


def main() -> None:
    """Write the seeds to the folder that is the only argument."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng, number = np.random.default_rng(0), 0
    for shape in SHAPES:
        for kind in range(6):
            codes = matrix(rng, shape, kind)
            if codes.size > 1 << 17:  # long enough for two blocks, short as bytes
                codes = np.zeros(shape, np.int32) + np.int32(kind)
            for coding in ("adaptive", "static"):
                stream = _core.encode(codes, coding=coding)
                if len(stream) <= 4000:
                    data = header(*shape, number) + stream
                    (folder / f"seed-{number:03}").write_bytes(data)
                number += 1


if __name__ == "__main__":
    main()
