"""One run: all stages of a decoder, those that are done left out, and its file."""

from __future__ import annotations

import logging
import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.blockwise.layer import compensated
from fitcompress.blockwise.passes import Passes, Stage
from fitcompress.blockwise.rows import RowWriter
from fitcompress.blockwise.steps import pace_for
from fitcompress.blockwise.sums import names_of
from fitcompress.blockwise.tokens import Tokens, checked_tokens
from fitcompress.blockwise.values import NAMES, Values, fill
from fitcompress.blockwise.work import Coded, Work
from fitcompress.compensate.compressor import scaled
from fitcompress.compensate.rounding import rounded_matrix
from fitcompress.compensate.row_parts import ROWS, joined
from fitcompress.compensate.size_fit import Pace
from fitcompress.compensate.trust import judge
from fitcompress.data.batches import digest
from fitcompress.errors import BudgetExceededError, OptionError
from fitcompress.files import write_atomically
from fitcompress.progress import Bar
from fitcompress.storage.coded_weight import (
    CodedWeight,
    Coding,
    write_coded,
)
from fitcompress.storage.container import Outline, pack_parts, packed_size
from fitcompress.storage.save_load import plan_info
from fitcompress.storage.sections import Leftovers, write_leftovers
from fitcompress.versions import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from fitcompress.blockwise.skeleton import Group, Skeleton
    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level, Plan
    from fitcompress.sensitivity.shards import Shards
    from fitcompress.storage.container import Section

__all__ = ["Run"]

logger = logging.getLogger(__name__)

RETRIES = 4  # of the last layers, until the file fits


