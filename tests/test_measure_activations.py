"""measure(activation_bits=…): the trace of inputs, and what quantizing them costs."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fitcompress as fc
from fitcompress.data import Batches
from fitcompress.errors import OptionError
from fitcompress.model import compressible_layers
from fitcompress.model.value_ranges import least_error
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.sensitivity.input_errors import input_histograms

GRIDS = (fc.Grid(bits=8), fc.Grid(bits=4))


def labelled(images):
    labels = torch.arange(len(images)) % 5
    return Batches(images, labels, batch_size=32)


def test_the_trace_is_that_of_single_samples(net, images):
    table = fc.measure(
        net,
        labelled(images),
        F.cross_entropy,
        grids=GRIDS,
        activation_bits=(8, 4),
        progress=False,
    )
    labels = torch.arange(len(images)) % 5
    total = dict.fromkeys(table.names, 0.0)
    for x, y in zip(images, labels, strict=True):
        caught = {}

        def keep(name, module, args, caught=caught):
            caught[name] = args[0].requires_grad_()

        handles = [
            net.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: keep(name, module, args)
            )
            for name in table.names
        ]
        loss = F.cross_entropy(net(x[None]), y[None])
        grads = torch.autograd.grad(loss, [caught[name] for name in table.names])
        for name, grad in zip(table.names, grads, strict=True):
            total[name] += float(grad.double().square().sum())
        for handle in handles:
            handle.remove()
    for name, trace in zip(table.names, table.activation_trace, strict=True):
        assert trace == pytest.approx(total[name] / len(images), rel=1e-5)


def test_the_distortion_is_half_the_trace_times_the_mean_square(net, images):
    loader = labelled(images)
    bits = (6, 4, 2)
    table = fc.measure(net, loader, grids=GRIDS, activation_bits=bits, progress=False)
    layers = compressible_layers(net)
    found = input_histograms(
        net, layers, [(images, None)], samples=None, progress=False
    )
    inputs = {}
    for layer in layers:
        layer.module.register_forward_pre_hook(
            lambda m, args, name=layer.name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        net(images)
    for row, layer in enumerate(layers):
        x = inputs[layer.name]
        assert table.activation_distortion[row, 0] == 0
        for column, wanted in enumerate(bits, 1):
            best, _ = least_error(found[layer.name], wanted)
            codes = (x / best.scale).round().clamp(best.min_code, best.max_code)
            mean = float((x - codes * best.scale).double().square().mean())
            expected = 0.5 * table.activation_trace[row] * mean
            # the histogram takes values as even within its bins
            assert table.activation_distortion[row, column] == pytest.approx(
                expected, rel=0.02
            )
        assert (torch.tensor(table.activation_distortion[row]).diff() > 0).all()


def test_without_activation_bits_nothing_changes(net, images):
    loader = labelled(images)
    without = fc.measure(net, loader, grids=GRIDS, progress=False)
    with_ = fc.measure(net, loader, grids=GRIDS, activation_bits=(8,), progress=False)
    assert without.activation_bits == (None,)
    assert with_.activation_bits == (None, 8)
    assert (without.distortion == with_.distortion).all()
    assert (without.size_bits == with_.size_bits).all()


def test_a_stream_of_batches_is_read_once(net, images):
    def stream():
        yield from labelled(images)

    loader = labelled(images)
    options = {"grids": GRIDS, "activation_bits": (8, 4), "progress": False}
    once = fc.measure(net, stream(), **options)
    again = fc.measure(net, loader, **options)
    assert (once.activation_distortion == again.activation_distortion).all()


def test_embeddings_have_no_activations(images):
    net = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 3)).eval()
    tokens = torch.randint(20, (64, 4), generator=torch.Generator().manual_seed(0))
    table = fc.measure(
        net,
        Batches(tokens, batch_size=32),
        grids=GRIDS,
        activation_bits=(8, 4),
        progress=False,
    )
    assert not table.activation_distortion[0].any()
    assert table.activation_distortion[1, 1:].all()
    plan = fc.search(table, fc.Budget(bops="2%"))
    assert plan.levels["0"].activation_bits is None
    assert plan.levels["2"].activation_bits is not None


class Stream:
    """Batches that stop with an error before number ``dies``."""

    def __init__(self, images, dies=None):
        self.images, self.dies = images, dies

    def __iter__(self):
        for number, batch in enumerate(labelled(self.images)):
            if number == self.dies:
                raise InterruptedError
            yield batch


def test_a_killed_measurement_goes_on(net, images, tmp_path, monkeypatch):
    path = tmp_path / "partial"
    options = {"grids": GRIDS, "activation_bits": (8, 4), "progress": False}
    whole = fc.measure(net, Stream(images), **options)
    monkeypatch.setattr("fitcompress.sensitivity.estimate.SAVE_EVERY", -1.0)
    with pytest.raises(InterruptedError):
        fc.measure(net, Stream(images, dies=2), checkpoint=path, **options)
    assert path.exists()
    updates = []
    update = FisherEstimator.update
    monkeypatch.setattr(
        FisherEstimator,
        "update",
        lambda *arguments: updates.append(1) or update(*arguments),
    )
    resumed = fc.measure(net, Stream(images), checkpoint=path, **options)
    assert len(updates) == 1  # of three batches
    assert (resumed.activation_trace == whole.activation_trace).all()
    assert (resumed.activation_distortion == whole.activation_distortion).all()


class Counted:
    """Batches that know how many of them are alive."""

    def __init__(self) -> None:
        self.alive, self.most = weakref.WeakSet(), 0

    def __iter__(self):
        for number in range(40):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(number))
            self.alive.add(x)
            self.most = max(self.most, len(self.alive))
            yield x
            del x


@pytest.mark.parametrize("bits", [(), (8, 4)])
def test_batches_are_not_kept(bits) -> None:
    net, data = nn.Sequential(nn.Linear(6, 4)).eval(), Counted()
    options = {"grids": GRIDS, "progress": False}
    table = fc.measure(net, data, activation_bits=bits, **options)
    assert table.samples == 120
    assert data.most <= 4
    once = Counted()  # a generator is, if its batches are needed twice
    again = fc.measure(net, iter(once), activation_bits=bits, **options)
    assert (again.activation_distortion == table.activation_distortion).all()
    assert (once.most <= 4) is (not bits)
    moments = Counted()
    fc.measure_fisher(net, moments, progress=False)
    assert moments.most <= 4


def test_bits_in_other_containers(net, loader):
    for bits in (8, [8], iter([8])):
        table = fc.measure(
            net, loader, grids=GRIDS, activation_bits=bits, progress=False
        )
        assert table.activation_bits == (None, 8)


@pytest.mark.parametrize("bits", [(4, 8), (8, 8), (17,), (1,), (8.0,)])
def test_bad_bits(net, loader, bits):
    with pytest.raises(OptionError, match="activation bits"):
        fc.measure(net, loader, grids=GRIDS, activation_bits=bits, progress=False)
