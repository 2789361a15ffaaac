"""Bit sharing: numbers that share bits, and gates."""

import pytest
import torch

from bit_sharing_nets import (
    LADDER,
    fixed_gates,
    network,
)
from fitcompress.errors import (
    OptionError,
)
from fitcompress.methods import BitSharing
from fitcompress.methods.bit_sharing.gates import (
    filter_gate,
    group_norms,
    highest_threshold,
    indicator,
)
from fitcompress.methods.bit_sharing.layers import SharedInput, SharedWeight
from fitcompress.methods.bit_sharing.shared_bits import (
    Ladder,
    quantize_directly,
    share_bits,
)
from fitcompress.model.matrix_view import MatrixView


def edges(bits: int) -> torch.Tensor:
    """Every level, every middle between two, and the numbers next to both."""
    points = torch.arange(2 * (2**bits - 1) + 1) / (2 * (2**bits - 1))
    near = [torch.nextafter(points, torch.full_like(points, to)) for to in (-9, 9)]
    return torch.cat([points, *near]).clamp(0, 1)


@pytest.mark.parametrize(
    "bits", [(2, 4, 8), (2, 4), (2, 8), (4, 8), (3, 6), (2, 4, 8, 16)]
)
def test_open_gates_give_direct_quantization_bit_for_bit(bits) -> None:
    random = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    z = torch.cat([random, *(edges(min(b, 8)) for b in bits)])
    ladder = Ladder(bits)
    for count in range(len(bits)):
        gates = [1.0] * count + [0.0] * (len(bits) - 1 - count)
        found = share_bits(z, ladder, fixed_gates(gates)[1])
        assert torch.equal(found.values, quantize_directly(z, bits[count]))
        assert float(found.bits.detach()) == bits[count]


def test_the_parts_are_those_of_the_formula() -> None:
    # z = .4: z_2 = 1/3, ε_4 = 1/15 (6/15 in all), ε_8 = 0; measures |z − z_prev|
    z = torch.tensor([0.4])
    found = share_bits(z, LADDER, fixed_gates([1.0, 1.0])[1])
    assert float(found.values.detach()) == pytest.approx(0.4)
    assert [float(m) for m in found.measures] == pytest.approx([1 / 15, 0], abs=1e-7)
    # a closed gate leaves z_prev where it was, and later rungs measure against that
    found = share_bits(z, LADDER, fixed_gates([0.0, 1.0])[1])
    assert float(found.values.detach()) == pytest.approx(1 / 3)
    assert [float(m) for m in found.measures] == pytest.approx([1 / 15, 1 / 15])


def test_values_and_bits_have_the_gradients_of_nested_gates() -> None:
    z = torch.tensor([0.37, 0.9, 0.121], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    gates, gate = fixed_gates([1.0, 1.0])
    found = share_bits(z, LADDER, gate)
    z2, z4, z8 = (quantize_directly(z.detach(), b) for b in (2, 4, 8))
    (found.values * weights).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, weights)  # straight through
    # ∂/∂g_4 = ε_4 + g_8 ε_8, ∂/∂g_8 = g_4 ε_8
    wanted = [((z8 - z2) * weights).sum(), ((z8 - z4) * weights).sum()]
    assert torch.allclose(torch.stack([g.grad for g in gates]), torch.stack(wanted))
    for g in gates:
        g.grad = None
    found.bits.backward()
    assert [float(g.grad) for g in gates] == [2 + 4, 4]


def test_a_closed_gate_closes_those_above_it() -> None:
    z = torch.rand(100)
    gates, gate = fixed_gates([0.0, 1.0])
    found = share_bits(z, LADDER, gate)
    assert torch.equal(found.values, quantize_directly(z, 2))
    assert [float(o.detach()) for o in found.opened] == [0, 0]
    found.bits.backward()
    assert [float(g.grad) for g in gates] == [2 + 4, 0]


@pytest.mark.parametrize(
    "bits",
    [(2, 3), (2, 4, 6), (4, 2), (2, 2), (1, 2), (2, 32), (), (2.0, 4.0), [2, 4]],
)
def test_other_ladders_are_refused(bits) -> None:
    with pytest.raises(OptionError, match=r"ladder|bits"):
        Ladder(bits)
    with pytest.raises(OptionError):
        BitSharing(ladder=bits)


def test_a_step_that_is_no_multiple_would_break_the_sum() -> None:
    # 2 → 3 bits: 1/3 is no multiple of 1/7; z = .55: z_2 = 2/3, and from there in
    # steps of 1/7 to .5238; directly 4/7 = .5714
    z2 = 2 / 3
    shared = z2 + round((0.55 - z2) * 7) / 7
    assert abs(shared - round(0.55 * 7) / 7) > 0.04


