"""Quantizers of activations: on the grid, through copies, files and the compiler."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fitcompress import reference
from fitcompress.errors import (
    CalibrationError,
    NonFiniteError,
    OptionError,
    UnsupportedLayerError,
)
from fitcompress.model.value_ranges import Range
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    MSEObserver,
    activation_of,
    attach_activation,
    channel_of,
    detach_activation,
    remove,
)

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 7, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (5, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (5, 3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (5, 3, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (5, 3, 6, 7)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 4, 4, 4)),
}
KINDS = {
    "tensor": {},
    "channel": {"wide": True},
    "symmetric": {"symmetric": True},
    "dynamic": {"dynamic": True},
    "dynamic channel": {"dynamic": True, "wide": True},
    "dynamic symmetric": {"dynamic": True, "symmetric": True},
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, module: nn.Module, x: torch.Tensor, bits: int = 4):
    options = dict(KINDS[kind])
    channel = channel_of(module) if options.pop("wide", False) else None
    if options.get("dynamic"):
        return ActivationQuantizer(bits, channel=channel, **options)
    quantizer = ActivationQuantizer(bits, MSEObserver(channel), **options)
    quantizer(x)
    quantizer.freeze()
    return quantizer


def fixed(lo: int, hi: int, scale: float = 0.5, bits: int = 3) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits)
    quantizer.set_range(Range(torch.tensor([scale]), lo, hi))
    return quantizer


def test_values_and_gradients_by_hand() -> None:
    quantizer = fixed(-2, 5)  # Δ = ½
    x = torch.tensor([-9.0, -1.0, 0.0, 0.25, 0.3, 1.1, 9.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 1.0, 2.5]  # half to even
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    # LSQ: bounds −2 and 5, and k − x/Δ between: 0, 0, −½, 1 − .6, 2 − 2.2.
    slope = (-2 + 5 + 0 + 0 - 0.5 + 0.4 - 0.2) / (7 * 5) ** 0.5
    assert quantizer.scale.grad.tolist() == pytest.approx([slope])


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_are_those_of_the_twin(wide) -> None:
    x = noise(6, 3, 5).mul(2).requires_grad_()
    scale = torch.tensor([0.2, 0.5, 0.9]) if wide else torch.tensor([0.4])
    quantizer = ActivationQuantizer(3, channel=1 if wide else None)
    quantizer.set_range(Range(scale, -3, 4))
    out = noise(6, 3, 5, seed=1)
    quantizer(x).backward(out)
    rows, back = x.detach(), out
    if wide:
        rows, back = rows.transpose(0, 1), back.transpose(0, 1)
    weight, step = reference.fake_quantize_prune_backward(
        back, rows, scale, None, 4, min_code=-3
    )
    weight = weight.transpose(0, 1) if wide else weight
    assert torch.allclose(x.grad, weight)
    smaller = (4 * x.numel() / len(scale)) ** -0.5
    assert torch.allclose(quantizer.scale.grad, smaller * step, rtol=1e-4)


def test_small_scale_gradients_leave_the_value_alone() -> None:
    x = noise(100)
    scale = torch.tensor([0.1234567])
    for learn in (False, True):
        quantizer = ActivationQuantizer(4, learn=learn)
        quantizer.set_range(Range(scale, -8, 7))
        expected = reference.fake_quantize_prune(x, scale, None, 7, min_code=-8)
        assert torch.equal(quantizer(x), expected)
        assert quantizer.scale.requires_grad == learn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_gets_an_input_on_the_grid(layer, kind) -> None:
    build, shape = LAYERS[layer]
    module, x = build(), noise(*shape)
    quantizer = make(kind, module, x)
    dense = module(x)
    attach_activation(module, quantizer)
    assert activation_of(module) is quantizer
    inputs = quantizer(x)
    other = copy.deepcopy(module)
    detach_activation(other)
    assert torch.equal(module(x), other(inputs))
    assert torch.equal(module(input=x), module(x))
    assert torch.equal(other(x), dense)
    assert not other._forward_pre_hooks and not list(other.children())
    wide = quantizer.channel is not None
    rows = inputs.movedim(channel_of(module), 0).flatten(1) if wide else [inputs]
    for row in rows:
        assert len(row.unique()) <= 16
    assert float((inputs - x).detach().square().mean()) < 0.1
    module(x).sum().backward()
    if not quantizer.dynamic:
        assert quantizer.scale.grad.shape == ((3,) if wide else (1,))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_state_and_compiler_agree(kind) -> None:
    module, x = nn.Conv2d(3, 4, 3), noise(2, 3, 6, 6)
    attach_activation(module, make(kind, module, x))
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        assert activation_of(twin) is not activation_of(module)
    fresh = nn.Conv2d(3, 4, 3)
    own = activation_of(module)
    attach_activation(
        fresh,
        ActivationQuantizer(
            4, channel=own.channel, dynamic=own.dynamic, symmetric=own.symmetric
        ),
    )
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    module.zero_grad()
    x.requires_grad_()
    compiled(x).square().sum().backward()
    by_compiler = [p.grad.clone() for p in module.parameters()] + [x.grad.clone()]
    module.zero_grad()
    x.grad = None
    module(x).square().sum().backward()
    by_hand = [p.grad for p in module.parameters()] + [x.grad]
    for a, b in zip(by_compiler, by_hand, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_unsigned_unless_something_is_negative() -> None:
    x = noise(1000)
    quantizer = make("tensor", nn.Linear(2, 2), x.relu())
    assert (quantizer.min_code, quantizer.max_code) == (0, 15)
    quantizer = make("tensor", nn.Linear(2, 2), x)
    assert quantizer.min_code < 0
    assert quantizer.max_code - quantizer.min_code == 15
    quantizer = make("symmetric", nn.Linear(2, 2), x.relu())
    assert (quantizer.min_code, quantizer.max_code) == (-7, 7)
    assert quantizer(torch.zeros(1)).tolist() == [0.0]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shift", [-5.0, -0.3, 0.0, 0.2, 5.0])
def test_a_dynamic_quantizer_covers_every_batch(bits, shift) -> None:
    quantizer = ActivationQuantizer(bits, dynamic=True)
    assert not quantizer.state_dict()
    for width in (1e-3, 1.0, 1e3):
        x = (noise(500) + shift) * width
        y = quantizer(x)
        codes = y.unique()
        step = quantizer._batch_scale(x)
        assert len(codes) <= 2**bits
        assert float((y - x).abs().max()) <= 0.5001 * float(step)
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))


def test_observing_then_frozen() -> None:
    quantizer = ActivationQuantizer(4, MinMaxObserver())
    x = noise(50)
    assert not quantizer.calibrated
    with pytest.raises(CalibrationError, match="no value was seen"):
        quantizer.freeze()
    assert quantizer(x) is x
    with pytest.raises(NonFiniteError):
        quantizer(x / 0)
    quantizer.freeze()
    assert quantizer.calibrated
    assert not torch.equal(quantizer(x), x)
    state = copy.deepcopy(quantizer.state_dict())
    quantizer.freeze()  # again: nothing changes
    quantizer(100 * x)
    assert all(torch.equal(state[k], v) for k, v in quantizer.state_dict().items())
    with pytest.raises(CalibrationError, match="before it was calibrated"):
        ActivationQuantizer(4)(x)
    observing = ActivationQuantizer(4, MinMaxObserver())
    observing.load_state_dict(state)
    assert torch.equal(observing(x), quantizer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_keep_their_type(kind, dtype) -> None:
    module, x = nn.Conv1d(3, 4, 2), noise(2, 3, 9)
    quantizer = make(kind, module, x)
    y = quantizer(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, quantizer(x.to(dtype).float()).to(dtype))
    assert torch.isfinite(quantizer.to(dtype)(x)).all()  # the model in that type


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_strides_and_scalars(kind) -> None:
    module, x = nn.Conv2d(3, 4, 3), noise(2, 3, 6, 6)
    quantizer = make(kind, module, x)
    attach_activation(module, quantizer)
    assert module(x[:0]).shape == (0, 4, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(quantizer(last), quantizer(x))
    assert torch.equal(quantizer(x[0]), quantizer(x[:1])[0])  # without a batch


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_devices_agree(kind) -> None:
    module, x = nn.Conv2d(3, 4, 3), noise(4, 3, 6, 6)
    quantizer = make(kind, module, x)
    expected = quantizer(x)
    assert torch.equal(quantizer.cuda()(x.cuda()).cpu(), expected)
    there = make(kind, module, x.cuda())
    assert torch.equal(there.cuda()(x.cuda()).cpu(), expected)


def test_replacing_and_removing() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), noise(8, 3)
    dense = model(x)
    for quantizer in (fixed(-2, 5), fixed(-4, 3, 0.25)):
        attach_activation(model[1], quantizer)
        assert activation_of(model[1]) is quantizer
    assert len(model[1]._forward_pre_hooks) == 1
    assert remove(model) is model
    assert activation_of(model[1]) is quantizer  # it is part of the function
    remove(model, activations=True)
    assert activation_of(model[1]) is None
    assert torch.equal(model(x), dense)


def test_what_cannot_be_quantized_is_a_typed_error() -> None:
    attention = nn.MultiheadAttention(4, 2)
    for module in (nn.Embedding(3, 4), nn.ReLU(), attention.out_proj):
        with pytest.raises(UnsupportedLayerError, match="cannot be quantized"):
            attach_activation(module, fixed(0, 7))
    taken = nn.Linear(2, 2)
    taken.input_quantizer = nn.ReLU()
    with pytest.raises(UnsupportedLayerError, match="input_quantizer"):
        attach_activation(taken, fixed(0, 7))
    for bits in (1, 17, 4.0):
        with pytest.raises(OptionError, match="2 … 16"):
            ActivationQuantizer(bits)
    with pytest.raises(OptionError, match="observes nothing"):
        ActivationQuantizer(4, MinMaxObserver(), dynamic=True)
    for lo, hi in ((0, 8), (1, 3), (-3, 0)):
        with pytest.raises(OptionError, match="does not fit"):
            fixed(lo, hi)


@pytest.mark.parametrize("wide", [False, True])
def test_a_dynamic_quantizer_does_not_hide_nan(wide) -> None:
    x = torch.randn(4, 6)
    x[1, 2] = torch.nan
    quantizer = ActivationQuantizer(8, dynamic=True, channel=-1 if wide else None)
    y = quantizer(x)
    assert y[1, 2].isnan()
    assert bool(y[:, 3].isfinite().all()) is wide  # channels do not share a step


def test_dynamic_steps_reach_the_ends_of_a_type() -> None:
    for symmetric in (False, True):
        made = ActivationQuantizer(8, dynamic=True, symmetric=symmetric)
        for low in range(-65000, -100, 530):
            x = torch.tensor([65504.0, float(low), 1.0]).half()
            assert bool(made(x).isfinite().all())
        x[2] = torch.nan
        assert made(x)[2].isnan()
        x = torch.tensor([3e38, -3e38, 1e38])
        assert torch.allclose(made(x), x, atol=3e36)


def test_assigned_states_leave_steps_in_float32() -> None:
    made = ActivationQuantizer(8)
    state = fixed(0, 255, bits=8).state_dict()
    state["scale"] = state["scale"].half()
    made.load_state_dict(state, assign=True)
    assert made.scale.dtype == torch.float32
    assert made.scale.requires_grad and isinstance(made.scale, nn.Parameter)


def test_steps_stay_float32_in_a_half_precision_model() -> None:
    x = torch.rand(64, 6) * 1e-6  # a step that would be 0 in float16
    quantizer = ActivationQuantizer(8, MSEObserver())
    quantizer(x)
    quantizer.freeze()
    quantizer(x).sum().backward()
    step = quantizer.scale
    before = step.detach().clone()
    quantizer.half()
    assert quantizer.scale is step
    assert step.dtype == torch.float32
    assert step.grad is not None
    assert step.grad.dtype == torch.float32
    assert torch.equal(step.detach(), before)
    assert bool((quantizer(x.half()) > 0).any())
