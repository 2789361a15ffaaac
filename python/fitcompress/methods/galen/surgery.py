"""``prune_channels``: a smaller network, from a list of the channels that stay."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.errors import OptionError, PlanMismatchError, UnsupportedLayerError
from fitcompress.quantize import grid_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CONVOLUTIONS", "is_depthwise", "prune_channels"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATISTICS = ("weight", "bias", "running_mean", "running_var")


@torch.no_grad()
def prune_channels(
    model: nn.Module, kept: Mapping[str, Mapping[str, Sequence[int]]]
) -> nn.Module:
    """Return a copy of a network without some of its channels.

    The list says it for every module that changes, so neither an example nor a package
    that traces networks is needed to build the network of a packed file:

        >>> import torch, fitcompress as fc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> kept = {"0": {"out": [0, 1, 5]}, "1": {"in": [0, 1, 5]}}
        >>> fc.methods.prune_channels(net, kept)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): Linear(in_features=3, out_features=2, bias=True)
        )

    Args:
        model: The dense network; unchanged.
        kept: Name of a module → ``"out"`` and ``"in"`` → indices of the output and
            input channels that stay, rising; a side that is not named stays whole.
            Norms and depthwise convolutions have ``"out"`` only. ``Galen`` leaves it in
            ``plan.details["kept_channels"]``.

    Raises:
        PlanMismatchError: The model has no such module, or not so many channels.
        UnsupportedLayerError: A module is neither a Linear, a convolution that is not
            grouped or a depthwise one, nor a batch norm.
        OptionError: The list is none, indices do not rise, there is none, or a side has
            another name; or the weight of a module is on a grid already.
    """
    _check_list(kept)
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    for name, sides in kept.items():
        if name not in modules:
            raise PlanMismatchError(
                f"the list of channels has a module {name!r} that the model lacks",
                got=type(model).__name__,
                fix="build the model that was pruned, with the same options",
            )
        if grid_of(modules[name]) is not None:
            raise OptionError(
                f"the weight of {name!r} is on a grid already",
                wanted="a dense model",
                fix="prune the dense model, then load the packed file into it",
            )
        if extra := set(sides) - {"in", "out"}:
            raise OptionError(
                f"channels of {name!r}", got=sorted(extra), wanted='"in" and "out"'
            )
        for side, indices in sides.items():
            _cut_(name, modules[name], side, indices)
    return small


def is_depthwise(module: nn.Module) -> bool:
    """Whether every output channel of a convolution has an input channel of its own."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    return module.groups > 1 and (
        module.groups == module.in_channels == module.out_channels
    )


def _check_list(kept: object) -> None:
    """Raise unless this is name → side → whole numbers, as in a plan file."""
    wrong = [kept]
    if isinstance(kept, Mapping):
        wrong = [side for side in kept.values() if not isinstance(side, Mapping)]
    if isinstance(kept, Mapping) and not wrong:
        lists = [each for side in kept.values() for each in side.values()]
        wrong = [each for each in lists if not _is_list(each)]
    if not wrong:
        return
    raise OptionError(
        "this is no list of channels",
        got=repr(wrong[0])[:100],
        wanted='{module: {"out": [whole numbers], "in": […]}}',
        fix='give plan.details["kept_channels"]',
    )


def _is_list(indices: object) -> bool:
    whole = isinstance(indices, (list, tuple, range))
    return whole and all(type(i) is int for i in indices)  # type: ignore[attr-defined]


def _cut_(name: str, module: Any, side: str, indices: Sequence[int]) -> None:
    """Leave these channels of a module, in place."""
    norm, depthwise = isinstance(module, _BatchNorm), is_depthwise(module)
    if not _cuttable(module) or (side == "in" and (norm or depthwise)):
        raise UnsupportedLayerError(
            f"{name!r} cannot lose channels",
            got=f"{side} of {type(module).__name__}",
            wanted="a Linear, a convolution without groups, a depthwise one or a "
            "batch norm",
        )
    index = _checked(name, _width(module, side), indices)
    if norm:
        for each in STATISTICS:
            _keep_(module, each, 0, index)
        module.num_features = len(index)
        return
    _keep_(module, "weight", int(side == "in"), index)
    linear = isinstance(module, nn.Linear)
    if side == "in":
        setattr(module, "in_features" if linear else "in_channels", len(index))
        return
    _keep_(module, "bias", 0, index)
    setattr(module, "out_features" if linear else "out_channels", len(index))
    if depthwise:
        module.in_channels = module.groups = len(index)


def _cuttable(module: Any) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 or is_depthwise(module)
    return isinstance(module, (nn.Linear, _BatchNorm))


def _width(module: Any, side: str) -> int:
    if isinstance(module, _BatchNorm):
        return module.num_features
    return int(module.weight.shape[int(side == "in")])


def _checked(name: str, width: int, indices: Sequence[int]) -> torch.Tensor:
    found = list(indices)
    if not found or any(a >= b for a, b in itertools.pairwise(found)):
        raise OptionError(
            f"channels of {name!r}",
            got=f"{found[:8]} …" if len(found) > 8 else found,
            wanted="indices that rise, at least one",
        )
    if found[0] < 0 or found[-1] >= width:
        raise PlanMismatchError(
            f"{name!r} has not so many channels",
            got=f"{width} channels",
            wanted=f"channels {found[0]} … {found[-1]}",
            fix="build the model that was pruned, with the same options",
        )
    return torch.tensor(found)


def _keep_(module: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    cut = tensor.detach().index_select(dim, index.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
    setattr(module, name, cut)
