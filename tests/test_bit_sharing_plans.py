"""Bit sharing: the plan that it finds, and input that it refuses."""

import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from bit_sharing_nets import (
    make_loader,
    make_net,
    run,
)
from fitcompress.data import Batches, load_dataset
from fitcompress.errors import (
    BudgetInfeasibleError,
    EmptyLoaderError,
    NonFiniteError,
    OptionError,
    PlanMismatchError,
)
from fitcompress.methods import BitSharing
from fitcompress.model import compressible_layers
from fitcompress.model.costs import bops, count_macs
from fitcompress.quantize import grid_of
from fitcompress.sensitivity.kept_filters import kept_filters, removed_share
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet


@pytest.fixture(scope="module")
def searched() -> tuple[fc.Plan, nn.Module]:
    return run()


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
