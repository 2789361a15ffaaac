"""The weights whose gradients are measured, and how to recognise them in a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fitcompress.model import Layer

__all__ = ["Part", "Weight", "WeightIndex", "measured_weights"]


@dataclass(frozen=True)
class Weight:
    """A parameter of two or more dimensions, under one name however often it is held.

    Attributes:
        name: Name of the first module that holds it, if it is called ``weight`` there;
            else the parameter's qualified name, as ``attention.in_proj_weight``.
        shape: Its shape, of the whole if it is sharded.
        holders: All (module, attribute) that hold it: several if it is tied.
        computed: Whether the module computes it at each access (a parametrization).
    """

    name: str
    shape: tuple[int, ...]
    holders: tuple[tuple[nn.Module, str], ...]
    computed: bool = False

    @property
    def rows(self) -> int:
        """Size of the first dimension."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Product of all other dimensions."""
        return int(torch.Size(self.shape[1:]).numel())


@dataclass(frozen=True)
class Part:
    """What of a weight a call uses: some of its rows, perhaps transposed.

    Attributes:
        weight: The weight.
        first: First row.
        rows: Number of rows.
        transposed: Whether the call sees the rows as columns.
    """

    weight: Weight
    first: int
    rows: int
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether all rows are used."""
        return self.rows == self.weight.rows


def measured_weights(
    model: nn.Module, layers: Iterable[Layer] | None = None
) -> list[Weight]:
    """Return the weights of ``model`` that a Fisher estimate covers, in its order.

    All floating-point parameters of two or more dimensions with at least one element;
    vectors in disguise, such as [1, 1, n], are left out like biases and norms. A weight
    that a parametrization computes is measured as the module uses it.

    Args:
        model: The network.
        layers: Only the weights of these layers, under their names.
    """
    if layers is not None:
        return [
            Weight(
                layer.name,
                layer.shape,
                tuple((module, "weight") for module in layer.modules),
                nn.utils.parametrize.is_parametrized(layer.module, "weight"),
            )
            for layer in layers
        ]
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    found: dict[int, nn.Parameter] = {}
    weights: list[Weight] = []
    order: list[int | Weight] = []
    for path, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module):
            for name in module.parametrizations:
                weight = getattr(module, name)
                if _is_matrix(weight):
                    key = _name(path, name)
                    order.append(
                        Weight(
                            key, tuple(weight.shape), ((module, name),), computed=True
                        )
                    )
        if ".parametrizations." in f".{path}.":
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not _is_matrix(parameter):
                continue
            if id(parameter) not in holders:
                order.append(id(parameter))
                found[id(parameter)] = parameter
            holders.setdefault(id(parameter), []).append((path, module, name))
    for item in order:
        if isinstance(item, Weight):
            weights.append(item)
            continue
        path, _, name = holders[item][0]
        held = tuple((module, name) for _, module, name in holders[item])
        weights.append(Weight(_name(path, name), tuple(found[item].shape), held))
    return weights


def _is_matrix(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() == 0:
        return False
    return tensor.dim() == 2 or tensor.numel() > max(tensor.shape)


def _name(path: str, attribute: str) -> str:
    if attribute == "weight" and path:
        return path
    return f"{path}.{attribute}" if path else attribute


class WeightIndex:
    """Recognises weights, their views and their unsharded copies among arguments.

    Args:
        weights: What to recognise.
    """

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        # The tensors are kept, so that no other one can get the address of a dead one.
        self._known: dict[int, tuple[torch.Tensor, Weight]] = {}
        self._learned: dict[int, tuple[torch.Tensor, Weight]] = {}
        self._strangers: dict[int, torch.Tensor] = {}
        self._refresh()

    def _refresh(self) -> None:
        self._known = {}
        for weight in self.weights:
            if not weight.computed:
                for module, name in weight.holders:
                    tensor = getattr(module, name)
                    self._known[id(tensor)] = (tensor, weight)

    def learn(self, tensor: torch.Tensor, weight: Weight) -> None:
        """Take a tensor that a module has computed for its weight, until ``forget``."""
        self._learned[id(tensor)] = (tensor, weight)

    def forget(self) -> None:
        """Let go of what only the last run knew."""
        self._learned.clear()
        self._strangers.clear()

    def _find(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Weight] | None:
        return self._known.get(id(tensor)) or self._learned.get(id(tensor))

    def weight_of(self, tensor: Any) -> Weight | None:
        """Return the weight that a tensor is, or is a view of, or None."""
        if not isinstance(tensor, torch.Tensor):
            return None
        found = self._find(tensor)
        if found is None and tensor._base is not None:
            found = self._find(tensor._base)
        return None if found is None else found[1]

    def part_of(self, tensor: Any) -> Part | None:
        """Return what of a weight the weight argument of a call is, or None.

        Raises:
            LookupError: It is a view of a weight that is neither some of its rows nor
                their transpose.
        """
        if not isinstance(tensor, torch.Tensor):
            return None
        base = tensor if tensor._base is None else tensor._base
        found = self._find(base)
        if found is None:
            # Sharded modules hold other parameters while they run.
            if not isinstance(base, nn.Parameter) or id(base) in self._strangers:
                return None
            self._refresh()
            found = self._find(base)
            if found is None:
                self._strangers[id(base)] = base
                return None
        return _part(found[1], base, tensor)


def _part(weight: Weight, base: torch.Tensor, tensor: torch.Tensor) -> Part:
    if tensor is base or (
        tensor.shape == base.shape and tensor.stride() == base.stride()
    ):
        return Part(weight, 0, weight.rows)
    for transposed in (False, True):
        view = tensor.mT if transposed and tensor.dim() == 2 else tensor
        if view.shape[1:] == base.shape[1:] and view.stride() == base.stride():
            first = view.storage_offset() - base.storage_offset()
            if base.stride(0) and first % base.stride(0) == 0:
                rows = view.shape[0]
                return Part(weight, first // base.stride(0), rows, transposed)
    message = f"a view of shape {tuple(tensor.shape)}"
    raise LookupError(message)
