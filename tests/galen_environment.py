"""The environment of the tiny network, with rewards of one's own."""

from collections.abc import Callable
from functools import cache

from fitcompress.methods.galen.environment import CompressionEnv
from fitcompress.methods.galen.features import Features
from fitcompress.methods.galen.policy import ActionMap, Policy
from fitcompress.methods.galen.sensitivities import (
    Sensitivities,
    measure_sensitivities,
)
from fitcompress.methods.galen.walk import Walk, make_walk
from galen_nets import X, make_loader, make_net


@cache
def walk() -> Walk:
    return make_walk(make_net(), X, ActionMap(round_to=2))


@cache
def sensitivities() -> Sensitivities:
    inputs = [x for x, _ in make_loader(32)]
    return measure_sensitivities(
        make_net(), walk(), inputs, prunes=True, quantizes=True, progress=False
    )


def environment(judge: Callable[[Policy], float] = lambda _: 1.0) -> CompressionEnv:
    actions = ActionMap(round_to=2)
    features = Features(make_net(), walk(), sensitivities(), actions)
    return CompressionEnv(walk(), actions, features, judge)
