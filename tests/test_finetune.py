"""Fine-tuning keeps grids, budget and determinism."""

import copy
import importlib

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.data import Batches
from fitcompress.errors import DataError, EmptyLoaderError, NonFiniteError
from fitcompress.quantize import fold_norms_, grid_of
from fitcompress.quantize.leftovers import thaw_norms_
from fitcompress.quantize.rate import Rate, code_lengths, rate_aware_codes
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train import divergence


def make_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
    )
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 2, 8, 8))
        net[7].weight.mul_(10)  # confident predictions, so that errors show
    return net.eval()


def make_loader(count: int = 192) -> Batches:
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    return Batches(x, batch_size=32, shuffle=True, seed=1)


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, nn.Module]:
    net = make_net()
    small = fc.compress(net, make_loader(), fc.Budget(size="30%"), progress=False)
    return net, small


def test_finetuning_lowers_the_divergence_within_the_budget(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    limit = len(packed_bytes(small))
    before = divergence(net, small, make_loader())
    result = fc.finetune(
        small, make_loader(), epochs=12, teacher=net, validation=make_loader(), progress=False
    )
    assert result.kept
    assert result.before == pytest.approx(before)
    assert result.after is not None
    assert result.after < 0.9 * before
    assert result.after == pytest.approx(divergence(net, small, make_loader()))
    budget = fc.Budget(size="30%").size_bytes(4 * sum(p.numel() for p in net.parameters()))
    assert len(packed_bytes(small)) <= max(limit, budget)


def test_weights_end_exactly_on_their_grids(compressed, tmp_path) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    fc.finetune(small, make_loader(), epochs=1, teacher=net, progress=False)
    for name in ("0", "3", "7"):
        module = small.get_submodule(name)
        grid = grid_of(module)
        assert grid is not None
        assert grid.rate is None
        weight = module.weight.detach()
        again = grid.codes(weight).float() * grid.scale
        assert torch.equal(again.reshape(weight.shape), weight)
    fc.save(small, tmp_path / "tuned.safetensors")
    loaded = fc.load(tmp_path / "tuned.safetensors", make_net())
    x = torch.randn(16, 2, 8, 8)
    assert torch.equal(loaded(x), small(x))


def test_a_killed_run_resumes_to_the_same_model(compressed, tmp_path, monkeypatch) -> None:
    net = compressed[0]
    whole, killed = copy.deepcopy(compressed[1]), copy.deepcopy(compressed[1])
    options = {"epochs": 3, "teacher": net, "progress": False}
    fc.finetune(whole, make_loader(), **options)
    module = importlib.import_module("fitcompress.train.finetuning")
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"

    class DyingLoader(Batches):
        calls = 0

        def __iter__(self):
            for batch in super().__iter__():
                DyingLoader.calls += 1
                if DyingLoader.calls == 20:
                    raise KeyboardInterrupt
                yield batch

    dying = DyingLoader(make_loader().inputs, batch_size=32, shuffle=True, seed=1)
    with pytest.raises(KeyboardInterrupt):
        fc.finetune(copy.deepcopy(killed), dying, checkpoint=file, **options)
    assert file.exists()
    fc.finetune(killed, make_loader(), checkpoint=file, **options)
    assert not file.exists()
    assert packed_bytes(killed) == packed_bytes(whole)


def test_a_worse_end_is_not_kept(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    start = packed_bytes(small)
    result = fc.finetune(
        small,
        make_loader(),
        lambda out, _: -out.square().mean(),
        epochs=1,
        lr=0.05,
        teacher=None,
        progress=False,
    )
    assert result.before is None
    assert packed_bytes(small) != start
    spoiled = copy.deepcopy(compressed[1])
    result = fc.finetune(
        spoiled,
        make_loader(),
        lambda out, _: (out - 3).square().mean() * 10,
        epochs=1,
        teacher=net,
        validation=make_loader(),
        progress=False,
    )
    assert not result.kept
    assert packed_bytes(spoiled) == start


def test_bad_input_is_told(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    with pytest.raises(DataError, match="nothing to train for"):
        fc.finetune(small, make_loader(), progress=False)
    with pytest.raises(EmptyLoaderError):
        fc.finetune(small, [], teacher=net, progress=False)
    with pytest.raises(NonFiniteError, match="step 0"):
        fc.finetune(
            small, make_loader(), lambda out, _: out.sum() * float("nan"), progress=False
        )


def test_rate_aware_rounding_is_the_cheapest_of_its_candidates() -> None:
    torch.manual_seed(0)
    scaled = torch.randn(40, 30) * 2
    lengths = code_lengths(scaled.round())
    rate = Rate(lengths, 0.1)
    found = rate_aware_codes(scaled, rate)
    every = torch.arange(-12, 13).float()
    cost = (scaled[..., None] - every).square() + 0.1 * lengths[(every + 64).long()]
    nearest = scaled.round()
    for i in range(40):
        for j in range(30):
            k = float(nearest[i, j])
            allowed = {k, k - (k > 0) + (k < 0), 0.0}
            best = min(allowed, key=lambda c: float(cost[i, j, int(c) + 12]))
            got = float(cost[i, j, int(found[i, j]) + 12])
            assert got == pytest.approx(float(cost[i, j, int(best) + 12]), rel=1e-6)
    assert torch.equal(rate_aware_codes(scaled, Rate(lengths, 0.0)), nearest)


def test_thawing_undoes_folding() -> None:
    net = make_net()
    folded = copy.deepcopy(net)
    fold_norms_(folded)
    x = torch.randn(256, 2, 8, 8)
    expected = folded(x)
    thaw_norms_(folded, [x])
    assert torch.allclose(folded(x), expected, atol=1e-5)
    norm = folded[1]
    assert isinstance(norm, nn.BatchNorm2d)
    inputs = folded[0](x)
    assert torch.allclose(norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-4)
