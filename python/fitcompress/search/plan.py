"""The ``Plan`` value: one level for every layer, and what it is expected to cost."""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcompress.errors import FormatError, PlanMismatchError
from fitcompress.files import write_atomically
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    import os

__all__ = ["Level", "Plan"]

VERSION = 1


@dataclass(frozen=True)
class Level:
    """What becomes of one layer.

    Attributes:
        grid: Where its weights may lie.
        sparsity: Share of its weights that a mask drops, in [0, 1); weights that merely
            round to zero come on top.
        shape: Shape of the weight, to recognise the model.
        distortion: Predicted rise of the loss, nats.
        size_bits: Predicted bits in the file.
        bops: Predicted bit operations of one sample.
        activation_bits: Bits of the layer's input, 2 to 16; None leaves it in float.
    """

    grid: Grid
    sparsity: float
    shape: tuple[int, ...]
    distortion: float = 0.0
    size_bits: int = 0
    bops: int = 0
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            msg = f"sparsity must be between 0 and 1; got {self.sparsity}"
            raise ValueError(msg)
        bits = self.activation_bits
        if bits is not None and (type(bits) is not int or not 2 <= bits <= 16):
            msg = f"activation_bits must be a whole number, 2 to 16; got {bits!r}"
            raise ValueError(msg)
        _check_numbers(self, "distortion", "size_bits", "bops")

    def __str__(self) -> str:
        masked = f", {100 * self.sparsity:.4g} % masked" if self.sparsity else ""
        bits = self.activation_bits
        inputs = "" if bits is None else f", input {bits} bits"
        return f"{self.grid}{masked}{inputs}"


