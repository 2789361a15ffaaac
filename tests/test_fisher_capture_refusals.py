"""What is left out by name, and what cannot be measured."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fisher_capture_nets import Added, Function, labels
from fisher_oracle import assert_exact
from fitcompress.errors import CalibrationError, NonFiniteError, UnsupportedLayerError
from fitcompress.sensitivity import FisherEstimator
from fitcompress.sensitivity.moments import FisherMoments


def test_other_uses_are_named_once(caplog) -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(5, 4, 8)
    others = ("positions", "scaled", "left")
    with caplog.at_level(logging.WARNING):
        estimator = FisherEstimator(model)
        for _ in range(3):
            estimator.update(x, labels(5), cross_entropy)
    assert len(caplog.records) == 3
    assert "no Fisher moments of positions: it enters add" in caplog.text
    assert estimator.moments.names == ("out",)
    assert estimator.moments.unsupported["scaled"] in (
        "it enters norm",
        "it enters div",
    )
    assert_exact(model, x, labels(5), cross_entropy, others)


def test_recurrent_layers_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    others = ("cell.weight_ih_l0", "cell.weight_hh_l0")
    estimator = assert_exact(
        Recurrent().eval(), torch.randn(4, 6, 4), labels(4), cross_entropy, others
    )
    assert "gru" in estimator.moments.unsupported["cell.weight_ih_l0"]


def test_gradients_within_the_model_are_refused() -> None:
    def energy(m: Function, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        total = m.out(m.inner(x).tanh()).sum()
        return torch.autograd.grad(total, x, create_graph=True)[0]

    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 4), "out": nn.Linear(4, 1)}
    model = Function(energy, **layers).eval()
    with pytest.raises(UnsupportedLayerError, match="differentiates through"):
        FisherEstimator(model).update(torch.randn(5, 4), labels(5), cross_entropy)


def test_an_unsupported_weight_stays_away(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(5, 4, 8)
    estimator = FisherEstimator(model)
    for _ in range(2):
        estimator.update(x, labels(5), cross_entropy)
    moments = estimator.moments
    assert set(moments.trace) == set(moments.squares) == set(moments.forms) == {"out"}
    moments.save(tmp_path / "file")
    loaded = FisherMoments.load(tmp_path / "file")
    resumed = FisherEstimator(model, moments=loaded)
    resumed.update(x, labels(5), cross_entropy)
    assert resumed.moments.names == ("out",)


def test_a_batch_that_fails_half_way_spoils_the_estimator() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).eval(), torch.randn(6, 4)
    estimator = FisherEstimator(model, memory=1)

    def broken(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(out, y) + (out - out.detach()).abs().sqrt().sum()

    with pytest.raises(NonFiniteError, match="a gradient of layer 'weight'"):
        estimator.update(x, labels(6), broken)
    with pytest.raises(CalibrationError, match="failed half-way"):
        estimator.update(x, labels(6), cross_entropy)


def norm(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Linear(5, 3))


@pytest.mark.parametrize("model", [norm(), norm(track_running_stats=False).eval()])
def test_norms_that_couple_samples_are_refused(model) -> None:
    with pytest.raises(CalibrationError, match=r"batch norm.*'1'.*model.eval\(\)"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


def test_active_dropout_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))
    with pytest.raises(CalibrationError, match=r"dropout.*'1'"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


@pytest.mark.parametrize(
    "mix", [lambda h: h - h.mean(0), lambda h: h - 0.5 * h[:1], lambda h: h.cumsum(0)]
)
def test_outputs_that_depend_on_other_samples_are_refused(mix) -> None:
    torch.manual_seed(0)
    model = Function(lambda m, x: mix(m.out(x)), out=nn.Linear(4, 3)).eval()
    with pytest.raises(UnsupportedLayerError, match="the model does not see"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


def test_other_layers_that_mix_samples_are_refused() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedLayerError, match="'2' does not see the samples"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)