class Run:
    """One call of ``compensate_shards``.

    Args:
        shards: Tensors of the dense network.
        skeleton: The model without values.
        plan: Levels of its layers.
        tokens: Calibration tokens.
        options: What compensation does.
        coding: How codes are coded.
        work: Folder for hidden states and finished layers.

    Attributes:
        work: What is in it.

    Raises:
        FitcompressError: As ``compensate_shards`` does, before any work starts.
    """

    def __init__(
        self,
        shards: Shards,
        skeleton: Skeleton,
        plan: Plan,
        tokens: Any,
        options: Compensation,
        coding: Coding,
        work: Path,
    ) -> None:
        self._shards, self._skeleton = shards, skeleton
        self._plan, self._options, self._coding = plan, options, coding
        plan.check({layer.name: layer.shape for layer in skeleton.layers})
        for name, level in plan.levels.items():
            if level.activation_bits is not None:
                raise OptionError(
                    "the plan quantizes activations, which takes the whole model",
                    got=f"{level.activation_bits} bits for the input of {name}",
                    wanted="a plan without activation bits",
                    fix="search without them, or use apply",
                )
        known = {skeleton.embedding.name}
        for number in range(skeleton.blocks):
            skeleton.arguments(number, 1, 1)
            groups = skeleton.groups(number)
            known |= {layer.name for group in groups for layer in group.layers}
        skeleton.check_known(known)
        self._aliases = {
            f"{name}.weight": f"{layer.name}.weight"
            for layer in skeleton.layers
            for name, _ in layer.tied
        }
        state = skeleton.model.state_dict()
        self._state = {
            name: tuple(tensor.shape)
            for name, tensor in state.items()
            if name not in self._aliases
        }
        self._values = Values(shards, self._state)
        self._tokens: Tokens = checked_tokens(tokens, skeleton.embedding.rows)
        self._check_halves()
        self.work = Work(work, self._key())
        self._pace = Pace("blocks", 1.0)
        self._stage_of: dict[str, str] = {}
        self._levels: dict[str, Level] = {}

    def _key(self) -> str:
        files = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self._shards.files
        ]
        about = (
            self._plan.to_json(),
            self._options,
            self._coding,
            tuple(self._tokens.ids.shape),
            files,
            self._skeleton.config.to_json_string(),
            (__version__, str(torch.__version__), self._skeleton.version),
        )
        crc = zlib.crc32(repr(about).encode())
        return f"{digest(self._tokens.ids, crc):08x}"

    def _check_halves(self) -> None:
        """Raise unless the first block is of the kind that is compressed here."""
        if self._skeleton.blocks:
            name = f"{self._skeleton.embedding.name}.weight"
            self._skeleton.check_halves(
                0,
                self._values.dense_rows(name, self._tokens.ids[:1]),
                lambda module, name: _filled(module, name, self._values),
            )
            self._shards.release()

    @torch.no_grad()
    def all_stages(self, *, progress: bool) -> None:
        """Do all that is not done yet."""
        blocks, head = self._skeleton.blocks, self._skeleton.head
        parts = sum(len(self._tokens.chunks(held_out=held)) for held in (False, True))
        passes = 4 * blocks + (head is not None)
        total = len(self._skeleton.layers) + passes * parts
        self._pace = pace_for(
            self._plan, self._skeleton, self._values, self.work.sizes, progress=progress
        )
        with Bar("compensate: blocks", total, enabled=progress) as bar:
            run = Passes(
                self._skeleton,
                self._values,
                self._tokens,
                self.work,
                bar,
                repairs=self._options.residual,
            )
            self._embed(bar)
            for number in range(blocks):
                known: dict[str, Coded] = {}
                if number:
                    known |= self._last_of(run.stages(number - 1))
                stages, groups = run.stages(number), self._skeleton.groups(number)
                for stage, group in zip(stages, groups, strict=True):
                    self._values.know(known)
                    last = head is None and stage is stages[-1] and number == blocks - 1
                    known |= self._stage(run, stage, number, group, bar, last=last)
            if head is not None:
                self._values.know(self._last_of(run.stages(blocks - 1)))
                stage = run.head_stage(head)
                self._stage(run, stage, blocks, None, bar, last=True)
        self.work.tidy(())
        self._judge()

    def _last_of(self, stages: list[Stage]) -> dict[str, Coded]:
        return self.work.layers(stages[-1].name)

    def _stage(
        self,
        run: Passes,
        stage: Stage,
        number: int,
        group: Group | None,
        bar: Bar,
        *,
        last: bool,
    ) -> dict[str, Coded]:
        """Do one stage, if it is not done, and return its layers."""
        if self.work.done(stage.name):
            bar.advance(run.parts + len(stage.layers))
            return self._note(stage.name)
        start = time.monotonic()
        run.run(stage, number, group)
        middle = time.monotonic()
        names = names_of(stage.name, held_out=self._tokens.held_out)
        self.work.tidy([*stage.keeps, *names])
        self._shards.release()
        made: dict[str, Coded] = {}
        for layer in stage.layers:
            factor = self._pace.factor(layer.name)
            made[layer.name] = self._compensate(layer, stage, factor)
            bar.advance(note=layer.name)
        for _ in range(RETRIES if last else 0):
            over = self._over(made)
            if over <= 0:
                break
            size = sum(len(each.section.payload) for each in made.values())
            wider = (1.01 * size / max(size - over, size / 4)) ** 1.5
            logger.info("%s: %d bytes too many, once more", stage.name, over)
            for layer in stage.layers:
                factor = wider * made[layer.name].factor
                made[layer.name] = self._compensate(layer, stage, factor)
        self.work.put(stage.name, made)
        self.work.tidy(stage.keeps)
        logger.info(
            "%s: tokens %.1f s, layers %.1f s",
            stage.name,
            middle - start,
            time.monotonic() - middle,
        )
        return self._note(stage.name)

    def _note(self, stage: str) -> dict[str, Coded]:
        """Return the layers of a finished stage, and remember what is needed later."""
        layers = self.work.layers(stage)
        for name, coded in layers.items():
            self._stage_of[name] = stage
            self._levels[name] = scaled(self._plan.levels[name], coded.factor)
            self._pace.factors[name] = coded.factor
            self._pace.spent(name, len(coded.section.payload))
        return layers

    def _over(self, made: dict[str, Coded]) -> int:
        """Return how far the file is beyond the limit with these last layers."""
        if self._plan.limit_bytes is None or self._pace.free:
            return 0
        found = {name: Outline.of(coded.section) for name, coded in made.items()}
        levels = {
            name: scaled(self._plan.levels[name], coded.factor)
            for name, coded in made.items()
        }
        outlines, _ = self._outlines(found)
        info = self._info(self._levels | levels)
        return packed_size(info, outlines) - self._plan.limit_bytes

    def _compensate(self, layer: Layer, stage: Stage, factor: float) -> Coded:
        level = scaled(self._plan.levels[layer.name], factor)
        weight = self._values.dense(f"{layer.name}.weight")
        biased = getattr(layer.module, "bias", None) is not None
        rows = len(weight) if level.sparsity else ROWS
        made = joined(
            [
                compensated(
                    part,
                    level,
                    self._options,
                    self.work,
                    stage.name,
                    rows=slice(first, first + len(part)),
                    by_inputs=stage.by_inputs,
                    held_out=self._tokens.held_out,
                    biased=biased,
                    name=layer.name,
                )
                for first, part in zip(
                    range(0, len(weight), rows), torch.split(weight, rows), strict=True
                )
            ]
        )
        del weight
        coded = self._coded(layer, level, made, factor)
        self._pace.spent(layer.name, len(coded.section.payload))
        return coded

    def _coded(
        self, layer: Layer, level: Level, made: Quantized, factor: float
    ) -> Coded:
        dtype = NAMES[self._shards.tensors[f"{layer.name}.weight"].dtype]
        coded = CodedWeight(
            layer.name, made.codes, made.scale, dtype, level, layer.view
        )
        section = write_coded(coded, self._coding)
        return Coded(section, made.shift, made.trust, made.drift, factor)

    def _embed(self, bar: Bar) -> None:
        """Round the embedding, and look up the first hidden states."""
        layer, stage = self._skeleton.embedding, "embedding"
        names = [f"block-0000.h.{kind}" for kind in ("dense", "small")]
        if self.work.done(stage):
            bar.advance()
            self._note(stage)
            return
        factor = self._pace.factor(layer.name)
        level = scaled(self._plan.levels[layer.name], factor)
        dense = self._values.dense(f"{layer.name}.weight")
        self._shards.release()
        width, ids = self._skeleton.width, self._tokens.ids
        with RowWriter(self.work.rows(names[0]), ids.numel(), width) as file:
            for number, sequence in enumerate(ids):
                file.write(number * len(sequence), dense[sequence])
        rows = len(dense) if level.sparsity else ROWS
        made = joined(
            [rounded_matrix(part, level) for part in torch.split(dense, rows)]
        )
        del dense
        dtype = self._values.dtype(f"{layer.name}.weight")
        scale = made.scale.expand(len(made.codes))
        with RowWriter(self.work.rows(names[1]), ids.numel(), width) as file:
            for number, sequence in enumerate(ids):
                found = made.codes[sequence].float() * scale[sequence][:, None]
                file.write(number * len(sequence), found.to(dtype).float())
        self.work.put(stage, {layer.name: self._coded(layer, level, made, factor)})
        self.work.tidy(names)
        self._note(stage)
        bar.advance(note=layer.name)

    def _judge(self) -> None:
        stages = dict.fromkeys(self._stage_of.values())
        trusts = [c.trust for s in stages for c in self.work.layers(s).values()]
        judge(trusts, len(self._tokens.ids))

    def write(self, out: str | os.PathLike[str]) -> int:
        """Write the packed file and return its size."""
        outlines, leftovers = self._outlines({})
        info = self._info(self._levels)
        size, limit = packed_size(info, outlines), self._plan.limit_bytes
        if limit is not None and size > limit:
            raise BudgetExceededError(
                "the packed file would exceed the plan's budget and is not written",
                size_bytes=size,
                got=f"{size} bytes",
                wanted=f"at most {limit} bytes",
                fix="search again with a smaller budget or with entropy-coded steps",
            )
        write_atomically(out, pack_parts(info, outlines, self._payloads(leftovers)))
        return size

    def _info(self, levels: dict[str, Level]) -> dict[str, Any]:
        total = sum(levels[name].distortion for name in self._plan.levels)
        return plan_info(replace(self._plan, distortion=total))

    def _outlines(self, found: dict[str, Outline]) -> tuple[list[Outline], Section]:
        """Return all sections without payloads, and the leftovers.

        Args:
            found: Layers that are not written down yet.
        """
        shifts: dict[str, torch.Tensor] = {}
        found = dict(found)
        for stage in dict.fromkeys(self._stage_of.values()):
            found |= self.work.outlines(stage)
            for name, coded in self.work.layers(stage).items():
                if coded.shift is not None:
                    shifts[f"{name}.bias"] = coded.shift
        coded_keys = {f"{name}.weight" for name in self._plan.levels}
        left = {
            key: self._values.leftover(key, shifts.get(key))
            for key in self._state
            if key not in coded_keys
        }
        leftovers = write_leftovers(Leftovers(left, {}, self._aliases))
        outlines = [found[name] for name in self._plan.levels]
        return [*outlines, Outline.of(leftovers)], leftovers

    def _payloads(self, leftovers: Section) -> Iterator[bytes]:
        stage, layers = "", dict[str, Coded]()
        for name in self._plan.levels:
            if self._stage_of[name] != stage:
                stage = self._stage_of[name]
                layers = self.work.layers(stage)
            yield layers[name].section.payload
        yield leftovers.payload


def _filled(module: torch.nn.Module, name: str, values: Values) -> None:
    fill(module, name, values.dense)
