"""What each method makes of a network, under one fine-tuning budget."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fitcompress as fc
from fitcompress.compensate.activations import input_bits
from fitcompress.data.batches import take
from fitcompress.methods import BitSharing, Galen, PathSearch, PruningTernary
from fitcompress.model import compressible_layers
from fitcompress.quantize import grid_of, plan_of
from fitcompress.sensitivity.moving_metric import MovingMetric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from fitcompress.data.batches import Batches
    from fitcompress.data.dataset import Dataset
    from fitcompress.methods.galen.policy import AgentKind

__all__ = ["Made", "Method", "Part", "Setting", "active_bytes", "methods"]

MEASURED, COMPENSATED, VALIDATED = 512, 1024, 1000  # samples
UNIFORM = (8, 4, 3, 2)
SIZES = ("20%", "9%", "6.7%", "4.6%", "3.4%", "2.5%")  # of ours
PATH_SIZE = "6.7%"
AGENTS: tuple[AgentKind, ...] = ("joint", "pruning", "quantization")
TARGET, AIMED = 0.5, 0.49  # of the latency, for Galen; latencies scatter
BIT_OPERATIONS = 60  # times fewer than in float32
ZEROS, TERNARY_RATE = 0.85, 0.0007  # from .002 on, ternary weights forget the network


class Part:
    """The first samples of each pass over a loader that shuffles.

    Args:
        batches: The loader.
        samples: Of a pass; whole batches.
    """

    def __init__(self, batches: Batches, samples: int) -> None:
        self._batches = batches
        size = len(next(iter(batches))[0])
        self._length = min(len(batches), -(-samples // size))
        self.epoch = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self._batches.epoch = self.epoch
        for _, batch in zip(range(self._length), self._batches, strict=False):
            yield batch


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Attributes:
        network: Name of the architecture.
        model: The trained network.
        source: Its data.
        folder: Keeps checkpoints of methods that train.
        tune: Samples of the fine-tuning that every compressed network gets.
        sharing: Samples of a pass of bit sharing, and its passes.
        ternary: The same of pruning ternary.
        galen: Episodes, and samples of the retraining in one.
        seed: Of everything.
    """

    network: str
    model: nn.Module
    source: Dataset
    folder: Path
    tune: int
    sharing: tuple[int, int]
    ternary: tuple[int, int]
    galen: tuple[int, int]
    seed: int = 0
    _tables: dict[tuple[int, ...], fc.Sensitivity] = field(default_factory=dict)

    def inputs(self) -> list[torch.Tensor]:
        """Return the inputs that calibrate and compensate."""
        batches = take(self.source.calibration(self.seed), COMPENSATED)
        return [x for x, _ in batches]

    def training(self, samples: int, seed: int = 0) -> Part:
        """Return training batches, so many samples of each pass."""
        return Part(self.source.training(64, self.seed + seed), samples)

    def table(self, *activation_bits: int) -> fc.Sensitivity:
        """Return the sensitivity."""
        if activation_bits not in self._tables:
            self._tables[activation_bits] = fc.measure(
                self.model,
                self.source.calibration(self.seed),
                samples=MEASURED,
                activation_bits=activation_bits,
                progress=False,
            )
        return self._tables[activation_bits]

    def key(self, name: str) -> tuple[Any, ...]:
        """Return the numbers that the outcome of a method depends on."""
        own = {"bit sharing": self.sharing, "pruning ternary": self.ternary}
        own |= {f"galen, {agent}": self.galen for agent in AGENTS}
        return self.tune, own.get(name), self.seed

    def checkpoint(self, name: str) -> Path:
        """Return where a method keeps its progress."""
        return self.folder / f"{name.replace(' ', '-').replace('/', '-')}.partial"


