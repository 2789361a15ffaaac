"""Norms folded to two numbers per channel, and everything else in 16 bits."""

import copy

import pytest
import torch
from torch import nn

from fitcompress.quantize import fold_norms_, round_leftovers_
from fitcompress.quantize.leftovers import is_folded, to_half


def seen(norm: nn.Module) -> nn.Module:
    """A norm with parameters and statistics as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        if norm.affine:
            norm.weight.uniform_(-2, 2)
            norm.bias.normal_()
        if norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(1e-3, 4)
            norm.num_batches_tracked.fill_(9)
    return norm.eval()


NORMS = {
    "1d": (lambda: nn.BatchNorm1d(6), (8, 6)),
    "1d sequence": (lambda: nn.BatchNorm1d(6), (8, 6, 5)),
    "2d": (lambda: nn.BatchNorm2d(6), (8, 6, 3, 3)),
    "3d": (lambda: nn.BatchNorm3d(6), (8, 6, 2, 3, 3)),
    "large eps": (lambda: nn.BatchNorm2d(6, eps=0.1), (8, 6, 3, 3)),
    "momentum None": (lambda: nn.BatchNorm2d(6, momentum=None), (8, 6, 3, 3)),
}


@pytest.mark.parametrize(("build", "shape"), NORMS.values(), ids=NORMS)
def test_folding_keeps_outputs_within_16_bits(build, shape) -> None:
    norm = seen(build())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before = norm(x)
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert not is_folded(norm)
    fold_norms_(norm)
    assert is_folded(norm)
    # a and c are rounded to 11 bits: 2⁻¹¹ of |a x| + |c| + |a μ|.
    limit = 2**-11 * (x.abs().max() * a.abs().max() + norm.bias.abs().max()) * 1.1
    assert (norm(x) - before).abs().max() <= limit
    assert norm.running_mean.count_nonzero() == 0
    assert torch.equal(norm.weight.half().float(), norm.weight)
    assert torch.equal(norm.bias.half().float(), norm.bias)


def test_folding_is_idempotent(net) -> None:
    fold_norms_(net)
    once = copy.deepcopy(net.state_dict())
    fold_norms_(net)
    round_leftovers_(net)
    again = net.state_dict()
    assert all(torch.equal(again[k], v) for k, v in once.items() if "norm" in k)


def test_a_fresh_norm_of_identity_stays_the_identity() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    fold_norms_(norm)
    torch.testing.assert_close(norm(x), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ],
    ids=lambda n: repr(n),
)
def test_other_norms_are_left_alone(norm) -> None:
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        seen(norm)
    before = copy.deepcopy(norm.state_dict())
    fold_norms_(norm)
    assert not is_folded(norm)
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())
    x = torch.randn(3, 4, 4, 4)
    out = norm(x)
    round_leftovers_(norm)
    torch.testing.assert_close(norm(x), out, rtol=5e-3, atol=5e-3)


def test_norms_in_half_precision_keep_their_outputs() -> None:
    norm = seen(nn.BatchNorm2d(6)).bfloat16()
    x = torch.randn(4, 6, 3, 3).bfloat16()
    before = norm(x).float()
    fold_norms_(norm)
    round_leftovers_(norm)
    torch.testing.assert_close(norm(x).float(), before, rtol=0.05, atol=0.05)


def test_halving_is_refused_where_it_would_harm() -> None:
    good = torch.tensor([1.0, 0.1, -3.7, 1e-4])
    assert torch.equal(to_half(good), good.half().float())
    for bad in (torch.tensor([1e5, 1.0]), torch.tensor([1e-9, 2e-9])):
        assert torch.equal(to_half(bad), bad)
    whole = torch.tensor([70_000, 3])
    assert to_half(whole) is whole
    double = torch.tensor([0.1], dtype=torch.float64)
    assert to_half(double) is double
    assert to_half(torch.zeros(0)).numel() == 0


def test_leftovers_are_rounded_and_grids_are_not(small) -> None:
    with torch.no_grad():
        small.out.bias.add_(1e-3 / 3)
    latent = small.head.parametrizations.weight.original
    latent.data.add_(1e-5 / 3)
    before, scale = latent.clone(), small.head.parametrizations.weight[0].scale.clone()
    round_leftovers_(small)
    assert torch.equal(small.out.bias.half().float(), small.out.bias)
    assert torch.equal(latent, before)
    assert torch.equal(small.head.parametrizations.weight[0].scale, scale)
