"""The ``Sensitivity`` value: what every level of every layer costs, and hurts.

Independent of any budget, measured once, saved as ``.safetensors``; imports no torch.
"""

from __future__ import annotations

import errno
import json
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from fitcompress.errors import FormatError
from fitcompress.files import write_atomically

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

__all__ = ["Grid", "Sensitivity"]

VERSION = 2  # 1 had no activations
REALS = {
    "activation_distortion",
    "activation_trace",
    "distortion",
    "fisher_error",
    "fisher_trace",
    "grid_length",
    "norm",
    "prune_length",
    "sparsity",
}


@dataclass(frozen=True)
class Grid:
    """A weight grid: either fixed-point ``bits`` or an entropy-coded ``step``.

    Attributes:
        bits: Signed b-bit integers −(2^(b−1)−1) … 2^(b−1)−1, one scale per output
            channel.
        step: Δ; levels kΔ for every integer k, one step for the tensor, in weight
            units.
    """

    bits: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.step is None):
            msg = f"a grid has bits or a step; got bits={self.bits}, step={self.step}"
            raise ValueError(msg)
        if self.bits is not None and (
            type(self.bits) is not int or not 2 <= self.bits <= 16
        ):
            msg = f"bits must be a whole number between 2 and 16; got {self.bits}"
            raise ValueError(msg)
        step = self.step
        if step is not None and (isinstance(step, bool) or not 0 < step < np.inf):
            msg = f"a step must be positive and finite; got {self.step}"
            raise ValueError(msg)

    @property
    def family(self) -> str:
        """``"bits"`` or ``"step"``."""
        return "bits" if self.step is None else "step"

    def __str__(self) -> str:
        return f"{self.bits} bit" if self.step is None else f"Δ={self.step:.3g}"


