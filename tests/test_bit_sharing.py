"""Bit sharing: expected costs, and the search by training."""

import copy
import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from bit_sharing_nets import (
    OPTIONS,
    dying_loader,
    make_loader,
    make_net,
    network,
    run,
    trainer,
    trainer_votes,
)
from fitcompress.data import Batches
from fitcompress.errors import (
    DataError,
)
from fitcompress.methods import BitSharing
from fitcompress.methods.bit_sharing import training
from fitcompress.methods.bit_sharing.configuration import (
    Configuration,
    configuration,
    smallest,
)
from fitcompress.methods.bit_sharing.expected_cost import expected_bops
from fitcompress.methods.bit_sharing.training import Price, Trainer, Votes
from fitcompress.model.costs import bops, count_macs
from fitcompress.storage.save_load import packed_bytes
from fitcompress.zoo import CifarResNet, resnet18


@pytest.fixture(scope="module")
def searched() -> tuple[fc.Plan, nn.Module]:
    return run()


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
