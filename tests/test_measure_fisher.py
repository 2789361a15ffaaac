"""measure_fisher: stopping, saving, merging, resuming, several processes."""

import json
import logging
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fitcompress as fc
from distributed_nets import convolutions, labelled_parts
from fisher_oracle import probe_of, squares_one_by_one
from fitcompress.errors import DataError, FormatError, OptionError
from fitcompress.sensitivity import FisherEstimator
from fitcompress.sensitivity import estimate as estimating
from fitcompress.sensitivity.labels import sampled_label_loss
from processes import run_processes, succeeded


def batches(images: torch.Tensor, size: int = 16) -> list[tuple[torch.Tensor, ...]]:
    y = torch.arange(len(images)) % 5
    return list(zip(images.split(size), y.split(size), strict=True))


def same(a: fc.FisherMoments, b: fc.FisherMoments, exactly: bool = True) -> None:
    assert (a.samples, a.names, a.unsupported) == (b.samples, b.names, b.unsupported)
    rtol = 0 if exactly else 1e-5
    assert a.loss == pytest.approx(b.loss, rel=rtol)
    for kind in ("trace", "squares", "activations"):
        mine, others = getattr(a, kind), getattr(b, kind)
        assert set(mine) == set(others)
        for name, sums in mine.items():
            torch.testing.assert_close(sums, others[name], rtol=rtol, atol=0)


def test_traces_only_unless_asked(net, images) -> None:
    net.train()
    found = fc.measure_fisher(net, batches(images), cross_entropy, progress=False)
    assert found.names == ("conv", "deep", "head", "out")
    assert found.squares == found.activations == {}
    assert found.samples == 96
    assert net.training
    with pytest.raises(DataError, match="was not measured; got traces only"):
        found.diagonal("conv")
    with pytest.raises(DataError, match="no weight 'cnv'"):
        found.diagonal("cnv")
    whole = fc.measure_fisher(
        net, batches(images), cross_entropy, diagonal=True, progress=False
    )
    for name in found.names:
        trace = whole.mean_trace(name)
        assert found.mean_trace(name) == pytest.approx(trace, rel=1e-6)
        assert float(whole.diagonal(name).sum()) == pytest.approx(trace, rel=1e-6)


