"""Moving metrics: the published procedure replayed node by node in plain torch."""

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import NonFiniteError, OptionError, PlanMismatchError
from fitcompress.methods import PathSearch
from fitcompress.search.problem import make_problem
from fitcompress.sensitivity.moving_metric import MovingMetric
from fitcompress.sensitivity.table import Grid, Sensitivity

BITS = (8, 4, 3, 2)
SPARSITIES = (0.0, 0.3, 0.6)
LOSS = nn.functional.cross_entropy


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 3)
    ).eval()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 1, 4, 4, generator=generator)
    y = torch.randint(3, (12,), generator=generator)
    return [(x[:8], y[:8]), (x[8:], y[8:])]


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    grids = [Grid(bits=b) for b in BITS]
    table = fc.measure(
        small_net(), data(), LOSS, grids=grids, sparsities=SPARSITIES, progress=False
    )
    return replace(table, overhead_bytes=0)  # it is more than this network


class Node(NamedTuple):
    """Compares by f, cost, order."""

    f: float
    cost: int
    order: int
    g: float
    levels: tuple[int, ...]  # grids, then the sparsity
    moves: tuple[int, ...]  # indices of levels that rose


class Twin:
    """The search of the paper, without any code of the package."""

    def __init__(self, table: Sensitivity, limit: int, lam: float) -> None:
        self.net = copy.deepcopy(small_net()).double()
        self.weights = {k: p.detach() for k, p in self.net.named_parameters()}
        self.names = [f"{name}.weight" for name in table.names]
        self.table, self.limit, self.lam = table, limit, lam

    def weight(self, layer: int, levels: tuple[int, ...]) -> torch.Tensor:
        """Rounded to the bits, from the float weight, and masked."""
        w = self.weights[self.names[layer]]
        rows = w.flatten(1)
        q = 2 ** (BITS[levels[layer]] - 1) - 1
        scale = rows.abs().amax(1, keepdim=True) / q
        rounded = (rows / scale).round() * scale
        share = self.table.sparsity[layer, levels[-1]]
        dropped = math.floor(share * w.numel())
        rounded.view(-1)[rows.abs().flatten().argsort()[:dropped]] = 0
        return rounded.view_as(w)

    def fisher(self, levels: tuple[int, ...]) -> list[torch.Tensor]:
        """Mean of the squared gradients of single samples."""
        weights = dict(self.weights)
        for i, name in enumerate(self.names):
            weights[name] = self.weight(i, levels).requires_grad_()
        own = [weights[name] for name in self.names]
        total = [torch.zeros_like(w) for w in own]
        for x, y in data():
            for i in range(len(x)):
                out = torch.func.functional_call(
                    self.net, weights, (x[i : i + 1].double(),)
                )
                grads = torch.autograd.grad(LOSS(out, y[i : i + 1]), own)
                total = [t + g.square() / 12 for t, g in zip(total, grads, strict=True)]
        return total

    def cost(self, levels: tuple[int, ...]) -> int:
        cells = enumerate(levels[:-1])
        return sum(int(self.table.size_bits[i, g, levels[-1]]) for i, g in cells)

    def distortion(self, levels: tuple[int, ...]) -> float:
        cells = enumerate(levels[:-1])
        return sum(float(self.table.distortion[i, g, levels[-1]]) for i, g in cells)

    def norm(self, fisher: list[torch.Tensor], levels: tuple[int, ...]) -> float:
        return sum(
            float((f * self.weight(i, levels).square()).sum())
            for i, f in enumerate(fisher)
        )

    def h(self, fisher: list[torch.Tensor], levels: tuple[int, ...]) -> float:
        away = abs(self.cost(levels) - self.limit) / (8 * self.table.dense_bytes)
        return self.lam * away * math.sqrt(self.norm(fisher, levels))

    def run(self, mode: str, width: int, *, exact: bool) -> list[Node]:
        """Return all nodes in the order of expansion, the last one within the limit."""
        start = (0,) * (len(self.names) + 1)
        g = math.sqrt(2 * self.distortion(start))
        fisher = self.fisher(start)
        f = g + self.h(fisher, start)
        opened = [Node(f, self.cost(start), 0, g, start, ())]
        expanded: list[Node] = []
        order = 0
        while True:
            opened.sort()
            node = opened.pop(0)
            expanded.append(node)
            if node.cost <= self.limit:
                return expanded
            if mode == "greedy":
                opened = []
            fisher = self.fisher(node.levels)
            for i, level in enumerate(node.levels):
                if level + 1 == (len(BITS) if i < len(start) - 1 else len(SPARSITIES)):
                    continue
                order += 1
                levels = (*node.levels[:i], level + 1, *node.levels[i + 1 :])
                if any(levels == other.levels for other in expanded):
                    continue
                squares = 0.0
                for k, diagonal in enumerate(fisher):
                    step = self.weight(k, levels) - self.weight(k, node.levels)
                    squares += float((diagonal * step.square()).sum())
                g = node.g + math.sqrt(squares)
                f = g + self.h(self.fisher(levels) if exact else fisher, levels)
                child = Node(f, self.cost(levels), order, g, levels, (*node.moves, i))
                same = [other for other in opened if other.levels == levels]
                if same and same[0] < child:
                    continue
                opened = sorted([*(o for o in opened if o.levels != levels), child])
                if mode == "beam":
                    opened = opened[:width]

    def filled(self, levels: tuple[int, ...]) -> tuple[int, ...]:
        """Undo the steps that gain most per cost, as long as the limit holds."""
        while True:
            best, best_rate = None, 0.0
            for i, level in enumerate(levels):
                finer = (*levels[:i], level - 1, *levels[i + 1 :])
                if level == 0 or self.cost(finer) > self.limit:
                    continue
                gain = self.distortion(levels) - self.distortion(finer)
                price = self.cost(finer) - self.cost(levels)
                rate = math.inf if price <= 0 < gain else gain / max(price, 1)
                if rate > best_rate:
                    best, best_rate = finer, rate
            if best is None:
                return levels
            levels = best