@dataclass(frozen=True)
class Sensitivity:
    """Distortion and cost of L layers × G grids × S sparsities.

    Attributes:
        names: Layer names in the order of the model, L.
        shapes: Weight shapes, L.
        macs: Multiply-accumulates of one sample, [L].
        fisher_trace: T_l = Σ_j F_j in nats², [L].
        fisher_error: Relative standard error of the trace, [L].
        grids: The grids, fixed-point first, each family from fine to coarse, G.
        sparsity: Share of weights that the mask drops, [L, S], rising in S.
        distortion: D = ½ Σ_j F_j (θ_j − θ̂_j)² in nats, [L, G, S].
        size_bits: Order-0 entropy of the codes plus the scales, in bits, [L, G, S].
        nonzeros: Codes that are not zero, [L, G, S].
        weight_bits: Bits that hold the largest code, [L, G].
        grid_length: Σ F (θ̂_g − θ̂_{g+1})² between neighbouring grids, [L, G, S].
        prune_length: Σ F θ̂² over weights that leave between s and s+1, [L, G, S].
        norm: Σ F θ̂², [L, G, S].
        overhead_bytes: Everything in the file but codes and scales.
        dense_bytes: 4 bytes × all parameters.
        samples: Samples that the Fisher moments were averaged over.
        loss: Their mean loss, nats.
        activation_bits: What the inputs of layers can be quantized to, None for float,
            which comes first, A.
        activation_distortion: ½ T_a · mean squared error of the quantized input, nats,
            [L, A]; adds to the distortion of the weights. 0 for float.
        activation_trace: T_a of the input of every layer in nats², [L]; 0 if not
            measured.
        provenance: How it was measured: labels, seed, rule for masks, allocation.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    macs: NDArray[np.int64]
    fisher_trace: NDArray[np.float64]
    fisher_error: NDArray[np.float64]
    grids: tuple[Grid, ...]
    sparsity: NDArray[np.float64]
    distortion: NDArray[np.float64]
    size_bits: NDArray[np.int64]
    nonzeros: NDArray[np.int64]
    weight_bits: NDArray[np.int64]
    grid_length: NDArray[np.float64]
    prune_length: NDArray[np.float64]
    norm: NDArray[np.float64]
    overhead_bytes: int
    dense_bytes: int
    samples: int
    loss: float
    provenance: dict[str, Any] = field(default_factory=dict)
    activation_bits: tuple[int | None, ...] = (None,)
    activation_distortion: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(0)
    )
    activation_trace: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if self.distortion.ndim != 3:
            raise FormatError("distortion has a wrong shape", got=self.distortion.shape)
        layers, grids, sparsities = self.distortion.shape
        if self.activation_bits == (None,):
            object.__setattr__(self, "activation_distortion", np.zeros((layers, 1)))
        if not self.activation_trace.size:
            object.__setattr__(self, "activation_trace", np.zeros(layers))
        bits = self.activation_bits[1:]
        if self.activation_bits[:1] != (None,) or not all(
            type(b) is int and 2 <= b <= 16 for b in bits
        ):
            raise FormatError(
                "activation_bits must be None and then bits from 2 to 16",
                got=self.activation_bits,
            )
        cells = (
            "distortion",
            "size_bits",
            "nonzeros",
            "grid_length",
            "prune_length",
            "norm",
        )
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(
            cells, (layers, grids, sparsities)
        )
        wanted |= dict.fromkeys(("macs", "fisher_trace", "fisher_error"), (layers,))
        wanted |= {"sparsity": (layers, sparsities), "weight_bits": (layers, grids)}
        wanted["activation_distortion"] = (layers, len(self.activation_bits))
        wanted["activation_trace"] = (layers,)
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array.shape != shape:
                msg = f"{name} has shape {array.shape}; wanted {shape}"
                raise FormatError(msg)
            kind = "f" if name in REALS else "i"
            if (
                array.dtype.kind != kind
                or not np.isfinite(array).all()
                or (array < 0).any()
            ):
                msg = f"{name} has values that are negative, not finite or mistyped"
                raise FormatError(msg, got=array.dtype)
        for name in ("overhead_bytes", "dense_bytes", "samples"):
            if type(getattr(self, name)) is not int:
                raise FormatError(f"{name} is no whole number", got=getattr(self, name))
        if (
            len(self.names) != layers
            or len(self.shapes) != layers
            or len(self.grids) != grids
        ):
            msg = f"names, shapes and grids do not match tables of {layers} × {grids}"
            raise FormatError(msg)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of weights of every layer, [L]."""
        return np.array([int(np.prod(s)) for s in self.shapes], dtype=np.int64)

    @property
    def quantizable_inputs(self) -> NDArray[np.bool_]:
        """Whether the input of each layer can be quantized, [L].

        Those of embeddings are indices, even where a Linear shares the weight.
        """
        indices = self.provenance.get("float_inputs", ())
        return np.array([name not in indices for name in self.names], dtype=np.bool_)

    def bops(self, activation: int = 0) -> NDArray[np.int64]:
        """Bit operations of every cell, [L, G, S].

        MACs · weight bits · activation bits, 32 for float; sparsity is not credited,
        ordinary kernels do not use it.

        Args:
            activation: Index into ``activation_bits``.
        """
        width = self.activation_bits[activation] or 32
        per_grid = self.macs[:, None] * self.weight_bits * width
        cells = np.broadcast_to(per_grid[:, :, None], self.distortion.shape)
        return np.array(cells, dtype=np.int64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` (``.safetensors``), atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {}
        meta: dict[str, Any] = {"version": VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                arrays[item.name] = np.ascontiguousarray(value)
            elif item.name == "grids":
                meta["grids"] = [[g.bits, g.step] for g in value]
            else:
                meta[item.name] = value
        meta["crc32"] = _checksum(meta, arrays)
        metadata = {"fitcompress.sensitivity": json.dumps(meta)}
        write_atomically(path, safetensors.numpy.save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FormatError: The file is damaged or something else.
        """
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header = (file.metadata() or {}).get("fitcompress.sensitivity")
                if header is None:
                    raise FormatError(
                        f"{path} is no sensitivity file",
                        wanted="a file written by `fitcompress measure`",
                        fix="run `fitcompress measure` again",
                    )
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads(header)
            version = meta.pop("version")
            if version not in (1, VERSION):
                raise FormatError(
                    f"{path} has another format version",
                    wanted=VERSION,
                    fix="measure again with this version of fitcompress",
                )
            if meta.pop("crc32") != _checksum({"version": version, **meta}, arrays):
                raise FormatError(
                    f"the checksum of {path} is wrong",
                    fix="run `fitcompress measure` again",
                )
            meta["grids"] = tuple(Grid(bits=b, step=s) for b, s in meta["grids"])
            meta["names"] = tuple(meta["names"])
            meta["activation_bits"] = tuple(meta.get("activation_bits", (None,)))
            meta["shapes"] = tuple(tuple(s) for s in meta["shapes"])
            return cls(**meta, **arrays)
        except (
            safetensors.SafetensorError,
            AttributeError,
            KeyError,
            OSError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"{path} is damaged or no sensitivity file",
                got=str(error)[:200],
                fix="run `fitcompress measure` again",
            ) from error


def _checksum(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> int:
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        described = f"{name} {arrays[name].dtype} {arrays[name].shape}".encode()
        crc = zlib.crc32(arrays[name].tobytes(), zlib.crc32(described, crc))
    return crc
