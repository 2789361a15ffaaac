"""What is added to the outputs of a layer, as residual connections do.

A layer whose output y goes into a sum r + y, and into nothing else that torch's
dispatcher sees, can repair what earlier layers have done to r as well as what they have
done to its own inputs: it is to answer

    y + (r − r̂) / s

with r̂ what r is in the network compressed so far, and s the factors of a norm between
the layer and the sum, 1 without. r must be there before the layer runs, as input or
output of a module; and the layer must answer W x + b, whatever class it is of.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.compensate.statistics import as_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.model import Layer

__all__ = ["Residual", "first_tensor", "watch_residuals"]


@dataclass(frozen=True, eq=False)
class Residual:
    """What is added to the outputs of a layer.

    Attributes:
        module: Name of a module that has it as input or output before the layer runs.
        output: Whether it is the output.
        inverse: 1 / s, float32 [rows], or None without a norm; 0 for rows that hardly
            count.
    """

    module: str
    output: bool
    inverse: torch.Tensor | None = None

    def share(self, layer: Layer, r: torch.Tensor) -> torch.Tensor:
        """Return r / s as [N, rows, D, H, W], as `layer_outputs` returns y.

        Args:
            layer: The layer.
            r: Without padding.
        """
        r = as_outputs(layer, r)
        if self.inverse is None:
            return r
        return r * self.inverse.reshape(1, -1, 1, 1, 1)


def watch_residuals(
    model: nn.Module,
    residuals: dict[str, Residual],
    tell: Callable[[str, torch.Tensor], None],
) -> contextlib.ExitStack:
    """Call ``tell(layer, r)`` whenever ``model`` has computed the r of a layer.

    Returns:
        What to close at the end.
    """
    hooks = contextlib.ExitStack()
    for name, residual in residuals.items():
        module = model.get_submodule(residual.module)

        def before(_: Any, args: Any, named: Any, name: str = name) -> None:
            r = first_tensor(args, named)
            assert r is not None
            tell(name, r)

        def after(_: Any, __: Any, out: Any, name: str = name) -> None:
            tell(name, out)

        handle = (
            module.register_forward_hook(after)
            if residual.output
            else module.register_forward_pre_hook(before, with_kwargs=True)
        )
        hooks.callback(handle.remove)
    return hooks


def first_tensor(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor | None:
    """Return the first float tensor that a module was called with."""
    given = [x for x in (*args, *named.values()) if torch.is_tensor(x)]
    return next((x for x in given if x.is_floating_point()), None)
