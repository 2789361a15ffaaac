"""The ``LatencyTable`` value: what integer layers do to the latency of a network.

Measured once for a network and a target, saved as JSON; imports no torch.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress.errors import FormatError, OptionError, PlanMismatchError
from fitcompress.files import write_atomically
from fitcompress.latency.interplay import Fit, fit

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.latency.measurement import LatencyCheck
    from fitcompress.latency.target import LatencyTarget
    from fitcompress.search.plan import Plan

__all__ = ["LatencyTable"]

VERSION = 1


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a network with some of its layers in integers.

    A layer is *integer* in a plan if its input is quantized, and *float* otherwise:
    weights alone gain no time, they are folded to floats. See ``latency.interplay`` for
    the model that is fitted to the measurements.

    Attributes:
        names: Layers that can be integer, in the order in which they run, L.
        weight_bits: Integers that their weights are stored in.
        activation_bits: Bits of their inputs.
        float_ms: Median latency of the float network.
        patterns: Which layers were integer in each measured network, [M, L].
        ratios: Latency of each over the float network's in the same turns, [M].
        spread: Interquartile range of each latency over its median, [M].
        target: Fingerprint of what was measured on.
        fit: What follows from patterns and ratios.
    """

    names: tuple[str, ...]
    weight_bits: int
    activation_bits: int
    float_ms: float
    patterns: NDArray[np.bool_]
    ratios: NDArray[np.float64]
    spread: NDArray[np.float64]
    target: str
    fit: Fit = field(init=False, compare=False)

    def __post_init__(self) -> None:
        measured, layers = len(self.ratios), len(self.names)
        numbers = np.array([*self.ratios, self.float_ms])
        if (
            self.patterns.shape != (measured, layers)
            or self.spread.shape != (measured,)
            or self.patterns.dtype != np.bool_
            or not layers
            or len(set(self.names)) < layers
        ):
            raise FormatError(
                "patterns, ratios and names of a latency table do not match",
                got=f"{self.patterns.shape}, {self.ratios.shape}, {layers} names",
            )
        if not (np.isfinite(numbers).all() and (numbers > 0).all()):
            raise FormatError("latencies are not positive", got=numbers.min())
        if not (np.isfinite(self.spread).all() and (self.spread >= 0).all()):
            raise FormatError("spreads of latencies are negative or not finite")
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or not 2 <= bits <= 16:
                raise FormatError(f"{name} is not 2 … 16", got=bits)
        object.__setattr__(self, "fit", fit(self.patterns, self.ratios))

    @property
    def single_ms(self) -> NDArray[np.float64]:
        """What each layer adds if it alone is integer, [L]; negative: a gain."""
        return np.asarray(self.float_ms * self.fit.single)

    @property
    def pair_ms(self) -> NDArray[np.float64]:
        """What neighbours l and l+1 add if both are integer, [L−1]."""
        return np.asarray(self.float_ms * self.fit.pair)

    @property
    def error_ms(self) -> float:
        """Root mean square error of predictions of networks left out of the fit."""
        return self.float_ms * self.fit.error

    def predict(self, plan: Plan) -> float:
        """Return the milliseconds that a plan should take.

        Raises:
            PlanMismatchError: The plan lacks a layer of the table.
            OptionError: It has integers that were not measured.
        """
        pattern = np.zeros((1, len(self.names)), dtype=np.bool_)
        for i, name in enumerate(self.names):
            if name not in plan.levels:
                raise PlanMismatchError(
                    f"the latency table has a layer {name!r} that the plan lacks",
                    got=", ".join(list(plan.levels)[:6]),
                    wanted="a plan for the network that was measured",
                )
            level = plan.levels[name]
            bits, inputs = level.grid.bits, level.activation_bits
            if inputs is None:
                continue
            narrow = bits is not None and bits <= self.weight_bits
            if not narrow or inputs > self.activation_bits:
                raise OptionError(
                    f"the latency of layer {name!r} was not measured at its level",
                    got=str(level),
                    wanted=f"a float input, or at most {self.weight_bits} bits of "
                    f"weights and {self.activation_bits} of inputs",
                    fix="measure with other bits",
                )
            pattern[0, i] = True
        return float(self.float_ms * self.fit.predict(pattern)[0])

    def check(
        self,
        model: nn.Module,
        example_input: Any,
        target: LatencyTarget,
        *,
        plan: Plan | None = None,
    ) -> LatencyCheck:
        """Measure a whole network: predicted ⇒ measured.

        Args:
            model: A compressed model; with ``plan``, any model of the architecture.
            example_input: A tensor, a tuple of arguments or a dict of named ones.
            target: What the table was measured on.
            plan: What to measure instead of the model's own plan.

        Raises:
            PlanMismatchError: The model is not compressed, or the plan is for another.
            OptionError: The target is another, or the plan's integers are.
            LatencyError: The target could not time it.
        """
        from fitcompress.latency.measurement import check_latency

        return check_latency(self, model, example_input, target, plan=plan)

    def summary(self) -> str:
        """Return one line: float, all integers, error of predictions."""
        whole = self.fit.predict(np.ones((1, len(self.names)), dtype=np.bool_))
        error = "unknown" if math.isnan(self.fit.error) else f"{self.error_ms:.3g} ms"
        return (
            f"float {self.float_ms:.4g} ms, all integer {self.float_ms * whole[0]:.4g} "
            f"ms, predictions off by {error} ({len(self.ratios)} networks; "
            f"{self.target})"
        )

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        lines = [self.summary()]
        for i, name in enumerate(self.names):
            line = f"  {name:<{width}}  alone {self.single_ms[i]:+.4f} ms"
            if i + 1 < len(self.names):
                line += f"  with the next {self.pair_ms[i]:+.4f} ms"
            lines.append(line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values for JSON."""
        return {
            "target": self.target,
            "names": list(self.names),
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "float_ms": self.float_ms,
            "patterns": self.patterns.astype(int).tolist(),
            "ratios": self.ratios.tolist(),
            "spread": self.spread.tolist(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        values = self.to_dict()
        head = {"fitcompress_latency": VERSION, "crc32": _checksum(values)}
        write_atomically(path, json.dumps(head | values, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FormatError: The file is damaged or something else.
        """
        data = Path(path).read_bytes()
        try:
            values = json.loads(data)
            version = values.pop("fitcompress_latency")
            if version != VERSION:
                raise FormatError(
                    f"{path} has another format version", got=version, wanted=VERSION
                )
            if values.pop("crc32") != _checksum(values):
                raise FormatError(f"the checksum of {path} is wrong")
            names = values["names"]
            if not all(isinstance(name, str) for name in names):
                raise FormatError("names of layers are texts", got=names[:3])
            rows = np.array(values["patterns"], dtype=np.int64)
            if not np.isin(rows, (0, 1)).all():
                raise FormatError("patterns consist of 0 and 1")
            return cls(
                names=tuple(names),
                weight_bits=values["weight_bits"],
                activation_bits=values["activation_bits"],
                float_ms=float(values["float_ms"]),
                patterns=rows.astype(np.bool_),
                ratios=np.array(values["ratios"], dtype=np.float64),
                spread=np.array(values["spread"], dtype=np.float64),
                target=str(values["target"]),
            )
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            fix = "run `fitcompress measure-latency` again"
            what = f"{path} is damaged or no latency table"
            raise FormatError(what, got=str(error)[:200], fix=fix) from error


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
