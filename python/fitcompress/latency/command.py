"""``CommandTarget``: a program of the user's that times an ONNX file, anywhere."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fitcompress.errors import LatencyError, OptionError
from fitcompress.latency.target import OnnxTarget, check_count
from fitcompress.latency.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CommandTarget"]

ONNX, BATCH = "{onnx}", "{batch}"
NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(?:ms)?")


@dataclass(frozen=True)
class CommandTarget(OnnxTarget):
    """Runs a command with the path of an ONNX file; it prints milliseconds.

    The last line of its standard output that is not empty must be one positive number,
    the milliseconds of one call, with or without ``ms`` behind it. No shell is
    involved: the command is split into arguments first, and placeholders are replaced
    in them afterwards.

    Attributes:
        command: The program and its arguments, as one text or a sequence. ``{onnx}`` is
            the path of the file, in at least one argument; ``{batch}`` the batch.
        batch: Samples that the command should use; it has to obey ``{batch}`` itself.
        turns: How often each of two networks is timed, in turns.
        timeout: Seconds for one run of the command.
        integer_sums: As for ``OnnxRuntimeTarget``.

    Example:
        >>> CommandTarget("ssh board time_onnx {onnx} --batch {batch}").arguments("a b")
        ('ssh', 'board', 'time_onnx', 'a b', '--batch', '1')
    """

    command: str | Sequence[str]
    batch: int = 1
    turns: int = 3
    timeout: float = 60.0
    integer_sums: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "turns"):
            check_count(name, getattr(self, name))
        if not 0 < self.timeout < math.inf:
            raise OptionError(
                "the command cannot have so long",
                got=f"timeout={self.timeout!r}",
                wanted="a positive number of seconds",
            )
        try:
            text = isinstance(self.command, str)
            parts = shlex.split(str(self.command)) if text else list(self.command)
        except ValueError as error:
            raise OptionError(
                "the command cannot be split into arguments",
                got=f"{self.command!r}: {error}",
                wanted="quotes in pairs",
            ) from error
        good = all(isinstance(part, str) and "\0" not in part for part in parts)
        if not parts or not good or not any(ONNX in part for part in parts[1:]):
            raise OptionError(
                "the command does not say where the file goes",
                got=repr(self.command),
                wanted=f"a program and arguments with {ONNX} in one of them",
                fix=f'write CommandTarget("program {ONNX}")',
            )
        object.__setattr__(self, "command", tuple(parts))

    @property
    def fingerprint(self) -> str:
        """The command, the batch, and whether sums are in integers."""
        sums = ", integer sums" if self.integer_sums else ""
        return f"command {shlex.join(self.command)}, batch {self.batch}{sums}"

    def arguments(self, path: str | os.PathLike[str]) -> tuple[str, ...]:
        """Return the program and its arguments for one file."""
        return tuple(
            part.replace(BATCH, str(self.batch)).replace(ONNX, os.fspath(path))
            for part in self.command
        )

    def time_files(self, path: Path, reference: Path, example: Any) -> Timing:
        """Time two ONNX files in turns; the example is not used.

        Raises:
            LatencyError: The command is missing, fails, takes too long, or prints
                something else than milliseconds.
        """
        turns = []
        for turn in range(self.turns):
            spent = {}
            for each in (path, reference) if turn % 2 else (reference, path):
                spent[each] = self.milliseconds_of(each)
            turns.append((spent[path], spent[reference]))
        return Timing.of(turns)

    def milliseconds_of(self, path: str | os.PathLike[str]) -> float:
        """Return what the command prints for one file, milliseconds.

        Raises:
            LatencyError: As for :meth:`time_files`.
        """
        arguments = self.arguments(path)
        shown = shlex.join(self.command)
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # to end what it starts, too
            )
        except OSError as error:
            raise LatencyError(
                "the command cannot be started",
                got=f"{arguments[0]}: {error.strerror or type(error).__name__}",
                wanted="a program that is installed and executable",
            ) from error
        try:
            out, errors = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            raise LatencyError(
                "the command took too long",
                got=f"{shown}, more than {self.timeout:g} seconds",
                wanted="milliseconds printed before that",
                fix="raise timeout=, or let the command do fewer calls",
            ) from error
        finally:
            _end(process)
        if process.returncode:
            raise LatencyError(
                "the command failed",
                got=f"{shown}, exit code {process.returncode}: {_tail(errors)}",
                wanted="exit code 0",
            )
        return _milliseconds(out, shown)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that was interrupted, and close its pipes."""
    if process.poll() is None:
        _kill(process)
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _milliseconds(out: bytes, shown: str) -> float:
    lines = out.decode(errors="replace").strip().splitlines()
    match = NUMBER.fullmatch(lines[-1].strip()) if lines else None
    number = float(match[1]) if match else math.nan
    if not 0 < number < math.inf:
        raise LatencyError(
            "the command printed no milliseconds",
            got=f"{shown}: {_tail(out)}",
            wanted='one positive number on the last line, such as "1.25" or "1.25 ms"',
        )
    return number


def _tail(text: bytes) -> str:
    """Return the end of an output on one line."""
    return repr(" ".join(text.decode(errors="replace").split())[-200:])
