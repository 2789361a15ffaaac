"""Fisher moments against per-sample gradients of torch.func, and measuring in parts."""

import copy
import logging
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fitcompress as fc
from fisher_cases import CASES, Overwrites, Tokens, make_case, oracle
from fitcompress.errors import UnsupportedLayerError
from fitcompress.model import compressible_layers
from fitcompress.sensitivity import estimate as measuring
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.sensitivity.labels import sampled_label_loss
from fitcompress.sensitivity.moments import FisherMoments


@pytest.mark.parametrize("name", CASES)
def test_moments_equal_per_sample_gradients(name) -> None:
    model, x = make_case(name)
    y = torch.arange(len(x)) % 3
    estimator = FisherEstimator(model, compressible_layers(model))
    traces = FisherEstimator(model, diagonal=False)
    for part in (slice(0, 16), slice(16, 20)):  # a short last batch
        estimator.update(x[part], y[part], cross_entropy)
        traces.update(x[part], y[part], cross_entropy)
    assert traces.moments.unsupported == traces.moments.squares == {}
    # The oracle cannot run modules that work in place: same model without.
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    if isinstance(plain, Overwrites):
        plain.forward = lambda x: plain.out(torch.tanh(x + 1 + plain.inner(x)))
    gradients = oracle(plain, x, y)
    assert estimator.moments.samples == 20
    for layer in compressible_layers(model):
        key = f"{layer.name}.weight".removeprefix(".")
        wanted = gradients[key].double().square().mean(0).flatten(1)
        measured = estimator.moments.diagonal(layer.name)
        torch.testing.assert_close(measured.double(), wanted, rtol=1e-4, atol=1e-9)
        error = (measured - wanted).norm() / wanted.norm()
        assert float(error) < 1e-6
        for moments in (estimator.moments, traces.moments):
            named = layer.name if layer.name in moments.names else "weight"
            trace = moments.mean_trace(named)
            assert trace == pytest.approx(float(wanted.sum()), rel=1e-6)
    with torch.no_grad():
        loss = float(cross_entropy(plain(x), y))
    assert estimator.moments.loss / 20 == pytest.approx(loss, rel=1e-5)


def test_batches_of_any_size_give_the_same_moments() -> None:
    model, x = make_case("groups", 21)
    y = torch.arange(len(x)) % 3
    found = []
    for size in (1, 8, 21):
        estimator = FisherEstimator(model, compressible_layers(model))
        for part, labels in zip(x.split(size), y.split(size), strict=True):
            estimator.update(part, labels, cross_entropy)
        found.append(estimator.moments)
    for other in found[1:]:
        for name, squares in found[0].squares.items():
            torch.testing.assert_close(other.squares[name], squares, rtol=1e-4, atol=0)


def test_positions_of_a_sequence_are_no_samples_even_if_they_are_as_many() -> None:
    # Four positions, looked up once for four samples.
    torch.manual_seed(0)
    model, x = Tokens("none"), torch.randint(5, (4, 4))
    wanted = FisherEstimator(model, compressible_layers(model))
    for i in range(4):
        wanted.update(x[i : i + 1], torch.tensor([i % 3]), cross_entropy)
    found = FisherEstimator(model, compressible_layers(model))
    found.update(x, torch.arange(4) % 3, cross_entropy)
    assert found.moments.batches == 1
    for name, squares in wanted.moments.squares.items():
        assert torch.equal(found.moments.squares[name], squares)


def test_samples_stay_together_when_every_layer_sees_them_apart() -> None:
    model, x = make_case("embedding")
    batches = []
    model.token.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    estimator = FisherEstimator(model, compressible_layers(model))
    for _ in range(2):
        estimator.update(x, torch.zeros(20).long(), cross_entropy)
    assert batches == [1, 1, 2, 20, 20]


def test_an_entry_for_padding_counts_like_any_other() -> None:
    # Training never moves it, but the output depends on it.
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))
    padded = copy.deepcopy(plain)
    padded[0].padding_idx = 2
    x, y = torch.randint(5, (20, 3)), torch.arange(20) % 3
    found = []
    for model in (plain, padded):
        estimator = FisherEstimator(model, compressible_layers(model))
        estimator.update(x, y, cross_entropy)
        found.append(estimator.moments.squares["0"])
    assert found[0][2].sum() > 0
    assert torch.equal(*found)


def test_half_precision_is_accumulated_in_more() -> None:
    model, x = make_case("mlp")
    y = torch.arange(len(x)) % 3
    exact = FisherEstimator(model, compressible_layers(model))
    exact.update(x, y, cross_entropy)
    half = copy.deepcopy(model).bfloat16()
    rough = FisherEstimator(half, compressible_layers(half))
    rough.update(x.bfloat16(), y, lambda out, y: cross_entropy(out.float(), y))
    for name, squares in exact.moments.squares.items():
        assert rough.moments.squares[name].dtype == torch.float32
        ratio = float(rough.moments.squares[name].sum() / squares.sum())
        assert ratio == pytest.approx(1, abs=0.05)


