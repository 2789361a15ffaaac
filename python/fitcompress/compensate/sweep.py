"""Quantize one layer so that later columns absorb the errors of earlier ones.

After Frantar, Singh, Alistarh 2022 (OBC, arXiv 2208.11580) and Frantar et al. 2022
(GPTQ, arXiv 2210.17323), with unbounded entropy-coded levels as well as fixed-point
ones and masks, and a beam instead of one path:

1. target W + γ(W* − W), see ``target``;
2. U, the upper Cholesky factor of (H + δI)⁻¹, columns in falling order of H_jj;
3. for each column j: k = round(w_j / Δ); w_{j'} −= (w_j − kΔ) U_jj' / U_jj for j' > j,
   with the codes k that minimise Σ_j (w_j − k_jΔ)² / U_jj² among the paths kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fitcompress import ops
from fitcompress.compensate.masks import prune_
from fitcompress.compensate.scales import clipped_scales
from fitcompress.compensate.target import Normal, Target, solve
from fitcompress.quantize import half_up

if TYPE_CHECKING:
    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.statistics import Moments
    from fitcompress.search.plan import Level

__all__ = ["Problem", "Quantized", "on_level", "quantize"]

DEAD = 0.01  # of the noise of rounding, carried by an input's largest weight
RATE_PASSES = 3
CHUNK = 512  # rows of codes that exist in float64 at a time


@dataclass
class Quantized:
    """One layer on its levels.

    Attributes:
        codes: int32 [rows, columns].
        scale: Δ, float32 [1] or [rows].
        mask: What the level's mask keeps, bool [rows, columns], or None.
        shift: What to add to the outputs, float32 [rows], or None.
        gain: What to multiply them by before, float32 [rows], or None.
        drift: Share γ of the drift correction, mean over groups.
        trust: What the whole correction gains on data that it was not fitted to, over
            what it gains on those that it was; NaN if unknown.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    mask: torch.Tensor | None
    shift: torch.Tensor | None
    gain: torch.Tensor | None
    drift: float
    trust: float


def quantize(
    weight: torch.Tensor,
    fitted: Moments,
    held_out: Moments | None,
    level: Level,
    options: Compensation,
    *,
    biased: bool = False,
    scalable: bool = False,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
    name: str = "",
) -> Quantized:
    """Return the compensated codes of one layer.

    Args:
        weight: W, [rows, columns].
        fitted: Moments of most of the data.
        held_out: Of the rest, to choose γ by, or None. Both are used up.
        level: Where the weights are to lie.
        options: What compensation does.
        biased: Whether something can restore the means of the outputs.
        scalable: Whether something can multiply the outputs.
        importance: What the mask keeps the largest of, [rows, columns]; None: it drops
            what others make up for best, see ``masks.prune_``.
        widen: Factor on the scales of fixed-point levels, for fewer bytes.
        name: Of the layer, for messages.

    Raises:
        CalibrationError: H cannot be inverted.
    """
    groups = len(fitted.second)
    dense = weight.float().reshape(groups, -1, weight.shape[1])
    centered = biased and options.bias
    problems = _problems(
        dense, fitted, held_out, level, options, name, centered=centered
    )
    return on_level(
        problems,
        level,
        options,
        centered=centered,
        scalable=scalable,
        importance=importance,
        widen=widen,
    )


def on_level(
    problems: list[Problem],
    level: Level,
    options: Compensation,
    *,
    centered: bool = False,
    scalable: bool = False,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
) -> Quantized:
    """Return the codes of a layer whose problems are set up.

    Args:
        problems: One per group; used up.
        level: As in :func:`quantize`, and so are the others.
        options: What compensation does.
        centered: Whether means are left out of the problems, and outputs shifted.
        scalable: Whether something can multiply the outputs.
        importance: What the mask keeps the largest of.
        widen: Factor on the scales of fixed-point levels.
    """
    groups = len(problems)
    each, columns = problems[0].target.weight.shape
    device = problems[0].target.weight.device
    mask = prune_([p.target for p in problems], level.sparsity, importance)
    scale = _scale(problems, level, options, mask, widen)
    codes = torch.empty(groups, each, columns, dtype=torch.int32, device=device)
    shift = torch.zeros(groups, each, dtype=torch.float64, device=device)
    gain = torch.ones_like(shift)
    for g, problem in enumerate(problems):
        own = scale if len(scale) == 1 else scale.reshape(groups, -1)[g]
        kept = None if mask is None else mask.reshape(codes.shape)[g]
        swept = problem.sweep(own, _max_code(level), kept, options)
        codes[g] = problem.target.unsorted(swept)
        step = own.double().flatten()
        if scalable and options.row_scale:
            gain[g] = problem.gain(swept * step.reshape(-1, 1))
        mean = problem.mean[problem.target.order]
        outputs = [part.double() @ mean for part in torch.split(swept, CHUNK)]
        shift[g] = problem.output - torch.cat(outputs) * step * gain[g]
    moved = [p.target.gain for p in problems if not math.isnan(p.target.gain[1])]
    trust = sum(held for held, _ in moved) / (sum(fit for _, fit in moved) or math.nan)
    return Quantized(
        codes.reshape(groups * each, columns),
        scale,
        mask,
        shift.flatten().float() if centered else None,
        gain.flatten().float() if scalable and options.row_scale else None,
        sum(p.target.drift for p in problems) / groups,
        trust,
    )


