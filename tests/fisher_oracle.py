"""The batch-size-1 loop: what every Fisher estimate must equal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fitcompress.data.batches import batch_size, part
from fitcompress.model.forward import call_model
from fitcompress.sensitivity import FisherEstimator
from fitcompress.sensitivity.probe import Probe


def squares_one_by_one(
    model: nn.Module, x: Any, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Σ_i G_i ∘ G_i of every parameter by autograd, one sample at a time, float64."""
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    for i in range(batch_size(x)):
        model.zero_grad()
        one = slice(i, i + 1)
        loss_fn(call_model(model, part(x, one)), part(y, one)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.double().square()
    model.zero_grad()
    return sums


def assert_exact(
    model: nn.Module,
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    unsupported: tuple[str, ...] = (),
    tolerance: float = 1e-6,
) -> FisherEstimator:
    """Compare traces and diagonals of all matrices of a model with the loop."""
    wanted = squares_one_by_one(model, x, y, loss_fn)
    for diagonal in (True, False):
        estimator = FisherEstimator(model, diagonal=diagonal)
        estimator.update(x, y, loss_fn)
        moments = estimator.moments
        assert set(moments.unsupported) == set(unsupported)
        expected = {
            name: sums
            for name, sums in wanted.items()
            if sums.dim() > 1 and name.removesuffix(".weight") not in unsupported
        }
        assert set(moments.names) == {n.removesuffix(".weight") for n in expected}
        for name, sums in expected.items():
            key = name.removesuffix(".weight")
            total = float(sums.sum())
            assert total > 0, name
            error = abs(float(moments.trace[key][0]) - total) / total
            assert error < tolerance, (name, moments.forms[key], error)
            if diagonal:
                found = moments.squares[key].view(sums.shape)
                error = float((found - sums).norm() / sums.norm())
                assert error < tolerance, (name, error)
    return estimator


def probe_of(estimator: FisherEstimator) -> Probe:
    """What the estimator has found out about samples of the first shape."""
    return next(iter(estimator._probes.values()))
