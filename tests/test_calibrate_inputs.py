"""Tables fitted to whole random plans: the bits of inputs."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import fitcompress as fc
from branched_nets import BITS, FAST, GRIDS, branched_batches, branched_net
from fitcompress.refinement.plan_fit import Drawn, fit_plans
from fitcompress.refinement.random_plans import draw_inputs, draw_plans
from test_search import random_table


@pytest.fixture
def net():
    return branched_net()


@pytest.fixture
def loader():
    return branched_batches()


def test_inputs_and_weights_get_factors_of_their_own() -> None:
    """Weights cost a fifth of what the table says, inputs twice."""
    random = np.random.default_rng(0)
    table = random_table(6, 5, 1, 0)
    table = dataclasses.replace(
        table,
        grids=tuple(fc.Grid(bits=bits) for bits in (6, 5, 4, 3, 2)),
        activation_bits=(None, 8, 6, 4),
        activation_distortion=np.outer(
            random.uniform(0.5, 2, 6), [0.0, 0.01, 0.1, 1.0]
        ),
    )
    drawn = Drawn(
        *draw_plans(table, "bits", 24, 0), inputs=draw_inputs(table, "bits", 24, 0)
    )
    layers = np.arange(6)
    weights = 0.2 * table.distortion[layers, drawn.grids, drawn.masks].sum(1)
    inputs = 2.0 * table.activation_distortion[layers, drawn.inputs].sum(1)
    noise = np.exp(random.normal(0, 0.01, (24, 2)))
    y = np.stack([weights, weights + inputs], axis=1) * noise
    fit = fit_plans(table, "bits", table.distortion, drawn, y)
    np.testing.assert_allclose(fit.distortion, 0.2 * table.distortion, rtol=0.1)
    np.testing.assert_allclose(fit.inputs, 2 * table.activation_distortion, rtol=0.1)
    assert fit.report["spearman"] > 0.99
    assert len(fit.report["input_factors"]) == 6


def test_inputs_are_measured_on_compensated_plans(net, loader) -> None:
    table = fc.measure(
        net,
        loader,
        samples=32,
        grids=GRIDS[: len(BITS)],
        sparsities=(0.0,),
        activation_bits=(8, 4, 3),
        progress=False,
    )
    settings = {"plans": 16, "samples": 32, "compensation": FAST, "progress": False}
    found = fc.calibrate(table, net, loader, **settings)
    assert found.activation_distortion.shape == table.activation_distortion.shape
    assert not np.allclose(found.activation_distortion, table.activation_distortion)
    x = torch.cat(loader).split(4)
    g, _ = draw_plans(table, "bits", 16, 0)
    a = draw_inputs(table, "bits", 16, 0)
    names, rows = table.names, np.arange(3)
    predicted, true = [], []
    for grids, inputs in zip(g, a, strict=True):
        levels = {
            name: fc.Level(
                table.grids[grids[i]],
                0.0,
                tuple(table.shapes[i]),
                activation_bits=table.activation_bits[inputs[i]],
            )
            for i, name in enumerate(names)
        }
        small = fc.apply(
            net,
            fc.Plan(levels),
            x[::2],
            samples=None,
            compensation=FAST,
            progress=False,
        )
        with torch.no_grad():
            p = net(torch.cat(x[1::2])).double().log_softmax(-1)
            q = small(torch.cat(x[1::2])).double().log_softmax(-1)
        true.append(float((p.exp() * (p - q)).sum(-1).mean()))
        predicted.append(
            found.distortion[rows, grids, 0].sum()
            + found.activation_distortion[rows, inputs].sum()
        )
    assert sum(predicted) == pytest.approx(sum(true), rel=0.3)
    assert spearmanr(predicted, true).statistic > 0.7


class Tied(torch.nn.Module):
    """Tokens in, tokens out, one weight for both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 16)
        self.mix = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)).relu())


@pytest.mark.parametrize("tied", [True, False])
def test_inputs_of_embeddings_stay_as_they_are(tied) -> None:
    torch.manual_seed(0)
    net = Tied().eval()
    if not tied:
        net.head.weight = torch.nn.Parameter(torch.randn(12, 16) / 4)
    tokens = list(torch.randint(0, 12, (32, 5)).split(8))
    table = fc.measure(
        net,
        tokens,
        samples=32,
        grids=GRIDS[: len(BITS)],
        activation_bits=(8, 4, 3),
        progress=False,
    )
    drawn = draw_inputs(table, "bits", 8, 0)
    embedding = table.names.index("embed")
    assert not drawn[:, embedding].any()
    assert np.delete(drawn, embedding, axis=1).all()
    found = fc.calibrate(
        table, net, tokens, plans=8, samples=32, compensation=FAST, progress=False
    )
    assert np.isfinite(found.activation_distortion).all()
    plan = fc.search(found, fc.Budget(bops="12%"))
    assert plan.levels["embed"].activation_bits is None
    assert plan.levels["mix"].activation_bits
    fc.apply(net, plan, tokens, progress=False)
