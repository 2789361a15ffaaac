"""``compress`` as a whole: killed and called again, other data, generators."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress import compression
from fitcompress.compensate import attempts, compressor, one_layer
from fitcompress.compensate.options import Compensation
from fitcompress.data import Batches
from fitcompress.errors import (
    BudgetInfeasibleError,
    DataError,
    EmptyLoaderError,
    NoCompressibleLayerError,
    NonFiniteError,
    OutputError,
    UnsupportedLayerError,
)
from fitcompress.model.costs import count_macs
from fitcompress.quantize import plan_of
from fitcompress.sensitivity import estimate
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.storage.save_load import packed_bytes

BUDGET = fc.Budget(size=1100)


class KilledError(Exception):
    pass


@pytest.fixture
def saving(monkeypatch) -> None:
    """Save at every opportunity."""
    monkeypatch.setattr(estimate, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(attempts, "SAVE_EVERY", -1.0)


@pytest.fixture
def few_plans(monkeypatch) -> None:
    """Refine with a third of the plans; what is claimed does not depend on them."""
    monkeypatch.setattr(compression, "REFINEMENT_PLANS", 8)


@pytest.fixture
def batches(images) -> list[torch.Tensor]:
    return list(images.split(16))


def compress(net: nn.Module, loader: Any, checkpoint: Path | None = None, **more: Any):
    budget = more.pop("budget", BUDGET)
    made = fc.compress(
        net, loader, budget, checkpoint=checkpoint, progress=False, **more
    )
    return packed_bytes(made)


def killed_after(monkeypatch, owner: Any, name: str, survived: int) -> list[int]:
    """Let ``owner.name`` raise after so many calls; returns the calls made."""
    real, calls = getattr(owner, name), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == survived:
            raise KilledError
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    return calls


def counted(monkeypatch, owner: Any, name: str) -> list[int]:
    return killed_after(monkeypatch, owner, name, -1)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("survived", [1, 2])
def test_killed_while_measuring(
    net, batches, tmp_path, monkeypatch, saving, survived
) -> None:
    whole, file = compress(net, batches, samples=90), tmp_path / "c"
    with monkeypatch.context() as patch:
        killed_after(patch, FisherEstimator, "update", survived)
        with pytest.raises(KilledError):
            compress(net, batches, file, samples=90)
    assert left(tmp_path) == {"c.measure"}
    calls = counted(monkeypatch, FisherEstimator, "update")
    assert compress(net, batches, file, samples=90) == whole
    assert len(calls) == 3 - survived  # 45 samples are three batches
    assert left(tmp_path) == set()


def test_moments_of_other_data_are_not_used(
    net, batches, tmp_path, monkeypatch, saving, caplog
) -> None:
    file = tmp_path / "c"
    with monkeypatch.context() as patch:
        killed_after(patch, FisherEstimator, "update", 2)
        with pytest.raises(KilledError):
            compress(net, batches, file, samples=90)
    others = [batches[0], *(5 * x for x in batches[1:])]
    with caplog.at_level(logging.WARNING):
        assert compress(net, others, file, samples=90) == compress(
            net, others, samples=90
        )
    assert "c.measure belongs to another measurement and is not used" in caplog.text


@pytest.mark.parametrize("survived", [0, 1, 3, 5])
def test_killed_while_applying(
    net, batches, tmp_path, monkeypatch, saving, survived
) -> None:
    whole, file = compress(net, batches), tmp_path / "c"
    with monkeypatch.context() as patch:
        needed = counted(patch, one_layer, "quantize")
        compress(net, batches)
    with monkeypatch.context() as patch:
        killed_after(patch, one_layer, "quantize", survived)
        with pytest.raises(KilledError):
            compress(net, batches, file)
    assert left(tmp_path) == {"c.sensitivity"} | ({"c.apply"} if survived else set())
    monkeypatch.setattr(compression, "measure", lambda *_, **__: pytest.fail("again"))
    calls = counted(monkeypatch, one_layer, "quantize")
    assert compress(net, batches, file) == whole
    assert len(calls) == len(needed) - survived
    assert left(tmp_path) == set()


def test_killed_in_both_and_after_all(
    net, batches, tmp_path, monkeypatch, saving
) -> None:
    whole, file = compress(net, batches), tmp_path / "c"
    for owner, name, survived in (
        (FisherEstimator, "update", 1),
        (FisherEstimator, "update", 0),
        (compression, "search", 0),
        (one_layer, "quantize", 2),
        (one_layer, "quantize", 1),
        (compression._Files, "forget", 0),
    ):
        with monkeypatch.context() as patch:
            killed_after(patch, owner, name, survived)
            with pytest.raises(KilledError):
                compress(net, batches, file)
    assert compress(net, batches, file) == whole
    assert left(tmp_path) == set()


def test_killed_in_a_repeated_search(
    net, batches, tmp_path, monkeypatch, saving, caplog
) -> None:
    options = {"budget": fc.Budget(size=1330), "family": "bits"}
    with monkeypatch.context() as patch:
        searches = counted(patch, compression, "search")
        layers = counted(patch, one_layer, "quantize")
        whole = compress(net, batches, **options)
    assert len(searches) > 1  # the first plan is over the budget
    file, last = tmp_path / "c", len(layers) - 2
    with monkeypatch.context() as patch:
        killed_after(patch, one_layer, "quantize", last)
        with pytest.raises(KilledError):
            compress(net, batches, file, **options)
    assert {"c.sensitivity", "c.apply", "c.apply-2"} <= left(tmp_path)
    layers = counted(monkeypatch, one_layer, "quantize")
    with caplog.at_level(logging.WARNING):
        assert compress(net, batches, file, **options) == whole
    assert len(layers) == 2
    assert "not used" not in caplog.text
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    "change", ["data", "cut", "weights", "samples", "seed", "damage", "other file"]
)
def test_what_another_run_left_is_not_used(
    net, batches, tmp_path, monkeypatch, saving, caplog, change
) -> None:
    file, options = tmp_path / "c", {"samples": 90, "seed": 0}
    with monkeypatch.context() as patch:
        killed_after(patch, one_layer, "quantize", 3)
        with pytest.raises(KilledError):
            compress(net, batches, file, **options)
    kept = tmp_path / "c.sensitivity"
    if change == "data":  # the first batch is the same, and so are all shapes
        batches = [*batches[:-1], batches[-1].flip(0)]
    elif change == "cut":  # labels are drawn by batch
        batches = list(torch.cat(batches).split(15))
    elif change == "weights":
        with torch.no_grad():
            net.conv.weight.mul_(1.01)
    elif change in options:
        options[change] += 2
    elif change == "damage":
        kept.write_bytes(kept.read_bytes()[:-1])
    else:
        fc.measure(net, batches, progress=False).save(kept)
    fresh = compress(net, batches, **options)
    with caplog.at_level(logging.WARNING):
        assert compress(net, batches, file, **options) == fresh
    assert "c.sensitivity" in caplog.text
    assert "not used" in caplog.text
    assert left(tmp_path) == set()


def test_another_budget_needs_no_other_measurement(
    net, batches, tmp_path, monkeypatch
) -> None:
    file = tmp_path / "c"
    with pytest.raises(BudgetInfeasibleError):
        compress(net, batches, file, budget=fc.Budget(size=100))
    fresh = compress(net, batches)
    monkeypatch.setattr(compression, "measure", lambda *_, **__: pytest.fail("again"))
    assert compress(net, batches, file) == fresh


def test_the_sensitivity_is_kept_exactly(net, batches, tmp_path) -> None:
    table = fc.measure(net, batches, progress=False)
    files = compression._Files(tmp_path / "c")
    files.keep(table, "key")
    again = files.sensitivity("key")
    assert again is not None
    assert again.provenance == table.provenance
    assert again.loss == table.loss
    assert again.grids == table.grids
    assert (again.distortion == table.distortion).all()


def test_files_are_checked_before_work_starts(net, tmp_path) -> None:
    def loader() -> Iterator[torch.Tensor]:
        pytest.fail("work has started")
        yield

    (tmp_path / "c.sensitivity").mkdir()
    for place in (tmp_path / "no" / "c", tmp_path, tmp_path / "c"):
        with pytest.raises(OutputError, match=r"cannot write .*To fix it"):
            compress(net, loader(), place)
    with pytest.raises(NoCompressibleLayerError):
        compress(nn.ReLU(), loader())
    with torch.no_grad():
        net.conv.weight[0] = torch.nan
    with pytest.raises(NonFiniteError):
        compress(net, loader())


def test_a_generator_gives_what_a_list_gives(net, batches, images) -> None:
    whole = compress(net, batches, samples=70)
    labels = torch.zeros(16).long()
    assert compress(net, (x for x in batches), samples=70) == whole
    assert compress(net, iter([(x, labels) for x in batches]), samples=70) == whole
    everything = compress(net, (x for x in batches), samples=None)
    assert everything == compress(net, batches, samples=None)
    with pytest.raises(EmptyLoaderError):
        compress(net, (x for x in ()))
    for wrong in (0, -1):
        with pytest.raises(DataError, match="at least one"):
            compress(net, iter(batches), samples=wrong)


def test_no_more_is_read_than_needed(net, batches) -> None:
    source = iter(batches)
    compress(net, source, samples=20)
    assert torch.equal(next(source), batches[2])


class Restless:
    """Yields another order every time, as a shuffling loader does."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.generator = images, torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator)
        return iter(self.images[order].split(16))


