"""Which layers can lose channels, and what goes with each: through torch-pruning."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.methods.galen.groups import ChannelGroup
from fitcompress.methods.galen.surgery import CONVOLUTIONS, is_depthwise
from fitcompress.methods.galen.trial import Trial, drawn
from fitcompress.model import compressible_layers
from fitcompress.model.devices import device_of, to_device

__all__ = ["channel_groups"]

logger = logging.getLogger(__name__)


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
        example: As the model takes it; its values count only where the network is not
            finite on others.

    Returns:
        Groups in the order of their first layers; and layer → reason for all layers in
        none.
    """
    import torch_pruning as tp

    dense = copy.deepcopy(model).eval()
    for parameter in dense.parameters():
        # The graph is found through gradients.
        parameter.requires_grad_(parameter.is_floating_point())
    example = to_device(example, device_of(dense))
    trial = Trial(dense, example)
    graph = tp.DependencyGraph()
    reasons: dict[str, str] = {}
    groups: list[ChannelGroup] = []
    layers = compressible_layers(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(dense, example_inputs=drawn(example))
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
                why = _misfit(dense, group) or trial.why_not(group)
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
    shared = _shared(dense)
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
            if target in shared:
                return None, f"{names[target]} shares a parameter with another layer"
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


def _misfit(dense: nn.Module, group: ChannelGroup) -> str:
    """Return why a group cannot lose channels at all, or nothing."""
    for (name, side), owned in group.owned.items():
        weight = dense.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        flat = sorted(i for own in owned for i in own)
        if flat != list(range(weight.shape[int(side == "in")])):
            return f"its channels are not one by one those of {name}"
    return "it has one channel" if group.width < 2 else ""


def _shared(model: nn.Module) -> set[nn.Module]:
    """Return the modules that have a parameter which another one has, too."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {each for found in owners.values() if len(found) > 1 for each in found}
