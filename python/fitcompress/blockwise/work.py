"""The folder in which a run keeps what it has done, so that it can be resumed.

Every stage ends with one file of its coded layers, written atomically: what is there is
done. Hidden states and sums are files of rows, there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from fitcompress.errors import FormatError, OptionError, OutputError
from fitcompress.files import write_atomically
from fitcompress.storage.container import Outline, Section

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

__all__ = ["Coded", "Work"]

KEY, SIZES = "run.json", "sizes.json"
STAGES, ROWS = ".stage", ".rows"
TEMPORARY = (".run", ".sizes", ".block-", ".embedding", ".head", ".fitcompress-")


@dataclass(frozen=True)
class Coded:
    """A layer that is done.

    Attributes:
        section: As it stands in the packed file.
        shift: What its bias takes on, float32 [rows], or None.
        trust: See ``Quantized``; NaN if unknown.
        drift: Likewise.
        factor: On the step of its level.
    """

    section: Section
    shift: torch.Tensor | None = None
    trust: float = float("nan")
    drift: float = 0.0
    factor: float = 1.0


@dataclass
class Work:
    """A folder of finished stages and of rows that the next ones need.

    Args:
        path: The folder; made if missing.
        key: What its content belongs to.

    Raises:
        OptionError: It holds another run's.
        OutputError: It cannot be made.
    """

    path: Path
    key: str
    _made: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self._made = not self.path.exists()
            self.path.mkdir(exist_ok=True)
            ours = (KEY, *TEMPORARY)  # a kill leaves temporary names behind
            names = [each.name for each in self.path.iterdir()]
            found = [name for name in names if not name.startswith(ours)]
        except OSError as error:
            raise OutputError(
                f"cannot use the folder {self.path}",
                got=error.strerror or type(error).__name__,
                wanted="a folder to keep hidden states and finished layers in",
                fix="choose another place",
            ) from error
        file = self.path / KEY
        known, made = _read_key(file)
        if known == self.key:
            self._made = made
            return
        if found or file.exists():
            raise OptionError(
                f"{self.path} holds the work of another run",
                got=f"{len(found)} files for run {known}",
                wanted=f"run {self.key} (model, plan, tokens and options), or nothing",
                fix="finish that run, remove the folder, or name another with work=",
            )
        about = {"fitcompress_run": self.key, "made": self._made}
        write_atomically(file, json.dumps(about).encode())

    @property
    def sizes(self) -> Path:
        """The file of what was learnt about the sizes of layers."""
        return self.path / SIZES

    def rows(self, name: str) -> Path:
        """Return the path of a file of rows."""
        return self.path / f"{name}{ROWS}"

    def done(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return self._file(stage).exists()

    def put(self, stage: str, layers: dict[str, Coded]) -> None:
        """Write the layers of a stage down: it is finished.

        Raises:
            OutputError: The disk is full.
        """
        tensors, about = {}, []
        for number, (name, coded) in enumerate(layers.items()):
            payload = np.frombuffer(coded.section.payload, np.uint8).copy()
            tensors[f"payload.{number}"] = torch.from_numpy(payload)
            if coded.shift is not None:
                tensors[f"shift.{number}"] = coded.shift.contiguous()
            about.append(
                {
                    "name": name,
                    "entry": coded.section.entry,
                    "version": coded.section.version,
                    "trust": coded.trust if coded.trust == coded.trust else None,
                    "drift": coded.drift,
                    "factor": coded.factor,
                }
            )
        data = safetensors.torch.save(tensors, {"stage": json.dumps(about)})
        write_atomically(self._file(stage), data)

    def outlines(self, stage: str) -> dict[str, Outline]:
        """Return layer → its section without the payload.

        Raises:
            FormatError: The stage's file is damaged.
        """
        with self._open(stage) as file:
            return {
                item["name"]: Outline(
                    item["entry"],
                    file.get_slice(f"payload.{n}").get_shape()[0],
                    item["version"],
                )
                for n, item in enumerate(_about(file))
            }

    def layers(self, stage: str) -> dict[str, Coded]:
        """Return the layers of a finished stage.

        Raises:
            FormatError: The stage's file is damaged.
        """
        found = {}
        with self._open(stage) as file:
            keys = set(file.keys())
            for number, item in enumerate(_about(file)):
                payload = file.get_tensor(f"payload.{number}").numpy().tobytes()
                shift = f"shift.{number}"
                trust = item["trust"]
                found[item["name"]] = Coded(
                    Section(item["entry"], payload, item["version"]),
                    file.get_tensor(shift) if shift in keys else None,
                    float("nan") if trust is None else trust,
                    item["drift"],
                    item["factor"],
                )
        return found

    def tidy(self, keep: Collection[str]) -> None:
        """Remove all files of rows but these, and what was left half written."""
        names = {f"{name}{ROWS}" for name in keep}
        for path in self._files():
            if path.suffix == ".partial" or (
                path.suffix == ROWS and path.name not in names
            ):
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove everything: the run is over. A folder that was there before stays."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # there are files of others in it
                self.path.rmdir()

    def _files(self) -> Iterator[Path]:
        for path in list(self.path.iterdir()):
            own = path.suffix in (STAGES, ROWS, ".partial")
            if own or path.name in (KEY, SIZES) or path.name.startswith(TEMPORARY):
                yield path

    def _file(self, stage: str) -> Path:
        return self.path / f"{stage}{STAGES}"

    def _open(self, stage: str) -> Any:
        try:
            return safetensors.safe_open(self._file(stage), framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(
                f"{self._file(stage)} is damaged",
                got=str(error)[:200],
                fix="remove the folder it is in, and start again",
            ) from error


def _about(file: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.metadata()["stage"])
    return found


def _read_key(path: Path) -> tuple[str | None, bool]:
    """Return whose work it is, and whether the folder was made for it."""
    try:
        about = json.loads(path.read_bytes())
        return str(about["fitcompress_run"]), bool(about.get("made", True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
