"""The end of a search: the best network, made once more and trained for longer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fitcompress.methods.galen.result import attach_sizes_, finish_
from fitcompress.methods.galen.retraining import estimate_all_norms_, retrain_
from fitcompress.quantize import plan_of
from fitcompress.train.norms import NORM_SAMPLES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fitcompress.methods.galen.episode import Episodes
    from fitcompress.methods.galen.outcome import Outcome
    from fitcompress.methods.galen.policy import Policy
    from fitcompress.methods.galen.retraining import Lessons

__all__ = ["SLACK", "final_network", "warn_if_missed"]

logger = logging.getLogger(__name__)

SLACK = 0.02  # of the target: what repeated measurements of latency differ by


def final_network(
    episodes: Episodes,
    policy: Policy,
    before: Outcome,
    lessons: Lessons,
    *,
    checkpoint: Path | None,
    key: str,
    progress: bool,
) -> tuple[nn.Module, Outcome]:
    """Return the network of a policy, and what it is worth.

    It is trained for ``finetune_epochs``. With none, or if it comes out less accurate
    than the network of the episode, that one is made again and returned: latencies are
    the same, for the policy is.

    Args:
        episodes: Made and judged the policy.
        policy: The best one.
        before: Its outcome there.
        lessons: Of the long training.
        checkpoint: File of that training, or None.
        key: What the file must be for.
        progress: Show a bar with the time left.
    """
    options, found = episodes.options, None
    if options.finetune_epochs:
        small = episodes.builder.build(policy)
        retrain_(
            small,
            lessons,
            epochs=options.finetune_epochs,
            learning_rate=options.learning_rate,
            seed=episodes.seed,
            checkpoint=checkpoint,
            key=key,
            progress=progress,
        )
        estimate_all_norms_(small, lessons.inputs(NORM_SAMPLES))
        finish_(small, episodes.builder.walk, policy)
        found = _scored(episodes, small)
        if found[1].accuracy >= before.accuracy:
            return found
    again = _scored(episodes, episodes.make(policy))
    if found is None or found[1].accuracy < again[1].accuracy:
        return again
    return found


def warn_if_missed(outcome: Outcome, target: float) -> None:
    """Log it if a network is slower than asked, beyond noise."""
    if outcome.share > (1 + SLACK) * target:
        logger.warning(
            "the network takes %.1f %% of the dense one's latency, not %.1f %%: try "
            "more episodes, another agent or a larger target",
            100 * outcome.share,
            100 * target,
        )


def _scored(episodes: Episodes, small: nn.Module) -> tuple[nn.Module, Outcome]:
    attach_sizes_(small, plan_of(small), {})
    return small, episodes.score(small)