@dataclass(frozen=True)
class Plan:
    """A level for every compressible layer.

    Attributes:
        levels: Layer name → level, in the order of the model.
        method: What chose it.
        distortion: Predicted rise of the mean loss, Σ_l D_l, nats.
        size_bytes: Predicted bytes of the packed file.
        bops: Predicted bit operations of one sample.
        limit_bytes: Bytes that the packed file may not exceed, or None.
        status: ``"OPTIMAL"`` or ``"FEASIBLE"``, for the objective of the method.
        gap: Proven relative distance from that optimum, or None if nothing is proven.
        details: What the method wants to tell: expansions, path length, objective.
    """

    levels: dict[str, Level]
    method: str = "given"
    distortion: float = 0.0
    size_bytes: int = 0
    bops: int = 0
    limit_bytes: int | None = None
    status: str = "FEASIBLE"
    gap: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.levels:
            msg = "a plan needs at least one level"
            raise ValueError(msg)
        _check_numbers(self, "distortion", "size_bytes", "bops", "limit_bytes", "gap")
        if not (isinstance(self.method, str) and isinstance(self.status, str)):
            msg = f"method and status are names; got {self.method!r}, {self.status!r}"
            raise TypeError(msg)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise unless the plan is for a model with these compressible layers.

        Raises:
            PlanMismatchError: Names the first layer that is missing, extra or of
                another shape.
        """
        fix = "use the plan with the model that it was searched for, or search again"
        for name, level in self.levels.items():
            if name not in shapes:
                raise PlanMismatchError(
                    f"the plan has a layer {name!r} that the model lacks",
                    got=f"a model with layers {', '.join(list(shapes)[:4])}, …",
                    wanted=f"layers {', '.join(list(self.levels)[:4])}, …",
                    fix=fix,
                )
            if tuple(shapes[name]) != level.shape:
                raise PlanMismatchError(
                    f"layer {name!r} has another shape than in the plan",
                    got=tuple(shapes[name]),
                    wanted=level.shape,
                    fix=fix,
                )
        extra = [name for name in shapes if name not in self.levels]
        if extra:
            raise PlanMismatchError(
                f"the model has a layer {extra[0]!r} that the plan lacks",
                got=f"{len(shapes)} layers",
                wanted=f"{len(self.levels)} layers",
                fix=fix,
            )

    def summary(self) -> str:
        """Return one line: method, status and gap, loss rise, size, BOPs.

        Where a method measured accuracy and latency instead of predicting the loss,
        they take its place, with what was asked for.
        """
        gap = "" if self.gap is None else f", gap {100 * self.gap:.2g} %"
        worth = f"predicted loss rise {self.distortion:.4g} nats"
        names = ("accuracy", "share", "target")
        told = [x for x in map(self.details.get, names) if isinstance(x, (int, float))]
        if len(told) == len(names):
            accuracy, share, target = (100 * x for x in told)
            worth = f"accuracy {accuracy:.2f} %, latency {share:.1f} % of {target:g} %"
        return (
            f"{self.method}: {self.status}{gap}, {worth}, "
            f"{self.size_bytes} bytes, {self.bops:.3g} BOPs"
        )

    def diff(self, other: Plan) -> str:
        """Return what another plan does differently, a line a layer that changes.

        Raises:
            PlanMismatchError: The plans are for different layers.
        """
        other.check({name: level.shape for name, level in self.levels.items()})
        lines = [
            f"{self.method} ⇒ {other.method}: {self.size_bytes} ⇒ {other.size_bytes} "
            f"bytes, {self.bops:.3g} ⇒ {other.bops:.3g} BOPs, predicted loss rise "
            f"{self.distortion:.4g} ⇒ {other.distortion:.4g} nats"
        ]
        for name, level in self.levels.items():
            before, after = str(level), str(other.levels[name])
            if before != after:
                lines.append(f"{name}: {before} ⇒ {after}")
        if len(lines) == 1:
            lines.append("the same level for every layer")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the plan as JSON text, the content of a plan file."""
        levels = {
            name: {
                "bits": level.grid.bits,
                "step": level.grid.step,
                "sparsity": level.sparsity,
                "shape": list(level.shape),
                "distortion": level.distortion,
                "size_bits": level.size_bits,
                "bops": level.bops,
                "activation_bits": level.activation_bits,
            }
            for name, level in self.levels.items()
        }
        values = {
            "fitcompress_plan": VERSION,
            "method": self.method,
            "status": self.status,
            "gap": self.gap,
            "distortion": self.distortion,
            "size_bytes": self.size_bytes,
            "bops": self.bops,
            "limit_bytes": self.limit_bytes,
            "details": self.details,
            "levels": levels,
        }
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            FormatError: The text is no plan, or one of another version.
        """
        try:
            values = json.loads(text)
            version = values.pop("fitcompress_plan")
            if version != VERSION:
                raise FormatError(
                    "a plan of another version", got=version, wanted=VERSION
                )
            levels = {}
            for name, level in values.pop("levels").items():
                grid = Grid(bits=level.pop("bits"), step=level.pop("step"))
                shape = tuple(level.pop("shape"))
                if not all(type(n) is int for n in shape):
                    msg = f"a shape is a list of sizes; got {shape}"
                    raise ValueError(msg)
                levels[name] = Level(grid=grid, shape=shape, **level)
            return cls(levels=levels, **values)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                "this is no plan",
                got=f"{type(error).__name__}: {str(error)[:200]}",
                wanted="JSON as written by `fitcompress search`",
                fix="run `fitcompress search` again",
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            FileNotFoundError: There is no such file.
            FormatError: It is no plan.
        """
        try:
            text = Path(path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{path} is no plan", got="bytes that are no text"
            ) from error
        return cls.from_json(text)


def _check_numbers(value: Level | Plan, *names: str) -> None:
    """Raise unless these fields are finite numbers ≥ 0, whole ones if so declared."""
    optional = {"limit_bytes", "gap"}
    for name in names:
        number = getattr(value, name)
        if number is None and name in optional:
            continue
        kind = numbers.Real if name in ("distortion", "gap") else numbers.Integral
        good = isinstance(number, kind) and not isinstance(number, bool)
        if not good or not math.isfinite(number) or number < 0:
            msg = f"{name} must be a finite number, at least 0; got {number!r}"
            raise ValueError(msg)
