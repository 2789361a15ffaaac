"""Catches the calls that multiply by a weight, without a change to the model.

Layers are recognised by the functions that they call and the parameters that they pass:
``linear``, convolutions, ``embedding`` and matrix products. So attention with packed
projections, tied weights and a layer's weight used by another module are seen like any
other layer; a weight that enters another function is reported.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fitcompress.sensitivity.calls import READERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.weights import Weight, WeightIndex

__all__ = ["Capture", "capturing"]


class _Anchor(torch.autograd.Function):
    """Makes a tensor depend on the anchor, in place; what follows may overwrite it.

    Backpropagation to the anchor then passes all of them. (A leaf that requires a
    gradient instead must not be modified, but models do that.)
    """

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return grads[0] if ctx.needs_input_grad[0] else None, None


def _unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Python function of torch without its own test for overrides.

    Called within a mode, it would otherwise hand the call to the mode again.
    """
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    made = types.FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# Functions written in Python whose body calls what is caught.
BODIES = {F.multi_head_attention_forward: _unchecked(F.multi_head_attention_forward)}

# Functions whose result has a shape that depends on values.
SELECTING = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}

FLIPPED = {"linear": "matrix", "matrix": "linear"}

# Functions whose result does not depend on the weight, as far as gradients go.
HARMLESS = {torch.Tensor.detach, torch.detach}


class Capture(TorchFunctionMode):
    """While active, hands every call that multiplies by a weight to ``caught``.

    Args:
        index: The weights to look for.
        caught: Called with the call and its result; what it returns replaces the
            result.
        apart: Whether a call's input is an alias that nothing else uses, so that the
            gradient of that is this call's alone; without a copy.

    Attributes:
        anchor: What results without a gradient are made to depend on.
        unsupported: Weight name → the function that it entered and that cannot be
            measured.
        irregular: Whether something was selected by value, as tokens for an expert are:
            then the rows that a layer sees need not be as many for every sample.
    """

    def __init__(
        self,
        index: WeightIndex,
        caught: Callable[[Call, torch.Tensor], torch.Tensor],
        *,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.index, self.caught, self.apart = index, caught, apart
        self.anchor = torch.zeros((), requires_grad=True)
        self.unsupported: dict[str, str] = {}
        self.irregular = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        body = BODIES.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        reader = READERS.get(func) if torch.is_grad_enabled() else None
        call = None if reader is None else self._read(reader, args, kwargs)
        if call is not None and self.apart:
            args, kwargs = _with_alias(call, args, kwargs)
        out = func(*args, **kwargs)
        if call is None:
            self.irregular = self.irregular or _selects(func, args)
            self._check(func, args, kwargs, out)
            return out
        self._check(func, args, kwargs, out, call.weight)
        return self.caught(call, out)

    def _read(
        self,
        reader: Callable[..., Call | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call | None:
        """Return the call, if it multiplies by a measured weight as a whole."""
        try:
            call = reader(*args, **kwargs)
            if call is None:
                return None
            part = self.index.part_of(call.weight)
        except (LookupError, TypeError):  # an unusual call
            return None  # reported by _check
        if part is None:
            return None
        if part.transposed:  # x W of a transposed view is x Wᵀ of the weight itself
            if call.kind not in FLIPPED:
                return None
            call.kind = FLIPPED[call.kind]
        call.part = part
        return call

    def _check(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        multiplied: torch.Tensor | None = None,
    ) -> None:
        """Note weights that enter a function through which they cannot be measured.

        ``multiplied`` is the argument by which a caught call multiplies.
        """
        name = getattr(func, "__name__", str(func))
        harmless = name in ("__get__", "__set__") or func in HARMLESS
        if harmless or not torch.is_grad_enabled():
            return
        for argument in _tensors((args, kwargs)):
            weight = self.index.weight_of(argument)
            if argument is multiplied or weight is None:
                continue
            if weight.name in self.unsupported:
                continue
            for result in _tensors(out):
                # Views are looked at again where they are used.
                view = self.index.weight_of(result) is weight
                if result.is_floating_point() and not view:
                    self.unsupported[weight.name] = f"it enters {name}"
                    break

    def hooks(self) -> list[Any]:
        """Learn what modules compute as their weights, whenever they do."""
        return [
            module.get_submodule(f"parametrizations.{name}").register_forward_hook(
                functools.partial(self._computed, weight)
            )
            for weight in self.index.weights
            if weight.computed
            for module, name in weight.holders
        ]

    def _computed(
        self, weight: Weight, _: nn.Module, __: Any, out: torch.Tensor
    ) -> torch.Tensor:
        if out._base is not None:  # views are recognised by what they are views of
            out = out.clone()
        self.index.learn(out, weight)
        return out

    def anchored(self, out: torch.Tensor) -> torch.Tensor:
        """Return ``out`` so that gradients reach it, also if it is then overwritten."""
        if out._base is not None:
            out = out.clone()
        made: torch.Tensor = _Anchor.apply(out, self.anchor)  # type: ignore[no-untyped-call]
        return made


@contextlib.contextmanager
def capturing(model: nn.Module, capture: Capture) -> Iterator[Capture]:
    """Run a block with the model's calls caught and its parameters frozen.

    Compiled parts run eagerly, and attention does not take its fused path, in which the
    projections could not be seen.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    handles = capture.hooks()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.compiler.set_stance("force_eager"), capture:
            yield capture
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)
        capture.index.forget()
        for handle in handles:
            handle.remove()


def _with_alias(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call an alias of its input; return its arguments with that."""
    x = call.input
    if x is None or not x.requires_grad:
        return args, kwargs
    alias = call.input = x.view_as(x)
    return (
        tuple(alias if value is x else value for value in args),
        {name: alias if value is x else value for name, value in kwargs.items()},
    )


def _selects(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the shape of a function's result depends on values."""
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:]))
    return name in SELECTING or (name == "where" and len(args) == 1)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