@dataclass(frozen=True)
class Made:
    """A compressed network before it is fine-tuned.

    Attributes:
        model: It.
        samples: Training samples that made it, calibration included.
        seconds: CPU seconds that chose its levels: measuring, searching, training.
        bops: Bit operations of one sample, or None: weights alone were compressed.
        latency: Over that of the dense network, if it is known.
        tuned: Whether the fine-tuning is done.
    """

    model: nn.Module
    samples: int
    seconds: float
    bops: int | None = None
    latency: float | None = None
    tuned: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: For the row.
        make: Compresses.
        ours: Whether it is what this package would do.
    """

    name: str
    make: Callable[[Setting], Made]
    ours: bool = False


def methods() -> Iterator[Method]:
    """Yield all methods but those of other scripts."""
    for bits in UNIFORM:
        yield Method(f"uniform {bits}/{bits}", lambda s, b=bits: _uniform(s, b))
    for mode in ("greedy", "refresh"):
        yield Method(f"path, {mode}", lambda s, m=mode: _path(s, m))
    for size in SIZES:
        yield Method(f"ours {size}", lambda s, z=size: _ours(s, z), ours=True)
    yield Method(f"ours, BOPs/{BIT_OPERATIONS}", _ours_bops, ours=True)
    yield Method("bit sharing", _bit_sharing)
    yield Method("pruning ternary", _pruning_ternary)
    for agent in AGENTS:
        yield Method(f"galen, {agent}", lambda s, a=agent: _galen(s, a))


def active_bytes(small: nn.Module) -> float:
    """Return kept weights · bits of their grid, over all layers, in bytes.

    Entropy-coded steps count the bits that their largest code needs, with its sign.
    """
    total = 0.0
    for layer in compressible_layers(small):
        weight = layer.weight.detach()
        kept, grid = int(weight.count_nonzero()), grid_of(layer.module)
        bits = 32.0
        if grid is not None:
            codes = grid.codes(weight)
            bits = float(int(codes.abs().max()).bit_length() + 1)
        total += kept * bits
    return total / 8


def _uniform(setting: Setting, bits: int) -> Made:
    """Give all layers so many bits, weights and inputs; 8 in the first and last."""
    layers = compressible_layers(setting.model)
    ends = {layers[0].name, layers[-1].name}
    levels = {}
    for layer in layers:
        own = max(bits, 8) if layer.name in ends else bits
        grid = fc.Grid(bits=own)
        levels[layer.name] = fc.Level(grid, 0.0, layer.shape, activation_bits=own)
    plan = fc.Plan(levels, method="uniform")
    small = fc.apply(setting.model, plan, setting.inputs(), progress=False)
    return Made(small, COMPENSATED, 0.0, _bops(setting, plan))


def _bops(setting: Setting, plan: fc.Plan) -> int:
    table = setting.table()
    macs = dict(zip(table.names, table.macs.tolist(), strict=True))
    bits = input_bits(plan)
    return sum(
        round(macs[name] * (level.grid.bits or 32) * bits.get(name, 32))
        for name, level in plan.levels.items()
    )


def _path(setting: Setting, mode: str) -> Made:
    begin = time.process_time()
    table = setting.table()
    metric: Any = "static"
    if mode == "refresh":
        batches = list(take(setting.source.calibration(setting.seed), MEASURED))
        metric = MovingMetric(setting.model, batches, table)
    plan = fc.search(
        table,
        fc.Budget(size=PATH_SIZE),
        method=PathSearch(mode="greedy", metric=metric, progress=False),
        family="bits",
        masks=True,
    )
    seconds = time.process_time() - begin
    small = fc.apply(setting.model, plan, progress=False)
    return Made(small, MEASURED, seconds)


def _ours(setting: Setting, size: str) -> Made:
    begin = time.process_time()
    plan = fc.search(setting.table(), fc.Budget(size=size))
    seconds = time.process_time() - begin
    small = fc.apply(setting.model, plan, setting.inputs(), progress=False)
    return Made(small, MEASURED + COMPENSATED, seconds)


def _ours_bops(setting: Setting) -> Made:
    begin = time.process_time()
    budget = fc.Budget(bops=f"{100 / BIT_OPERATIONS:.5f}%")
    small = fc.compress(setting.model, setting.inputs(), budget, progress=False)
    plan = plan_of(small)
    seconds = time.process_time() - begin  # with the final apply
    return Made(small, COMPENSATED, seconds, plan.bops)


def _bit_sharing(setting: Setting) -> Made:
    begin = time.process_time()
    samples, passes = setting.sharing
    plan, small = BitSharing(epochs=passes).run(
        setting.model,
        setting.training(samples, seed=1),
        fc.Budget(bops=f"{100 / BIT_OPERATIONS:.5f}%"),
        checkpoint=setting.checkpoint("bit sharing"),
        seed=setting.seed,
        labels=False,
    )
    seconds = time.process_time() - begin
    return Made(small, samples * passes + COMPENSATED, seconds, plan.bops)


def _pruning_ternary(setting: Setting) -> Made:
    begin = time.process_time()
    samples, passes = setting.ternary
    method = PruningTernary(zeros=ZEROS, learning_rate=TERNARY_RATE, epochs=passes)
    small = method.run(
        setting.model,
        setting.training(samples, seed=1),
        checkpoint=setting.checkpoint("pruning ternary"),
        seed=setting.seed,
    )
    return Made(small, samples * passes, time.process_time() - begin)


def _galen(setting: Setting, agent: AgentKind) -> Made:
    """Search for a latency; ends with as much fine-tuning as the others get."""
    begin = time.process_time()
    episodes, samples = setting.galen
    images, labels = (part[:VALIDATED] for part in setting.source.validation)
    plan, small = Galen(
        agent=agent,
        target=AIMED,
        one_sided=True,
        episodes=episodes,
        retrain_samples=samples,
        finetune_epochs=1,
        most_bits=7,  # eight saturate in AVX2
        sensitivity_samples=64,
    ).run(
        setting.model,
        setting.training(setting.tune, seed=2),
        list(zip(images.split(250), labels.split(250), strict=True)),
        setting.source.test[0][:1],
        fc.OnnxRuntimeTarget(threads=1, batch=1, integer_sums=True),
        checkpoint=setting.checkpoint(f"galen {agent}"),
        seed=setting.seed,
    )
    return Made(
        small,
        samples,
        time.process_time() - begin,
        latency=plan.details["share"],
        tuned=True,
    )
