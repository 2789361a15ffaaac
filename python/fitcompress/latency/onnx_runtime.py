"""``OnnxRuntimeTarget``: ONNX Runtime on the processor of this machine."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.errors import LatencyError, MissingDependencyError, OptionError
from fitcompress.export.sessions import session_of
from fitcompress.latency.target import OnnxTarget, check_count
from fitcompress.latency.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["OnnxRuntimeTarget"]

CPU_INFO = Path("/proc/cpuinfo")
MOST_CALLS = 100_000
FINE = 1e-6  # seconds that a clock must tell apart


@dataclass(frozen=True)
class OnnxRuntimeTarget(OnnxTarget):
    """Times networks in ONNX Runtime's CPU provider, all optimizations on.

    A turn calls each of two networks, one after the other, the order swapped from turn
    to turn, and takes the median call of each. With one thread a call counts the
    processor time of that thread, which other work on the machine hardly changes; with
    more, the time that passes.

    Attributes:
        threads: Of one operator.
        batch: Samples of one call; the first one of the example is repeated.
        turns: Turns; the median of them counts.
        shortest_ms: What a turn should take at least, of each network.
        integer_sums: Time networks whose sums are in integers, too, as ``export_onnx``
            writes them with its option of this name.

    Example::

        target = fc.OnnxRuntimeTarget(threads=1, batch=1)
        table = fc.measure_latency(model, torch.zeros(1, 3, 32, 32), target)
    """

    threads: int = 1
    batch: int = 1
    turns: int = 9
    shortest_ms: float = 10.0
    integer_sums: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "batch", "turns"):
            check_count(name, getattr(self, name))
        if not 0 <= self.shortest_ms < 1e6:
            raise OptionError(
                "a turn cannot take so long",
                got=f"shortest_ms={self.shortest_ms!r}",
                wanted="milliseconds, from 0 to 1e6",
            )

    @property
    def fingerprint(self) -> str:
        """Version of the runtime, processor, threads, batch, and whether sums are."""
        try:
            version = importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError as error:
            raise _missing() from error
        return (
            f"onnxruntime {version}, {_processor()}, {self.threads} threads, "
            f"batch {self.batch}{', integer sums' if self.integer_sums else ''}"
        )

    def time_files(self, path: Path, reference: Path, example: Any) -> Timing:
        """Time two ONNX files in turns.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            LatencyError: ONNX Runtime does not run one of the files.
        """
        runs = [self._runner(path, example), self._runner(reference, example)]
        shortest, clock = self.shortest_ms / 1e3, _clock(self.threads)
        calls = [_calls(run, shortest, clock) for run in runs]
        turns = []
        collecting = gc.isenabled()
        gc.disable()
        try:
            for turn in range(self.turns):
                spent = [0.0, 0.0]
                for i in (0, 1) if turn % 2 else (1, 0):
                    spent[i] = 1e3 * statistics.median(
                        _seconds(runs[i], calls[i], clock)
                    )
                turns.append((spent[0], spent[1]))
        finally:
            if collecting:
                gc.enable()
        return Timing.of(turns)

    def _runner(self, path: Path, example: Any) -> Callable[[], object]:
        try:
            session = session_of(str(path), threads=self.threads)
            names = [value.name for value in session.get_inputs()]
            feed = arguments(example, names, self.batch)
            session.run(None, feed)
        except (MissingDependencyError, OptionError):
            raise
        except Exception as error:  # its errors share no base but this one
            raise LatencyError(
                "ONNX Runtime does not run the network",
                got=" ".join(str(error).split())[:300] or type(error).__name__,
                wanted="a network that it can run on the example",
                fix="export it with export_onnx and look at the file",
            ) from error
        return lambda: session.run(None, feed)


def arguments(example: Any, names: list[str], batch: int) -> dict[str, NDArray[Any]]:
    """Return what a network is fed with: the first sample, ``batch`` times.

    Args:
        example: A tensor, a tuple of arguments or a dict of named ones.
        names: Of the network's inputs, in order.
        batch: Samples.

    Raises:
        OptionError: The example has another number of tensors.
    """
    found = example
    if not isinstance(example, dict):
        parts = example if isinstance(example, (tuple, list)) else (example,)
        tensors = [x for x in parts if torch.is_tensor(x)]
        found = dict(zip(names, tensors, strict=False)) if len(tensors) else {}
    feed = {}
    for name in names:
        x = found.get(name)
        if not torch.is_tensor(x) or x.dim() == 0 or not len(x):
            raise OptionError(
                f"the example has no batch for the input {name!r} of the network",
                got=f"tensors for {', '.join(found) or 'none'}",
                wanted=", ".join(names),
            )
        first = x[:1].detach().cpu()
        repeated = first.expand(batch, *first.shape[1:])
        feed[name] = np.ascontiguousarray(repeated.numpy())
    return feed


def _clock(threads: int) -> Callable[[], float]:
    """Return what seconds are read from: see :class:`OnnxRuntimeTarget`."""
    fine = time.get_clock_info("thread_time").resolution < FINE
    return time.thread_time if threads == 1 and fine else time.perf_counter


def _calls(
    run: Callable[[], object], shortest: float, clock: Callable[[], float]
) -> int:
    """Return how many calls take ``shortest`` seconds, odd, at least 3."""
    once = max(min(_seconds(run, 3, clock)), 1e-9)
    return min(max(int(shortest / once), 3), MOST_CALLS) | 1


def _seconds(
    run: Callable[[], object], calls: int, clock: Callable[[], float]
) -> list[float]:
    found = []
    for _ in range(calls):
        begin = clock()
        run()
        found.append(clock() - begin)
    return found


def _processor() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _missing() -> MissingDependencyError:
    return MissingDependencyError(
        "timing networks needs a package that is not installed",
        got="no onnxruntime",
        wanted="onnxruntime",
        fix="pip install 'fitcompress[onnx]'",
    )