def test_a_shuffling_loader_of_the_same_seed_is_resumed(
    net, images, tmp_path, monkeypatch, saving
) -> None:
    whole, file = compress(net, Restless(images)), tmp_path / "c"
    with monkeypatch.context() as patch:
        killed_after(patch, one_layer, "quantize", 3)
        with pytest.raises(KilledError):
            compress(net, Restless(images), file)
    monkeypatch.setattr(compression, "measure", lambda *_, **__: pytest.fail("again"))
    assert compress(net, Restless(images), file) == whole


def test_compensation_is_passed_on(net, images) -> None:
    loader = Batches(images, batch_size=16)
    usual = compress(net, loader)
    assert compress(net, loader, compensation=Compensation()) == usual
    plain = Compensation(drift=0.0, bias=False, beam=1)
    other = compress(net, loader, compensation=plain)
    table = fc.measure(net, loader, samples=512, progress=False)
    plan = fc.search(table, BUDGET)
    made = fc.apply(net, plan, loader, compensation=plain, progress=False)
    assert other == packed_bytes(made) != usual


def test_the_model_is_left_alone(net, batches) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    compress(net, batches)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_bit_operations_quantize_inputs_too(net, batches, few_plans) -> None:
    bound = fc.Budget(bops="2%")
    small = fc.compress(net, batches, bound, samples=32, progress=False)
    plan = plan_of(small)
    assert plan.bops <= 0.02 * 32 * 32 * sum(count_macs(net, batches[0]).values())
    assert all(level.activation_bits for level in plan.levels.values())
    weights = fc.Budget(bops="15%")
    plain = fc.compress(
        net, batches, weights, samples=32, activation_bits=(), progress=False
    )
    assert not any(x.activation_bits for x in plan_of(plain).levels.values())
    with pytest.raises(BudgetInfeasibleError, match="activation_bits"):
        fc.compress(net, batches, bound, samples=32, activation_bits=(), progress=False)


