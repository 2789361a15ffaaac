"""error_feedback_sweep: quantization with the errors spread over later columns."""

import itertools

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads


def example(rows, cols, masked=False):
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(rows, cols, **double)
    # triangular with a dominant diagonal: no library whose last bits depend on threads
    factor = torch.randn(cols, cols, **double).triu(1) * 0.3
    factor += torch.diag(torch.rand(cols, **double) + 0.5)
    scale = torch.rand(rows, **double) * 0.3 + 0.1
    mask = torch.rand(rows, cols, generator=generator) < 0.7 if masked else None
    return weight, factor, scale, mask


# the kernel works on 32 rows and 64 columns at a time, in tiles of 4 rows
@pytest.mark.parametrize("max_code", [0, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1), (3, 7), (33, 64), (5, 150), (38, 201)]
)
def test_equals_the_twin(shape, masked, max_code):
    arguments = (*example(*shape, masked=masked), max_code)
    codes = ops.error_feedback_sweep(*arguments)
    assert torch.equal(codes, reference.error_feedback_sweep(*arguments))


def quadratic_cost(codes, weight, factor, scale, bits=None, rate=0.0):
    """(w − kΔ) H (w − kΔ)ᵀ + λΔ² Σ bits[k] of each row, H = (UᵀU)⁻¹."""
    difference = weight - codes * scale.reshape(-1, 1)
    whitened = torch.linalg.solve_triangular(factor, difference, upper=True, left=False)
    cost = whitened.square().sum(1)
    if bits is not None:
        cost += rate * scale.square() * bits[codes + len(bits) // 2].sum(1)
    return cost


def ill_conditioned(rows, cols, seed=0):
    """A weight and a factor of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    double = {"generator": generator, "dtype": torch.float64}
    inputs = torch.randn(2 * cols, cols, **double) + 3 * torch.randn(
        2 * cols, 1, **double
    )
    moments = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(cols).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    return torch.randn(rows, cols, **double), factor.contiguous()


def code_bits(largest):
    """Uneven bits of the codes −h … h, zero the cheapest."""
    codes = torch.arange(-largest, largest + 1, dtype=torch.float64)
    return 0.5 + (1 + codes.abs()).log2() + 0.1 * (codes % 3)


# a search of 33 rows has groups of several rows, and one that is not full
@pytest.mark.parametrize("beam", [1, 2, 3, 16])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 7), (33, 64), (7, 130)])
def test_beam_equals_the_twin(shape, masked, beam):
    weight, factor, scale, mask = example(*shape, masked=masked)
    factor = factor.diagonal().diag() + 0.5 * factor.triu(1)  # codes stay in 32 bits
    zero = scale.clone()
    zero[::2] = 0
    one = torch.tensor([0.3], dtype=torch.float64)
    cases = [*itertools.product((scale, zero, one), (0, 1, 3), (0, 0.3))]
    for some, max_code, rate in cases if weight.numel() < 100 else cases[::5]:
        bits = code_bits(5) if rate else None
        arguments = (weight, factor, some, mask, max_code, beam, bits, rate)
        codes = ops.error_feedback_sweep(*arguments)
        assert torch.equal(codes, reference.error_feedback_sweep(*arguments))


# more proposals than are ranked by counting; weights between two codes tie
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_wide_beam_equals_the_twin(tied, rate):
    weight, factor, scale, mask = example(2, 70, masked=True)
    if tied:
        weight = (2 * weight).round() / 2
        factor, scale = torch.eye(70).double(), torch.ones(1).double()
    arguments = (weight, factor, scale, mask, 9, 300, code_bits(4), rate)
    codes = ops.error_feedback_sweep(*arguments)
    assert torch.equal(codes, reference.error_feedback_sweep(*arguments))


def test_beam_by_hand():
    weight = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    factor = torch.tensor([[1.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    # 0.4 → 0, e = 0.4: then 0.2 → 0 costs 0.16 + 0.4²; 0.4 → 1, e = −0.6: then 1.2 → 1
    # costs 0.36 + 0.4²
    assert ops.error_feedback_sweep(weight, factor, one, beam=2).tolist() == [[0, 0]]
    # with U_12 = 0.6, 0.36 → 0 costs 0.16 + 0.72², but 0.96 → 1 only 0.36 + 0.08²
    factor[0, 1] = 0.6
    assert ops.error_feedback_sweep(weight, factor, one).tolist() == [[0, 0]]
    assert ops.error_feedback_sweep(weight, factor, one, beam=2).tolist() == [[1, 1]]


def test_rate_by_hand():
    weight = torch.tensor([[0.6, 1.6, 2.6, -1.4]], dtype=torch.float64)
    eye, one = torch.eye(4).double(), torch.ones(1).double()
    bits = torch.tensor([9.0, 3.0, 1.0, 3.0, 3.5], dtype=torch.float64)  # of −2 … 2
    plain = ops.error_feedback_sweep(weight, eye, one, bits=bits)
    assert plain.tolist() == [[1, 2, 2, -1]]
    # 0.6: 0.36 + 0.3 beats 0.16 + 0.9; 1.6: 0.16 + 1.05 beats 0.36 + 0.9;
    # −1.4: 0.16 + 0.9 beats 0.36 + 2.7 and 1.96 + 0.3
    codes = ops.error_feedback_sweep(weight, eye, one, bits=bits, rate=0.3)
    assert codes.tolist() == [[0, 2, 2, -1]]
    codes = ops.error_feedback_sweep(weight, eye, one, bits=bits, rate=5.0)
    assert codes.tolist() == [[0, 0, 0, 0]]


def proposals(position, largest, rated):
    nearest = max(-largest, min(largest, round(position)))
    codes = [nearest, nearest + 1 if position > nearest else nearest - 1]
    if rated:
        codes += [nearest - (nearest > 0) + (nearest < 0), 0]
    return [code for code in codes if abs(code) <= largest]


def proposed_rows(weight, factor, step, largest, rated):
    """All codes of a row that can be reached through proposals."""
    if len(weight) == 0:
        yield ()
        return
    for code in set(proposals(float(weight[0] / step), largest, rated)):
        error = (weight[0] - code * step) / factor[0, 0]
        later = weight[1:] - error * factor[0, 1:]
        for rest in proposed_rows(later, factor[1:, 1:], step, largest, rated):
            yield (code, *rest)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("cols", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_all_paths_finds_the_minimum(seed, cols, rate):
    weight, factor = ill_conditioned(1, cols, seed)
    scale = torch.tensor([0.7], dtype=torch.float64)
    bits = code_bits(2)
    codes = ops.error_feedback_sweep(weight, factor, scale, None, 2, 1024, bits, rate)
    rows = torch.tensor(list(proposed_rows(weight[0], factor, 0.7, 2, rate > 0)))
    costs = quadratic_cost(rows, weight, factor, scale, bits, rate)
    assert codes.tolist() == [rows[costs.argmin()].tolist()]
    # with weak correlations, what is never proposed is never better
    factor = factor.diagonal().diag() + 0.1 * factor.triu(1)
    codes = ops.error_feedback_sweep(weight, factor, scale, None, 2, 1024, bits, rate)
    rows = torch.cartesian_prod(*[torch.arange(-2, 3)] * cols).reshape(-1, cols)
    costs = quadratic_cost(rows, weight, factor, scale, bits, rate)
    assert codes.tolist() == [rows[costs.argmin()].tolist()]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_wider_beam_costs_less(rate):
    weight, factor = ill_conditioned(20, 80)
    scale = torch.full((20,), 0.5, dtype=torch.float64)
    bits = code_bits(40)
    totals = []
    for beam in (1, 4, 16):
        codes = ops.error_feedback_sweep(
            weight, factor, scale, None, 0, beam, bits, rate
        )
        totals.append(quadratic_cost(codes, weight, factor, scale, bits, rate).sum())
    assert totals[2] < totals[1] < 0.97 * totals[0]


def test_a_rate_saves_bits():
    weight, factor = ill_conditioned(20, 80)
    scale = torch.full((20,), 0.5, dtype=torch.float64)
    bits = code_bits(40)
    spent = []
    for rate in (0.0, 0.05, 0.5):
        codes = ops.error_feedback_sweep(weight, factor, scale, None, 0, 1, bits, rate)
        spent.append(float(bits[codes + 40].sum()))
    assert spent[0] > spent[1] > spent[2]


def test_by_hand():
    weight = torch.tensor([[1.4, 1.0, 1.0]], dtype=torch.float64)
    factor = torch.tensor(
        [[2.0, 1.0, -4.0], [0.0, 1.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    # 1.4 → 1, e = 0.4 / 2 = 0.2: others 0.8 and 1.8; 0.8 → 1, e = −0.2: 1.8 + 0.6 → 2
    codes = ops.error_feedback_sweep(weight, factor, torch.ones(1).double())
    assert codes.tolist() == [[1, 1, 2]]


def test_identity_rounds_half_to_even():
    weight = torch.tensor([[0.5, 1.5, -2.5, 3.5, -0.5]], dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    codes = ops.error_feedback_sweep(weight, eye, torch.ones(1).double())
    assert codes.tolist() == [[0, 2, -2, 4, 0]]
    codes = ops.error_feedback_sweep(weight, eye, torch.ones(1).double(), None, 2)
    assert codes.tolist() == [[0, 2, -2, 2, 0]]


def test_reduces_the_output_error():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    inputs += 2 * inputs[:, :1]  # correlated: there is something to compensate with
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    moments = inputs.T @ inputs / 200
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    step = torch.tensor([0.5], dtype=torch.float64)
    rounded = (weight / step).round() * step
    swept = ops.error_feedback_sweep(weight, factor, step) * step
    errors = [(inputs @ (weight - w).T).square().sum() for w in (rounded, swept)]
    assert errors[1] < 0.6 * errors[0]


def test_a_scale_that_is_not_positive_gives_zeros():
    weight, factor, scale, _ = example(3, 9)
    scale[1] = 0
    scale[2] = -1
    codes = ops.error_feedback_sweep(weight, factor, scale)
    assert codes[0].any()
    assert not codes[1:].any()


def test_arguments_are_not_changed():
    arguments = example(5, 70)
    copies = [None if x is None else x.clone() for x in arguments]
    ops.error_feedback_sweep(*arguments)
    ops.error_feedback_sweep(*arguments, max_code=7, beam=3)
    for before, after in zip(copies, arguments, strict=True):
        assert before is after is None or torch.equal(before, after)


def test_uint8_mask_and_non_contiguous_tensors():
    weight, factor, scale, mask = example(6, 70, masked=True)
    expected = ops.error_feedback_sweep(weight, factor, scale, mask, 7)
    codes = ops.error_feedback_sweep(
        weight.t().contiguous().t(),
        factor.t().contiguous().t(),
        scale.repeat_interleave(2)[::2],
        mask.t().contiguous().t().to(torch.uint8) * 2,
        7,
    )
    assert torch.equal(codes, expected)


def test_same_codes_for_any_number_of_threads():
    codes = []
    for count in (1, 2):
        with threads(count):
            codes.append(ops.error_feedback_sweep(*example(41, 130)))
    assert torch.equal(*codes)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("beam", [2, 16])
def test_beam_has_the_same_codes_for_any_number_of_threads(beam, rate):
    codes = []
    for count in (1, 2, 4):
        with threads(count):
            weight, factor = ill_conditioned(41, 130)
            scale = torch.tensor([0.4], dtype=torch.float64)
            arguments = (weight, factor, scale, None, 0, beam, code_bits(40), rate)
            codes.append(ops.error_feedback_sweep(*arguments))
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fitcompress.error_feedback_sweep.default,
        (*example(3, 5, masked=True), 7),
    )
    torch.library.opcheck(
        torch.ops.fitcompress.error_feedback_sweep.default,
        (*example(3, 5, masked=True), 7, 3, code_bits(4), 0.1),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5).double()}, r"\[rows, columns\], got \[5\]"),
        ({0: torch.zeros(3, 5)}, "weight must be float64, got float32"),
        ({1: torch.zeros(5, 5)}, "factor must be float64, got float32"),
        ({1: torch.zeros(5, 4).double()}, r"shape \[5, 5\], got \[5, 4\]"),
        ({2: torch.ones(2).double()}, "1 element or one a row, 3, got 2"),
        ({2: torch.ones(3)}, "scale must be float64, got float32"),
        ({3: torch.ones(5).bool()}, r"mask must have shape \[3, 5\], got \[5\]"),
        ({3: torch.ones(3, 5)}, "mask must be bool or uint8, got float32"),
        ({0: torch.full((3, 5), 1e10).double()}, "not a finite 32-bit integer"),
        ({0: torch.full((3, 5), torch.nan).double()}, "not a finite 32-bit integer"),
        ({1: torch.zeros(5, 5).double()}, "not a finite 32-bit integer"),
    ],
)
def test_bad_arguments(change, message):
    arguments = list(example(3, 5))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"error_feedback_sweep: .*{message}"):
        ops.error_feedback_sweep(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam": 0}, "beam must be 1 to 1024, got 0"),
        ({"beam": 1025}, "beam must be 1 to 1024, got 1025"),
        ({"rate": -1.0}, "rate must be finite and not negative, got -1"),
        ({"rate": torch.inf}, "rate must be finite and not negative, got inf"),
        ({"rate": torch.nan}, "rate must be finite and not negative, got nan"),
        ({"bits": None}, "a rate needs the bits of the codes"),
        ({"bits": torch.ones(5)}, "bits must be float64, got float32"),
        ({"bits": torch.ones(4).double()}, r"2h \+ 1 of them, got \[4\]"),
        ({"bits": torch.ones(0).double()}, r"2h \+ 1 of them, got \[0\]"),
        ({"bits": torch.ones(5, 1).double()}, r"2h \+ 1 of them, got \[5, 1\]"),
        ({"bits": torch.full((5,), torch.nan).double()}, "cost not finite"),
        ({"weight": torch.full((3, 5), torch.nan).double()}, "not a finite 32-bit"),
        ({"factor": torch.zeros(5, 5).double()}, "cost not finite"),
        (
            {"weight": torch.full((3, 5), 1e10).double(), "bits": None, "rate": 0.0},
            "not a finite 32-bit integer",
        ),
    ],
)
def test_bad_arguments_of_the_search(change, message):
    weight, factor, scale, _ = example(3, 5)
    arguments = {"weight": weight, "factor": factor, "scale": scale}
    arguments |= {"beam": 2, "bits": code_bits(2), "rate": 0.1} | change
    with pytest.raises(ValueError, match=f"error_feedback_sweep: .*{message}"):
        ops.error_feedback_sweep(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 150), (38, 201)])
def test_cuda_equals_cpu(shape, masked):
    arguments = (*example(*shape, masked=masked), 7)
    on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    codes = ops.error_feedback_sweep(*on_device).cpu()
    assert torch.equal(codes, ops.error_feedback_sweep(*arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("beam", [1, 3, 300])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 150)])
def test_cuda_beam_equals_cpu(shape, beam, rate):
    weight, factor, scale, mask = example(*shape, masked=True)
    factor = factor.diagonal().diag() + 0.5 * factor.triu(1)
    arguments = (weight, factor, scale, mask, 7, beam, code_bits(6), rate)
    on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    codes = ops.error_feedback_sweep(*on_device).cpu()
    assert torch.equal(codes, ops.error_feedback_sweep(*arguments))
