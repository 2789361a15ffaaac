"""Weights that several modules share, compensated by what all of them read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate import shared
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.shared import shared_inputs
from fitcompress.errors import NonFiniteError
from fitcompress.model import compressible_layers

WORDS, WIDTH = 48, 16


class Tied(nn.Module):
    """Embedding, one layer that makes correlated features, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            spread = torch.logspace(1, -1, WIDTH)
            turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
            self.mix.weight.copy_(turn @ torch.diag(spread) @ turn.T)

    def features(self, ids):
        return self.mix(self.embed(ids))

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.features(input_ids))


@pytest.fixture
def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


def ids(count: int = 64, length: int = 8) -> torch.Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randint(WORDS, (count, length), generator=made)


def plan_of(model: nn.Module, bits: int = 3) -> fc.Plan:
    levels = {
        x.name: fc.Level(fc.Grid(bits=bits), 0.0, x.shape)
        for x in compressible_layers(model)
    }
    return fc.Plan(levels, method="test")


def test_moments_are_those_of_all_uses(tied) -> None:
    x = ids()
    batches = [{"input_ids": part} for part in x.split(16)]
    found = shared_inputs(tied, compressible_layers(tied), batches)
    features = tied.features(x).detach().reshape(-1, WIDTH).double()
    second = features.T @ features / len(features)
    expected = second / second.diagonal().mean() + torch.eye(WIDTH)
    assert list(found) == ["embed"]
    torch.testing.assert_close(found["embed"], expected, rtol=1e-5, atol=1e-6)


def test_two_linear_layers_with_one_weight() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    x = torch.randn(128, WIDTH)
    found = shared_inputs(model, compressible_layers(model), [x])["0"]
    expected = 0
    for y in (x, torch.relu(first(x)).detach()):
        moments = (y.T @ y).double()
        expected = expected + moments / moments.diagonal().mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count(tied) -> None:
    x, mask = ids(), torch.ones(64, 8, dtype=torch.long)
    mask[:, 5:] = 0
    layers = compressible_layers(tied)
    padded = shared_inputs(tied, layers, [{"input_ids": x, "attention_mask": mask}])
    cut = shared_inputs(tied, layers, [{"input_ids": x[:, :5]}])
    torch.testing.assert_close(padded["embed"], cut["embed"], rtol=1e-6, atol=1e-7)


def test_untied_layers_and_convolutions_are_left_out() -> None:
    a, b = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
    b.weight = a.weight
    model = nn.Sequential(a, b, nn.Flatten(), nn.Linear(8, 8)).eval()
    layers = compressible_layers(model)
    assert shared_inputs(model, layers, [torch.randn(3, 4, 2)]) == {}
    small = fc.apply(model, plan_of(model), [torch.randn(32, 4, 2)], progress=False)
    assert torch.equal(small[0].weight, small[1].weight)


def test_the_logits_err_less_than_rounded(tied) -> None:
    x = ids(256)
    batches = [{"input_ids": part} for part in x.split(32)]
    features = tied.features(x).detach()
    errors = {}
    for spread in (False, True):
        options = Compensation(shared=spread)
        small = fc.apply(
            tied, plan_of(tied), batches, compensation=options, progress=False
        )
        assert small.head.weight is not None
        assert torch.equal(small.head.weight, small.embed.weight)
        moved = (small.head.weight - tied.head.weight).detach()
        errors[spread] = float((features @ moved.T).square().mean())
    assert errors[True] < 0.8 * errors[False]


def test_masks_and_steps(tied) -> None:
    batches = [{"input_ids": part} for part in ids().split(16)]
    shapes = {x.name: x.shape for x in compressible_layers(tied)}
    for grid, sparsity in ((fc.Grid(step=0.3), 0.0), (fc.Grid(bits=4), 0.5)):
        levels = {n: fc.Level(grid, sparsity, shape) for n, shape in shapes.items()}
        plan = fc.Plan(levels, method="test")
        small = fc.apply(tied, plan, batches, progress=False)
        zeros = float((small.embed.weight == 0).float().mean())
        assert zeros >= sparsity - 1 / WIDTH
        assert torch.equal(small.head.weight, small.embed.weight)


def test_inputs_that_are_not_finite_are_refused(tied) -> None:
    layers = compressible_layers(tied)
    with torch.no_grad():
        tied.mix.bias.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="embed"):
        shared_inputs(tied, layers, [{"input_ids": ids()}])


@pytest.mark.parametrize("grid", [fc.Grid(step=0.3), fc.Grid(bits=3)])
def test_rows_are_compensated_some_at_a_time(tied, grid, monkeypatch) -> None:
    batches = [{"input_ids": part} for part in ids().split(16)]
    levels = {x.name: fc.Level(grid, 0.0, x.shape) for x in compressible_layers(tied)}
    plan = fc.Plan(levels, method="test")
    whole = fc.apply(tied, plan, batches, progress=False)
    monkeypatch.setattr(shared, "ROWS", 7)
    parts = fc.apply(tied, plan, batches, progress=False)
    assert torch.equal(whole.embed.weight, parts.embed.weight)