@dataclass
class Problem:
    """One group: its target, and the means that its outputs should keep."""

    target: Target
    mean: torch.Tensor
    output: torch.Tensor
    live: torch.Tensor

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        whole: Normal,
        level: Level,
        options: Compensation,
        *,
        fitted: Normal | None = None,
        held_out: Normal | None = None,
        name: str = "",
    ) -> Problem:
        """Set up the problem of one group.

        Args:
            weight: W, float32 [rows, columns].
            whole: Equations of all data; used up.
            level: Where the weights are to lie.
            options: What compensation does.
            fitted: Those of most of the data, if γ is to be chosen here.
            held_out: Those of the rest.
            name: Of the layer, for messages.

        Raises:
            CalibrationError: H cannot be inverted.
        """
        mean, output = whole.mean, whole.output
        second = whole.h.diagonal().clamp_min(whole.noise)
        energy = weight.abs().amax(0).double().square() * second
        live = energy > DEAD * _step(weight, level) ** 2 / 12 * second.mean()
        live &= whole.live
        target = solve(
            weight,
            fitted or whole,
            held_out,
            whole,
            damping=options.damping,
            drift=options.drift,
            name=name,
        )
        return cls(target, mean, output, live)

    def sweep(
        self,
        scale: torch.Tensor,
        max_code: int,
        mask: torch.Tensor | None,
        options: Compensation,
        beam: int | None = None,
    ) -> torch.Tensor:
        """Return codes in the order of the target's columns."""
        target = self.target
        rows, columns = target.weight.shape
        kept = None
        if mask is not None or not bool(self.live.all()):
            kept = self.live.expand(rows, -1)
            kept = kept if mask is None else kept & mask
            kept = kept[:, target.order].contiguous()
        paths = beam or options.paths(rows, columns)
        scale = scale.double().contiguous()

        def run(bits: torch.Tensor | None = None, rate: float = 0.0) -> torch.Tensor:
            return ops.error_feedback_sweep(
                target.weight, target.factor, scale, kept, max_code, paths, bits, rate
            )

        codes = run()
        if options.rate and not max_code:
            # At high resolution dD/dR = −Δ² d ln 2 / 6 with d = 1/U_jj².
            d = math.exp(-2 * float(target.factor.diagonal().log().mean()))
            for _ in range(RATE_PASSES):
                codes = run(code_bits(codes), options.rate * d * math.log(2) / 6)
        return codes

    def whitened(self, columns: torch.Tensor) -> torch.Tensor:
        """Return V U⁻¹, whose squared norm per row is that of V's outputs."""
        factor, values = self.target.factor, columns.double()
        white: torch.Tensor = torch.linalg.solve_triangular(
            factor, values, upper=True, left=False
        )
        return white

    def gain(self, values: torch.Tensor) -> torch.Tensor:
        """Return the factor of every row that brings values closest to the target."""
        have, want = self.whitened(values), self.whitened(self.target.weight)
        norm = have.square().sum(1)
        return torch.where(norm > 0, (have * want).sum(1) / norm.clamp_min(1e-300), 1.0)

    def error(self, values: torch.Tensor) -> torch.Tensor:
        """Return the squared error of every row's outputs, per position."""
        return self.whitened(self.target.weight - values).square().sum(1)


def code_bits(codes: torch.Tensor) -> torch.Tensor:
    """Return −log₂ of the frequency of −h … h, float64 [2h + 1], unseen ones ½ each."""
    half = int(codes.abs().max()) + 1 if codes.numel() else 1
    counts = torch.bincount((codes.flatten().long() + half), minlength=2 * half + 1)
    counts = counts.double() + 0.5
    return -(counts / counts.sum()).log2()


def _problems(
    dense: torch.Tensor,
    fitted: Moments,
    held_out: Moments | None,
    level: Level,
    options: Compensation,
    name: str,
    *,
    centered: bool,
) -> list[Problem]:
    whole = fitted
    if held_out is not None and options.drift is None:
        whole = type(fitted)(fitted.second + held_out.second, fitted.cross.clone())
        whole.cross += held_out.cross
    elif held_out is not None:
        whole, held_out = fitted.add_(held_out), None
    problems = []
    for g, weight in enumerate(dense):
        parts = [
            None if part is None else Normal.of(part, g, centered=centered)
            for part in (held_out, fitted if held_out is not None else None, whole)
        ]
        assert parts[2] is not None
        if len(dense) == 1:  # from here on the equations alone hold the memory
            empty = parts[2].mean.new_empty(0)
            whole.second, whole.cross = empty, empty
        problem = Problem.of(
            weight,
            parts[2],
            level,
            options,
            fitted=parts[1],
            held_out=parts[0],
            name=name,
        )
        problems.append(problem)
    return problems


def _step(weight: torch.Tensor, level: Level) -> float:
    """Return Δ, or about what it will be."""
    if level.grid.step is not None:
        return level.grid.step
    return float(weight.abs().amax(1).median()) / _max_code(level)


def _max_code(level: Level) -> int:
    return 0 if level.grid.bits is None else 2 ** (level.grid.bits - 1) - 1


def _scale(
    problems: list[Problem],
    level: Level,
    options: Compensation,
    mask: torch.Tensor | None,
    widen: float,
) -> torch.Tensor:
    if level.grid.step is not None:
        device = problems[0].mean.device
        return torch.tensor([level.grid.step], dtype=torch.float32, device=device)
    scale = clipped_scales(problems, _max_code(level), options, mask)
    return scale if widen == 1 else half_up(scale * widen)
