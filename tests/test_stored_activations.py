"""What is saved of quantizers of activations is what they do, or an error."""

import copy

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import NonFiniteError, OptionError
from fitcompress.model import compressible_layers
from fitcompress.model.value_ranges import Range
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    attach_activation,
)


@pytest.fixture
def small(net, images) -> nn.Module:
    layers = compressible_layers(net)
    plan = fc.Plan({x.name: fc.Level(fc.Grid(bits=6), 0.0, x.shape) for x in layers})
    return fc.apply(net, plan, [images], progress=False)


def attached(model, layer, images, **options) -> ActivationQuantizer:
    channel = options.pop("channel", None)
    observer = None if options.get("dynamic") else MinMaxObserver(channel)
    made = ActivationQuantizer(6, observer, channel=channel, **options)
    attach_activation(model.get_submodule(layer), made)
    with torch.no_grad():
        model(images)
    made.freeze()
    return made


@pytest.mark.parametrize("step", [-0.01, 0.0, 1e-45])
def test_steps_that_training_lost_are_saved_as_they_are_used(
    net, small, images, tmp_path, step
) -> None:
    made = attached(small, "head", images)
    with torch.no_grad():
        made.scale.fill_(step)
    assert 0 < float(made.step.detach()) < 1e-30
    small(images).sum().backward()
    assert made.scale.grad is not None and made.scale.grad.isfinite().all()
    fc.save(small, tmp_path / "small")
    loaded = fc.load(tmp_path / "small", copy.deepcopy(net))
    assert torch.equal(loaded(images), small(images))


@pytest.mark.parametrize("step", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_not_saved(small, images, tmp_path, step) -> None:
    made = attached(small, "head", images)
    with torch.no_grad():
        made.scale.fill_(step)
    with pytest.raises(NonFiniteError, match=r"head.*scale has values"):
        fc.save(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_ranges_have_steps(step) -> None:
    with pytest.raises(OptionError, match="not positive and finite"):
        ActivationQuantizer(4).set_range(Range(torch.tensor([1.0, step]), 0, 15))


def test_a_state_must_fit_the_bits() -> None:
    def state(lo, hi):
        return {"scale": torch.ones(1), "bounds": torch.tensor([lo, hi]).int()}

    for lo, hi in ((0, 255), (-8, 8), (1, 3), (-3, -1)):
        made = ActivationQuantizer(4)
        with pytest.raises(RuntimeError, match="are no 4 bits"):
            made.load_state_dict(state(lo, hi))
        assert not made.calibrated
    even = ActivationQuantizer(4, symmetric=True)
    with pytest.raises(RuntimeError, match="are no 4 bits"):
        even.load_state_dict(state(-8, 7))
    with pytest.raises(OptionError, match="on both sides"):
        even.set_range(Range(torch.ones(1), -8, 7))
    even.load_state_dict(state(-7, 7))
    even.load_state_dict(state(0, 0))  # not calibrated


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("layer", "channel"), [("conv", 0), ("conv", -1), ("out", 0), ("out", 1)]
)
def test_steps_along_other_dimensions_are_refused(
    small, images, tmp_path, layer, channel, dynamic
) -> None:
    attached(small, layer, images, channel=channel, dynamic=dynamic)
    with pytest.raises(OptionError, match=f"'{layer}' has steps .* channel={channel};"):
        fc.save(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dynamic", [False, True])
def test_channels_of_a_batch_are_those_from_the_end(
    net, small, images, tmp_path, dynamic
) -> None:
    attached(small, "conv", images, channel=1, dynamic=dynamic)
    fc.save(small, tmp_path / "small")
    loaded = fc.load(tmp_path / "small", copy.deepcopy(net))
    assert torch.equal(loaded(images), small(images))
