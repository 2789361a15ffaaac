"""The passes of the calibration tokens through the parts of a block, in both networks.

Before each group of layers one pass: it takes the states that the pass before has left
on disk a little further, with the weights that are final by then, and sums the moments
of the group's inputs. No product of a weight with the tokens is computed twice. o and
down are to repair the states that they add to, as ``compensate.residuals`` has it.

    group      reads            does                        leaves
    q/k/v      ĥ of the block before: r̂ + down(m̂)          h, ĥ
    o          h, ĥ             a = attention(norm₁(h))     â, r = h + o(a)
    gate/up    ĥ, â, r          r̂ = ĥ + o(â)                r, r̂
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
        adds: Whether its outputs are added to the states.
    """

    name: str
    layers: tuple[Layer, ...]
    writes: dict[str, int]
    keeps: tuple[str, ...]
    adds: bool = False

    @property
    def columns(self) -> int:
        """Inputs of the layers."""
        return self.layers[0].columns

    @property
    def by_inputs(self) -> bool:
        """Whether dense inputs are summed, and not dense outputs: what is cheaper."""
        return not self.adds and (
            len(self.layers) > 1 or self.layers[0].rows >= self.columns
        )


class Passes:
    """Runs the passes of one model.

    Args:
        skeleton: The model without values.
        values: Its values, those of finished stages among them.
        tokens: Calibration tokens.
        work: Where rows are.
        bar: Told of every part of the tokens that is through.
        repairs: Whether layers are to repair the states that they add to.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        values: Values,
        tokens: Tokens,
        work: Work,
        bar: Bar,
        *,
        repairs: bool,
    ) -> None:
        self._skeleton, self._values, self._tokens = skeleton, values, tokens
        self._work, self._bar, self._repairs = work, bar, repairs

    @property
    def parts(self) -> int:
        """How many parts the tokens of a pass are cut into."""
        return sum(len(self._tokens.chunks(held_out=held)) for held in (False, True))

    def stages(self, number: int) -> list[Stage]:
        """Return the four stages of a block."""
        name, width = f"block-{number:04d}", self._skeleton.width
        qkv, out, gates, down = self._skeleton.groups(number)
        h, r = (_both(f"{name}.{kind}") for kind in "hr")
        a, m = f"{name}.a.small", f"{name}.m.small"
        after = f"block-{number + 1:04d}.h.dense"
        ends = number + 1 == self._skeleton.blocks and self._skeleton.head is None
        inner, wide = out.layers[0].columns, down.layers[0].columns
        return [
            Stage(f"{name}-0", qkv.layers, {h[1]: width} if number else {}, h),
            Stage(
                f"{name}-1",
                out.layers,
                {a: inner, r[0]: width},
                (h[1], a, r[0]),
                adds=True,
            ),
            Stage(f"{name}-2", gates.layers, {r[1]: width}, r),
            Stage(
                f"{name}-3",
                down.layers,
                {} if ends else {m: wide, after: width},
                () if ends else (r[1], m, after),
                adds=True,
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
            step = self._down(number) if group.output else self._gates(number)
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
        out = self._linear(layer, self._values.dense)
        a, r = f"block-{number:04d}.a.small", f"block-{number:04d}.r.dense"

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            named = self._skeleton.arguments(number, chunk.sequences, chunk.length)
            found, states = [], []
            for read, norm, half in zip(reads, norms, halves, strict=True):
                states.append(read.read(chunk.row, chunk.rows))
                x = chunk.shaped(norm(states[-1]))
                inner = call_half(half, "self_attn", x, named)
                found.append(inner.reshape(chunk.rows, -1).contiguous())
            y, after = self._added(out, found[0], states)
            return (found[1], y), {a: found[1], r: after}

        return step

    def _gates(self, number: int) -> Step:
        (layer,) = self._skeleton.groups(number)[1].layers
        out = self._linear(layer, self._values.small)
        norms = self._norms(number, "mlp")
        width, name = self._skeleton.width, f"block-{number:04d}"
        h = self._rows(f"{name}.h.small", width)
        a = self._rows(f"{name}.a.small", layer.columns)
        r = self._rows(f"{name}.r.dense", width)

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            small = h.read(chunk.row, chunk.rows)
            small.add_(out(a.read(chunk.row, chunk.rows)))
            states = (r.read(chunk.row, chunk.rows), small)
            x, now = (norm(each) for norm, each in zip(norms, states, strict=True))
            return (now, x), {f"{name}.r.small": small}

        return step

    def _down(self, number: int) -> Step:
        layer = self._skeleton.groups(number)[-1].layers[0]
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
            y, h = self._added(down, found[0], states)
            return (found[1], y), {m: found[1], after: h}

        return step

    def _added(
        self, layer: nn.Linear, x: torch.Tensor, states: list[torch.Tensor]
    ) -> Pair:
        """Return what a layer is to answer, and the dense states with its output added.

        Args:
            layer: The dense layer.
            x: Its inputs.
            states: Those that its outputs are added to, dense and now; used up.
        """
        y = F.linear(x, layer.weight)
        dense, now = states
        after = dense.add_(y)
        wanted = after - now if self._repairs else y
        if layer.bias is not None:
            after.add_(layer.bias)
        return wanted, after

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
        weight = self._values.dense(f"{head.name}.weight")
        by_inputs = self.head_stage(head).by_inputs

        def step(chunk: Chunk) -> tuple[Pair, dict[str, torch.Tensor]]:
            x = norms[0](h.read(chunk.row, chunk.rows))
            other = x if by_inputs else F.linear(x, weight)
            return (norms[1](state(chunk)), other), {}

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


def _both(name: str) -> tuple[str, str]:
    return f"{name}.dense", f"{name}.small"
