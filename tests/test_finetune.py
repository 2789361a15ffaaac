"""Fine-tuning keeps grids, budget and determinism."""

import copy
import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from dying_batches import dying
from fitcompress.data import Batches
from fitcompress.errors import (
    DataError,
    EmptyLoaderError,
    NonFiniteError,
    OptionError,
)
from fitcompress.model import compressible_layers
from fitcompress.quantize import fold_norms_, grid_of, plan_of
from fitcompress.quantize.leftovers import thaw_norms_
from fitcompress.quantize.rate import Rate, code_lengths, rate_aware_codes
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train import divergence, finetuning
from fitcompress.train.rate_control import RateControl, code_entropy


def make_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 9, 4),
    )
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 2, 8, 8))
        net[7].weight.mul_(10)  # confident predictions, so that errors show
    return net.eval()


def make_loader(count: int = 512) -> Batches:
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    return Batches(x, batch_size=32, shuffle=True, seed=1)


def dying_loader(last: int) -> Batches:
    return dying(make_loader(), last)


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, nn.Module]:
    net = make_net()
    small = fc.compress(net, make_loader(), fc.Budget(size="12%"), progress=False)
    return net, small


def test_finetuning_lowers_the_divergence_within_the_budget(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    limit = len(packed_bytes(small))
    before = divergence(net, small, make_loader())
    result = fc.finetune(
        small,
        make_loader(),
        epochs=12,
        lr=1e-3,
        float_lr=1e-2,
        norms="frozen",
        teacher=net,
        validation=make_loader(),
        progress=False,
    )
    assert result.kept
    assert result.before == pytest.approx(before)
    assert result.after is not None
    assert result.after < 0.95 * before
    assert result.after == pytest.approx(divergence(net, small, make_loader()))
    budget = fc.Budget(size="12%").size_bytes(
        4 * sum(p.numel() for p in net.parameters())
    )
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


def test_a_killed_run_resumes_to_the_same_model(
    compressed, tmp_path, monkeypatch
) -> None:
    net = compressed[0]
    whole, killed = copy.deepcopy(compressed[1]), copy.deepcopy(compressed[1])
    options = {"epochs": 3, "teacher": net, "progress": False}
    fc.finetune(whole, make_loader(), **options)
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"

    with pytest.raises(KeyboardInterrupt):
        fc.finetune(copy.deepcopy(killed), dying_loader(40), checkpoint=file, **options)
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
        lr=0.05,
        teacher=net,
        validation=make_loader(),
        progress=False,
    )
    assert not result.kept
    assert result.after > result.before
    assert "the start was kept, because training made it worse" in str(result)
    assert packed_bytes(spoiled) == start


