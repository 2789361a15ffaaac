"""The passes of the calibration tokens through the parts of a block, in both networks.

Before each group of layers one pass: it takes the states that the pass before has left
on disk a little further, with the weights that are final by then, and sums the moments
of the group's inputs. No product of a weight with the tokens is computed twice.

    group      reads            does                        leaves
    q/k/v      ĥ of the block before: r̂ + down(m̂)          h, ĥ
    o          h, ĥ             a = attention(norm₁(h))     a, â
    gate/up    h, ĥ, a, â       r = h + o(a)                r, r̂
    down       r, r̂             m = mlp(norm₂(r))           m̂, h ← r + down(m)
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fitcompress.blockwise.rows import Rows, RowWriter
from fitcompress.blockwise.skeleton import call_half
from fitcompress.blockwise.sums import GroupSums, names_of
from fitcompress.blockwise.values import fill

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.blockwise.skeleton import Group, Skeleton
    from fitcompress.blockwise.tokens import Chunk, Tokens
    from fitcompress.blockwise.values import Values
    from fitcompress.blockwise.work import Work
    from fitcompress.model import Layer
    from fitcompress.progress import Bar

    Pair = tuple[torch.Tensor, torch.Tensor]
    Step = Callable[[Chunk], tuple[Pair, dict[str, torch.Tensor]]]

__all__ = ["Passes", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One group of layers.

    Attributes:
        name: Of its files.
        layers: The layers.
        writes: Name of rows → width, what its pass leaves on disk.
        keeps: Names of rows that this or later stages read once its pass is over.
    """

    name: str
    layers: tuple[Layer, ...]
    writes: dict[str, int]
    keeps: tuple[str, ...]

    @property
    def columns(self) -> int:
        """Inputs of the layers."""
        return self.layers[0].columns

    @property
    def by_inputs(self) -> bool:
        """Whether dense inputs are summed, and not dense outputs: what is cheaper."""
        return len(self.layers) > 1 or self.layers[0].rows >= self.columns


