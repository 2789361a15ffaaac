"""``measure_shards``: the table of a model that is never in memory as a whole."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy

from fitcompress import ops
from fitcompress.data.batches import digest
from fitcompress.errors import (
    NoCompressibleLayerError,
    NonFiniteError,
    OptionError,
)
from fitcompress.files import check_no_input, check_writable, write_atomically
from fitcompress.progress import Bar
from fitcompress.sensitivity.levels import (
    SPARSITIES,
    check_levels,
    grids_from,
    histogram_sparsities,
    steps_from,
    sum_of_squares,
)
from fitcompress.sensitivity.shard_fisher import SUFFIX, ShardFisher, layer_name
from fitcompress.sensitivity.shards import Shards, ShardTensor, WeightSource
from fitcompress.sensitivity.table import Grid, Sensitivity
from fitcompress.sensitivity.tables import TableColumns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from fitcompress.sensitivity.moments import FisherMoments

__all__ = ["measure_shards"]

logger = logging.getLogger(__name__)

FLOATS = ("F32", "BF16", "F16")


def measure_shards(
    path: str | os.PathLike[str] | WeightSource,
    *,
    fisher: Mapping[str, float] | FisherMoments | str | os.PathLike[str] | None = None,
    grids: Sequence[Grid] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    smallest: int = 1024,
    macs: Mapping[str, int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure every level of the layers in ``.safetensors`` files, one layer at a time.

    Reads the files twice, for magnitudes and for tables; memory is that of the largest
    tensor and its table. A layer is a tensor ``<layer>.weight`` of 2 to 5 dimensions in
    float32, bfloat16 or float16; dimension 0 is its rows. Everything else, counted at
    2 bytes a number, is overhead.

    Args:
        path: A ``.safetensors`` file, a folder with some, or an ``.index.json``; or
            anything else that yields weights by name, a
            :class:`fitcompress.sensitivity.shards.WeightSource`.
        fisher: Layer → trace T ≥ 0 in nats²; moments, with diagonals or of traces
            only; or shards with the diagonals under the names of the weights. None:
            F = 1, so distortion is half the squared error, and is no loss in nats.
        grids: As for `measure`.
        sparsities: As for `measure`.
        include: Shell pattern, or several; a layer must match one.
        exclude: Shell pattern, or several; a layer must match none.
        smallest: Least number of weights of a layer.
        macs: Layer → multiply-accumulates of one sample. None: one position each, rows
            × columns, which ranks convolutions wrongly.
        checkpoint: File to save progress to and resume from; removed at the end.
        progress: Show a bar with the time left.

    Returns:
        The table, with 0 samples and loss 0 unless `fisher` is moments.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        FormatError: A file is damaged, or does not fit the index or the weights.
        NoCompressibleLayerError: Nothing is left to compress.
        NonFiniteError: A weight or its Fisher information is NaN or infinite, or its
            distortion would be.
        OptionError: Levels are out of order, a layer has no Fisher or no MACs or
            negative ones, or the checkpoint is one of the files.
        OutputError: The checkpoint cannot be written.
    """
    if checkpoint is not None:
        check_writable(checkpoint)
    shards: WeightSource
    shards = Shards(path) if isinstance(path, (str, os.PathLike)) else path
    if checkpoint is not None:
        check_no_input(checkpoint, shards.files)
    layers = _choose(shards, include, exclude, smallest)
    known = ShardFisher(fisher)
    known.check(layers)
    counts = _macs(layers, macs)
    sparsities = tuple(sparsities)
    chosen = tuple(grids) if grids is not None else ()
    check_levels(chosen or grids_from(()), sparsities)
    shards.reserve(max(layer.bytes for layer in layers))
    with Bar("measure: magnitudes", len(layers), enabled=progress) as bar:
        histograms, squares, check = [], 0.0, 0
        for layer in layers:
            weight = shards.read(layer.name)
            histograms.append(_histogram(layer, weight))
            squares += sum_of_squares(weight)
            if checkpoint is not None:
                check = digest(weight, check)
            del weight
            bar.advance()
    sizes = [layer.size for layer in layers]
    chosen = chosen or grids_from(steps_from(squares, sum(sizes)))
    shares = histogram_sparsities(histograms, sparsities)
    del histograms
    columns = TableColumns(chosen)
    traces: list[float] = []
    if checkpoint is not None:
        key = _key(layers, check, chosen, shares, known)
        traces = _resume(checkpoint, key, columns)
    with Bar(
        "measure: distortion of every level", len(layers), enabled=progress
    ) as bar:
        bar.advance(len(traces))
        for layer, share in list(zip(layers, shares, strict=True))[len(traces) :]:
            information, trace = known.of(layer)
            matrix = shards.read(layer.name).flatten(1)
            _tabulate(columns, layer, matrix, information, share)
            del matrix, information
            traces.append(trace)
            if checkpoint is not None:
                _save(checkpoint, key, columns, traces)
            bar.advance()
    moments = known.moments
    names = [layer_name(layer) for layer in layers]
    everything = sum(tensor.size for tensor in shards.tensors.values())
    skipped = Counter(t.dtype for t in shards.tensors.values() if t.dtype not in FLOATS)
    sensitivity = Sensitivity(
        names=tuple(names),
        shapes=tuple(layer.shape for layer in layers),
        macs=np.array(counts, dtype=np.int64),
        fisher_trace=np.array(traces),
        fisher_error=np.array(
            [0.0 if moments is None else moments.relative_error(n) for n in names]
        ),
        grids=chosen,
        overhead_bytes=2 * (everything - sum(sizes)),
        dense_bytes=4 * everything,
        samples=0 if moments is None else moments.samples,
        loss=0.0 if moments is None else moments.loss / moments.samples,
        provenance={
            "labels": "unknown",
            "fisher": known.kind,
            "macs": "one position" if macs is None else "given",
            "skipped_dtypes": dict(skipped),
        },
        **columns.stack(),
    )
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return sensitivity


