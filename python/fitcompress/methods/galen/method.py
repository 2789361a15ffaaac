"""``Galen``: channels and bits by reinforcement learning, on measured latency."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import take
from fitcompress.errors import OptionError
from fitcompress.files import check_writable
from fitcompress.methods.galen.checks import check_input, search_key
from fitcompress.methods.galen.details import plan_details
from fitcompress.methods.galen.episode import Builder, Episodes
from fitcompress.methods.galen.packages import check_packages
from fitcompress.methods.galen.policy import ActionMap, AgentKind, Integers
from fitcompress.methods.galen.reconstruction import Reconstruction
from fitcompress.methods.galen.result import attach_sizes_, finish_
from fitcompress.methods.galen.retraining import (
    Lessons,
    estimate_all_norms_,
    retrain_,
)
from fitcompress.methods.galen.sensitivities import (
    Sensitivities,
    measure_sensitivities,
)
from fitcompress.methods.galen.stopwatch import Stopwatch
from fitcompress.methods.galen.walk import make_walk
from fitcompress.model.devices import device_of
from fitcompress.quantize import plan_of
from fitcompress.threads import FIXED, threads
from fitcompress.train.loop import one_pass
from fitcompress.train.norms import NORM_SAMPLES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

    from fitcompress.latency.target import LatencyTarget
    from fitcompress.search import Plan

__all__ = ["Galen"]


@dataclass(frozen=True)
class Galen:
    """Channels and bits of every layer, chosen by an agent for a measured latency.

    An episode walks through the layers in the order in which they run. The agent sees
    what a layer costs and how sensitive it is, and answers with numbers in [0, 1]: the
    share of channels that go, the bits of input and weight. Then the network is pruned,
    quantized, retrained briefly, validated, and *timed on the target*, in turns with
    the dense float network. All steps of the episode get the one reward

        accuracy + β · |T/(c·T_ref) − 1|,

    and the agent, DDPG, makes one update a step. The best network of all episodes is
    made once more, retrained for longer, and returned.

    Attributes:
        agent: ``"pruning"`` decides on channels, ``"quantization"`` on bits,
            ``"joint"`` on both.
        target: c, the share of the dense float network's latency that is asked for.
        episodes: How many.
        warm_up: Of these, the first ones with random actions.
        retrain_epochs: Passes of the retraining inside an episode; 0 for none.
        retrain_samples: Inputs of such a pass, the same in every episode; None for all.
        finetune_epochs: Passes over the loader in the end.
        learning_rate: Peak, of both.
        beta: β ≤ 0.
        one_sided: Do not punish networks that are faster than asked.
        integers: ``"int8"``, or ``"mixed"`` for targets that run other widths.
        round_to: Channels are kept in multiples of this.
        most_bits: Largest of mixed widths; 7 keeps the weights of ``"int8"`` layers in
            7 of their 8 bits, for runtimes whose sums saturate (AVX2 without VNNI).
        reconstruct: Let the layers that follow make up for channels that are gone, by
            least squares, before the retraining.
        calibration_samples: Inputs for that, for norms and for ranges of activations.
        sensitivity_samples: Inputs for the sensitivities that the agent sees.

    Raises:
        OptionError: An option cannot be used.

    Example::

        method = fc.methods.Galen(target=0.5, episodes=100, retrain_samples=5000)
        plan, small = method.run(
            model, training, validation, torch.zeros(1, 3, 32, 32),
            fc.OnnxRuntimeTarget(),
        )
        fc.save(small, "small.safetensors")
        pruned = fc.methods.prune_channels(build(), plan.details["kept_channels"])
        again = fc.load("small.safetensors", pruned)

    Source: Galen (Krieger, Klein, Fröning 2022, arXiv 2212.07818); where it is a
    reconstruction, see ``docs/method.md``.
    """

    agent: AgentKind = "joint"
    target: float = 0.5
    episodes: int = 310
    warm_up: int = 10
    retrain_epochs: int = 1
    retrain_samples: int | None = None
    finetune_epochs: int = 30
    learning_rate: float = 1e-3
    beta: float = -5.0
    one_sided: bool = False
    integers: Integers = "int8"
    round_to: int = 8
    most_bits: int = 8
    reconstruct: bool = True
    calibration_samples: int = 256
    sensitivity_samples: int = 256

    def __post_init__(self) -> None:
        self.actions()
        least = {"warm_up": 0, "retrain_epochs": 0, "finetune_epochs": 0}
        for name in (
            *least,
            "episodes",
            "calibration_samples",
            "sensitivity_samples",
            "retrain_samples",
        ):
            value, bound = getattr(self, name), least.get(name, 1)
            if value is None and name == "retrain_samples":
                continue
            if type(value) is not int or value < bound:
                raise OptionError(
                    name, got=repr(value), wanted=f"a whole number, {bound} or more"
                )
        for name in ("target", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(name, got=getattr(self, name), wanted="a number > 0")
        if not -math.inf < self.beta <= 0:
            raise OptionError("beta", got=self.beta, wanted="a number, at most 0")

    def actions(self) -> ActionMap:
        """Return what the actions of the agent mean."""
        return ActionMap(self.agent, self.integers, self.round_to, self.most_bits)

    def run(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        validation: Iterable[Any],
        example: torch.Tensor,
        latency_target: LatencyTarget,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> tuple[Plan, nn.Module]:
        """Search, and return the plan with the compressed network.

        Args:
            model: The trained classifier, in float32; unchanged.
            loader: Yields inputs or (inputs, …) to retrain with, the same for the same
                epoch; if it has an attribute ``epoch``, that is set before each pass.
                Labels are not used.
            validation: Yields (inputs, labels) without augmentation, held out from
                training: rewards are accuracies on these.
            example: One input with its batch dimension; the target times it.
            latency_target: Where networks are timed. Its ``open`` takes ``reference=``.
            checkpoint: File to save progress to and resume from; with ``.retrain``
                appended, that of the last retraining. Removed at the end. After a kill
                the same call ends with what it would have ended with, as far as
                latencies that were not measured yet come out the same.
            seed: Of the agent, and of dropout; the loader draws for itself.
            progress: Show bars with the time left, and the best policy so far.

        Returns:
            The plan, for the pruned network, and that network, ready for ``save`` and
            ``export_onnx``. Its ``details``: ``kept_channels``, for ``prune_channels``;
            ``share`` of the dense network's latency, ``latency_ms`` and
            ``reference_ms``; ``accuracy``, 0 … 1; ``reward``; ``policy``; ``searched``,
            the same numbers before the last retraining; ``history``, (reward,
            accuracy, share) of every episode; ``left_out``, layer → why it keeps its
            channels. Layers that stay in float have 16 bits in it and no activation
            bits.

        Raises:
            MissingDependencyError: A package of the extra ``galen`` is missing.
            OptionError: The model is compressed already, not in float32, or has nothing
                to decide on.
            DataError: The example or a batch does not serve.
            EmptyLoaderError: A loader yields nothing.
            NonFiniteError: A weight or the loss is NaN or infinite.
            LatencyError: The target cannot time a network.
            OutputError: The checkpoint cannot be written.
        """
        check_packages()
        check_input(model, example)
        path = None if checkpoint is None else check_writable(checkpoint)
        with threads(FIXED), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dense = copy.deepcopy(model).eval()
            example = example.to(device_of(dense))
            walk = make_walk(dense, example, self.actions())
            inputs = list(_inputs(dense, one_pass(loader, 0), self.calibration_samples))
            key = search_key(self, dense, seed, inputs, latency_target)
            with Stopwatch.of(
                latency_target, dense, example, 8 if self.integers == "int8" else 2
            ) as stopwatch:
                found = None
                if self.reconstruct and walk.groups:
                    found = Reconstruction(dense, walk.groups, inputs)
                builder = Builder(dense, walk, inputs, found)
                lessons = Lessons(dense, loader, self.retrain_samples)
                episodes = Episodes(builder, self, lessons, validation, stopwatch, seed)
                return self._run(episodes, loader, path, key, progress=progress)

    def _run(
        self,
        episodes: Episodes,
        loader: Iterable[Any],
        path: Path | None,
        key: str,
        *,
        progress: bool,
    ) -> tuple[Plan, nn.Module]:
        from fitcompress.methods.galen.search import Search

        builder, actions = episodes.builder, self.actions()
        dense, walk = builder.dense, builder.walk

        def sensitivities() -> Sensitivities:
            held = episodes.validation
            return measure_sensitivities(
                dense,
                walk,
                list(_inputs(dense, held, self.sensitivity_samples)),
                prunes=actions.prunes,
                quantizes=actions.quantizes,
                progress=progress,
            )

        search = Search(
            dense,
            walk,
            actions,
            sensitivities,
            episodes.judge,
            warm_up=self.warm_up,
            seed=episodes.seed,
            path=path,
            key=key,
        )
        search.run(self.episodes, progress=progress)
        policy, before = search.best
        small = builder.build(policy)
        lessons = Lessons(dense, loader, None)
        own = None if path is None else path.with_name(f"{path.name}.retrain")
        retrain_(
            small,
            lessons,
            epochs=self.finetune_epochs,
            learning_rate=self.learning_rate,
            seed=episodes.seed,
            checkpoint=own,
            key=key,
            progress=progress,
        )
        estimate_all_norms_(small, lessons.inputs(NORM_SAMPLES))
        finish_(small, walk, policy)
        plan = attach_sizes_(small, plan_of(small), {})
        after = episodes.score(small)
        details = plan_details(builder, policy, before, after, search.history)
        plan = attach_sizes_(small, plan, details)
        for each in (own, path):
            if each is not None:
                each.unlink(missing_ok=True)
        return plan, small


def _inputs(dense: nn.Module, loader: Iterable[Any], samples: int) -> Any:
    device = device_of(dense)
    return (x.to(device) for x, _ in take(loader, samples))
