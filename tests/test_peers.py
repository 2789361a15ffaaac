"""The peers of calibration: equal to a brute reference, inside their budgets."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fitcompress as fc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peer_files
import peer_gptq
import peers


class Net(nn.Module):
    """Two convolutions, one of them grouped, norms, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 32, 3, 9, 9, generator=generator)
    return list(x.cumsum(-1) / 3)  # neighbours are correlated, as pixels are


@pytest.fixture
def net(inputs) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for x in inputs:
            net(x)
    return net.eval()


def loss(model: nn.Module, other: nn.Module, inputs: list[torch.Tensor]) -> float:
    """Mean squared difference of the outputs."""
    with torch.no_grad():
        return float(torch.stack([model(x) - other(x) for x in inputs]).square().mean())


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [5, 12], H of correlated inputs, scales of 3 bits."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mix
    return w, x.T @ x / 200, w.abs().amax(1) / 3


def brute(w, h, scale, max_code):
    """Quantize columns in turn; the rest moves to the exact minimum of the error.

    With e the errors of the columns Q that are done, the others F minimise
    (w − ŵ) H (w − ŵ)ᵀ at w_F − H_FF⁻¹ H_FQ e.
    """
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    order = h.diagonal().argsort(descending=True).tolist()
    codes = torch.zeros_like(w)
    for i, j in enumerate(order):
        done, rest = order[:i], order[i:]
        error = codes[:, done] * scale[:, None] - w[:, done]
        moved = (
            w[:, rest]
            - torch.linalg.solve(h[rest][:, rest], h[rest][:, done] @ error.T).T
        )
        codes[:, j] = (moved[:, 0] / scale).round().clamp(-max_code, max_code)
    return codes


@pytest.mark.parametrize("max_code", [1, 3])
def test_error_feedback_is_the_exact_minimum_after_each_column(layer, max_code) -> None:
    w, h, scale = layer
    found = peers.error_feedback(w, h, scale, max_code=max_code)
    assert torch.equal(found, brute(w, h, scale, max_code))


def test_error_feedback_is_no_worse_than_rounding(layer) -> None:
    w, h, scale = layer

    def error(codes: torch.Tensor) -> float:
        d = codes * scale[:, None] - w
        return float(((d @ h) * d).sum())

    nearest = (w / scale[:, None]).round().clamp(-3, 3)
    assert error(peers.error_feedback(w, h, scale, max_code=3)) < 0.8 * error(nearest)


def test_inputs_that_are_always_zero_leave_their_weights_at_zero(layer) -> None:
    w, h, scale = layer
    h[4], h[:, 4] = 0.0, 0.0
    codes = peers.error_feedback(w, h, scale, max_code=3)
    assert (codes[:, 4] == 0).all()
    rest = [i for i in range(12) if i != 4]
    assert (codes[:, rest] != 0).any()


def test_second_moments_are_those_of_what_the_weight_multiplies(net, inputs) -> None:
    # E[y²] of a row's output without bias is w H wᵀ, in every group.
    h = peer_gptq._second_moments(net, "second", inputs)
    assert h.shape == (2, 36, 36)
    with torch.no_grad():
        y = torch.cat([torch.relu(net.norm(net.first(x))) for x in inputs])
        y = nn.functional.conv2d(y, net.second.weight, stride=2, groups=2)
    w = net.second.weight.detach().double().flatten(1).unflatten(0, (2, 4))
    expected = ((w @ h) * w).sum(2).flatten()
    torch.testing.assert_close(
        y.double().square().mean((0, 2, 3)), expected, rtol=1e-4, atol=1e-6
    )


def test_rounding_to_a_size_uses_it_and_is_the_files_own_rounding(net, inputs) -> None:
    size = 1000
    found = peers.rounded_to_size(net, inputs, size)
    assert 0.97 * size < found.bytes <= size
    step = float(found.model.first.weight.detach().abs().unique()[1])
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    levels = {
        name: fc.Level(fc.Grid(step=step), 0.0, shapes[f"{name}.weight"])
        for name in ("first", "second", "head")
    }
    applied = fc.remove(fc.apply(net, fc.Plan(levels), progress=False))
    for key, value in applied.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[key], value, msg=key)


def test_a_size_below_all_others_is_an_error(net, inputs) -> None:
    with pytest.raises(ValueError, match="nothing fits into 10 bytes"):
        peers.rounded_to_size(net, inputs, 10)


@pytest.mark.parametrize("clip", [False, True])
def test_fixed_point_has_its_levels_and_error_feedback_helps(net, inputs, clip) -> None:
    rounded = peers.rounded_to_bits(net, inputs, 3, clip=clip)
    better = peers.gptq(net, inputs, 3, clip=clip)
    for found in (rounded, better):
        assert 0 < found.bytes < 4 * sum(p.numel() for p in net.parameters())
        for row in found.model.second.weight.detach().flatten(1):
            assert len(row.abs().unique()) <= 4  # 0, Δ, 2Δ, 3Δ
    assert loss(better.model, net, inputs) < loss(rounded.model, net, inputs)


def test_more_bits_are_closer_and_larger(net, inputs) -> None:
    few, many = (peers.rounded_to_bits(net, inputs, b) for b in (3, 6))
    assert few.bytes < many.bytes
    assert loss(many.model, net, inputs) < loss(few.model, net, inputs)


def test_clipping_lowers_the_squared_error_of_every_row(net) -> None:
    w = net.first.weight.detach().double().flatten(1)
    errors = []
    for clip in (False, True):
        scale = peer_files.scales(w, 2, clip)
        rounded = peer_files.nearest(w, scale, 2) * scale.double()[:, None]
        errors.append((rounded - w).square().sum(1))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()


def test_bits_of_the_first_and_last_layer(net, inputs) -> None:
    bits = peers.bits_with_edges(net, 2, 4)
    assert bits == {"first": 4, "second": 2, "head": 4}
    found = peers.gptq(net, inputs, bits).model
    assert len(found.second.weight[0].detach().abs().unique()) <= 2


def test_norms_get_the_statistics_of_the_rounded_network(net, inputs) -> None:
    found = peers.rounded_to_bits(net, inputs, 2, norms=True)
    with torch.no_grad():
        y = torch.cat([found.model.norm(found.model.first(x)) for x in inputs])
    # γ = 1 and β = 0: normalised, but for 16 bits and an average over three batches.
    assert y.mean((0, 2, 3)).abs().max() < 5e-3
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(8), rtol=3e-2, atol=0)


def test_the_network_is_left_as_it_was(net, inputs) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    peers.rounded_to_size(net, inputs, 1700, norms=True)
    peers.gptq(net, inputs, 3, norms=True, sequential=False)
    assert not net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_nncodec_is_within_its_size(net, inputs) -> None:
    pytest.importorskip("nncodec", reason="NNCodec is not installed")
    size = 1000
    found = peers.nncodec(net, inputs, size)
    assert 0 < found.bytes <= size
    coarser = peers.nncodec(net, inputs, 600)
    assert coarser.bytes <= 600
    assert loss(found.model, net, inputs) < loss(coarser.model, net, inputs)


@pytest.mark.skipif(
    importlib.util.find_spec("nncodec") is not None, reason="NNCodec is installed"
)
def test_nncodec_is_named_where_it_is_missing(net, inputs) -> None:
    with pytest.raises(ImportError, match="nncodec"):
        peers.nncodec(net, inputs, 2000)
    assert "nncodec.framework" not in sys.modules
