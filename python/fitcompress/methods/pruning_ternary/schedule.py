"""When weights become zero: a share that rises in training, and masks that hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["START_ZEROS", "ZeroSchedule", "next_mask"]

START_ZEROS = 0.46  # of normal weights the share whose ternary filters align best, .90
EVERY = 10  # steps between two masks


@dataclass(frozen=True)
class ZeroSchedule:
    """The share of zeros at every step of a training.

        z(k) = z₀ + (z₁ − z₀) · (1 − (1 − k/r)³),   k < r;   z₁ from there on

    which prunes fast while much is redundant and slowly towards the end (Zhu and Gupta
    2017, arXiv 1710.01878). Masks follow it every ten steps, until codes are frozen.

    Attributes:
        zeros: z₁, in [0, 1).
        steps: Of the training.
        ramp: Share of the steps in which zeros rise, r.
        frozen: Share of the steps, the last ones, in which signs and masks stay.
    """

    zeros: float
    steps: int
    ramp: float
    frozen: float

    @property
    def start(self) -> float:
        """z₀, the share at the switch to ternary weights."""
        return min(START_ZEROS, self.zeros)

    @property
    def freeze_step(self) -> int:
        """The first step with frozen codes; their last masks are made right there.

        At the latest the last step, so that every training ends at its share.
        """
        return min(round((1 - self.frozen) * self.steps), self.steps - 1)

    def zeros_at(self, step: int) -> float:
        """Return z(step)."""
        rising = self.ramp * self.steps
        if step >= min(rising, self.freeze_step):
            return self.zeros
        left = 1 - step / rising
        return self.start + (self.zeros - self.start) * (1 - left**3)

    def is_frozen(self, step: int) -> bool:
        """Tell whether codes stay as they are in this step."""
        return step >= self.freeze_step

    def has_new_mask(self, step: int) -> bool:
        """Tell whether masks are made anew before this step."""
        if step >= self.freeze_step:
            return step == self.freeze_step
        return step % EVERY == 0


@torch.no_grad()
def next_mask(
    magnitude: torch.Tensor,
    mask: torch.Tensor | None,
    zeros: float,
    hysteresis: float,
) -> tuple[torch.Tensor, float]:
    """Return which weights are kept so that a share of them is zero, and δ.

        kept:  |u| > δ              if it was kept before,
               |u| > δ · (1 + h)    if it was not

    δ is set so that ⌈zeros · n⌋ of n weights are out by this rule; ties at δ go out
    together. A weight that has just changed sides must move by a factor 1 + h to come
    back.

    Args:
        magnitude: |u|, [rows, columns].
        mask: What was kept, bool of the same shape; None: no weight has a side yet.
        zeros: Share of the layer's weights that are to be zero.
        hysteresis: h ≥ 0.

    Returns:
        The mask, bool [rows, columns], and δ.
    """
    score = magnitude
    if mask is not None and hysteresis:
        score = torch.where(mask, magnitude, magnitude / (1 + hysteresis))
    out = round(zeros * score.numel())
    delta = float(score.flatten().kthvalue(out).values) if out else 0.0
    return score > delta, delta