def problem_of(table: Sensitivity, share: str) -> Any:
    return make_problem(table, fc.Budget(size=share), "bits")


def solve(table: Sensitivity, share: str, metric: Any, **options: Any) -> Any:
    method = PathSearch(metric=metric, trace=True, progress=False, **options)
    return method.solve(problem_of(table, share))


@pytest.mark.parametrize("kind", ["refresh", "exact"])
@pytest.mark.parametrize(
    ("mode", "lam"), [("greedy", 1.0), ("beam", 0.3), ("best_first", 1.0)]
)
def test_every_node_is_that_of_the_plain_twin(
    table: Sensitivity, kind: Any, mode: Any, lam: float
) -> None:
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    metric = MovingMetric(net, data(), table, LOSS, kind=kind)
    choice = solve(table, "12%", metric, mode=mode, lam=lam, beam_width=3)
    twin = Twin(table, problem_of(table, "12%").limit, lam)
    nodes = twin.run(mode, 3, exact=kind == "exact")
    trace = choice.details["trace"]
    found = [
        (*grids, s)
        for grids, s in zip(
            trace["grids"].tolist(), trace["sparsity"].tolist(), strict=True
        )
    ]
    assert found == [node.levels for node in nodes]
    assert len(nodes) > 4
    assert trace["cost"].tolist() == [node.cost for node in nodes]
    np.testing.assert_allclose(trace["g"], [n.g for n in nodes], rtol=1e-5)
    np.testing.assert_allclose(trace["f"], [n.f for n in nodes], rtol=1e-5)
    h = trace["f"] - trace["g"]
    np.testing.assert_allclose(h, [n.f - n.g for n in nodes], rtol=1e-5)
    levels = twin.filled(nodes[-1].levels)
    assert (*choice.grid.tolist(), choice.sparsity[0]) == levels
    # once for every node that was expanded, and every child
    if kind == "refresh":
        assert metric.estimates == len(nodes) - 1
    else:
        assert metric.estimates > 2 * len(nodes)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_metric_at_the_start_is_that_of_the_table(table: Sensitivity) -> None:
    # Weights of 8 bits are nearly the float ones; F is nearly that of the table.
    metric = MovingMetric(small_net(), data(), table, LOSS)
    steps = metric.steps(np.zeros(3, np.int64), 0)
    np.testing.assert_allclose(steps.grid_length, table.grid_length[:, 0, 0], rtol=0.2)
    np.testing.assert_allclose(steps.norm, table.norm[:, 0, 0], rtol=0.2)
    np.testing.assert_allclose(steps.norm_after, table.norm[:, 1, 0], rtol=0.2)
    pruned = table.prune_length[:, 0, 0].sum()
    assert steps.prune_length == pytest.approx(pruned, rel=0.2)
    assert steps.norm_pruned == pytest.approx(table.norm[:, 0, 1].sum(), rel=0.2)


