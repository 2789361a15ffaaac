"""The path search of ``_core`` once more, in plain Python: the same answer.

For tests and for reading; a hundred times slower. A node is one grid per layer and one
sparsity for the network. Every sum runs over the layers in their order, so that floats
agree to the last bit.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from fitcompress._core import PathResult

SPARSITY = -1

Move = tuple[int, int]


class Levels(NamedTuple):
    """One grid per layer, one sparsity."""

    grids: tuple[int, ...]
    sparsity: int

    def after(self, move: Move) -> Levels:
        """The levels that a move leads to."""
        layer, index = move
        if layer == SPARSITY:
            return Levels(self.grids, index)
        grids = (*self.grids[:layer], index, *self.grids[layer + 1 :])
        return Levels(grids, self.sparsity)


class Node(NamedTuple):
    """Generated, not expanded; compares by f, then cost, then order of generation.

    ``siblings`` are the children of its parent, by layer, once these are known.
    """

    f: float
    cost: int
    order: int
    g: float
    levels: Levels
    moves: tuple[Move, ...] = ()
    siblings: Mapping[int, Node] = MappingProxyType({})


@dataclass
class Tables:
    """Arrays [layers, grids, sparsities] and sums over the layers, in their order."""

    grid_length: NDArray[np.float64]
    prune_length: NDArray[np.float64]
    norm: NDArray[np.float64]
    distortion: NDArray[np.float64]
    cost: NDArray[np.int64]
    layers: int = field(init=False)
    grids: int = field(init=False)
    sparsities: int = field(init=False)

    def __post_init__(self) -> None:
        self.layers, self.grids, self.sparsities = self.cost.shape

    def total(self, table: NDArray[np.float64], levels: Levels) -> float:
        """Sum of a table over the layers; not sum(), which compensates rounding."""
        total = 0.0
        for layer, grid in enumerate(levels.grids):
            total += float(table[layer, grid, levels.sparsity])
        return total

    def total_cost(self, levels: Levels) -> int:
        """Exact sum of the cost."""
        grids = enumerate(levels.grids)
        return sum(int(self.cost[layer, g, levels.sparsity]) for layer, g in grids)

    def step(self, levels: Levels, layer: int) -> float:
        """Length of the step to the next grid of a layer, or to the next sparsity."""
        if layer == SPARSITY:
            return math.sqrt(self.total(self.prune_length, levels))
        grid = levels.grids[layer]
        return math.sqrt(float(self.grid_length[layer, grid, levels.sparsity]))

    def cheapest(self) -> Levels:
        """The cheapest levels of all; of equally cheap ones, the finest."""
        by_sparsity = [
            Levels(tuple(self.cost[:, :, s].argmin(axis=1).tolist()), s)
            for s in range(self.sparsities)
        ]
        return min(by_sparsity, key=self.total_cost)

    def children(self, levels: Levels) -> Iterator[tuple[Move, float]]:
        """Moves to the children, and sums of the norm there."""
        s = levels.sparsity
        norm = self.total(self.norm, levels)
        for layer, grid in enumerate(levels.grids):
            if grid + 1 < self.grids:
                old, new = self.norm[layer, grid, s], self.norm[layer, grid + 1, s]
                yield (layer, grid + 1), max(norm + (float(new) - float(old)), 0.0)
        if s + 1 < self.sparsities:
            move = (SPARSITY, s + 1)
            yield move, self.total(self.norm, levels.after(move))


def fill(tables: Tables, moves: list[Move], budget: int) -> list[Move]:
    """Undo the step that lowers the distortion most per cost, while it fits."""
    moves = list(moves)
    levels = Levels((0,) * tables.layers, 0)
    for move in moves:
        levels = levels.after(move)
    while True:
        cost = tables.total_cost(levels)
        best_rate, best = 0.0, None
        for layer in [*range(tables.layers), SPARSITY]:
            at = levels.sparsity if layer == SPARSITY else levels.grids[layer]
            if at == 0:
                continue
            after = levels.after((layer, at - 1))
            if layer == SPARSITY:
                gain = tables.total(tables.distortion, levels)
                gain -= tables.total(tables.distortion, after)
            else:
                column = tables.distortion[layer, :, levels.sparsity]
                gain = float(column[at]) - float(column[at - 1])
            price = tables.total_cost(after) - cost
            if gain <= 0 or cost + price > budget:
                continue
            rate = math.inf if price <= 0 else gain / price
            if rate > best_rate:
                best_rate, best = rate, (layer, at - 1)
        if best is None:
            return moves
        levels = levels.after(best)
        last = max(i for i, move in enumerate(moves) if move[0] == best[0])
        del moves[last]


def left_to_sibling(node: Node, layer: int, taken: dict[Levels, float]) -> bool:
    """Whether a better sibling has led to what lowering the grid of a layer leads to.

    Lowering two layers has the same length in either order. The sibling that lowers
    this layer was better than the node, so it was expanded before, by this way or by
    one that is no longer.
    """
    own = node.moves[-1][0] if node.moves else SPARSITY
    if SPARSITY in (own, layer) or own == layer or layer not in node.siblings:
        return False
    sibling = node.siblings[layer]
    return sibling < node and taken[sibling.levels] <= sibling.f


def path_search(
    grid_length: NDArray[np.float64],
    prune_length: NDArray[np.float64],
    norm: NDArray[np.float64],
    distortion: NDArray[np.float64],
    cost: NDArray[np.int64],
    start_length: float,
    budget: int,
    reference_cost: int,
    lam: float,
    mode: str,
    beam_width: int,
    max_expansions: int,
) -> PathResult:
    """What ``_core.path_search`` returns for the same arguments; see there."""
    tables = Tables(grid_length, prune_length, norm, distortion, cost)
    start = Levels((0,) * tables.layers, 0)
    expansions = 0

    def answer(moves: list[Move], status: str) -> PathResult:
        levels, length = start, start_length
        for move in moves:
            length += tables.step(levels, move[0])
            levels = levels.after(move)
        return {
            "grids": np.array(levels.grids, np.int64),
            "sparsity": levels.sparsity,
            "length": length,
            "distortion": tables.total(distortion, levels),
            "cost": tables.total_cost(levels),
            "expansions": expansions,
            "status": status,  # type: ignore[typeddict-item]
            "moves": moves,
        }

    def heuristic(norm_sum: float, cost_sum: int) -> float:
        away = abs(float(cost_sum - budget))
        return lam / float(reference_cost) * (away * math.sqrt(norm_sum))

    cheapest = tables.cheapest()
    if tables.total_cost(cheapest) > budget:
        straight = [
            (i, g) for i, n in enumerate(cheapest.grids) for g in range(1, n + 1)
        ]
        straight += [(SPARSITY, s) for s in range(1, cheapest.sparsity + 1)]
        return answer(straight, "exhausted")

    first = heuristic(tables.total(norm, start), tables.total_cost(start))
    node = Node(start_length + first, tables.total_cost(start), 0, start_length, start)
    opened: list[Node] = []  # sorted; no two have the same levels
    taken = {start: node.f}
    lowest = node
    goal: Node | None = None
    generated, status = 0, "limit"
    while node.cost > budget:
        lowest = min(lowest, node, key=lambda each: each.cost)
        if expansions == max_expansions:
            break
        expansions += 1
        if mode == "greedy":
            opened.clear()
        children: dict[int, Node] = {}
        for move, norm_sum in tables.children(node.levels):
            generated += 1
            levels = node.levels.after(move)
            g = node.g + tables.step(node.levels, move[0])
            total = tables.total_cost(levels)
            f = g + heuristic(norm_sum, total)
            moves = (*node.moves, move)
            child = Node(f, total, generated, g, levels, moves, children)
            if total <= budget:
                goal = min(goal or child, child)
            if mode == "best_first" and left_to_sibling(node, move[0], taken):
                continue
            children[move[0]] = child
            same = [other for other in opened if other.levels == levels]
            if levels in taken or (same and same[0] < child):
                continue
            if same:
                opened.remove(same[0])
            bisect.insort(opened, child)
            if mode == "beam":
                del opened[beam_width:]
        if not opened:
            status = "exhausted" if goal is None else "reached"
            break
        node = opened.pop(0)
        taken[node.levels] = node.f
    else:
        goal, status = node, "reached"
    if goal is None:
        return answer(list(lowest.moves), status)
    return answer(fill(tables, list(goal.moves), budget), status)