def _choose(
    shards: WeightSource,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    smallest: int,
) -> list[ShardTensor]:
    include = (include,) if isinstance(include, str) else include
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    chosen = [
        tensor
        for tensor in shards.tensors.values()
        if tensor.name.endswith(SUFFIX)
        and tensor.dtype in FLOATS
        and 2 <= len(tensor.shape) <= 5
        and tensor.size >= max(smallest, 1)
        and any(fnmatchcase(layer_name(tensor), p) for p in include)
        and not any(fnmatchcase(layer_name(tensor), p) for p in exclude)
    ]
    if not chosen:
        raise NoCompressibleLayerError(
            "no tensor can be compressed",
            got=f"{len(shards.tensors)} tensors",
            wanted=f"<layer>.weight, 2 to 5 dimensions, {', '.join(FLOATS)}",
            fix="look at include, exclude and smallest",
        )
    return chosen


def _macs(layers: list[ShardTensor], macs: Mapping[str, int] | None) -> list[int]:
    if macs is None:
        return [layer.size for layer in layers]
    names = [layer_name(layer) for layer in layers]
    for name in names:
        if name not in macs:
            raise OptionError("a layer has no MACs", got=name)
        if not 0 <= macs[name] < 2**63 or macs[name] != int(macs[name]):
            raise OptionError(
                f"the MACs of {name} are no count",
                got=macs[name],
                wanted="a whole number ≥ 0",
            )
    return [int(macs[name]) for name in names]


def _histogram(layer: ShardTensor, weight: torch.Tensor) -> torch.Tensor:
    try:
        return ops.magnitude_histogram(weight).to_sparse()
    except ValueError as error:
        raise NonFiniteError(f"{layer.name} in {layer.path}: {error}") from error


def _tabulate(
    columns: TableColumns,
    layer: ShardTensor,
    matrix: torch.Tensor,
    information: torch.Tensor | float | None,
    share: Sequence[float],
) -> None:
    try:
        columns.add(matrix, information, share)
    except (OverflowError, ValueError) as error:
        raise NonFiniteError(f"{layer.name} in {layer.path}: {error}") from error


def _key(
    layers: list[ShardTensor],
    weights: int,
    grids: Sequence[Grid],
    shares: list[list[float]],
    known: ShardFisher,
) -> str:
    """Return what a checkpoint must have in common with this call."""
    about = [(t.name, t.shape, t.dtype) for t in layers]
    described = repr((about, weights, list(grids), shares, known.key()))
    return f"{zlib.crc32(described.encode()):08x}"


def _save(
    path: str | os.PathLike[str], key: str, columns: TableColumns, traces: list[float]
) -> None:
    arrays = columns.stack() | {"fisher_trace": np.array(traces)}
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    saved = safetensors.numpy.save(
        arrays, {"fitcompress.shards": json.dumps({"key": key})}
    )
    write_atomically(path, saved)


def _resume(
    path: str | os.PathLike[str], key: str, columns: TableColumns
) -> list[float]:
    if not Path(path).exists():
        return []
    try:
        with safetensors.safe_open(Path(path), framework="np") as file:
            saved = json.loads((file.metadata() or {})["fitcompress.shards"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        traces = [float(t) for t in arrays.pop("fisher_trace")]
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return []
    if saved.get("key") != key:
        logger.warning("%s belongs to another measurement and is not used", path)
        return []
    columns.restore(arrays)
    return traces
