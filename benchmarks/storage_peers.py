"""Ways to store a matrix of weight codes: general compressors, and NNCodec."""

from __future__ import annotations

import lzma
from typing import TYPE_CHECKING, Any

import numpy as np

from peer_nncodec import import_nncodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Codes = NDArray[np.int32]

__all__ = ["ZSTD_LEVEL", "entropy_bytes", "nncodec_bytes", "packed_forms", "peers_of"]

ZSTD_LEVEL = 19


def entropy_bytes(codes: Codes) -> float:
    """Return the order-0 entropy of codes, Σ −log2 p(k), in bytes."""
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(share * np.log2(share)).sum()) * codes.size / 8


def packed_forms(codes: Codes, bits: int) -> dict[str, bytes]:
    """Return codes as bytes without an entropy stage, for a general compressor.

    Codes of b bits one after another, whole bytes, and a bitmask of the codes that are
    not 0 before those, of b bits or in whole bytes.
    """
    flat = codes.reshape(-1)
    used = flat[flat != 0]
    mask = np.packbits(flat != 0, bitorder="little").tobytes()
    whole = np.int8 if bits <= 8 else np.int16
    return {
        f"{bits} bits": _bits(flat, bits),
        whole.__name__: flat.astype(whole).tobytes(),
        f"mask, {bits} bits": mask + _bits(used, bits),
        f"mask, {whole.__name__}": mask + used.astype(whole).tobytes(),
    }


def _bits(codes: Codes, bits: int) -> bytes:
    """Return the lowest bits of codes in two's complement, the lowest bit first."""
    digits = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little").tobytes()


def peers_of(forms: dict[str, bytes]) -> dict[str, Callable[[], bytes]]:
    """Return how general compressors store codes; of all forms the smallest counts.

    Raises:
        ImportError: ``zstandard`` is missing.
    """
    import zstandard

    def zstd() -> bytes:
        made = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        return min((made.compress(form) for form in forms.values()), key=len)

    def xz() -> bytes:
        preset = 9 | lzma.PRESET_EXTREME
        return min(
            (lzma.compress(form, preset=preset) for form in forms.values()), key=len
        )

    return {"zstd -19": zstd, "xz -9e": xz}


def nncodec_bytes(codes: dict[str, Codes]) -> bytearray:
    """Return NNCodec's stream of exactly these integers: no step, no trellis.

    Raises:
        ImportError: The package is not installed.
        ValueError: What comes back is something else.
    """
    codec: Any = import_nncodec()
    stream = codec.compress(
        {key: value.copy() for key, value in codes.items()},
        bitstream_path=None,
        return_bitstream=True,
        use_dq=False,
        verbose=False,
    )
    decoded = codec.decompress(bytearray(stream), verbose=False)
    for key, value in codes.items():
        if not np.array_equal(decoded[key].reshape(value.shape), value):
            message = f"NNCodec changed {key}"
            raise ValueError(message)
    return bytearray(stream)
