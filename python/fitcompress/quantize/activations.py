"""Quantizers for the inputs of layers.

    x̂ = Δ · clip(round(x / Δ), lo, hi),    lo ≤ 0 < hi

with one Δ for the tensor or one per channel, chosen from calibration data (static) or
from each batch (dynamic). Zero is on the grid, and no zero point enters the arithmetic:
x̂ is Δ times an integer. A quantizer is a child of its layer, and a pre-hook that is
a plain function calls it: copies, pickles, ``state_dict`` and ``torch.compile`` work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fitcompress import ops
from fitcompress.errors import CalibrationError, OptionError, UnsupportedLayerError
from fitcompress.model.value_histogram import channel_rows
from fitcompress.model.value_ranges import Range, check_bits, covering_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fitcompress.quantize.observers import Observer

__all__ = [
    "ActivationQuantizer",
    "activation_of",
    "activations",
    "attach_activation",
    "channel_of",
    "detach_activation",
]

CHILD = "input_quantizer"
LEAST = torch.finfo(torch.float32).tiny  # Δ
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ActivationQuantizer(nn.Module):
    """Puts a tensor on a grid of ``bits`` bits, with straight-through gradients.

    With an observer it *observes*: inputs pass unchanged, until :meth:`freeze`. After
    that, or with the state dict of another one loaded, it quantizes.

    Args:
        bits: 2 … 16.
        observer: Chooses the range; also says which dimension is the channel's.
        symmetric: lo = −hi; otherwise unsigned or affine, as the data are.
        channel: Dimension that has a Δ for each of its entries; None for one in all.
        dynamic: Δ covers each batch, nothing is calibrated.
        learn: Let Δ be trained, by the gradient of LSQ times 1/√(n·hi), n the values of
            a batch that share Δ.

    Attributes:
        scale: Δ, float32, one or one per channel; a parameter. Where training brings
            it to 0 or below, :attr:`step` is used.
        bounds: lo and hi, int32 [2]; both 0 before calibration.
        min_code: lo.
        max_code: hi.

    Raises:
        OptionError: The bits are others, or a dynamic one has an observer.

    Source: Learned step size quantization (Esser et al., 2020, arXiv 1902.08153).
    """

    scale: nn.Parameter
    bounds: torch.Tensor

    def __init__(
        self,
        bits: int,
        observer: Observer | None = None,
        *,
        symmetric: bool = False,
        channel: int | None = None,
        dynamic: bool = False,
        learn: bool = True,
    ) -> None:
        super().__init__()
        check_bits(bits)
        if dynamic and observer is not None:
            raise OptionError(
                "a dynamic quantizer observes nothing", fix="leave the observer out"
            )
        self.bits, self.symmetric, self.dynamic = bits, symmetric, dynamic
        self.learn, self.observer = learn, observer
        self.channel = channel if observer is None else observer.channel
        self.min_code = self.max_code = 0
        if not dynamic:
            self._set_scale(torch.ones(1))
            self.register_buffer("bounds", torch.zeros(2, dtype=torch.int32))

    @property
    def calibrated(self) -> bool:
        """Whether it can quantize."""
        return self.observer is None and (self.dynamic or self.max_code > 0)

    @property
    def step(self) -> torch.Tensor:
        """Δ as it is used: at least a small positive number; gradients pass."""
        scale = self.scale.float()
        return scale.detach().clamp_min(LEAST) + (scale - scale.detach())

    def freeze(self) -> None:
        """End observing: choose the range, and quantize from now on.

        Raises:
            CalibrationError: No value was observed.
        """
        if self.observer is not None:
            self.set_range(self.observer.range(self.bits, symmetric=self.symmetric))

    @torch.no_grad()
    def set_range(self, found: Range) -> None:
        """Take Δ and bounds from somewhere else, and quantize from now on.

        Raises:
            OptionError: The quantizer is dynamic, has fewer bits than that or is
                symmetric; or a Δ is not positive and finite.
        """
        lo, hi = found.min_code, found.max_code
        if not bool((found.scale.isfinite() & (found.scale > 0)).all()):
            raise OptionError(
                "a step of an activation quantizer is not positive and finite",
                got=found.scale.flatten()[:8].tolist(),
            )
        if self.dynamic or not self._fits(lo, hi):
            raise OptionError(
                "the range does not fit the quantizer",
                got=f"codes {lo} … {hi}",
                wanted="a dynamic one has none"
                if self.dynamic
                else f"0 and at most {2**self.bits} codes"
                + (", as many on both sides" if self.symmetric else ""),
            )
        self._set_scale(found.scale.float().to(self.scale.device))
        self.bounds.copy_(torch.tensor([lo, hi]))
        self.min_code, self.max_code, self.observer = lo, hi, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` on the grid, in its own type; in float16 at most its largest.

        Raises:
            CalibrationError: There is no range yet.
        """
        if self.observer is not None:
            self.observer.observe(x)
            return x
        if not x.numel():
            return x
        exact = x if x.dtype in FLOATS else x.float()
        if self.channel is None:
            found = self._on_grid(exact)
        else:
            rows = exact.movedim(self.channel, 0)
            found = self._on_grid(rows).movedim(0, self.channel)
        if x.dtype == torch.float16:  # half a step above the largest value may be ∞
            limit = torch.finfo(x.dtype).max
            found = found.clamp(-limit, limit)
        return found.to(x.dtype)

    def _on_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows``, the channels along their first dimension, on the grid."""
        if self.dynamic:
            return ops.fake_quantize_prune(rows, self._batch_scale(rows))
        if not self.max_code:
            raise CalibrationError(
                "an activation quantizer is used before it was calibrated",
                fix="give it an observer, run calibration data, then call freeze()",
            )
        scale = self.step
        if self.learn:  # Δ itself, to the bit, with a smaller gradient
            share = len(rows) if self.channel is not None else 1
            n = rows.numel() / share
            factor = (n * self.max_code) ** -0.5
            scale = scale.detach() + factor * (scale - scale.detach())
        return ops.fake_quantize_prune(
            rows, scale, None, self.max_code, min_code=self.min_code
        )

    def _batch_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the Δ that covers a batch."""
        channel = None if self.channel is None else 0
        low, high = channel_rows(rows.detach(), channel).float().aminmax(dim=1)
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = covering_step(low, high, self.bits, symmetric=self.symmetric)[0]
        # Values that are NaN must not become zeros, which a step of NaN makes of all.
        return torch.where(step.isnan(), torch.inf, step)

    def _fits(self, lo: int, hi: int) -> bool:
        """Whether codes from lo to hi are some that it can have."""
        even = lo == -hi or not self.symmetric
        return lo <= 0 < hi and hi - lo < 2**self.bits and even

    def _set_scale(self, scale: torch.Tensor) -> None:
        self.scale = nn.Parameter(scale.detach().clone(), requires_grad=self.learn)

    def _apply(
        self, fn: Callable[..., Any], recurse: bool = True
    ) -> ActivationQuantizer:
        exact = None if self.dynamic else self.scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Δ stays as it was calibrated when the model goes to half precision.
        if exact is not None and self.scale.dtype != torch.float32:
            self.scale.data = exact.to(self.scale.device)
            if self.scale.grad is not None:
                self.scale.grad.data = self.scale.grad.float()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        bounds: Any = state_dict.get(f"{prefix}bounds")
        if bounds is not None and not self.dynamic and bounds.shape == (2,):
            lo, hi = bounds.tolist()
            if hi != 0 and not self._fits(lo, hi):
                errors: list[str] = args[-1]
                errors.append(f"{prefix}bounds: {lo} … {hi} are no {self.bits} bits")
                return
        stored: Any = state_dict.get(f"{prefix}scale")
        wide = self.channel is not None and not self.dynamic
        if wide and stored is not None and stored.shape != self.scale.shape:
            self._set_scale(torch.ones_like(stored, device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.dynamic:
            if self.scale.dtype != torch.float32:  # assign=True takes what is there
                self._set_scale(self.scale.float())
            self.min_code, self.max_code = self.bounds.tolist()
            if self.max_code:
                self.observer = None

    def extra_repr(self) -> str:
        """Describe the quantizer for ``print(model)``."""
        where = "" if self.channel is None else f", channel={self.channel}"
        if self.dynamic:
            return f"bits={self.bits}, dynamic{where}"
        if self.observer is not None:
            return f"bits={self.bits}, observing{where}"
        return f"bits={self.bits}, codes={self.min_code}…{self.max_code}{where}"


def attach_activation(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Let ``quantizer`` have the input of ``module`` first; replaces an earlier one.

    Args:
        module: A Linear or a convolution, transposed or not.
        quantizer: Becomes its child ``input_quantizer``.

    Raises:
        UnsupportedLayerError: The module is of another kind, or has a child of that
            name.
    """
    channel_of(module)
    detach_activation(module)
    if hasattr(module, CHILD):
        raise UnsupportedLayerError(
            f"the module has something else named {CHILD}", got=type(module).__name__
        )
    weight = cast("torch.Tensor", module.weight)
    module.add_module(CHILD, quantizer.to(weight.device))
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def activation_of(module: nn.Module) -> ActivationQuantizer | None:
    """Return the quantizer of the module's input, or None."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, ActivationQuantizer) else None


def activations(
    model: nn.Module, *, every_name: bool = False
) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield (name of the layer, its quantizer).

    Args:
        model: Any.
        every_name: Name a layer that stands in several places each time.
    """
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if (quantizer := activation_of(module)) is not None:
            yield name, quantizer


def detach_activation(module: nn.Module) -> None:
    """Give ``module`` its input as it is again."""
    if activation_of(module) is None:
        return
    del module._modules[CHILD]
    hooks = module._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if hook is _quantize_input]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def channel_of(module: nn.Module) -> int:
    """Return the dimension of a layer's input that its channels are, from the end.

    Raises:
        UnsupportedLayerError: The layer's input cannot be quantized.
    """
    packed = isinstance(module, NonDynamicallyQuantizableLinear)  # never called
    if isinstance(module, nn.Linear) and not packed:
        return -1
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    raise UnsupportedLayerError(
        "the input of this layer cannot be quantized",
        got=type(module).__name__,
        wanted="a Linear or a convolution",
        fix="leave its activation_bits None",
    )


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = cast("ActivationQuantizer", getattr(module, CHILD))
    if args:
        return (quantizer(args[0]), *args[1:]), named
    return args, {**named, "input": quantizer(named["input"])}
