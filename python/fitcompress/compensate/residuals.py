"""What is added to the outputs of a layer, as residual connections do.

A layer whose output y goes into a sum r + y, and nowhere else, can repair what earlier
layers have done to r as well as what they have done to its own inputs: it is to answer

    y + (r − r̂) / s

with r̂ what r is in the network compressed so far, and s the factors of a norm between
the layer and the sum, 1 without. r must be there before the layer runs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitcompress.data.batches import floats
from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.compensate.outlets import Outlet
    from fitcompress.model import Layer

__all__ = ["Residual", "find_residuals", "watch_residuals"]

ADDS = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
}
VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
}
SMALL = 1e-3  # of the largest factor of a norm: rows below hardly count

Key = tuple[int, tuple[int, ...], int]


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
        r = r.float()
        if hasattr(layer.module, "kernel_size"):
            r = r.reshape(*r.shape[:2], *[1] * (5 - r.dim()), *r.shape[2:])
        else:
            r = r.reshape(-1, r.shape[-1], 1, 1, 1)
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
            r = _first_tensor(args, named)
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


@torch.no_grad()
def find_residuals(
    model: nn.Module, layers: list[Layer], outlets: dict[str, Outlet], x: Any
) -> dict[str, Residual]:
    """Return what is added to the outputs of layers, by name, seen by running ``x``.

    Args:
        model: With folded norms.
        layers: Names of the layers are looked up in ``model``.
        outlets: Of the layers.
        x: Some inputs.
    """
    watched = {
        layer.name: outlets[layer.name].module
        if outlets[layer.name].norm
        else layer.name
        for layer in layers
        if not layer.rounded_alone
    }
    sums = _Sums(model, {str(module): name for name, module in watched.items()})
    with sums:
        sums.output(call_model(model, x))
    found = {}
    for layer in layers:
        source = sums.source(layer.name)
        if source is not None and sums.shapes_agree(layer):
            norm = watched[layer.name] if outlets[layer.name].norm else None
            inverse = None if norm is None else _inverse(model.get_submodule(norm))
            found[layer.name] = Residual(*source, inverse)
    return found


def _inverse(norm: nn.Module) -> torch.Tensor:
    assert isinstance(norm.weight, torch.Tensor)
    slope = norm.weight.detach().float()
    counts = slope.abs() > SMALL * slope.abs().max()
    return torch.where(counts, 1 / slope, torch.zeros_like(slope))


@dataclass
class _Watched:
    """The output of one layer, or of its norm.

    Attributes:
        started: When the layer was called.
        shape: Of the output; None if there was more than one.
        storage: Where it lies.
        readers: How many operations have read it.
        added: What was added to it, and its shape there.
    """

    started: int
    shape: tuple[int, ...] | None = None
    storage: int = 0
    readers: int = 0
    added: tuple[Key, tuple[int, ...]] | None = None


class _Sums(TorchDispatchMode):
    """Sees which sums outputs go into. All tensors are kept: no two share an address.

    Args:
        model: To be run within the mode.
        names: Module whose outputs to watch → layer that they are reported for.
    """

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._names = model, names
        self._hooks = contextlib.ExitStack()
        self._kept: list[torch.Tensor] = []
        self._layers: dict[str, _Watched] = {}
        self._of_storage: dict[int, _Watched] = {}
        self._seen: dict[Key, tuple[int, str, bool]] = {}
        self._calls: dict[str, int] = {}
        self._time = 0

    def __enter__(self) -> _Sums:
        layers = set(self._names.values())
        for name, module in self._model.named_modules():

            def before(_: Any, args: Any, named: Any, name: str = name) -> None:
                self._time += 1
                self._calls[name] = self._calls.get(name, 0) + 1
                if name in layers and name not in self._layers:
                    self._layers[name] = _Watched(self._time)
                self._see(_first_tensor(args, named), name, output=False)

            def after(_: Any, __: Any, out: Any, name: str = name) -> None:
                self._time += 1
                if name in self._names:
                    self._watch(self._names[name], out)
                self._see(out, name, output=True)

            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ):
                self._hooks.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note who reads an output, then do what was asked for."""
        named = kwargs or {}
        if func not in VIEWS:
            self._read(func, args, named)
        out = func(*args, **named)
        self._kept += floats(out)
        return out

    def output(self, out: Any) -> None:
        """Learn what the model returns: it is read by whoever called it."""
        for tensor in filter(_plain, floats(out)):
            watched = self._of_storage.get(_storage(tensor))
            if watched is not None:
                watched.readers += 1

    def source(self, name: str) -> tuple[str, bool] | None:
        """Return the module that has r, and whether as output; None if there is none.

        Only what was there before the layer was called, by a module called once.
        """
        watched = self._layers.get(name)
        if watched is None or watched.added is None or watched.readers != 1:
            return None
        seen = self._seen.get(watched.added[0])
        if seen is None or seen[0] > watched.started or self._calls[name] > 1:
            return None
        return None if self._calls[seen[1]] > 1 else (seen[1], seen[2])

    def shapes_agree(self, layer: Layer) -> bool:
        """Whether r has the places of the layer's outputs, in their order."""
        watched = self._layers[layer.name]
        assert watched.added is not None
        shape = watched.added[1]
        if hasattr(layer.module, "kernel_size"):
            dims = len(layer.module.kernel_size)  # type: ignore[arg-type]
            return shape == watched.shape and len(shape) == dims + 2
        return shape[-1] == layer.rows

    def _watch(self, layer: str, out: Any) -> None:
        watched = self._layers[layer]
        if watched.shape is not None or not _whole(out):
            watched.readers = 2  # no one sum takes them all
            return
        watched.shape, watched.storage = tuple(out.shape), _storage(out)
        self._of_storage[watched.storage] = watched
        self._kept.append(out)

    def _see(self, tensor: Any, name: str, *, output: bool) -> None:
        if torch.is_tensor(tensor) and tensor.is_floating_point() and _plain(tensor):
            self._kept.append(tensor)
            self._seen.setdefault(_key(tensor), (self._time, name, output))

    def _read(self, func: Any, args: Any, named: dict[str, Any]) -> None:
        read = [x for x in floats([args, list(named.values())]) if _plain(x)]
        for tensor in {id(each): each for each in read}.values():
            watched = self._of_storage.get(_storage(tensor))
            if watched is None:
                continue
            watched.readers += 1
            others = [other for other in read if other is not tensor]
            plain = func in ADDS and not named and len(others) == 1
            if plain and _whole(tensor) and others[0].shape == tensor.shape:
                watched.added = _key(others[0]), tuple(tensor.shape)
            if func is torch.ops.aten.add_.Tensor and tensor is args[0]:
                del self._of_storage[watched.storage]  # it is the sum from here on


def _plain(tensor: torch.Tensor) -> bool:
    """Whether it has an address, and changes of it are counted."""
    return tensor.layout is torch.strided and not tensor.is_inference()


def _whole(tensor: Any) -> bool:
    """Whether it is all of its storage, in order."""
    return bool(
        torch.is_tensor(tensor)
        and _plain(tensor)
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _key(tensor: torch.Tensor) -> Key:
    return tensor.data_ptr(), tuple(tensor.shape), tensor._version


def _first_tensor(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor | None:
    """Return the first float tensor that a module was called with."""
    given = [x for x in (*args, *named.values()) if torch.is_tensor(x)]
    return next((x for x in given if x.is_floating_point()), None)
