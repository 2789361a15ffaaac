"""Models that several processes hold together: what is sharded, and the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fitcompress.errors import OptionError, UnsupportedLayerError

if TYPE_CHECKING:
    from fitcompress.ranks import Ranks

__all__ = ["check_sharding", "is_sharded", "local", "reshard", "unwrapped", "whole"]

FIX = "shard the model with torch.distributed.fsdp.fully_shard"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside ``DistributedDataParallel``, else the model itself."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only parts of parameters."""
    return any(hasattr(p, "full_tensor") for p in model.parameters()) or bool(
        _fsdp(model)
    )


def check_sharding(model: nn.Module, ranks: Ranks) -> None:
    """Raise unless a sharded model gathers its parameters itself, as FSDP2 does.

    Raises:
        UnsupportedLayerError: It is wrapped by FSDP1, or sharded otherwise.
        OptionError: It is sharded over other processes than those of the group.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedLayerError(
                f"{name or 'the model'} is wrapped by FSDP1, whose parameters have no "
                "shapes",
                got="FullyShardedDataParallel",
                fix=FIX,
            )
    if not is_sharded(model):
        return
    managed = {id(p) for module in _fsdp(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", None)
        if placements is None:
            continue
        kinds = [type(each).__name__ for each in placements]
        if id(parameter) not in managed or kinds not in (
            ["Shard"],
            ["Replicate", "Shard"],
        ):
            raise UnsupportedLayerError(
                f"parameter {name!r} is sharded in a way that cannot be measured",
                got=", ".join(kinds),
                wanted="one sharded dimension, gathered whenever the layer runs",
                fix=FIX,
            )
        size = parameter.device_mesh.size()  # type: ignore[attr-defined]
        if size != ranks.count:
            raise OptionError(
                f"parameter {name!r} is sharded over other processes than the group's",
                got=f"a mesh of {size}",
                wanted=f"one of {ranks.count}",
                fix="pass the process group of the mesh",
            )


def reshard(model: nn.Module) -> None:
    """Let go of parameters that have been gathered, as those of the root module are."""
    for module in _fsdp(model):
        module.reshard()  # type: ignore[operator]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be sharded as one; all processes must call this."""
    if hasattr(tensor, "full_tensor"):
        gathered: torch.Tensor = tensor.full_tensor()
        return gathered
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    if hasattr(tensor, "to_local"):
        held: torch.Tensor = tensor.to_local()
        return held
    return tensor


def _fsdp(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]
