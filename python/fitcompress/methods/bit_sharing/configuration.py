"""What the gates decided, and how it is brought to the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from fitcompress.methods.bit_sharing.expected_cost import real_bops
from fitcompress.methods.bit_sharing.gates import group_norms
from fitcompress.methods.bit_sharing.network import FIXED_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fitcompress.methods.bit_sharing.layers import SharedLayer
    from fitcompress.methods.bit_sharing.network import SharedNetwork
    from fitcompress.methods.bit_sharing.training import Votes

__all__ = ["Configuration", "configuration", "smallest"]

LEAST = 1e-30  # measure


@dataclass(frozen=True)
class _Move:
    """One gate that closes or opens.

    Attributes:
        nearness: τ/A.
        layer: Its layer.
        what: What it is of.
        before: Bits, or the filters that stay.
        after: The same after the move.
    """

    nearness: float
    layer: str
    what: Literal["weight", "input", "filters"]
    before: int | list[int]
    after: int | list[int]

    def __str__(self) -> str:
        values = [
            f"{v} bits" if isinstance(v, int) else f"{len(v)}"
            for v in (self.before, self.after)
        ]
        return f"{self.layer} {self.what}: {' ⇒ '.join(values)}"


@dataclass
class Configuration:
    """Bits of weights and inputs, and kept filters, of every layer.

    Attributes:
        network: That it is of.
        measures: Layer → mean measures of its input's rungs over all votes.
        weight_bits: Layer → bits.
        input_bits: Layer → bits; none for an embedding.
        kept: Layer → numbers of the filters that stay.
        moved: What :meth:`fit` changed, in order.
    """

    network: SharedNetwork
    measures: dict[str, list[float]]
    weight_bits: dict[str, int]
    input_bits: dict[str, int]
    kept: dict[str, list[int]]
    moved: list[str] = field(default_factory=list)

    def cost(self, layer: SharedLayer) -> int:
        """Return the bit operations of a layer."""
        name = layer.name
        if name not in self.input_bits:
            return 0
        bits = self.weight_bits[name], self.input_bits[name]
        return real_bops(layer.macs, layer.rows, len(self.kept[name]), *bits)

    def bops(self) -> int:
        """Return the bit operations of the network."""
        return sum(self.cost(layer) for layer in self.network.layers)

    @torch.no_grad()
    def fit(self, limit: int) -> None:
        """Close gates until the bit operations are within the limit, then spend it.

        The next one to close is the open gate, of bits or of filters, with the largest
        τ/A, nearest to closing by itself. Then gates of bits are opened that fit, again
        that with the smallest τ/A first. Of equals the first in the order of the model
        moves.

        Args:
            limit: At least :func:`smallest` of the network.
        """
        while self.bops() > limit:
            closing = [*self._bits(up=False), *self._filters()]
            move = max(closing, key=lambda found: found.nearness)
            self._set(move, move.after)
            self.moved.append(str(move))
        while (opened := self._open(limit)) is not None:
            self.moved.append(opened)

    def _open(self, limit: int) -> str | None:
        """Open the nearest gate that fits; return what it was, None if none does."""
        for move in sorted(self._bits(up=True), key=lambda found: found.nearness):
            self._set(move, move.after)
            if self.bops() <= limit:
                return str(move)
            self._set(move, move.before)
        return None

    def _set(self, move: _Move, value: int | list[int]) -> None:
        if isinstance(value, list):
            self.kept[move.layer] = value
        else:
            bits = self.weight_bits if move.what == "weight" else self.input_bits
            bits[move.layer] = value

    def _bits(self, *, up: bool) -> Iterator[_Move]:
        """Yield moves of one rung."""
        for layer in self.network.free:
            name = layer.name
            assert layer.weight.found is not None
            assert layer.inputs is not None
            of_weight = [float(m) for m in layer.weight.found.measures]
            for what, sharing, bits, measures in (
                ("weight", layer.weight, self.weight_bits[name], of_weight),
                ("input", layer.inputs, self.input_bits[name], self.measures[name]),
            ):
                ladder = sharing.ladder.bits
                rung = ladder.index(bits)
                if rung == (len(ladder) - 1 if up else 0):
                    continue
                gate = rung if up else rung - 1
                nearness = float(sharing.threshold[gate].detach()) / max(
                    measures[gate], LEAST
                )
                after = ladder[rung + 1 if up else rung - 1]
                yield _Move(nearness, name, what, bits, after)  # type: ignore[arg-type]

    def _filters(self) -> Iterator[_Move]:
        """Yield moves that remove one more group of filters, where one may go."""
        for layer in self.network.free:
            size, name = layer.weight.group, layer.name
            if not size:
                continue
            rows = layer.weight.view.matrix_of(layer.latent)
            norms = group_norms(rows, size)
            staying = sorted({row // size for row in self.kept[name]})
            gone = len(norms) - len(staying)
            if gone >= int(layer.weight.share_removed * len(norms)):
                continue
            least = min(staying, key=lambda group: float(norms[group]))
            kept = [row for row in self.kept[name] if row // size != least]
            assert layer.weight.filter_threshold is not None
            threshold = float(layer.weight.filter_threshold.detach())
            nearness = threshold / max(float(norms[least]), LEAST)
            yield _Move(nearness, name, "filters", self.kept[name], kept)


@torch.no_grad()
def configuration(network: SharedNetwork, votes: Votes) -> Configuration:
    """Return what the gates decided: those of inputs by a majority of the batches.

    Args:
        network: After the search and the votes.
        votes: Of equals the more bits win.
    """
    weights, inputs, kept = {}, {}, {}
    for layer in network.layers:
        name = layer.name
        assert layer.weight.found is not None
        weights[name] = int(layer.weight.found.bits.detach())
        if layer.inputs is not None:
            inputs[name] = FIXED_BITS
        if name in votes.bits:
            tally = votes.bits[name]
            inputs[name] = max(tally, key=lambda bits, t=tally: (t[bits], bits))  # type: ignore[misc]
        kept[name] = layer.weight.filters(layer.latent).nonzero().flatten().tolist()
    return Configuration(network, votes.measures, weights, inputs, kept)


def smallest(network: SharedNetwork) -> int:
    """Return the fewest bit operations that gates can reach for certain: all closed."""
    total = 0
    for layer in network.layers:
        if layer.inputs is None:
            continue
        kept, size = layer.rows, layer.weight.group
        if size:
            groups = -(-layer.rows // size)
            gone = int(layer.weight.share_removed * groups)
            # Which ones will go is not known; the last may be a smaller one.
            last = layer.rows - (groups - 1) * size
            kept -= max(0, gone - 1) * size + min(gone, 1) * last
        bits = layer.weight.ladder.bits[0], layer.inputs.ladder.bits[0]
        total += real_bops(layer.macs, layer.rows, kept, *bits)
    return total
