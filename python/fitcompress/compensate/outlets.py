"""Where the outputs of a layer can be shifted or scaled for free."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import floats
from fitcompress.model.forward import call_model
from fitcompress.model.patches import layer_input
from fitcompress.quantize import MOST_DIGITS, is_folded, shorten, to_half

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.model import Layer

__all__ = ["Outlet", "find_outlets"]


@dataclass(frozen=True)
class Outlet:
    """What follows a layer.

    Attributes:
        module: Name of the layer with a bias or of the norm that follows; None: nothing
            can take a shift.
        norm: Whether it is a norm, which takes a factor too.
    """

    module: str | None
    norm: bool = False

    @torch.no_grad()
    def adjust(
        self,
        model: nn.Module,
        shift: torch.Tensor | None,
        gain: torch.Tensor | None,
        digits: int = MOST_DIGITS,
    ) -> None:
        """Make up for outputs that come out as (y − shift) / gain, in place.

        Args:
            model: With folded norms, y ↦ a y + c.
            shift: To add to the layer's outputs, [rows], or None.
            gain: To multiply them by before, [rows], or None.
            digits: Binary digits that the numbers of a norm keep.
        """
        if self.module is None:
            return
        module = model.get_submodule(self.module)
        assert isinstance(module.bias, torch.Tensor)
        slope = torch.ones_like(module.bias, dtype=torch.float64)
        if self.norm:
            assert isinstance(module.weight, torch.Tensor)
            slope = module.weight.double()
        if shift is not None:
            moved = module.bias.double() + slope * shift.double()
            short = to_half(moved.float())
            module.bias.copy_(shorten(short, digits) if self.norm else short)
        if gain is not None and self.norm:
            assert isinstance(module.weight, torch.Tensor)
            short = to_half((slope * gain.double()).float())
            module.weight.copy_(shorten(short, digits))


@torch.no_grad()
def find_outlets(model: nn.Module, layers: list[Layer], x: Any) -> dict[str, Outlet]:
    """Return the outlet of every layer, seen by running ``x``.

    The layer's own bias if it has one; else a norm over the same channels that reads
    the layer's output as it is, and is the only one to read it. A layer that runs more
    than once, or not at all, has none: its inputs have no one mean.

    Args:
        model: With folded norms.
        layers: Names of the layers are looked up in ``model``.
        x: Some inputs.
    """
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    norms = {name: m for name, m in model.named_modules() if is_folded(m)}
    made: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in modules}
    taken: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in norms}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():

            def output(_: Any, __: Any, out: torch.Tensor, name: str = name) -> None:
                made[name].append((out, out._version))

            hooks.callback(module.register_forward_hook(output).remove)
        for name, module in norms.items():

            def take(_: Any, args: Any, named: Any, name: str = name) -> None:
                read = layer_input(args, named)
                taken[name].append((read, read._version))

            handle = module.register_forward_pre_hook(take, with_kwargs=True)
            hooks.callback(handle.remove)
        call_model(model, x)
    outlets, followers = {}, {}
    for layer in layers:
        outlets[layer.name] = Outlet(None)
        if len(made[layer.name]) != 1 or layer.rounded_alone:
            continue
        if isinstance(getattr(modules[layer.name], "bias", None), torch.Tensor):
            outlets[layer.name] = Outlet(layer.name)
            continue
        out, version = made[layer.name][0]
        for norm, reads in taken.items():
            same = len(reads) == 1 and reads[0][0] is out and reads[0][1] == version
            if same and _channels_agree(layer, out, norms[norm]):
                followers[layer.name] = norm
    for group in (list(followers), *([name] for name in followers)):
        if _sole_readers(model, {name: followers[name] for name in group}, x):
            for name in group:
                outlets[name] = Outlet(followers[name], norm=True)
            if len(group) == len(followers):
                break
    return outlets


def _channels_agree(layer: Layer, out: torch.Tensor, norm: nn.Module) -> bool:
    """Whether the norm's channels are the layer's rows, along dimension 1."""
    dimension = 1 if hasattr(layer.module, "kernel_size") else out.dim() - 1
    return dimension == 1 and getattr(norm, "num_features", None) == layer.rows


def _sole_readers(model: nn.Module, followers: dict[str, str], x: Any) -> bool:
    """Whether nothing but these norms reads the outputs of these layers.

    Constants are added to the outputs and taken off again where the norms read them:
    the model's outputs do not change unless something else has read them too.
    """
    before = floats(call_model(model, x))
    with contextlib.ExitStack() as hooks:
        for name, norm in followers.items():

            def add(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
                return out + 1.0

            def take(
                _: Any, args: tuple[Any, ...], named: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                read = layer_input(args, named) - 1.0
                return (read,), {}

            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(add).remove)
            handle = model.get_submodule(norm).register_forward_pre_hook(
                take, with_kwargs=True
            )
            hooks.callback(handle.remove)
        after = floats(call_model(model, x))
    return len(before) == len(after) and all(
        a.shape == b.shape
        and float((a - b).double().norm()) <= 1e-3 * float(a.double().norm()) + 1e-6
        for a, b in zip(before, after, strict=True)
    )