def test_a_refinement_can_be_asked_for(net, batches, few_plans, monkeypatch) -> None:
    asked = []
    real = fc.Refinement.correct

    def correct(self, *args: Any, **named: Any) -> fc.Sensitivity:
        asked.append(self)
        return real(self, *args, **named)

    monkeypatch.setattr(fc.Refinement, "correct", correct)
    compress(net, batches, samples=32)
    assert not asked
    compress(net, batches, samples=32, budget=fc.Budget(bops="5%"), refine=False)
    assert not asked
    own = fc.Refinement(samples=32, plans=10)
    compress(net, batches, samples=32, refine=own)
    compress(net, batches, samples=32, budget=fc.Budget(bops="5%"))
    assert [r.plans for r in asked] == [10, compression.REFINEMENT_PLANS]
    assert asked[1].samples == 32


def test_killed_while_refining_it_ends_with_the_same_file(
    net, batches, saving, few_plans, tmp_path, monkeypatch
) -> None:
    settings = {"budget": fc.Budget(bops="3%"), "samples": 32}
    wanted = compress(net, batches, **settings)
    with monkeypatch.context() as patch:
        killed_after(patch, compressor.Compressor, "at", 4)
        with pytest.raises(KilledError):
            compress(net, batches, tmp_path / "run", **settings)
    assert (tmp_path / "run.refine.plans").exists()
    monkeypatch.setattr(compression, "measure", None)  # it is done
    assert compress(net, batches, tmp_path / "run", **settings) == wanted
    assert not list(tmp_path.iterdir())


def test_inputs_that_cannot_be_quantized_stay_in_float(batches, caplog) -> None:
    class Shared(nn.Module):
        """One of its layers has an input that all samples share."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.place = nn.Parameter(torch.randn(1, 64))
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last((x + self.first(self.place)).relu())

    inputs = [x.flatten(1)[:, :64] for x in batches]
    budget = fc.Budget(bops="20%")
    with caplog.at_level(logging.WARNING):
        small = fc.compress(Shared(), inputs, budget, samples=32, progress=False)
    assert "not quantized" in caplog.text
    assert not any(x.activation_bits for x in plan_of(small).levels.values())
    with pytest.raises(UnsupportedLayerError, match="activation_bits"):
        fc.compress(Shared(), inputs, budget, activation_bits=8, progress=False)


def test_bits_of_inputs_may_be_one_number(net, batches, tmp_path) -> None:
    budget = fc.Budget(bops="12%")
    settings = {"budget": budget, "samples": 32, "refine": False}
    one = compress(net, batches, tmp_path / "run", activation_bits=8, **settings)
    assert compress(net, batches, activation_bits=iter([8]), **settings) == one
    few = [x[:4] for x in batches[:1]]
    compress(net, few, budget=fc.Budget(bops="5%"))  # too few to refine with