def test_the_relative_error_is_that_of_a_mean() -> None:
    # ‖G‖² of 1, 2, 3: mean 2, standard deviation 1, of the mean 1/√3.
    moments = FisherMoments(samples=3)
    moments.add_norms("a", torch.tensor([1.0, 2.0]).double())
    moments.add_norms("a", torch.tensor([3.0]).double())
    assert moments.mean_trace("a") == 2
    assert moments.relative_error("a") == pytest.approx(1 / math.sqrt(3) / 2)
    assert moments.largest_relative_error == moments.relative_error("a")
    assert FisherMoments(trace={"a": torch.zeros(2)}).relative_error("a") == 0
    one = FisherMoments(trace={"a": torch.ones(2)}, samples=1)
    assert one.relative_error("a") == math.inf


def test_a_layer_that_mixes_samples_cannot_be_measured() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[::2] + x[1::2]).repeat(2, 1)

    model = Mixes()
    estimator = FisherEstimator(model, compressible_layers(model))
    with pytest.raises(UnsupportedLayerError, match=r"'linear' does not see"):
        estimator.update(torch.randn(10, 4), torch.zeros(10).long(), cross_entropy)


def test_sampled_labels_give_the_true_fisher_information() -> None:
    # Logits (w·x, 0): F = x² p (1 − p) for the weight of the first logit.
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.5], [0.0]]))
    x = torch.full((6000, 1), 0.8)
    sens = fc.measure(model, x.split(1000), samples=None, progress=False)
    p = 1 / (1 + math.exp(-1.5 * 0.8))
    # Both rows of the weight have this information; standard error about 1 %.
    assert sens.fisher_trace[0] == pytest.approx(2 * 0.64 * p * (1 - p), rel=0.05)


def test_sampled_labels_follow_the_generator_and_every_position() -> None:
    logits = torch.randn(3, 5, 4)
    draws = [
        sampled_label_loss(logits, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert float(sampled_label_loss(certain, torch.Generator())) < 1e-30


def test_measuring_leaves_the_model_as_it_was(net, images) -> None:
    net.train()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    fc.measure(net, [images[:8]], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == [
        "conv.weight"
    ]
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    assert not net.norm.training
    assert not any(m._forward_hooks for m in net.modules())


def same(a: fc.Sensitivity, b: fc.Sensitivity) -> bool:
    values = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in values
    )


class KilledError(Exception):
    pass


def killed_after(batches: list[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    yield from batches[:count]
    raise KilledError


@pytest.mark.parametrize("survived", [1, 3, 5])
@pytest.mark.parametrize("sampled", [True, False])
def test_killed_and_resumed_gives_the_same_numbers(
    net, images, tmp_path, monkeypatch, survived, sampled
) -> None:
    loss = None if sampled else lambda out, _: out.logsumexp(-1).mean()
    batches = list(images.split(20))  # four of 20, one of 16
    whole = fc.measure(net, batches, loss, progress=False)
    monkeypatch.setattr(measuring, "SAVE_EVERY", -1.0)
    file = tmp_path / "moments"
    with pytest.raises(KilledError):
        fc.measure(
            net,
            killed_after(batches, survived),
            loss,
            checkpoint=file,
            progress=False,
        )
    assert file.exists()
    resumed = fc.measure(net, batches, loss, checkpoint=file, progress=False)
    assert same(resumed, whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["seed", "weights", "samples", "batches", "damage"])
def test_a_checkpoint_of_something_else_is_not_used(
    net, images, tmp_path, monkeypatch, caplog, change
) -> None:
    batches = list(images.split(20))
    options = {"seed": 3, "samples": 90, "progress": False}
    file = tmp_path / "moments"
    monkeypatch.setattr(measuring, "SAVE_EVERY", -1.0)
    with pytest.raises(KilledError):
        fc.measure(net, killed_after(batches, 2), checkpoint=file, **options)
    if change == "weights":
        with torch.no_grad():
            net.out.bias.add_(0.5)
    elif change == "batches":
        batches = list(images.split(30))
    elif change == "damage":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        options |= {change: 89}
    fresh = fc.measure(net, batches, **options)
    with caplog.at_level(logging.WARNING):
        resumed = fc.measure(net, batches, checkpoint=file, **options)
    assert same(resumed, fresh)
    assert "not used" in caplog.text


def test_a_generator_is_measured_whole(net, images) -> None:
    whole = fc.measure(net, images.split(32), progress=False)
    assert same(fc.measure(net, (x for x in images.split(32)), progress=False), whole)