# --- gates


def test_the_gate_has_the_gradient_of_the_smoothed_gate() -> None:
    measure = torch.tensor([0.3, -0.2, 1.7, 0.0], dtype=torch.float64)
    measure.requires_grad_()
    threshold = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    gates = indicator(measure, threshold)
    assert gates.tolist() == [1, 0, 1, 0]
    weights = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    (gates * weights).sum().backward()

    def smooth(a: torch.Tensor, t: float) -> torch.Tensor:
        return (torch.sigmoid(a - t) * weights).sum()

    h, a, t = 1e-6, measure.detach(), float(threshold.detach())
    slope = float(smooth(a, t + h) - smooth(a, t - h)) / (2 * h)
    assert float(threshold.grad) == pytest.approx(slope, rel=1e-6)
    for i in range(4):
        step = torch.zeros_like(a)
        step[i] = h
        slope = float(smooth(a + step, t) - smooth(a - step, t)) / (2 * h)
        assert float(measure.grad[i]) == pytest.approx(slope, rel=1e-6)
    assert float(indicator(threshold.detach(), threshold).detach()) == 0  # A = τ closes


def test_filter_groups_go_as_a_whole() -> None:
    matrix = torch.tensor([[1.0, -3], [2, 2], [0.5, 0], [0, 0.25], [4, -4]])
    norms = group_norms(matrix, 2)
    # mean ‖w‖₁ of groups (4, 4), (.5, .25), (8): 4, .375, 8, over the largest
    assert norms.tolist() == pytest.approx([0.5, 0.375 / 8, 1])
    gates = filter_gate(matrix, 2, torch.tensor(0.2))
    assert gates.tolist() == [1, 1, 0, 0, 1]
    weight = matrix.reshape(5, 2, 1, 1)
    shared = SharedWeight(LADDER, weight, MatrixView(), 2, 0.5)
    with torch.no_grad():
        shared.filter_threshold.fill_(0.2)
    out = shared(weight)
    assert bool((out[2:4] == 0).all())
    assert bool((out[[0, 1, 4]] != 0).all())  # a grid without zero
    assert shared.filters(weight).tolist() == [True, True, False, False, True]
    # mean and deviation are those of the filters that stay
    kept = matrix[[0, 1, 4]]
    reach = float(shared.reach.detach()) * kept.std(unbiased=False)
    low, high = kept.mean() - reach, kept.mean() + reach
    clipped = shared.clipped(weight).flatten(1)
    assert torch.allclose(clipped[[0, 1, 4]], kept.clamp(low, high), atol=1e-6)


def test_at_most_the_allowed_share_of_groups_goes() -> None:
    norms = torch.tensor([0.5, 0.1, 1.0, 0.3, 0.3])
    for share, gone in ((0, 0), (0.2, 1), (0.4, 1), (0.6, 3), (0.99, 4)):
        # at .4 two equals would go together, so only one group goes
        most = highest_threshold(norms, share)
        assert int((norms <= most).sum()) == gone


def test_thresholds_and_ranges_respect_their_clamps() -> None:
    shared = network()
    layer = next(x for x in shared.layers if x.name == "3")
    with torch.no_grad():
        layer.weight.threshold.fill_(-1)
        layer.weight.filter_threshold.fill_(7)
        layer.weight.reach.fill_(-3)
        layer.inputs.threshold.copy_(torch.tensor([-0.1, 0.2]))
    layer.clamp_()
    assert layer.weight.threshold.tolist() == [0, 0]
    assert layer.inputs.threshold.tolist() == pytest.approx([0, 0.2])
    assert float(layer.weight.reach.detach()) == pytest.approx(layer.weight.least)
    # six groups of 4, at most half of them
    assert int(layer.weight.filters(layer.latent).sum()) == 12
    with torch.no_grad():
        layer.weight.filter_threshold.fill_(-7)
    layer.clamp_()
    assert float(layer.weight.filter_threshold.detach()) == 0


def test_ranges_of_signed_and_unsigned_inputs() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.26, 2.0], requires_grad=True)
    two = Ladder((2,))
    unsigned = SharedInput(two, 1.0, signed=False)
    assert unsigned(x).tolist() == pytest.approx([0, 0, 0, 1 / 3, 1])
    signed = SharedInput(two, 1.0, signed=True)  # −1, −1/3, 1/3, 1; 0 is halfway
    assert signed(x).tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1 / 3, 1])
    signed(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
