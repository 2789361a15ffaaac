"""Moments of a layer's inputs, compared with dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compensation_layers import KINDS, columns, layer_of, outputs
from fitcompress.compensate import statistics
from fitcompress.compensate.statistics import gather
from fitcompress.errors import NonFiniteError


@pytest.mark.parametrize(("module", "shape"), KINDS, ids=repr)
def test_moments_equal_explicit_outer_products(module, shape) -> None:
    torch.manual_seed(0)
    dense, now = (list(torch.randn(2, *shape)) for _ in range(2))
    with torch.no_grad():
        moments = gather(layer_of(module), dense, now)
    x, y = columns(module, now), outputs(module, columns(module, dense))
    x = torch.cat([x, torch.ones(*x.shape[:2], 1)], 2)
    assert moments.count == x.shape[1]
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(moments.second, x.transpose(1, 2) @ x, **close)
    torch.testing.assert_close(moments.cross, y.transpose(1, 2) @ x, **close)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(1, 2, 2), (8, 1, 33, 33)),
        (nn.Linear(3, 2), (8, 1000, 3)),
        (nn.ConvTranspose2d(1, 2, 4, stride=2), (8, 1, 33, 33)),
    ],
    ids=repr,
)
@torch.no_grad()
def test_many_positions_are_subsampled_evenly(monkeypatch, module, shape) -> None:
    torch.manual_seed(0)
    x = list(torch.randn(shape).split(2))
    whole = gather(layer_of(module), x, x)
    monkeypatch.setattr(statistics, "ENOUGH_ROWS", 800)
    some = gather(layer_of(module), x, x)
    assert 800 <= some.count < 0.5 * whole.count
    assert (some.second.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(
        some.second / some.count, whole.second / whole.count, rtol=0, atol=0.2
    )


@torch.no_grad()
def test_inputs_that_are_not_finite_are_an_error() -> None:
    module, x = nn.Linear(3, 2), torch.ones(4, 3)
    x[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="'layer'"):
        gather(layer_of(module), [torch.ones(4, 3)], [x])


def test_a_forward_of_its_own_is_not_asked() -> None:
    class Tenth(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, 0.1 * self.weight, self.bias)

    torch.manual_seed(0)
    module, x = Tenth(6, 4), torch.randn(50, 6)
    moments = gather(layer_of(module), [x], [x])
    torch.testing.assert_close(
        moments.cross[0, :, :-1],
        (module.weight @ x.T @ x).double(),
        rtol=1e-4,
        atol=1e-4,
    )