def test_train_mode_is_switched_loudly(net, images, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        quiet = fc.measure_fisher(net, batches(images), cross_entropy, progress=False)
    assert caplog.text == ""
    net.train()
    with caplog.at_level(logging.WARNING):
        loud = fc.measure_fisher(net, batches(images), cross_entropy, progress=False)
    assert "batch norms, such as norm, were in train mode" in caplog.text
    same(loud, quiet)


def test_a_loss_that_is_no_mean_is_noticed(net, images, caplog) -> None:
    weights = torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0])
    for loss, warned in (
        (cross_entropy, False),
        (nn.CrossEntropyLoss(reduction="sum"), True),
        (nn.CrossEntropyLoss(weight=weights), True),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            fc.measure_fisher(net, batches(images)[:1], loss, progress=False)
        assert ("not the mean of the losses" in caplog.text) == warned


def test_it_stops_when_the_error_is_small_enough(net, images) -> None:
    many = batches(images.repeat(20, 1, 1, 1))
    whole = fc.measure_fisher(net, many, cross_entropy, progress=False)
    error = whole.largest_relative_error
    early = fc.measure_fisher(
        net, many, cross_entropy, tolerance=2 * error, progress=False
    )
    # Four times the error at a quarter of the samples; the estimate is one itself.
    assert whole.samples / 8 < early.samples < whole.samples / 2
    assert early.largest_relative_error < 2 * error
    for name in whole.names:
        gap = abs(early.mean_trace(name) / whole.mean_trace(name) - 1)
        assert gap < 8 * error
    loose = fc.measure_fisher(net, many, cross_entropy, tolerance=9, progress=False)
    assert loose.samples == estimating.FEWEST
    with pytest.raises(OptionError, match="tolerance"):
        fc.measure_fisher(net, many, tolerance=0, progress=False)


def test_the_standard_error_is_that_of_repeated_draws(net, images) -> None:
    estimator = FisherEstimator(net, diagonal=False)
    traces, before = [], 0.0
    for x, y in batches(images, 12):
        estimator.update(x, y, cross_entropy)
        total = estimator.moments.trace["head"][0].item()
        traces.append((total - before) / 12)
        before = total
    traces = torch.tensor(traces).double()
    wanted = traces.std() / math.sqrt(len(traces)) / traces.mean()
    found = estimator.moments.relative_error("head")
    assert found == pytest.approx(float(wanted), rel=0.5)


def test_micro_batches_change_nothing_but_rounding(net, images) -> None:
    whole = FisherEstimator(net)
    small = FisherEstimator(net, memory=1)
    x, y = images[:23], torch.arange(23) % 5
    for estimator in (whole, small):
        estimator.update(x, y, cross_entropy)
    some = FisherEstimator(net, memory=5 * probe_of(whole).bytes_per_sample)
    some.update(x, y, cross_entropy)
    assert whole._micro_batch(23, probe_of(whole)) == 23
    assert small._micro_batch(23, probe_of(small)) == 1
    assert some._micro_batch(23, probe_of(some)) == 5
    same(small.moments, whole.moments, exactly=False)
    same(some.moments, whole.moments, exactly=False)


def test_saved_and_loaded(net, images, tmp_path) -> None:
    found = fc.measure_fisher(
        net, batches(images), diagonal=True, activations=True, progress=False
    )
    found.unsupported["other"] = "it enters add"
    found.save(tmp_path / "fisher.safetensors")
    loaded = fc.FisherMoments.load(tmp_path / "fisher.safetensors")
    assert vars(loaded).keys() == vars(found).keys()
    same(loaded, found)
    assert loaded.forms == found.forms
    assert loaded.batches == found.batches == 1 * 6


@pytest.mark.parametrize("damage", ["cut", "kind", "version", "tensor", "absent"])
def test_damaged_files_are_refused(net, images, tmp_path, damage) -> None:
    found = fc.measure_fisher(net, batches(images)[:1], progress=False)
    file = tmp_path / "fisher.safetensors"
    content = found.to_bytes({"version": 2} if damage == "version" else {})
    if damage == "cut":
        content = content[:-1]
    elif damage == "kind":
        content = safetensors.torch.save({"a": torch.zeros(1)})
    elif damage == "tensor":
        found.trace["conv"] = torch.zeros(3).double()
        content = found.to_bytes({})
    if damage != "absent":
        file.write_bytes(content)
    with pytest.raises(
        FormatError, match="newer" if damage == "version" else "damaged"
    ):
        fc.FisherMoments.load(file)


def test_merged_halves_are_the_whole(net, images) -> None:
    options = {"diagonal": True, "activations": True, "progress": False}
    parts = batches(images)
    whole = fc.measure_fisher(net, parts, cross_entropy, **options)
    first = fc.measure_fisher(net, parts[:2], cross_entropy, **options)
    second = fc.measure_fisher(net, parts[2:], cross_entropy, **options)
    same(first.merge(second), whole, exactly=False)
    assert first.samples == 32
    traces = fc.measure_fisher(net, parts[:2], cross_entropy, progress=False)
    with pytest.raises(DataError, match="cannot be merged"):
        whole.merge(traces)


def test_killed_and_resumed(net, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(estimating, "SAVE_EVERY", -1.0)
    options = {"diagonal": True, "activations": True, "progress": False}
    whole = fc.measure_fisher(net, batches(images), **options)
    file = tmp_path / "checkpoint"

    def killed():
        yield from batches(images)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fc.measure_fisher(net, killed(), checkpoint=file, **options)
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    resumed = fc.measure_fisher(net, iter(batches(images)), checkpoint=file, **options)
    same(resumed, whole)
    assert seen == [1, 1, 2, 16, 16, 16]  # two samples to look at, then what was left
    assert not file.exists()


def test_activation_traces(net, images) -> None:
    x, y = images[:7], torch.arange(7) % 5
    inputs = {}
    for name in ("conv", "deep", "head", "out"):

        def keep(_, args, name=name):
            if args[0].requires_grad and not args[0].is_leaf:
                args[0].retain_grad()
            inputs[name] = args[0]

        getattr(net, name).register_forward_pre_hook(keep)
    wanted = dict.fromkeys(inputs, 0.0)
    for i in range(7):
        one = x[i : i + 1].clone().requires_grad_()
        cross_entropy(net(one), y[i : i + 1]).backward()
        for name, tensor in inputs.items():
            total = float(tensor.grad.double().square().sum())
            wanted[name] = wanted.get(name, 0) + total / 7
    net._forward_pre_hooks.clear()
    found = FisherEstimator(net, activations=True)
    found.update(x, y, cross_entropy)
    for name in inputs:
        trace = found.moments.mean_activation(name)
        assert trace == pytest.approx(wanted[name], rel=1e-5)


def test_masked_positions_do_not_count() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = sampled_label_loss(logits, torch.Generator().manual_seed(0), mask)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad.abs().sum(-1) > 0).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    # A sample's loss is the mean over its positions: two halves, one whole.
    label = torch.multinomial(
        logits.detach().flatten(0, 1).softmax(-1).double(), 1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    each = cross_entropy(logits.flatten(0, 1), label[:, 0], reduction="none")
    wanted = ((each[0] + each[1]) / 4 + each[3] / 2).item()
    assert loss.item() == pytest.approx(wanted)
    with pytest.raises(DataError, match="no position that counts"):
        sampled_label_loss(logits, torch.Generator(), torch.zeros(2, 3))


class Named(nn.Module):
    """Takes and gives named things, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.out = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, scale: float = 1.0
    ) -> dict[str, torch.Tensor]:
        return {"logits": self.out(self.token(input_ids).tanh() * scale)}


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_batches_of_named_tensors(memory) -> None:
    torch.manual_seed(0)
    model = Named().eval()
    x = {
        "input_ids": torch.randint(7, (6, 4)),
        "attention_mask": torch.ones(6, 4).long(),
        "scale": 2.0,
    }
    y = torch.randint(5, (6, 4))

    def loss(out: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(out["logits"].flatten(0, 1), y.flatten())

    wanted = squares_one_by_one(model, x, y, loss)
    for batch in ({**x, "labels": y}, (x, y)):
        found = fc.measure_fisher(
            model, [batch], loss, diagonal=True, memory=memory, progress=False
        )
        for name in ("token", "out"):
            torch.testing.assert_close(
                found.squares[name],
                wanted[f"{name}.weight"].float(),
                rtol=1e-5,
                atol=1e-12,
            )
    x["attention_mask"][2, 1:] = 0
    sampled = fc.measure_fisher(model, [x], memory=memory, progress=False)
    assert sampled.mean_trace("token") > 0
    with pytest.raises(DataError, match="no common number of samples"):
        fc.measure_fisher(model, [{**x, "scale": torch.ones(3)}], progress=False)


def test_weights_that_no_gradient_reaches_are_named(caplog) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(x)
            return self.used(x)

    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        found = fc.measure_fisher(Unused(), [torch.randn(8, 4)], progress=False)
    assert found.names == ("used",)
    assert found.unsupported == {
        "idle": "no gradient of the loss reaches a product with it"
    }
    assert "no Fisher moments of idle" in caplog.text


PROCESS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from distributed_nets import convolutions, labelled_parts

parts = labelled_parts()
for kind in ("data", "sharded"):
    model = convolutions()
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
    whole = dict(diagonal=True, activations=True, progress=False)
    found = fc.measure_fisher(model, parts, cross_entropy, **whole)
    if kind == "data":  # they reach other layers
        mine = fc.FisherMoments(samples=1, loss=1.0)
        for name in ("a", "b", "c") if rank else ("c", "b"):
            mine.trace[name] = torch.tensor([1.0, 1.0]).double() * ord(name)
            mine.squares[name] = torch.ones(1, 1) * ord(name)
            mine.forms[name] = "direct"
        if rank:
            mine.unsupported["c"] = "it enters add"
        mine.all_reduce()
        traces = {n: float(t[0]) for n, t in mine.trace.items()}
        assert traces == {"a": 97.0, "b": 196.0}
        squares = {n: float(t) for n, t in mine.squares.items()}
        assert squares == {"a": 97.0, "b": 196.0}
        assert set(mine.forms) == {"a", "b"}
        assert mine.unsupported == {"c": "it enters add"}
    early = fc.measure_fisher(
        model, parts * 25 + parts[:1], cross_entropy, tolerance=0.1, progress=False
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    if rank == 0:
        found.save(folder / kind)
        early.save(folder / f"{kind}-early")
    x, y = parts[0]
    cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
"""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> Path:
    """A folder with what two processes have measured."""
    folder = tmp_path_factory.mktemp("two")
    succeeded(run_processes(folder, PROCESS))
    return folder


@pytest.mark.parametrize("kind", ["data", "sharded"])
def test_two_processes_equal_one(of_two, kind) -> None:
    model, parts = convolutions(), labelled_parts()
    settings = {"diagonal": True, "activations": True, "progress": False}
    one = fc.measure_fisher(model, parts, cross_entropy, **settings)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    same(fc.FisherMoments.load(of_two / kind), one, exactly=False)
    early = fc.FisherMoments.load(of_two / f"{kind}-early")
    assert early.samples < 25 * 24
    assert early.largest_relative_error < 0.1


def test_names_in_a_file_keep_the_order_of_the_model(net, images, tmp_path) -> None:
    found = fc.measure_fisher(net, batches(images)[:1], progress=False)
    found.save(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        counts = json.loads(file.metadata()["fitcompress-fisher"])
    assert counts["names"] == list(found.names)
    assert Path(tmp_path / "file").stat().st_size < 10_000
