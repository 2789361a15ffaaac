"""Weights that are computed, looked at, cut or overwritten before they are used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from fisher_capture_nets import Function, labels
from fisher_oracle import assert_exact, squares_one_by_one
from fitcompress.sensitivity import FisherEstimator


def test_a_weight_that_is_only_looked_at_is_measured() -> None:
    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.shape[0] == 3
            assert self.weight.numel() > 0
            assert torch.isfinite(self.weight.detach()).all()
            return super().forward(x.to(self.weight.dtype))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Looks(5, 3)).eval()
    assert_exact(model, torch.randn(4, 4), labels(4), cross_entropy)


def test_a_weight_that_a_parametrization_computes() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Half())
    x = torch.randn(6, 4)
    estimator = FisherEstimator(model)
    estimator.update(x, labels(6), cross_entropy)
    # The gradient for the original is half of that for the weight in use.
    wanted = squares_one_by_one(model, x, labels(6), cross_entropy)
    found = estimator.moments.squares["0"]
    original = wanted["0.parametrizations.weight.original"].float()
    torch.testing.assert_close(found, 4 * original)
    assert estimator.moments.names == ("0", "2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_a_compiled_model_is_measured_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(6, 4)
    found = []
    for each in (model, torch.compile(model)):
        estimator = FisherEstimator(each)
        estimator.update(x, labels(6), cross_entropy)
        found.append(estimator.moments)
    assert found[0].names == found[1].names
    for name in found[0].names:
        assert torch.equal(found[0].squares[name], found[1].squares[name])


def places(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])[None]


def in_place(m: Function, x: torch.Tensor) -> torch.Tensor:
    single = [torch.relu_(m.conv(torch.relu_(m.stem(z)))) for z in x.mT]
    return m.out(torch.stack(single).mean(2))


# Positions that all samples share, and are not merely broadcast to them; models whose
# results are views that are overwritten, inputs that require a gradient, and so on.
TRICKY = {
    "one position row": lambda m, x: m.out(m.inner(x + m.place(places(x))[0]).mean(1)),
    "positions averaged": lambda m, x: m.out(
        m.inner(x + m.place(places(x)).mean(0)).mean(1)
    ),
    "positions flattened": lambda m, x: m.out(
        m.inner(x + m.place(places(x)).view(-1, 4)[: x.shape[1]]).mean(1)
    ),
    "inputs with gradients": lambda m, x: m.out(
        m.inner((x + m.place(places(x))).detach().requires_grad_()).mean(1)
        + m.place(places(x)).mean(1)
    ),
    "no gradient": lambda m, x: m.out(
        m.inner(x).mean(1) + without_gradient(m, x) + m.place(places(x)).mean(1)
    ),
    "rows by value": lambda m, x: m.out(
        torch.zeros(len(x), 4).index_add(
            0,
            (x[..., 0] > 0).nonzero()[:, 0],
            m.inner(x[x[..., 0] > 0]).tanh() + m.place(places(x)).mean(),
        )
    ),
}  # fmt: skip


def without_gradient(m: Function, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return m.inner(x).mean(1)


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_models(name) -> None:
    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 4), "place": nn.Embedding(5, 4)}
    model = Function(TRICKY[name], **layers, out=nn.Linear(4, 3)).eval()
    assert_exact(model, torch.randn(6, 5, 4), labels(6), cross_entropy)


def test_a_view_that_is_overwritten() -> None:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv1d(4, 4, 2), "conv": nn.Conv1d(4, 4, 2)}
    model = Function(in_place, **layers, out=nn.Linear(4, 3)).eval()
    assert_exact(model, torch.randn(6, 5, 4), labels(6), cross_entropy)


def test_rows_of_a_weight_that_overlap() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))

    def used(m: Function, x: torch.Tensor) -> torch.Tensor:
        h = x @ weight[0:4] + x.tanh() @ weight[2:6]
        h = h + F.embedding((x[..., 0] > 0).long(), weight[1:4])
        return m.out(F.linear(h, weight[1:5]).mean(1))

    model = Function(used, out=nn.Linear(4, 3)).eval()
    model.weight = weight
    assert_exact(model, torch.randn(5, 3, 4), labels(5), cross_entropy)


def test_other_arguments_of_a_product_are_looked_at() -> None:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(2, 3))
    model = Function(
        lambda m, x: torch.addmm(bias[:1], m.inner(x), m.out.weight.t()),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3, bias=False),
    ).eval()
    model.bias = bias
    assert_exact(model, torch.randn(5, 4), labels(5), cross_entropy, ("bias",))


class Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1


def test_computed_weights_are_known_by_what_they_are() -> None:
    torch.manual_seed(0)
    model = Function(
        lambda m, x: F.linear(
            m.first(m.second(x) @ m.second.weight.t()) @ m.other, m.table.weight
        ),
        first=nn.Linear(4, 4),
        second=nn.Linear(4, 4),
        table=nn.Linear(4, 3, bias=False),
    ).eval()
    model.register_buffer("other", torch.randn(4, 4))
    for layer in (model.first, model.second, model.table):
        nn.utils.parametrize.register_parametrization(layer, "weight", Same())
    x = torch.randn(5, 4)
    wanted = squares_one_by_one(model, x, labels(5), cross_entropy)
    estimator = FisherEstimator(model)
    estimator.update(x, labels(5), cross_entropy)
    assert estimator.moments.names == ("first", "second", "table")
    for name in estimator.moments.names:
        original = wanted[f"{name}.parametrizations.weight.original"].float()
        torch.testing.assert_close(estimator.moments.squares[name], original)
