"""Running ONNX files in ONNX Runtime, to measure and to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import take, tensors
from fitcompress.errors import (
    CalibrationError,
    DataError,
    MissingDependencyError,
    NonFiniteError,
)
from fitcompress.model.devices import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["SAMPLES", "calibration_inputs", "runner", "session_of"]

SAMPLES = 1024


def calibration_inputs(loader: Iterable[Any]) -> list[Any]:
    """Return the first inputs of a loader, 1024 samples at most, on the processor.

    Raises:
        EmptyLoaderError: It yields nothing.
        DataError: A batch cannot be used.
        NonFiniteError: An input is NaN or infinite.
        CalibrationError: All inputs are the same number: a placeholder's.
    """
    place = torch.device("cpu")
    found = [to_device(x, place) for x, _ in take(loader, SAMPLES)]
    values = [x for x in tensors(found) if x.numel()]
    if not all(bool(x.isfinite().all()) for x in values):
        raise NonFiniteError(
            "inputs that ranges of sums are measured on are NaN or infinite",
            wanted="finite numbers",
            fix="look for NaN in the data",
        )
    if all(bool((x == values[0].flatten()[0]).all()) for x in values):
        raise CalibrationError(
            "ranges of sums cannot be measured on inputs without content",
            got=f"{len(found)} batches of the same number",
            wanted="inputs such as the network will get",
            fix="give a loader of real inputs to integer_sums=",
        )
    return found


def session_of(source: bytes | str, *, threads: int = 1, exact: bool = False) -> Any:
    """Return a session of ONNX Runtime on the processor.

    Args:
        source: The bytes of a file, or its path.
        threads: Of one operator.
        exact: Run the operators one by one, as the file has them; otherwise with all
            optimizations, as a user would.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX files are run with a package that is not installed",
            got=str(error),
            wanted="onnxruntime",
            fix="pip install 'fitcompress[onnx]'",
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"]
    )


def runner(data: bytes, *, exact: bool = False) -> Callable[[Any], list[torch.Tensor]]:
    """Return a function from inputs, as a model takes them, to outputs of a file.

    Args:
        data: The bytes of the file.
        exact: As for :func:`session_of`.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    session = session_of(data, exact=exact)
    names = [value.name for value in session.get_inputs()]

    def run(x: Any) -> list[torch.Tensor]:
        feed = x if isinstance(x, dict) else dict(zip(names, tensors(x), strict=False))
        if set(feed) != set(names):
            raise DataError(
                "batches do not fit the inputs of the network",
                got=", ".join(feed),
                wanted=", ".join(names),
                fix="let the loader yield named inputs, {name: tensor}",
            )
        values = {name: feed[name].detach().cpu().numpy() for name in names}
        try:
            return [torch.from_numpy(found) for found in session.run(None, values)]
        except Exception as error:  # its errors share no base but this one
            raise DataError(
                "the network does not run on a batch",
                got=" ".join(str(error).split())[:300] or type(error).__name__,
                wanted="inputs of the shape and type of the example",
                fix="let the loader yield such batches, of the example's size if the "
                "batch is not a dynamic dimension",
            ) from error

    return run
