"""What is saved of quantizers of activations is what they do, or an error."""

import copy

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import OptionError
from fitcompress.model import compressible_layers
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
