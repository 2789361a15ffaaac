"""Running ONNX files in ONNX Runtime, to measure and to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import take, tensors
from fitcompress.errors import CalibrationError, DataError, MissingDependencyError
from fitcompress.model.devices import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["SAMPLES", "calibration_inputs", "runner"]

SAMPLES = 1024


def calibration_inputs(loader: Iterable[Any]) -> list[Any]:
    """Return the first inputs of a loader, 1024 samples at most, on the processor.

    Raises:
        EmptyLoaderError: It yields nothing.
        DataError: A batch cannot be used.
        CalibrationError: All inputs are the same number: a placeholder's.
    """
    place = torch.device("cpu")
    found = [to_device(x, place) for x, _ in take(loader, SAMPLES)]
    values = [x for x in tensors(found) if x.numel()]
    if all(bool((x == values[0].flatten()[0]).all()) for x in values):
        raise CalibrationError(
            "ranges of sums cannot be measured on inputs without content",
            got=f"{len(found)} batches of the same number",
            wanted="inputs such as the network will get",
            fix="give a loader of real inputs to integer_sums=",
        )
    return found


def runner(data: bytes, *, exact: bool = False) -> Callable[[Any], list[torch.Tensor]]:
    """Return a function from inputs, as a model takes them, to outputs of a file.

    Args:
        data: The bytes of the file.
        exact: Run the operators one by one, as the file has them; otherwise with all
            optimizations, as a user would.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ranges of sums are measured with a package that is not installed",
            got=str(error),
            wanted="onnxruntime",
            fix="pip install 'fitcompress[onnx]'",
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"]
    )
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
        values = {name: feed[name].numpy() for name in names}
        return [torch.from_numpy(found) for found in session.run(None, values)]

    return run
