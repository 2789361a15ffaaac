"""Find the sums that outputs of layers go into, by watching a forward pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitcompress.compensate.residuals import Residual, first_tensor
from fitcompress.compensate.statistics import as_outputs, layer_outputs
from fitcompress.data.batches import floats
from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fitcompress.compensate.outlets import Outlet
    from fitcompress.model import Layer

__all__ = ["find_residuals"]

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
SMALL = 0.03  # of the upper quartile of a norm's factors: rows below hardly count
CLOSE = 0.01  # relative, to what the weight makes of the input: half precision is

Key = tuple[int, tuple[int, ...], tuple[int, ...], int]


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
    sums = _Sums(
        model,
        {layer.name: layer for layer in layers if layer.name in watched},
        {str(module): name for name, module in watched.items()},
    )
    with sums:
        sums.output(call_model(model, x))
    found = {}
    for layer in layers:
        source = sums.source(layer.name)
        if source is not None:
            norm = watched[layer.name] if outlets[layer.name].norm else None
            inverse = None if norm is None else _inverse(model.get_submodule(norm))
            found[layer.name] = Residual(*source, inverse)
    return found


def _inverse(norm: nn.Module) -> torch.Tensor:
    assert isinstance(norm.weight, torch.Tensor)
    slope = norm.weight.detach().float()
    counts = slope.abs() > SMALL * slope.abs().quantile(0.75)
    return torch.where(counts, 1 / slope, torch.zeros_like(slope))


def _answers(layer: Layer, bias: Any, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether ``out`` is W x + b, at as many places."""
    kernel = getattr(layer.module, "kernel_size", None)
    if kernel is not None and out.dim() != len(kernel) + 2:
        return False  # an image without a batch
    expected, found = layer_outputs(layer, x), as_outputs(layer, out)
    if torch.is_tensor(bias):
        expected = expected + bias.float().reshape(1, -1, 1, 1, 1)
    if expected.shape != found.shape:
        return False
    change, scale = (expected - found).double().norm(), found.double().norm()
    return bool(change <= CLOSE * scale + 1e-12)


class _Seen(NamedTuple):
    """A tensor that a module has read or returned: when, and which of the two."""

    time: int
    module: str
    output: bool
    tensor: weakref.ref[torch.Tensor]


@dataclass
class _Watched:
    """The output of one layer, or of its norm.

    Attributes:
        started: When the layer was called.
        input: With what; None once it has answered.
        answers: Whether with W x + b.
        shape: Of the output; None if there was more than one.
        stride: Likewise.
        storage: Where it lies.
        kept: The output, as long as it may have a sum of its own.
        readers: How many operations have read it.
        source: Who had what was added to it.
    """

    started: int
    input: torch.Tensor | None
    answers: bool = False
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    storage: int = 0
    kept: torch.Tensor | None = None
    readers: int = 0
    source: _Seen | None = None

    def placed(self, layer: Layer, tensor: torch.Tensor) -> bool:
        """Whether a view of the output has its places in their order."""
        if tuple(tensor.shape) == self.shape and tensor.stride() == self.stride:
            return True
        linear = not hasattr(layer.module, "kernel_size")
        return linear and tensor.is_contiguous() and tensor.shape[-1] == layer.rows


