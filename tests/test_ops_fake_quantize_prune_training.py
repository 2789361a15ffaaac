"""fake_quantize_prune in training: gradients, torch.compile, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from fitcompress import ops, reference
from fitcompress.quantize import WeightGrid, attach_grid

backward = torch.ops.fitcompress.fake_quantize_prune_backward

# Torch's own use of it, in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def example(shape, masked=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    scale = torch.rand(shape[0], generator=generator) * 0.5 + 0.01
    mask = None
    if masked:
        mask = ops.pack_mask(torch.rand(shape, generator=generator) < 0.6)
    return weight, scale, mask


@pytest.mark.parametrize("max_code", [0, 2])
def test_autograd_uses_the_backward_op(max_code):
    weight, scale, mask = example((4, 9))
    weight.requires_grad_()
    scale.requires_grad_()
    grad = torch.randn(4, 9)
    ops.fake_quantize_prune(weight, scale, mask, max_code).backward(grad)
    expected = reference.fake_quantize_prune_backward(
        grad, weight.detach(), scale.detach(), mask, max_code
    )
    assert torch.equal(weight.grad, expected[0])
    torch.testing.assert_close(scale.grad, expected[1])


def test_there_is_no_second_derivative():
    weight, scale, mask = example((4, 9))
    weight.requires_grad_()
    result = ops.fake_quantize_prune(weight, scale, mask, 3).square().sum()
    (grad,) = torch.autograd.grad(result, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_scale_gradient_is_a_finite_difference():
    # d/dΔ of Δ·k at a fixed code is k, and STE adds −w/Δ: the clipped weights alone
    # have a derivative in the ordinary sense
    weight = torch.tensor([5.3, -8.1, 100.0])
    scale = torch.tensor([0.5], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0])
    (ops.fake_quantize_prune(weight, scale, None, 3) * grad).sum().backward()
    with torch.no_grad():
        above, below = (
            (ops.fake_quantize_prune(weight, scale + e, None, 3) * grad).sum()
            for e in (0.125, -0.125)
        )
    assert scale.grad.item() == ((above - below) / 0.25).item()


def composition(weight, scale, mask, low, high, group):
    """The same function of torch's own differentiable ops."""
    delta = scale.view(len(weight), -1).repeat_interleave(group, 1)[
        :, : weight[0].numel()
    ]
    x = weight / delta
    # identity where x rounds to a code inside the bounds, constant outside
    outside = x.detach().round().clamp(low, high)
    x = torch.where(x.detach().round() == outside, x, outside)
    return mask * delta * (x + (x.round() - x).detach())


@pytest.mark.parametrize(("low", "high"), [(-2, 2), (0, 3), (-5, 1)])
@pytest.mark.parametrize("group", [9, 4, 1])
def test_composition_of_torch_ops_has_the_same_gradient(group, low, high):
    weight, _, _ = example((4, 9))
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(4 * -(-9 // group), generator=generator) * 0.5 + 0.1
    mask = torch.rand(4, 9, generator=generator) < 0.7
    results = []
    for native in (True, False):
        w = weight.clone().requires_grad_()
        s = scale.clone().requires_grad_()
        if native:
            out = ops.fake_quantize_prune(
                w, s, ops.pack_mask(mask), high, min_code=low, group=group
            )
        else:
            out = composition(w, s, mask, low, high, group)
        out.square().sum().backward()
        results.append((out.detach(), w.grad, s.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_gradcheck_where_there_is_a_derivative():
    # Clipped weights: ŵ = ±q Δ, so ∂ŵ/∂Δ = ±q and ∂ŵ/∂w = 0; exact in float32.
    weight = torch.tensor([[5.25, -8.5, 64.0], [7.0, -9.0, -4.5]], requires_grad=True)
    scale = torch.tensor([0.5, 0.25], requires_grad=True)
    assert gradcheck(
        lambda w, s: ops.fake_quantize_prune(w, s, None, 3),
        (weight, scale),
        eps=2**-5,
        atol=1e-6,
        rtol=1e-6,
        nondet_tol=0.0,
        check_undefined_grad=False,
    )


class Quantized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 6, generator=generator))
        self.scale = torch.nn.Parameter(torch.full((8,), 0.2))
        self.register_buffer("mask", ops.pack_mask(self.weight.abs() > 0.3))

    def forward(self, x):
        weight = ops.fake_quantize_prune(self.weight, self.scale, self.mask, 7)
        return torch.nn.functional.linear(x, weight).relu()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_training_equals_eager(dynamic, backend):
    torch.compiler.reset()
    weights = []
    for compiled in (True, False):
        model = Quantized()
        step = torch.compile(
            model,
            fullgraph=True,
            backend=backend,
            dynamic=dynamic,
            disable=not compiled,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in range(3):
            x = torch.randn(
                5 + batch, 6, generator=torch.Generator().manual_seed(batch)
            )
            optimizer.zero_grad()
            step(x).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    weight, scale, mask = example((4, 5), masked=masked)
    forward = torch.ops.fitcompress.fake_quantize_prune.default
    arguments = (weight.requires_grad_(), scale.requires_grad_(), mask, 3)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(
        backward.default,
        (torch.randn(4, 5), weight.detach(), scale.detach(), mask, 3),
    )


@pytest.mark.parametrize("masked", [True, False])
def test_a_parametrized_model_compiles_in_one_graph(masked):
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    for module in (model[0], model[3]):
        weight = module.weight.detach()
        mask = weight.flatten(1).abs() > 0.05 if masked else None
        attach_grid(
            module, WeightGrid(torch.full((len(weight),), 0.05), 7, mask), weight
        )
    twin = copy.deepcopy(model)
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True)
    for net, call in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        call(x).square().mean().backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(compiled(x), twin(x))
