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

        The reference is timed in the same turns: another network if one was named, else
        this one with float inputs everywhere.
        """
        ...


class LatencyTarget(Protocol):
    """What networks are to be fast on."""

    @property
    def fingerprint(self) -> str:
        """What latencies depend on besides the network: runtime, machine, batch."""
        ...

    def open(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        weight_bits: int,
        reference: LatencySession | None = None,
    ) -> contextlib.AbstractContextManager[LatencySession]:
        """Get ready to time a network.

        Args:
            model: Compressed, with calibrated input quantizers.
            example_input: A tensor, a tuple of arguments or a dict of named ones.
            weight_bits: 2, 4, 8 or 16: integers that weights are stored in, at least.
            reference: An open session of this target, whose network in float is to be
                the reference; None: this network in float. Only networks that lose
                channels need it, so targets that never time any may go without.
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
            reference: The same network in float, or another one to compare with.
            example: Arguments for them, batch of any size.

        Raises:
            LatencyError: One of them does not run.
        """

    @contextlib.contextmanager
    def open(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        weight_bits: int = 8,
        reference: LatencySession | None = None,
    ) -> Iterator[LatencySession]:
        """Trace a network once, for any number of files.

        Raises:
            FitcompressError: As ``export_onnx`` raises them.
            OptionError: ``reference`` is no session of a target for ONNX files.
        """
        if reference is not None and not isinstance(reference, _Session):
            raise OptionError(
                "the reference cannot be timed here",
                got=type(reference).__name__,
                wanted="a session that open of this target gave",
            )
        options = ExportOptions(
            min_bits=weight_bits,
            fold_weights=True,
            integer_sums=[example_input] if self.integer_sums else None,
        )
        variants = Variants(model, example_input, options)
        with tempfile.TemporaryDirectory(prefix="fitcompress-") as folder:
            own = Path(folder) / "float.onnx"
            if reference is None:
                own.write_bytes(variants.onnx_bytes(()))
            float_file = own if reference is None else reference.float_file

            def time(layers: Collection[str]) -> Timing:
                path = Path(folder) / "network.onnx"
                path.write_bytes(variants.onnx_bytes(layers))
                return self.time_files(path, float_file, example_input)

            yield _Session(time, float_file)


class _Session:
    """What ``OnnxTarget.open`` gives.

    Args:
        time: Names of layers → their timing.
        float_file: The reference; there until the session is closed.
    """

    def __init__(
        self, time: Callable[[Collection[str]], Timing], float_file: Path
    ) -> None:
        self._time, self.float_file = time, float_file

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
