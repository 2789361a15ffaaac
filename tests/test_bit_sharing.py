"""Bit sharing: the shared parts, gates, costs, the search, and what becomes of it."""

import copy
import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from dying_batches import dying
from fitcompress.data import Batches, load_dataset
from fitcompress.errors import (
    BudgetInfeasibleError,
    DataError,
    EmptyLoaderError,
    NonFiniteError,
    OptionError,
    PlanMismatchError,
)
from fitcompress.methods import BitSharing
from fitcompress.methods.bit_sharing import training
from fitcompress.methods.bit_sharing.configuration import (
    Configuration,
    configuration,
    smallest,
)
from fitcompress.methods.bit_sharing.expected_cost import expected_bops
from fitcompress.methods.bit_sharing.gates import (
    filter_gate,
    group_norms,
    highest_threshold,
    indicator,
)
from fitcompress.methods.bit_sharing.layers import SharedInput, SharedWeight
from fitcompress.methods.bit_sharing.network import SharedNetwork, build_network
from fitcompress.methods.bit_sharing.shared_bits import (
    Ladder,
    quantize_directly,
    share_bits,
)
from fitcompress.methods.bit_sharing.training import Price, Trainer, Votes
from fitcompress.model import compressible_layers
from fitcompress.model.costs import bops, count_macs
from fitcompress.model.matrix_view import MatrixView
from fitcompress.quantize import grid_of
from fitcompress.sensitivity.kept_filters import kept_filters, removed_share
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train.supervised import train
from fitcompress.zoo import CifarResNet, DigitsNet, resnet18

LADDER = Ladder((2, 4, 8))


