"""What can time a network, and the part that all targets for ONNX files share."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fitcompress.errors import OptionError
from fitcompress.export.onnx_file import ExportOptions
from fitcompress.export.variants import Variants

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import nn

    from fitcompress.latency.timing import Timing

__all__ = ["LatencySession", "LatencyTarget", "OnnxTarget", "check_count"]


class LatencySession(Protocol):
    """One compressed network on a target."""

    def milliseconds(self, layers: Collection[str]) -> Timing:
        """Time the network with quantized inputs of these layers only.

        The network with float inputs everywhere is timed in the same turns.
        """
        ...


class LatencyTarget(Protocol):
    """What networks are to be fast on."""

    @property
    def fingerprint(self) -> str:
        """What latencies depend on besides the network: runtime, machine, batch."""
        ...

    def open(
        self, model: nn.Module, example_input: Any, *, weight_bits: int
    ) -> contextlib.AbstractContextManager[LatencySession]:
        """Get ready to time a network.

        Args:
            model: Compressed, with calibrated input quantizers.
            example_input: A tensor, a tuple of arguments or a dict of named ones.
            weight_bits: 2, 4, 8 or 16: integers that weights are stored in, at least.
        """
        ...


class OnnxTarget(ABC):
    """A target that takes ONNX files.

    They are those of ``export_onnx(…, fold_weights=True, min_bits=weight_bits)``:
    weights are integers where inputs are quantized, and floats elsewhere, where integer
    weights gain no time (docs/deployment.md).

    Attributes:
        integer_sums: Write files as with ``integer_sums`` of ``export_onnx``, their
            ranges those of the example input, which do not change latencies.
    """

    integer_sums: bool = False

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What latencies depend on besides the network."""

    @abstractmethod
    def time_files(self, path: Path, reference: Path, example: Any) -> Timing:
        """Time two ONNX files in turns.

        Args:
            path: The file of interest.
            reference: The same network in float.
            example: Arguments for them, batch of any size.

        Raises:
            LatencyError: One of them does not run.
        """

    @contextlib.contextmanager
    def open(
        self, model: nn.Module, example_input: Any, *, weight_bits: int = 8
    ) -> Iterator[LatencySession]:
        """Trace a network once, for any number of files.

        Raises:
            FitcompressError: As ``export_onnx`` raises them.
        """
        options = ExportOptions(
            min_bits=weight_bits,
            fold_weights=True,
            integer_sums=[example_input] if self.integer_sums else None,
        )
        variants = Variants(model, example_input, options)
        with tempfile.TemporaryDirectory(prefix="fitcompress-") as folder:
            reference = Path(folder) / "float.onnx"
            reference.write_bytes(variants.onnx_bytes(()))

            def time(layers: Collection[str]) -> Timing:
                path = Path(folder) / "network.onnx"
                path.write_bytes(variants.onnx_bytes(layers))
                return self.time_files(path, reference, example_input)

            yield _Session(time)


class _Session:
    def __init__(self, time: Callable[[Collection[str]], Timing]) -> None:
        self._time = time

    def milliseconds(self, layers: Collection[str]) -> Timing:
        """Time the network with quantized inputs of these layers only."""
        return self._time(layers)


def check_count(name: str, value: object) -> None:
    """Raise unless a value is a whole number, 1 or more.

    Raises:
        OptionError: It is not.
    """
    if type(value) is not int or value < 1:
        raise OptionError(
            f"{name} cannot be this",
            got=f"{name}={value!r}",
            wanted="a whole number, 1 or more",
        )
