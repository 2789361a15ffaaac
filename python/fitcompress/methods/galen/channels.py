"""Which layers can lose channels, and what goes with each: through torch-pruning."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.methods.galen.surgery import (
    CONVOLUTIONS,
    is_depthwise,
    prune_channels,
)
from fitcompress.model import compressible_layers
from fitcompress.model.devices import to_device
from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "ChannelGroup",
    "channel_groups",
    "kept_channels",
    "strongest",
    "without_channels",
]

logger = logging.getLogger(__name__)

CLOSE = 1e-3  # of the largest output: how exact a check in float32 is


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together: one decision.

    Attributes:
        layers: Layers that have them as outputs, in the order of the model.
        width: How many there are.
        owned: (module, side) → for every channel, its indices there; a channel of a
            convolution is many inputs of a Linear behind a flatten.
    """

    layers: tuple[str, ...]
    width: int
    owned: Mapping[tuple[str, str], Sequence[Sequence[int]]]

    def indices(self, channels: Iterable[int]) -> dict[tuple[str, str], list[int]]:
        """Return (module, side) → what belongs to these channels, rising."""
        chosen = sorted(channels)
        return {
            place: sorted(i for c in chosen for i in owned[c])
            for place, owned in self.owned.items()
        }


def channel_groups(
    model: nn.Module, example: Any
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups of channels that can be removed, and why others cannot.

    The dependency graph of torch-pruning (Fang et al. 2023, arXiv 2301.12900) tells
    what is coupled: layers whose outputs are added, norms, and the inputs of what
    follows. It is not believed: half of the channels of every group are removed on
    trial, and the group is left out unless the network computes what the dense one does
    with the same weights set to zero. A shortcut that pads channels, which shifts them,
    fails this, and so does the output layer.

    Args:
        model: The dense network.
        example: As the model takes it; the values do not matter.

    Returns:
        Groups in the order of their first layers; and layer → reason for all layers in
        none.
    """
    import torch_pruning as tp

    dense = copy.deepcopy(model).eval()
    for parameter in dense.parameters():
        parameter.requires_grad_(True)  # the graph is found through gradients
    example = to_device(_noise(example), next(dense.parameters()).device)
    graph = tp.DependencyGraph()
    reasons: dict[str, str] = {}
    groups: list[ChannelGroup] = []
    layers = compressible_layers(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(dense, example_inputs=example)
        except Exception as error:  # whatever tracing may raise
            text = " ".join(str(error).split())[:100] or type(error).__name__
            return [], {x.name: f"the network cannot be traced: {text}" for x in layers}
        seen: set[str] = set()
        for layer in layers:
            if layer.name in seen:
                continue
            group, why = _group(graph, dense, layer.name, layer.module)
            if group is not None:
                seen |= set(group.layers)
                why = _trial(dense, group, example)
                if not why:
                    groups.append(group)
                    continue
            for name in group.layers if group is not None else (layer.name,):
                reasons.setdefault(name, why)
    in_groups = {name for group in groups for name in group.layers}
    reasons = {name: why for name, why in reasons.items() if name not in in_groups}
    for name, why in reasons.items():
        logger.info("%s keeps its channels: %s", name, why)
    return groups, reasons


def kept_channels(
    groups: Sequence[ChannelGroup], kept: Sequence[Sequence[int]]
) -> dict[str, dict[str, list[int]]]:
    """Return the list for ``prune_channels`` that leaves these channels of groups.

    Groups that keep all channels are not in it.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for group, channels in zip(groups, kept, strict=True):
        if len(channels) == group.width:
            continue
        for (name, side), indices in group.indices(channels).items():
            found.setdefault(name, {})[side] = indices
    return found


@torch.no_grad()
def without_channels(
    model: nn.Module, group: ChannelGroup, removed: Iterable[int]
) -> nn.Module:
    """Return a copy of the same shapes that computes without these channels.

    What they own of weights, biases and norms is zero.
    """
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    for (name, side), indices in group.indices(removed).items():
        module: Any = modules[name]
        index = torch.tensor(indices, dtype=torch.long, device=module.weight.device)
        module.weight.index_fill_(int(side == "in"), index, 0)
        if side == "out" and module.bias is not None:
            module.bias.index_fill_(0, index, 0)
    return masked


@torch.no_grad()
def strongest(model: nn.Module, group: ChannelGroup, count: int) -> list[int]:
    """Return the ``count`` channels of largest norm, rising.

        I_c = √ Σ_m ‖W_m[c]‖² / mean_c' ‖W_m[c']‖²

    with m over the layers that have the channel as an output or as an input, each
    relative to its mean, for norms may scale either; batch norms do not count. Ties go
    to the lower index. The channels of the smallest norms are those that are removed,
    so the kept ones are nested.
    """
    total = torch.zeros(group.width, dtype=torch.float64)
    for (name, side), owned in group.owned.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            continue
        weight = module.weight.detach().double().cpu()
        squares = weight.transpose(0, int(side == "in")).flatten(1).square().sum(1)
        own = torch.stack([squares[list(indices)].sum() for indices in owned])
        total += own / own.mean().clamp_min(torch.finfo(torch.float64).tiny)
    order = torch.argsort(total, descending=True, stable=True)
    return sorted(order[:count].tolist())


def _group(
    graph: Any, dense: nn.Module, name: str, module: nn.Module
) -> tuple[ChannelGroup | None, str]:
    """Return what is coupled with the outputs of a layer, or why they must stay."""
    import torch_pruning as tp

    if isinstance(module, nn.Linear):
        prune, width = tp.prune_linear_out_channels, module.out_features
    elif isinstance(module, CONVOLUTIONS) and module.groups == 1:
        prune, width = tp.prune_conv_out_channels, module.out_channels
    elif is_depthwise(module):
        return None, "a depthwise convolution goes with the layer before it"
    else:
        grouped = isinstance(module, CONVOLUTIONS)
        kind = "a grouped convolution" if grouped else f"a {type(module).__name__}"
        return None, f"{kind} is not pruned"
    names = {each: key for key, each in dense.named_modules()}
    owned: dict[tuple[str, str], list[set[int]]] = {}
    for channel in range(width):
        try:
            items = list(graph.get_pruning_group(module, prune, idxs=[channel]))
        except Exception as error:  # torch-pruning's own, of no common type
            text = " ".join(str(error).split())[:100] or type(error).__name__
            return None, f"what is coupled with it is not known: {text}"
        for item in items:
            target = item.dep.target.module
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            if "ElementWise" in type(target).__name__ or target not in names:
                if isinstance(target, nn.Parameter):
                    return None, "a parameter outside of layers goes with it"
                continue
            if not _known(target):
                return None, f"a {type(target).__name__} goes with it"
            side = "out" if out or is_depthwise(target) else "in"
            place = owned.setdefault(
                (names[target], side), [set() for _ in range(width)]
            )
            place[channel] |= {int(i) for i in item.idxs}
    layers = [
        each.name
        for each in compressible_layers(dense)
        if (each.name, "out") in owned and not is_depthwise(each.module)
    ]
    found = {key: [sorted(own) for own in places] for key, places in owned.items()}
    return ChannelGroup(tuple(layers), width, found), ""


def _known(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 or is_depthwise(module)
    affine = isinstance(module, _BatchNorm) and module.weight is not None
    return affine or isinstance(module, nn.Linear)


@torch.no_grad()
def _trial(dense: nn.Module, group: ChannelGroup, example: Any) -> str:
    """Remove every other channel; return why that fails, or nothing."""
    for (name, side), owned in group.owned.items():
        weight = dense.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        flat = sorted(i for own in owned for i in own)
        if flat != list(range(weight.shape[int(side == "in")])):
            return f"its channels are not one by one those of {name}"
    if group.width < 2:
        return "it has one channel"
    # Not a regular pattern, which a shift of channels could leave as it is.
    generator = torch.Generator().manual_seed(group.width)
    order = torch.randperm(group.width, generator=generator).tolist()
    half = -(-group.width // 2)
    kept, removed = sorted(order[:half]), sorted(order[half:])
    wanted = call_model(without_channels(dense, group, removed), example)
    try:
        small = prune_channels(dense, kept_channels([group], [kept]))
        found = call_model(small, example)
    except (RuntimeError, ValueError, TypeError, LookupError):
        return "the network does not run without some of its channels"
    for a, b in zip(_outputs(found), _outputs(wanted), strict=True):
        if a.shape != b.shape:
            return "its channels are those of the output"
        if float((a - b).abs().max()) > CLOSE * float(b.abs().max()):
            return "what follows mixes up its channels when some are missing"
    return ""


def _outputs(out: Any) -> list[torch.Tensor]:
    if torch.is_tensor(out):
        return [out]
    values = out.values() if hasattr(out, "values") else out
    return [x for x in values if torch.is_tensor(x)]


def _noise(example: Any) -> Any:
    """Return an example of the same shapes, floats drawn anew: zeros tell nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: draw(value) for key, value in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(draw(value) for value in x)
        if torch.is_tensor(x) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator).to(x.dtype)
        return x

    return draw(example)