def make_net() -> nn.Module:
    """Three convolutions, the second with groups, and a linear layer: 25 088 MACs."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(24, 20, 1, bias=False),
        nn.BatchNorm2d(20),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(320, 4),
    )
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 2, 8, 8))
    return net.eval()


def make_loader(count: int = 96, seed: int = 5) -> Batches:
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = make_net()(x).argmax(1)
    return Batches(x, y, batch_size=16, shuffle=True, seed=1)


def dying_loader(last: int) -> Batches:
    return dying(make_loader(), last)


OPTIONS = {"epochs": 3, "threshold_rate": 0.05, "prune_groups": {"3": 4, "5": 2}}


def network(**options) -> SharedNetwork:
    groups = options.get("prune_groups", {"3": 4, "5": 2})
    return build_network(make_net(), make_loader(), LADDER, groups, 0.5)


def trainer(limit: float = 0.02, **options) -> Trainer:
    method = BitSharing(**(OPTIONS | options))
    shared = network()
    allowed = int(limit * shared.dense_bops)
    return Trainer(shared, make_loader(), method, allowed, None)


def fixed_gates(values: list[float]):
    """Return gates with these values, and the function that opens them."""
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    return tensors, lambda rung, measure: tensors[rung]


# --- shared bits


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


# --- costs


def test_published_bit_operations_are_reproduced() -> None:
    """ABS, table of CIFAR-100 and ImageNet: MACs · b_w · b_a, first and last 8 bits."""
    net = CifarResNet(3, 100, projection=True)
    macs = count_macs(net, torch.zeros(1, 3, 32, 32))
    assert sum(macs.values()) == 40_818_944
    assert bops(sum(macs.values()), 32, 32) / 1e6 == pytest.approx(41_798.6, abs=0.05)
    ends = ("conv1", "linear")
    four = sum(bops(n, *((8, 8) if k in ends else (4, 4))) for k, n in macs.items())
    assert four / 1e6 == pytest.approx(674.6, abs=0.05)
    macs = count_macs(resnet18(), torch.zeros(1, 3, 224, 224))
    assert bops(sum(macs.values()), 32, 32) / 1e9 == pytest.approx(1857.6, abs=0.05)


def test_expected_bit_operations_are_the_real_ones_when_gates_are_hard() -> None:
    shared = network()
    bits = {"3": (4, 2), "5": (2, 8)}
    with torch.no_grad():
        for layer in shared.free:
            for sharing, b in zip(
                (layer.weight, layer.inputs), bits[layer.name], strict=True
            ):
                closed = {2: [9.0, 9.0], 4: [0.0, 9.0], 8: [0.0, 0.0]}[b]
                sharing.threshold.copy_(torch.tensor(closed))
        pruned = next(x for x in shared.layers if x.name == "3")
        pruned.weight.filter_threshold.fill_(9)
    pruned.weight.clamp_filters_(pruned.latent)
    shared.model(make_loader().inputs[:16])
    macs = count_macs(make_net(), make_loader().inputs[:1])
    wanted = bops(macs["0"], 8, 8) + bops(macs["9"], 8, 8)
    wanted += bops(macs["3"] // 2, 4, 2) + bops(macs["5"], 2, 8)
    assert float(expected_bops(shared.layers).detach()) == wanted
    found = configuration(shared, trainer_votes(shared, bits))
    assert found.bops() == wanted


def trainer_votes(shared: SharedNetwork, bits: dict[str, tuple[int, int]]) -> Votes:
    measures = {x.name: [0.1, 0.01] for x in shared.free}
    return Votes({name: {b[1]: 5, 4: 1} for name, b in bits.items()}, measures)


def test_the_price_pulls_thresholds_up() -> None:
    shared = network()
    shared.model(make_loader().inputs[:16])
    cost = expected_bops(shared.layers)
    cost.log().backward()
    for layer in shared.free:
        for sharing in (layer.weight, layer.inputs):
            assert bool((sharing.threshold.grad < 0).all())  # descent raises them
        assert float(layer.weight.filter_threshold.grad) < 0
    for layer in shared.layers:
        if layer.fixed:
            assert layer.weight.threshold.numel() == 0
    # a layer's share of the cost, times the slope σ′(A − τ) of its upper gate
    layer = shared.free[0]
    own = layer.macs * 64 / float(cost.detach())
    slope = torch.sigmoid(layer.weight.found.measures[1].detach())
    slope = float(slope * (1 - slope))
    wanted = -own * 4 / 8 * slope  # 8 → 4 bits
    assert float(layer.weight.threshold.grad[1]) == pytest.approx(wanted, rel=1e-4)


def test_lambda_follows_the_target() -> None:
    price = Price(0.1, start=1000, limit=100, steps=100, gain=20, ramp=0.5)
    assert price.target(49) == price.target(99) == pytest.approx(100)
    assert price.target(24) == pytest.approx(math.sqrt(1000 * 100))
    cost = torch.tensor(500.0)
    assert float(price.term(99, cost)) == pytest.approx(0.1 * math.log(500))
    assert float(price.term(99, torch.tensor(99.0))) == 0
    price.adjust(99, 500)
    assert price.weight == pytest.approx(0.1 * 5**0.2)
    for _ in range(1000):
        price.adjust(99, 1000)
    assert price.weight == pytest.approx(100)
    for _ in range(1000):
        price.adjust(99, 10)
    assert price.weight == pytest.approx(0.001)
    # a budget above the start asks for nothing
    assert Price(0.1, start=10, limit=100, steps=9).target(8) == pytest.approx(10)


# --- training


def thresholds(search: Trainer, which: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in getattr(search, which)]


def test_alternating_steps_freeze_the_other_half() -> None:
    search = trainer()
    batches = list(make_loader()) * 2
    moved = {"of_weights": 0, "of_inputs": 0}
    for step in range(8):
        before = {which: thresholds(search, which) for which in moved}
        search.step(step, batches[step])
        frozen, free = ("of_weights", "of_inputs")[:: 1 if step % 2 else -1]
        for old, new in zip(before[frozen], thresholds(search, frozen), strict=True):
            # filters' thresholds may still be clamped, as norms move
            assert torch.equal(old, new) or (old.dim() == 0 and new < old)
        changed = zip(before[free], thresholds(search, free), strict=True)
        moved[free] += any(not torch.equal(a, b) for a, b in changed)
    assert min(moved.values()) >= 3


def test_every_batch_has_a_vote() -> None:
    search = trainer()
    layer = search.network.free[0]
    x = torch.cat([search.loader.inputs[:16]] * 3)
    x[32:] = 0  # the third batch has nothing left to mend
    search.loader = Batches(x, batch_size=16)
    with torch.no_grad():
        layer.inputs.threshold[0] = 0.03
        norm = search.network.model[1]
        norm.running_mean.zero_()
        norm.bias.zero_()
    votes = search.votes(64)
    assert votes.bits[layer.name] == {8: 2, 2: 1}
    assert sum(search.votes(2).bits[layer.name].values()) == 2
    found = configuration(search.network, votes)
    assert found.input_bits[layer.name] == 8  # though the last batch asked for 2
    assert found.input_bits["0"] == found.weight_bits["0"] == 8
    tie = Votes({layer.name: {2: 3, 4: 3}}, {})
    assert configuration(search.network, tie).input_bits[layer.name] == 4


@pytest.mark.parametrize("limit", [0.01, 0.015, 0.02, 0.06])
def test_the_last_gates_meet_and_spend_the_budget(limit) -> None:
    search = trainer()
    shared = search.network
    search.step(0, next(iter(make_loader())))
    found = configuration(shared, search.votes(9))
    allowed = max(int(limit * shared.dense_bops), smallest(shared))
    found.fit(allowed)
    assert found.bops() <= allowed
    for layer in shared.free:  # no gate of bits is left that would fit
        for bits in (found.weight_bits, found.input_bits):
            if bits[layer.name] < 8:
                more = copy.deepcopy(bits) | {layer.name: 2 * bits[layer.name]}
                other = Configuration(
                    shared,
                    {},
                    more if bits is found.weight_bits else found.weight_bits,
                    more if bits is found.input_bits else found.input_bits,
                    found.kept,
                )
                assert other.bops() > allowed


def run(**more):
    options = OPTIONS | more.pop("options", {})
    loader = more.pop("loader") if "loader" in more else make_loader()
    budget = more.pop("budget", fc.Budget(bops="2.5%"))
    return BitSharing(**options).run(make_net(), loader, budget, progress=False, **more)


@pytest.fixture(scope="module")
def searched() -> tuple[fc.Plan, nn.Module]:
    return run()


def test_the_result_is_the_same_for_the_same_seed(searched) -> None:
    plan, small = run()
    assert plan.to_json() == searched[0].to_json()
    assert packed_bytes(small) == packed_bytes(searched[1])
    other = run(seed=1)  # drops out others
    assert packed_bytes(other[1]) != packed_bytes(small)


def test_a_killed_search_resumes_to_the_same_result(
    searched, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        run(loader=dying_loader(22), checkpoint=file)
    assert file.exists()
    steps = []
    real = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, n, batch: steps.append(n) or real(self, n, batch)
    )
    plan, small = run(checkpoint=file)
    assert not file.exists()
    assert steps[0] > 0
    assert plan.to_json() == searched[0].to_json()
    assert packed_bytes(small) == packed_bytes(searched[1])


def test_a_checkpoint_of_another_search_is_not_used(
    searched, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        run(loader=dying_loader(15), checkpoint=file, options={"learning_rate": 2e-3})
    plan, _ = run(checkpoint=file)
    assert "belongs to another run" in caplog.text
    assert plan.to_json() == searched[0].to_json()


def test_the_model_stays_as_it_was() -> None:
    net, method = make_net().train(), BitSharing(**(OPTIONS | {"epochs": 1}))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    types = [type(m) for m in net.modules()]
    method.run(net, make_loader(), fc.Budget(bops="3%"), progress=False, labels=False)
    assert net.training
    assert [type(m) for m in net.modules()] == types
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_it_learns_from_outputs_without_labels() -> None:
    inputs_only = Batches(make_loader().inputs, batch_size=16)
    plan, _ = run(loader=inputs_only, labels=False, options={"epochs": 1})
    assert plan.bops <= plan.details["bops_limit"]
    with pytest.raises(DataError, match="labels"):
        run(loader=inputs_only, options={"epochs": 1})


# --- plans


def test_plans_survive_a_file_and_keep_their_filters(searched, tmp_path) -> None:
    plan, small = run(options={"max_pruned": 0.7}, budget=fc.Budget(bops="1.1%"))
    plan.save(tmp_path / "plan.json")
    again = fc.Plan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    kept = again.details["kept_filters"]
    assert kept  # so small a budget takes filters
    assert plan.bops == sum(level.bops for level in plan.levels.values())
    models = [small]
    models.append(fc.apply(make_net(), again, make_loader(), progress=False))
    for model in models:
        for name, level in again.levels.items():
            weight = model.get_submodule(name).weight.detach()
            rows = weight.flatten(1).abs().sum(1) > 0
            stay = kept.get(name, list(range(len(rows))))
            gone = [row for row in range(len(rows)) if row not in stay]
            assert not bool(rows[gone].any()), name
            assert level.sparsity == pytest.approx(len(gone) / len(rows))
            mask = grid_of(model.get_submodule(name)).mask
            assert (mask is not None) == bool(gone)
    macs = count_macs(make_net(), make_loader().inputs[:1])
    total = 0
    for name, level in again.levels.items():
        share = macs[name] * len(kept.get(name, [0] * level.shape[0]))
        share //= level.shape[0]
        total += bops(share, level.grid.bits, level.activation_bits)
    assert plan.bops == total


def test_removed_filters_stay_removed_in_fine_tuning(tmp_path) -> None:
    plan, small = run(options={"max_pruned": 0.7}, budget=fc.Budget(bops="1.1%"))
    fc.finetune(small, make_loader(), epochs=1, teacher=make_net(), progress=False)
    for name, rows in plan.details["kept_filters"].items():
        weight = small.get_submodule(name).weight.detach().flatten(1)
        gone = [row for row in range(len(weight)) if row not in rows]
        assert not bool(weight[gone].any())
    fc.save(small, tmp_path / "small.safetensors")
    loaded = fc.load(tmp_path / "small.safetensors", make_net())
    x = make_loader().inputs[:16]
    assert torch.equal(loaded(x), small(x))


def test_a_sparsity_drops_whole_filters_exactly() -> None:
    for rows in range(1, 70):
        for kept in range(rows + 1):
            for columns in (1, 7, 27, 49):
                share = removed_share(rows, kept, columns)
                assert int(share * (rows * columns)) == (rows - kept) * columns
                assert 0 <= share <= 1


def test_filters_of_another_model_are_told(net) -> None:
    layer = compressible_layers(net)[0]
    rule = kept_filters({"kept_filters": {"conv": [0, 99]}})
    with pytest.raises(PlanMismatchError, match="lacks a filter"):
        rule.importance(layer)
    assert rule.digest() != kept_filters({"kept_filters": {"conv": [0]}}).digest()
    assert kept_filters({}) is None
    for bad in ([1], {"conv": 3}, {"conv": []}, {"conv": ["1"]}):
        with pytest.raises(PlanMismatchError, match="cannot be used"):
            kept_filters({"kept_filters": bad})


def test_embeddings_keep_eight_bits_and_float_inputs() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 16)
            self.first = nn.Linear(16, 16)
            self.middle = nn.Linear(16, 16)
            self.last = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(self.words(x).mean(1)).relu()
            return self.last(self.middle(h).relu())

    torch.manual_seed(0)
    ids, net = torch.randint(0, 20, (64, 5)), Words()
    loader = Batches(ids, torch.randint(0, 3, (64,)), batch_size=16)
    plan, small = BitSharing(epochs=2).run(
        net, loader, fc.Budget(bops="4.5%"), progress=False
    )
    assert plan.levels["words"].grid.bits == 8
    assert plan.levels["words"].activation_bits is None
    assert plan.levels["middle"].activation_bits in (2, 4, 8)
    assert small(ids).shape == (64, 3)


@pytest.mark.slow
def test_digits_keep_their_accuracy_within_the_budget() -> None:
    data = load_dataset("digits")
    torch.manual_seed(0)
    net = DigitsNet()
    train(net, data.training(), epochs=3, progress=False)
    before = fc.evaluate(net, data.testing(), progress=False).accuracy
    plan, small = BitSharing(epochs=2).run(
        net, data.training(), fc.Budget(bops="5%"), progress=False
    )
    macs = count_macs(net, data.test[0][:1])
    assert plan.bops <= 0.05 * 1024 * sum(macs.values())
    after = fc.evaluate(small, data.testing(), progress=False).accuracy
    assert before > 90
    assert after > before - 3


# --- bad input


@pytest.mark.parametrize(
    "options",
    [
        {"ladder": (8,)},
        {"epochs": 0},
        {"epochs": 1.5},
        {"vote_batches": 0},
        {"learning_rate": 0.0},
        {"threshold_rate": math.nan},
        {"price": math.inf},
        {"weight_decay": -1.0},
        {"max_pruned": 1.0},
        {"max_pruned": -0.1},
        {"prune_groups": {"3": 0}},
        {"prune_groups": 4},
    ],
)
def test_options_that_cannot_work_are_told(options) -> None:
    with pytest.raises(OptionError):
        BitSharing(**options)


def test_what_cannot_be_searched_is_told() -> None:
    for budget in (
        fc.Budget(size="5%"),
        fc.Budget(size="5%", bops="5%"),
        fc.Budget(bops="5%", rules=(fc.Rule("3", min_bits=4),)),
    ):
        with pytest.raises(OptionError, match="one bound"):
            run(budget=budget)
    with pytest.raises(BudgetInfeasibleError) as caught:
        run(budget=fc.Budget(bops="0.01%"))
    smaller = fc.Budget(bops=caught.value.smallest)
    assert run(budget=smaller, options={"epochs": 1})[0].bops <= smaller.bops
    for name in ("0", "9", "nothing*"):  # fixed layers keep all their filters
        with pytest.raises(OptionError, match="no layer whose filters"):
            run(options={"prune_groups": {name: 2}})
    with pytest.raises(EmptyLoaderError):
        run(loader=[])
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    data = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(OptionError, match="no bits to search"):
        BitSharing().run(net, data, fc.Budget(bops="5%"), progress=False)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(OptionError, match="float32"):
        BitSharing().run(net.half(), data, fc.Budget(bops="5%"), progress=False)


def test_a_method_that_trains_does_not_search_a_table(sensitivity) -> None:
    with pytest.raises(OptionError, match=r"run\(\)"):
        fc.search(sensitivity, fc.Budget(bops="9%"), method=BitSharing())


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(NonFiniteError, match="step"):
        run(options={"learning_rate": 1e12})
