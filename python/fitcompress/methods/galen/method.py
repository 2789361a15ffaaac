"""``Galen``: channels and bits by reinforcement learning, on measured latency."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.files import check_writable
from fitcompress.methods.galen.checks import (
    check_input,
    check_loader,
    check_options,
    check_seed,
    check_target,
)
from fitcompress.methods.galen.details import plan_details
from fitcompress.methods.galen.ending import final_network, warn_if_missed
from fitcompress.methods.galen.episode import Builder, Episodes
from fitcompress.methods.galen.packages import check_packages
from fitcompress.methods.galen.policy import ActionMap, AgentKind, Integers
from fitcompress.methods.galen.reconstruction import Reconstruction
from fitcompress.methods.galen.result import attach_sizes_
from fitcompress.methods.galen.retraining import Lessons, first_inputs
from fitcompress.methods.galen.search_key import search_key
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

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

    from fitcompress.latency.target import LatencyTarget
    from fitcompress.search import Plan

__all__ = ["Galen"]

logger = logging.getLogger(__name__)


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
        finetune_epochs: Passes over the loader in the end; with 0, or if they do not
            help, the result is the best network as its episode made it.
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
        check_options(self)

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
            model: The trained classifier, in float32; unchanged. Parameters without
                ``requires_grad`` are not trained.
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
                latencies that were not measured yet come out the same. A call with
                other ``episodes`` or ``finetune_epochs`` goes on from there, too.
            seed: 0 or more; of the agent, and of dropout; the loader draws for itself.
            progress: Show bars with the time left, and the best policy so far.

        Returns:
            The plan, for the pruned network, and that network, ready for ``save`` and
            ``export_onnx``. Its ``details``: ``kept_channels``, for ``prune_channels``;
            ``share`` of the dense network's latency, ``latency_ms`` and
            ``reference_ms``; ``target``; ``accuracy``, 0 … 1; ``reward``; ``policy``;
            ``searched``, the same numbers before the last retraining; ``history``,
            (reward, accuracy, share) of every episode; ``failed``, (episode, why) of
            those that could not be judged and count as the worst; ``left_out``, layer →
            why it keeps its channels. Layers that stay in float have 16 bits in it and
            no activation bits. A latency more than 2 % above the target is logged.

        Raises:
            MissingDependencyError: A package of the extra ``galen`` is missing, or one
                that the target needs.
            OptionError: The model is compressed already, not in float32, or has nothing
                to decide on or to train; the target or the seed cannot be used; the
                checkpoint is that of another search.
            NoCompressibleLayerError: No layer of the model can be compressed.
            DataError: The example, a loader or a batch does not serve.
            EmptyLoaderError: A loader yields nothing.
            CalibrationError: The data never reach a layer.
            NonFiniteError: A weight or an output is NaN or infinite, or the loss of
                every network.
            LatencyError: The target can time no network.
            ExportError: No network can be written for the target.
            FormatError: The checkpoint lacks a part.
            OutputError: The checkpoint cannot be written.
        """
        check_packages()
        check_seed(seed)
        trains = bool(self.retrain_epochs or self.finetune_epochs)
        check_input(model, example, trains=trains)
        check_target(latency_target)
        check_loader("loader", loader)
        check_loader("validation", validation)
        files = None if checkpoint is None else _files(checkpoint)
        if self.episodes <= self.warm_up:
            logger.warning(
                "all %d episodes are random: the agent learns after %d",
                self.episodes,
                self.warm_up,
            )
        with (
            threads(FIXED),
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
        ):
            torch.manual_seed(seed)
            dense = copy.deepcopy(model).eval()
            example = example.to(device_of(dense))
            walk = make_walk(dense, example, self.actions())
            first = one_pass(loader, 0)
            inputs = list(first_inputs(dense, first, self.calibration_samples))
            key = search_key(
                self, dense, seed, inputs, validation, example, latency_target
            )
            with Stopwatch.of(
                latency_target, dense, example, 8 if self.integers == "int8" else 2
            ) as stopwatch:
                found = None
                if self.reconstruct and walk.groups:
                    found = Reconstruction(dense, walk.groups, inputs)
                builder = Builder(dense, walk, inputs, found)
                lessons = Lessons(dense, loader, self.retrain_samples)
                whole = Lessons(dense, loader, None)
                episodes = Episodes(builder, self, lessons, validation, stopwatch, seed)
                return self._run(episodes, whole, files, key, progress=progress)

    def _run(
        self,
        episodes: Episodes,
        lessons: Lessons,
        files: tuple[Path, Path] | None,
        key: str,
        *,
        progress: bool,
    ) -> tuple[Plan, nn.Module]:
        from fitcompress.methods.galen.search import Search

        builder, actions = episodes.builder, self.actions()
        dense, walk = builder.dense, builder.walk

        def sensitivities() -> Sensitivities:
            held = first_inputs(dense, episodes.validation, self.sensitivity_samples)
            return measure_sensitivities(
                dense,
                walk,
                list(held),
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
            episodes.failed,
            warm_up=self.warm_up,
            seed=episodes.seed,
            path=None if files is None else files[0],
            key=key,
        )
        search.run(self.episodes, progress=progress)
        policy, before = search.best
        small, after = final_network(
            episodes,
            policy,
            before,
            lessons,
            checkpoint=None if files is None else files[1],
            key=key,
            progress=progress,
        )
        warn_if_missed(after, self.target)
        details = plan_details(
            builder, policy, before, after, search.history, self.target
        )
        plan = attach_sizes_(small, plan_of(small), details)
        for each in files or ():
            each.unlink(missing_ok=True)
        return plan, small


def _files(checkpoint: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the file of the search and that of the last training."""
    path = check_writable(checkpoint)
    return path, check_writable(path.with_name(f"{path.name}.retrain"))
