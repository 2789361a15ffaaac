"""What the plan of a search tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitcompress.methods.galen.episode import Builder
    from fitcompress.methods.galen.outcome import Outcome
    from fitcompress.methods.galen.policy import Policy
    from fitcompress.methods.galen.walk import Walk

__all__ = ["plan_details"]


def plan_details(
    builder: Builder,
    policy: Policy,
    before: Outcome,
    after: Outcome,
    history: list[tuple[Policy, Outcome]],
    target: float,
) -> dict[str, Any]:
    """Return the details of a plan.

    Args:
        builder: Made the network.
        policy: By this.
        before: What it was worth in the search.
        after: What it is worth after the last retraining.
        history: Of all episodes.
        target: The share of the latency that was asked for.
    """
    return {
        "kept_channels": builder.kept(policy),
        "share": after.share,
        "latency_ms": after.latency_ms,
        "reference_ms": after.reference_ms,
        "target": target,
        "accuracy": after.accuracy,
        "reward": after.reward,
        "searched": before.to_dict(),
        "policy": _readable(builder.walk, policy),
        "history": [[o.reward, o.accuracy, o.share] for _, o in history],
        "failed": [
            [number, outcome.failure]
            for number, (_, outcome) in enumerate(history)
            if outcome.failure is not None
        ],
        "left_out": dict(builder.walk.left_out),
    }


def _readable(walk: Walk, policy: Policy) -> dict[str, Any]:
    return {
        "channels": {
            ", ".join(group.layers): [count, group.width]
            for group, count in zip(walk.groups, policy.channels, strict=True)
        },
        "bits": {name: [weight, inputs] for name, weight, inputs in policy.bits},
    }
