"""Where the outputs of a layer can be shifted or scaled for free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import CalibrationError
from fitcompress.quantize import is_folded, to_half

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
    ) -> None:
        """Make up for outputs that come out as (y − shift) / gain, in place.

        Args:
            model: With folded norms, y ↦ a y + c.
            shift: To add to the layer's outputs, [rows], or None.
            gain: To multiply them by before, [rows], or None.
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
            module.bias.copy_(to_half(moved.float()))
        if gain is not None and self.norm:
            assert isinstance(module.weight, torch.Tensor)
            module.weight.copy_(to_half((slope * gain.double()).float()))


@torch.no_grad()
def find_outlets(
    model: nn.Module, layers: list[Layer], x: torch.Tensor
) -> dict[str, Outlet]:
    """Return the outlet of every layer, seen by running ``x``.

    Args:
        model: With folded norms.
        layers: Names of the layers are looked up in ``model``.
        x: Some inputs.

    Raises:
        CalibrationError: A layer is never reached; names the first one.
    """
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    norms = {name: m for name, m in model.named_modules() if is_folded(m)}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    taken: dict[str, list[torch.Tensor]] = {name: [] for name in norms}
    handles = []
    for name, module in modules.items():

        def output(_: Any, __: Any, out: torch.Tensor, name: str = name) -> None:
            made[name].append(out)

        handles.append(module.register_forward_hook(output))
    for name, module in norms.items():

        def take(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            taken[name].append(args[0])

        handles.append(module.register_forward_pre_hook(take))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, outputs in made.items() if not outputs]
    if missing:
        raise CalibrationError(
            f"the calibration data never reach layer {missing[0]!r}",
            got=f"{len(missing)} of {len(layers)} layers not reached",
            wanted="a forward pass that uses every compressible layer",
            fix="calibrate with inputs that exercise it, or remove the layer",
        )
    outlets = {}
    for name, module in modules.items():
        follower = next(
            (
                n
                for n, inputs in taken.items()
                if len(made[name]) == len(inputs) == 1 and inputs[0] is made[name][0]
            ),
            None,
        )
        if follower is not None:
            outlets[name] = Outlet(follower, norm=True)
        elif isinstance(getattr(module, "bias", None), torch.Tensor):
            outlets[name] = Outlet(name)
        else:
            outlets[name] = Outlet(None)
    return outlets