class _Sums(TorchDispatchMode):
    """Sees which sums outputs go into.

    Outputs are kept until it is clear that they go into no sum, so that nothing else
    gets their address; what modules read and return is looked up while it is there.

    Args:
        model: To be run within the mode.
        layers: Name → layer.
        names: Module whose outputs to watch → layer that they are reported for.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, Layer], names: dict[str, str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._layers, self._names = model, layers, names
        self._hooks = contextlib.ExitStack()
        self._watched: dict[str, _Watched] = {}
        self._of_storage: dict[int, str] = {}
        self._seen: dict[Key, _Seen] = {}
        self._calls: dict[str, int] = {}
        self._time, self._blind = 0, False

    def __enter__(self) -> _Sums:
        for name, module in self._model.named_modules():

            def before(_: Any, args: Any, named: Any, name: str = name) -> None:
                self._time += 1
                self._calls[name] = self._calls.get(name, 0) + 1
                x = first_tensor(args, named)
                if name in self._layers and name not in self._watched:
                    self._watched[name] = _Watched(self._time, x)
                self._see(x, name, output=False)

            def after(module: Any, _: Any, out: Any, name: str = name) -> None:
                self._time += 1
                if name in self._layers:
                    self._judge(name, module, out)
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
        if func not in VIEWS and not self._blind:
            self._read(func, args, named)
        return func(*args, **named)

    def output(self, out: Any) -> None:
        """Learn what the model returns: it is read by whoever called it."""
        for tensor in filter(_plain, _held(out, set())):
            name = self._of_storage.get(_storage(tensor))
            if name is not None:
                self._rule_out(self._watched[name])

    def source(self, name: str) -> tuple[str, bool] | None:
        """Return the module that has r, and whether as output; None if there is none.

        Only what was there before the layer was called, by a module called once.
        """
        watched = self._watched.get(name)
        if watched is None or not watched.answers or self._calls[name] > 1:
            return None
        seen = watched.source
        if seen is None or seen.time > watched.started or self._calls[seen.module] > 1:
            return None
        return seen.module, seen.output

    def _judge(self, name: str, module: Any, out: Any) -> None:
        """Learn whether a layer answers as its weight does."""
        watched, layer = self._watched[name], self._layers[name]
        x, watched.input = watched.input, None
        if x is None or not torch.is_tensor(out):
            return
        self._blind = True
        try:
            watched.answers = _answers(layer, getattr(module, "bias", None), x, out)
        finally:
            self._blind = False

    def _watch(self, name: str, out: Any) -> None:
        watched = self._watched[name]
        if watched.shape is not None or not _whole(out):
            self._rule_out(watched)  # no one sum takes them all
            return
        watched.shape, watched.stride = tuple(out.shape), out.stride()
        watched.storage = _storage(out)
        self._of_storage[watched.storage] = name
        watched.kept = out

    def _rule_out(self, watched: _Watched) -> None:
        """Forget an output that is not, or not only, part of a sum."""
        self._of_storage.pop(watched.storage, None)
        watched.source = watched.kept = None

    def _see(self, tensor: Any, name: str, *, output: bool) -> None:
        if torch.is_tensor(tensor) and tensor.is_floating_point() and _plain(tensor):
            key = _key(tensor)
            known = self._seen.get(key)
            if known is None or known.tensor() is None:
                self._seen[key] = _Seen(self._time, name, output, weakref.ref(tensor))

    def _read(self, func: Any, args: Any, named: dict[str, Any]) -> None:
        read = [x for x in floats([args, list(named.values())]) if _plain(x)]
        for tensor in {id(each): each for each in read}.values():
            name = self._of_storage.get(_storage(tensor))
            if name is None:
                continue
            watched = self._watched[name]
            watched.readers += 1
            others = [other for other in read if other is not tensor]
            plain = func in ADDS and not named and len(others) == 1
            plain = plain and others[0].shape == tensor.shape
            plain = plain and watched.placed(self._layers[name], tensor)
            if not plain or watched.readers > 1:
                self._rule_out(watched)
                continue
            seen = self._seen.get(_key(others[0]))
            watched.source = None if seen is None or seen.tensor() is None else seen
            if func is torch.ops.aten.add_.Tensor and tensor is args[0]:
                del self._of_storage[watched.storage]  # it is the sum from here on


def _held(value: Any, known: set[int]) -> Iterator[torch.Tensor]:
    """Yield the float tensors in containers, and in objects of any class."""
    if id(value) in known:
        return
    known.add(id(value))
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _held(each, known)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _held(each, known)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _held([getattr(value, f.name) for f in fields(value)], known)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _held(vars(value), known)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether it has an address, and changes of it are counted."""
    if tensor.layout is not torch.strided or tensor.is_inference():
        return False
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # of vmap, or of a wrapper
        return False


def _whole(tensor: Any) -> bool:
    """Whether it is all of its storage."""
    return bool(
        torch.is_tensor(tensor)
        and _plain(tensor)
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _key(tensor: torch.Tensor) -> Key:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return tensor.data_ptr(), shape, stride, tensor._version