def test_an_interrupted_run_leaves_the_model_as_it_was(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    start = packed_bytes(small)
    with pytest.raises(KeyboardInterrupt):
        fc.finetune(small, dying_loader(30), teacher=net, progress=False)
    assert packed_bytes(small) == start
    assert not small.training
    assert all(grid_of(small[i]).rate is None for i in (0, 3, 7))


def test_dropout_draws_the_same_after_a_resume(tmp_path, monkeypatch) -> None:
    net = nn.Sequential(*make_net()[:7], nn.Dropout(0.3), make_net()[7]).eval()
    start = fc.compress(net, make_loader(), fc.Budget(size="12%"), progress=False)
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    options = {"epochs": 2, "lr": 1e-3, "teacher": net, "progress": False}
    torch.manual_seed(11)
    fc.finetune(whole, make_loader(), **options)
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"
    torch.manual_seed(11)
    with pytest.raises(KeyboardInterrupt):
        fc.finetune(resumed, dying_loader(40), checkpoint=file, **options)
    torch.manual_seed(12)
    fc.finetune(resumed, make_loader(), checkpoint=file, **options)
    assert packed_bytes(resumed) == packed_bytes(whole)


def test_a_checkpoint_of_other_weights_is_not_used(
    compressed, tmp_path, monkeypatch, caplog
) -> None:
    net, start = compressed
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    file = tmp_path / "partial"
    options = {"epochs": 1, "teacher": net, "norms": "frozen", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        fc.finetune(copy.deepcopy(start), dying_loader(5), checkpoint=file, **options)
    other, expected = copy.deepcopy(start), copy.deepcopy(start)
    for model in (other, expected):  # the same numbers in another order
        bias = model[7].bias.data
        bias.copy_(bias.flip(0))
    fc.finetune(other, make_loader(), checkpoint=file, **options)
    assert "belongs to another run" in caplog.text
    fc.finetune(expected, make_loader(), **options)
    assert packed_bytes(other) == packed_bytes(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norms", ["frozen", "batch"])
def test_weights_in_16_bits_train_too(dtype, norms, tmp_path, monkeypatch) -> None:
    x = make_loader().inputs.to(dtype)
    loader = Batches(x, batch_size=32, shuffle=True, seed=1)
    net = make_net().to(dtype)
    plan = fc.search(
        fc.measure(make_net(), make_loader(), progress=False), fc.Budget(size="12%")
    )
    small = fc.apply(net, plan, loader, progress=False)
    start, before = copy.deepcopy(small), divergence(net, small, loader)
    options = {"epochs": 4, "lr": 1e-3, "teacher": net, "norms": norms}
    options |= {"validation": loader, "progress": False}
    result = fc.finetune(small, loader, **options)
    assert result.before == pytest.approx(before)
    assert result.kept
    assert result.after < before
    assert len(packed_bytes(small)) <= plan.limit_bytes
    assert {p.dtype for p in small.parameters()} == {dtype}
    # and a run that was killed ends the same
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    interrupted = dying_loader(20)
    interrupted.inputs = x
    file = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        fc.finetune(start, interrupted, checkpoint=file, **options)
    fc.finetune(start, loader, checkpoint=file, **options)
    assert packed_bytes(start) == packed_bytes(small)


def test_modes_are_restored(compressed) -> None:
    net, small = copy.deepcopy(compressed[0]), copy.deepcopy(compressed[1])
    net.train()
    net[1].eval()
    small[4].train()
    before = [m.training for m in (*net.modules(), *small.modules())]
    divergence(net, small, make_loader())
    labelled = [(torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 3]))]
    fc.evaluate(net, labelled, progress=False)
    assert [m.training for m in (*net.modules(), *small.modules())] == before


def test_labels_that_do_not_fit_are_told(compressed) -> None:
    x = torch.randn(3, 2, 8, 8)
    for y in (None, torch.tensor([0, 1, 4]), torch.rand(3), torch.tensor([0, 1])):
        with pytest.raises(DataError, match="label"):
            fc.evaluate(compressed[0], [(x, y)], progress=False)
    with pytest.raises(DataError, match="logits"):
        divergence(nn.Flatten(0), compressed[1], [x])
    with pytest.raises(DataError, match="different outputs"):
        divergence(nn.Flatten(), compressed[1], [x])


def test_bad_input_is_told(compressed) -> None:
    net, small = compressed[0], copy.deepcopy(compressed[1])
    with pytest.raises(DataError, match="nothing to train for"):
        fc.finetune(small, make_loader(), progress=False)
    with pytest.raises(EmptyLoaderError):
        fc.finetune(small, [], teacher=net, progress=False)
    with pytest.raises(NonFiniteError, match="step 0"):
        fc.finetune(
            small,
            make_loader(),
            lambda out, _: out.sum() * float("nan"),
            progress=False,
        )


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"lr": 0.0}, {"lr": math.nan}, {"norms": "none"}]
)
def test_options_that_cannot_work_are_told(compressed, options) -> None:
    with pytest.raises(OptionError):
        fc.finetune(compressed[1], make_loader(), teacher=compressed[0], **options)


def test_entropy_counts_every_code() -> None:
    # 1024 different codes, each once: 10 bits a code, however far apart they are
    for spread in (1, 10**6):
        codes = torch.arange(1024.0) * spread - 500
        assert code_entropy(codes) == pytest.approx(1024 * 10)
    # ¼, ¼, ½: 1.5 bits a code
    assert code_entropy(torch.tensor([0.0, 1, 7, 7])) == pytest.approx(6)
    assert code_entropy(torch.zeros(5)) == 0
    assert code_entropy(torch.zeros(0)) == 0


def test_the_price_meets_a_smaller_target_closely(compressed) -> None:
    small = copy.deepcopy(compressed[1])
    torch.manual_seed(0)
    with torch.no_grad():  # as in training: weights between the steps
        for name in ("0", "3", "7"):
            module = small.get_submodule(name)
            latent = module.parametrizations.weight.original
            latent += 0.3 * grid_of(module).scale * torch.randn_like(latent)
    rate = RateControl(small, len(packed_bytes(small)))
    for share in (0.95, 0.8, 0.9):
        rate.target = share * rate.start
        rate.adjust()
        found = rate.entropy_bits()
        assert 0.97 * rate.target < found <= rate.target
        assert rate.weight > 0
    rate.target = 2 * rate.start
    rate.adjust()
    assert rate.weight == 0


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
    assert torch.allclose(
        norm.running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-4
    )


def test_the_file_does_not_depend_on_torch_threads(compressed) -> None:
    files = []
    before = torch.get_num_threads()
    for count in (1, 2):
        small = copy.deepcopy(compressed[1])
        torch.set_num_threads(count)
        try:
            fc.finetune(
                small, make_loader(), epochs=1, teacher=compressed[0], progress=False
            )
        finally:
            torch.set_num_threads(before)
        files.append(packed_bytes(small))
    assert files[0] == files[1]


def test_channels_last_models_end_on_their_grids(compressed) -> None:
    net = compressed[0]
    plain, last = copy.deepcopy(compressed[1]), copy.deepcopy(compressed[1])
    last = last.to(memory_format=torch.channels_last)
    for small in (plain, last):
        fc.finetune(small, make_loader(), epochs=1, teacher=net, progress=False)
    limit = plan_of(last).limit_bytes
    assert len(packed_bytes(last)) <= limit
    for layer in compressible_layers(last):
        grid = grid_of(layer.module)
        latent = layer.module.parametrizations.weight.original
        assert torch.equal(latent, layer.module.weight)
        assert grid is not None
    assert divergence(net, last, make_loader()) < 2 * divergence(
        net, plain, make_loader()
    )