def test_weights_are_never_rounded_twice(table: Sensitivity) -> None:
    # What a node's metric is does not depend on where the search was before.
    far = np.array([2, 3, 1])
    alone = MovingMetric(small_net(), data(), table, LOSS).steps(far, 2)
    metric = MovingMetric(small_net(), data(), table, LOSS)
    for grid in range(3):
        metric.steps(np.full(3, grid), 1)
    after = metric.steps(far, 2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, after, strict=True))
    before = metric.estimates
    metric.steps(far, 2)
    assert metric.estimates == before  # each node once


def test_zero_codes_are_no_pruned_weights(table: Sensitivity) -> None:
    # At 2 bits most codes are zero; the step in sparsity is still as long as the
    # weights that the mask takes, and those with code zero add nothing to it.
    metric = MovingMetric(small_net(), data(), table, LOSS)
    steps = metric.steps(np.full(3, 3), 0)
    zero = 1 - table.nonzeros[:, 3, 0].sum() / table.sizes.sum()
    assert zero > 0.3
    assert table.sparsity[:, 0].tolist() == [0, 0, 0]
    dropped = steps.norm.sum() - steps.norm_pruned
    assert steps.prune_length == pytest.approx(dropped, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_restored_whatever_happens(
    table: Sensitivity, error: type[BaseException]
) -> None:
    net = small_net().train()
    before = copy.deepcopy(net.state_dict())
    calls = 0

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error
        return LOSS(out, y)

    metric = MovingMetric(net, data(), table, loss)
    with pytest.raises(error):
        solve(table, "12%", metric, mode="greedy")
    assert calls == 9
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Interrupted:
    """A metric that Ctrl-C hits at a call."""

    exact = False

    def __init__(self, inner: MovingMetric, call: int) -> None:
        self.inner, self.call = inner, call

    def steps(self, grids: Any, sparsity: int) -> Any:
        self.call -= 1
        if self.call == 0:
            raise KeyboardInterrupt
        return self.inner.steps(grids, sparsity)


def test_ctrl_c_returns_a_plan_that_is_known(table: Sensitivity) -> None:
    metric = MovingMetric(small_net(), data(), table, LOSS)
    options = {"mode": "best_first", "lam": 0.0}
    full = solve(table, "12%", metric, **options)
    calls = full.details["expansions"] + 1  # and one for h of the start
    problem = problem_of(table, "12%")
    known = solve(table, "12%", Interrupted(metric, calls), **options)
    assert known.details["status"] == "interrupted"
    rows = np.arange(3)
    assert problem.cost[rows, known.grid, known.sparsity].sum() <= problem.limit
    with pytest.raises(KeyboardInterrupt):
        solve(table, "12%", Interrupted(metric, 2), **options)


def test_an_error_at_a_node_is_the_callers(table: Sensitivity) -> None:
    metric = MovingMetric(
        small_net(), data(), table, lambda out, y: LOSS(out, y) * math.nan
    )
    with pytest.raises(NonFiniteError):
        solve(table, "12%", metric)


def test_sampled_labels_and_a_plan(table: Sensitivity) -> None:
    metric = MovingMetric(small_net(), [x for x, _ in data()], table, samples=8)
    method = PathSearch(metric=metric, progress=False)
    plan = fc.search(table, fc.Budget(size="12%"), method=method, family="bits")
    assert plan.size_bytes <= 0.12 * table.dense_bytes
    again = PathSearch(metric=metric, progress=False)
    assert plan == fc.search(table, fc.Budget(size="12%"), method=again, family="bits")


def test_wrong_arguments(table: Sensitivity) -> None:
    with pytest.raises(OptionError, match="refresh or exact"):
        MovingMetric(small_net(), data(), table, LOSS, kind="static")  # type: ignore[arg-type]
    with pytest.raises(PlanMismatchError, match="another model"):
        MovingMetric(nn.Linear(2, 2), data(), table, LOSS)