class Passes:
    """Runs the passes of one model.

    Args:
        skeleton: The model without values.
        values: Its values, those of finished stages among them.
        tokens: Calibration tokens.
        work: Where rows are.
        bar: Told of every part of the tokens that is through.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        values: Values,
        tokens: Tokens,
        work: Work,
        bar: Bar,
    ) -> None:
        self._skeleton, self._values, self._tokens = skeleton, values, tokens
        self._work, self._bar = work, bar

    @property
    def parts(self) -> int:
        """How many parts the tokens of a pass are cut into."""
        return sum(len(self._tokens.chunks(held_out=held)) for held in (False, True))

    def stages(self, number: int) -> list[Stage]:
        """Return the four stages of a block."""
        name, width = f"block-{number:04d}", self._skeleton.width
        qkv, out, gates, down = self._skeleton.groups(number)
        h, a, r = (_both(f"{name}.{kind}") for kind in "har")
        m, after = f"{name}.m.small", f"block-{number + 1:04d}.h.dense"
        ends = number + 1 == self._skeleton.blocks and self._skeleton.head is None
        inner, wide = out.layers[0].columns, down.layers[0].columns
        return [
            Stage(f"{name}-0", qkv.layers, {h[1]: width} if number else {}, h),
            Stage(f"{name}-1", out.layers, dict.fromkeys(a, inner), h + a),
            Stage(f"{name}-2", gates.layers, dict.fromkeys(r, width), r),
            Stage(
                f"{name}-3",
                down.layers,
                {} if ends else {m: wide, after: width},
                () if ends else (r[1], m, after),
            ),
        ]

    def head_stage(self, head: Layer) -> Stage:
        """Return the stage of the head."""
        return Stage("head", (head,), {}, ())

    @torch.no_grad()
    def run(self, stage: Stage, number: int, group: Group | None) -> None:
        """Run the pass of a stage, unless its files are all there.

        Args:
            stage: The stage.
            number: Of its block; the number of blocks for the head.
            group: Which group of the block it is; None for the head.
        """
        names = names_of(stage.name, held_out=self._tokens.held_out)
        if all(self._work.rows(n).exists() for n in [*stage.writes, *names]):
            self._bar.advance(self.parts)
            return
        if group is None:
            step = self._into_head(number)
        elif group.half == "self_attn":
            step = self._out(number) if group.output else self._into(number)
        else:
            step = self._down(number, stage) if group.output else self._gates(number)
        sums = GroupSums.zeros(
            stage.columns, stage.columns if stage.by_inputs else stage.layers[0].rows
        )
        with contextlib.ExitStack() as files:
            writers = {
                name: files.enter_context(
                    RowWriter(self._work.rows(name), self._tokens.count, width)
                )
                for name, width in stage.writes.items()
            }
            for part in ("fitted", "held_out"):
                chunks = self._tokens.chunks(held_out=part == "held_out")
                if not chunks:
                    continue
                for chunk in chunks:
                    (now, other), leaves = step(chunk)
                    sums.add_(now, other)
                    for name, rows in leaves.items():
                        if name in writers:
                            writers[name].write(chunk.row, rows)
                    del now, other, leaves
                    self._bar.advance(note=stage.name)
                sums.write(self._work, stage.name, part)
                sums.second.zero_()
                sums.cross.zero_()

    def states(self, number: int) -> Callable[[Chunk], torch.Tensor]:
        """Return what gives ĥ before a block, in the compressed network."""
        if not number:
            read = self._rows("block-0000.h.small", self._skeleton.width)
            return lambda chunk: read.read(chunk.row, chunk.rows)
        last = self._skeleton.groups(number - 1)[-1].layers[0]
        before = f"block-{number - 1:04d}"
        r = self._rows(f"{before}.r.small", self._skeleton.width)
        m = self._rows(f"{before}.m.small", last.columns)
        down = self._linear(last, self._values.small)

        def state(chunk: Chunk) -> torch.Tensor:
            return r.read(chunk.row, chunk.rows).add_(
                down(m.read(chunk.row, chunk.rows))
            )

        return state

    def _into(self, number: int) -> Step:
        norm, norm_now = self._norms(number, "self_attn")
        h = self._rows(f"block-{number:04d}.h.dense", self._skeleton.width)
        state, name = self.states(number), f"block-{number:04d}.h.small"

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            now = state(chunk)
            x = norm(h.read(chunk.row, chunk.rows))
            return (norm_now(now), x), {name: now}

        return step

    def _out(self, number: int) -> Step:
        (layer,) = self._skeleton.groups(number)[1].layers
        halves = self._halves(number, "self_attn")
        norms = self._norms(number, "self_attn")
        names = _both(f"block-{number:04d}.h")
        reads = [self._rows(name, self._skeleton.width) for name in names]
        writes = _both(f"block-{number:04d}.a")
        other = self._other(layer)

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            named = self._skeleton.arguments(number, chunk.sequences, chunk.length)
            found = []
            for read, norm, half in zip(reads, norms, halves, strict=True):
                x = norm(read.read(chunk.row, chunk.rows))
                out = call_half(half, "self_attn", chunk.shaped(x), named)
                found.append(out.reshape(chunk.rows, -1).contiguous())
            a, now = found
            return (now, other(a)), dict(zip(writes, found, strict=True))

        return step

    def _gates(self, number: int) -> Step:
        (layer,) = self._skeleton.groups(number)[1].layers
        sources = (self._values.dense, self._values.small)
        projections = [self._linear(layer, value) for value in sources]
        norms = self._norms(number, "mlp")
        width, inner = self._skeleton.width, layer.columns
        h = [self._rows(n, width) for n in _both(f"block-{number:04d}.h")]
        a = [self._rows(n, inner) for n in _both(f"block-{number:04d}.a")]
        writes = _both(f"block-{number:04d}.r")

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            r = [
                state.read(chunk.row, chunk.rows).add_(
                    project(out.read(chunk.row, chunk.rows))
                )
                for state, out, project in zip(h, a, projections, strict=True)
            ]
            x, now = (norm(each) for norm, each in zip(norms, r, strict=True))
            return (now, x), dict(zip(writes, r, strict=True))

        return step

    def _down(self, number: int, stage: Stage) -> Step:
        (layer,) = stage.layers
        halves, norms = self._halves(number, "mlp"), self._norms(number, "mlp")
        width = self._skeleton.width
        reads = [self._rows(n, width) for n in _both(f"block-{number:04d}.r")]
        down = self._linear(layer, self._values.dense)
        m, after = f"block-{number:04d}.m.small", f"block-{number + 1:04d}.h.dense"

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            found, states = [], []
            for read, norm, half in zip(reads, norms, halves, strict=True):
                r = read.read(chunk.row, chunk.rows)
                states.append(r)
                found.append(call_half(half, "mlp", norm(r), {}))
            y = F.linear(found[0], down.weight)
            other = found[0] if stage.by_inputs else y
            h = states[0].add_(y)
            if down.bias is not None:
                h.add_(down.bias)
            return (found[1], other), {m: found[1], after: h}

        return step

    def _into_head(self, number: int) -> Step:
        head = self._skeleton.head
        assert head is not None
        name, norm = self._skeleton.last_norm()
        norms = [
            fill(copy.deepcopy(norm), name, value)
            for value in (self._values.dense, self._values.small)
        ]
        state = self.states(number)
        h = self._rows(f"block-{number:04d}.h.dense", self._skeleton.width)
        other = self._other(head)

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            x = norms[0](h.read(chunk.row, chunk.rows))
            return (norms[1](state(chunk)), other(x)), {}

        return step

    def _rows(self, name: str, width: int) -> Rows:
        return Rows(self._work.rows(name), width)

    def _linear(
        self, layer: Layer, value: Callable[[str], torch.Tensor]
    ) -> torch.nn.Linear:
        module = fill(copy.deepcopy(layer.module), layer.name, value)
        assert isinstance(module, torch.nn.Linear)
        return module

    def _norms(self, number: int, half: str) -> list[nn.Module]:
        name, norm = self._skeleton.norm(number, half)
        return [
            fill(copy.deepcopy(norm), name, value)
            for value in (self._values.dense, self._values.small)
        ]

    def _halves(self, number: int, half: str) -> list[nn.Module]:
        prefix = f"{self._skeleton.block_name(number)}.{half}"
        return [
            fill(self._skeleton.inner(number, half), prefix, value)
            for value in (self._values.dense, self._values.small)
        ]

    def _other(self, layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes z of dense inputs, see ``GroupSums``."""
        if Stage("", (layer,), {}, ()).by_inputs:
            return lambda x: x
        weight = self._values.dense(f"{layer.name}.weight")
        return lambda x: F.linear(x, weight)


def _both(name: str) -> tuple[str, str]:
    return f"{name}.dense", f"{name}.small"
