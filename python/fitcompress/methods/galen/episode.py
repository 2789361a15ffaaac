"""From a policy to a compressed network, and to what it is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fitcompress.methods.galen.groups import kept_channels, strongest
from fitcompress.methods.galen.outcome import Outcome
from fitcompress.methods.galen.ranges import quantize_inputs_
from fitcompress.methods.galen.result import finish_
from fitcompress.methods.galen.retraining import estimate_all_norms_, retrain_
from fitcompress.methods.galen.reward import reward
from fitcompress.methods.galen.surgery import prune_channels
from fitcompress.model import compressible_layers
from fitcompress.quantize import WeightGrid, attach_grid, row_scales
from fitcompress.search.plan import Level
from fitcompress.sensitivity.table import Grid
from fitcompress.train.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn

    from fitcompress.methods.galen.method import Galen
    from fitcompress.methods.galen.policy import Policy
    from fitcompress.methods.galen.reconstruction import Reconstruction
    from fitcompress.methods.galen.retraining import Lessons
    from fitcompress.methods.galen.stopwatch import Stopwatch
    from fitcompress.methods.galen.walk import Walk

__all__ = ["Builder", "Episodes"]

EPISODE_NORM_SAMPLES = 1024


class Builder:
    """Makes networks of policies: prunes first, then puts weights and inputs on grids.

    Args:
        dense: The network; unchanged.
        walk: Its layers and groups.
        calibration: Inputs for norms and ranges.
        reconstruction: Makes up for channels that are gone; None: their weights are
            merely dropped.
    """

    def __init__(
        self,
        dense: nn.Module,
        walk: Walk,
        calibration: Sequence[torch.Tensor],
        reconstruction: Reconstruction | None,
    ) -> None:
        self.dense, self.walk, self.calibration = dense, walk, calibration
        self._reconstruction = reconstruction

    def kept(self, policy: Policy) -> dict[str, dict[str, list[int]]]:
        """Return the list for ``prune_channels``."""
        channels = [
            strongest(self.dense, group, count)
            for group, count in zip(self.walk.groups, policy.channels, strict=True)
        ]
        return kept_channels(self.walk.groups, channels)

    def build(self, policy: Policy) -> nn.Module:
        """Return a fresh network, ready to be retrained, in eval mode."""
        kept = self.kept(policy)
        small = prune_channels(self.dense, kept).eval()
        if kept:
            if self._reconstruction is not None:
                self._reconstruction.apply_(small, kept)
            estimate_all_norms_(small, self.calibration)
        bits = {name: weight for name, weight, _ in policy.bits}
        for layer in compressible_layers(small):
            if layer.name in bits:
                level = Level(Grid(bits=bits[layer.name]), 0.0, layer.shape)
                grid = WeightGrid(*row_scales(layer.matrix(), level))
                latent = layer.weight.detach().clone()
                attach_grid(layer.module, grid.to(latent.device), latent)
        inputs = {name: number for name, _, number in policy.bits}
        quantize_inputs_(small, inputs, self.calibration)
        return small


class Episodes:
    """Judges policies: builds, retrains, validates and times their networks.

    Args:
        builder: Makes the networks.
        options: The method's.
        lessons: Of the retraining.
        validation: Yields (inputs, labels).
        stopwatch: Times them.
        seed: Of dropout.
    """

    def __init__(
        self,
        builder: Builder,
        options: Galen,
        lessons: Lessons,
        validation: Iterable[Any],
        stopwatch: Stopwatch,
        seed: int,
    ) -> None:
        self.builder, self.options, self.lessons = builder, options, lessons
        self.validation, self.stopwatch, self.seed = validation, stopwatch, seed

    def make(self, policy: Policy) -> nn.Module:
        """Return the network of a policy, after a brief retraining."""
        small = self.builder.build(policy)
        retrain_(
            small,
            self.lessons,
            epochs=self.options.retrain_epochs,
            learning_rate=self.options.learning_rate,
            seed=self.seed,
        )
        estimate_all_norms_(small, self.lessons.inputs(EPISODE_NORM_SAMPLES))
        finish_(small, self.builder.walk, policy)
        return small

    def judge(self, policy: Policy) -> Outcome:
        """Return what a policy is worth, after a brief retraining."""
        return self.score(self.make(policy))

    def failed(self, why: str) -> Outcome:
        """Return the outcome of a policy that cannot be judged."""
        options = self.options
        return Outcome.failed(
            why, options.target, beta=options.beta, one_sided=options.one_sided
        )

    def score(self, small: nn.Module) -> Outcome:
        """Validate and time a finished network."""
        accuracy = evaluate(small, self.validation, progress=False).accuracy / 100
        timing = self.stopwatch.time(small)
        value = reward(
            accuracy,
            timing.ratio,
            self.options.target,
            beta=self.options.beta,
            one_sided=self.options.one_sided,
        )
        return Outcome(value, accuracy, timing.ratio, timing.ms, timing.reference_ms)
