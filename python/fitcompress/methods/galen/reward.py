"""What an episode is worth: accuracy, and how far its latency is from the target."""

from __future__ import annotations

import math

from fitcompress.errors import OptionError

__all__ = ["reward"]


def reward(
    accuracy: float,
    share: float,
    target: float,
    *,
    beta: float = -5.0,
    one_sided: bool = False,
) -> float:
    """Return the reward of one compressed network.

        accuracy + β · |T/(c·T_ref) − 1|,
        accuracy + β · max(0, T/(c·T_ref) − 1) if one-sided.

    The first form also punishes a network that is faster than asked: it holds back what
    could have been spent on accuracy. The second one does not.

    Args:
        accuracy: Share of right answers, 0 … 1.
        share: T/T_ref, the latency relative to the dense float network's.
        target: c, the share that is asked for.
        beta: β ≤ 0, what a relative miss of 1 costs.
        one_sided: Only slower counts.

    Raises:
        OptionError: A number is not finite, the shares are not positive, or β is.

    Example:
        >>> reward(0.9, 0.6, 0.5)
        -0.09...
        >>> reward(0.9, 0.4, 0.5, one_sided=True)
        0.9

    Source: Galen (Krieger, Klein, Fröning 2022, arXiv 2212.07818).
    """
    if not all(map(math.isfinite, (accuracy, share, target, beta))):
        raise OptionError(
            "a reward is made of finite numbers", got=(accuracy, share, target, beta)
        )
    if share <= 0 or target <= 0 or beta > 0:
        raise OptionError(
            "a reward cannot be made of these numbers",
            got=f"share={share}, target={target}, beta={beta}",
            wanted="shares > 0, beta ≤ 0",
        )
    miss = share / target - 1
    return accuracy + beta * (max(0.0, miss) if one_sided else abs(miss))
