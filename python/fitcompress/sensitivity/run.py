"""One micro-batch: calls are caught, gradients arrive, norms come out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import with_tensors
from fitcompress.errors import NonFiniteError, UnsupportedLayerError
from fitcompress.sensitivity.capture import Capture
from fitcompress.sensitivity.contraction import (
    Contraction,
    Entries,
    contraction,
    entries,
    joined,
)
from fitcompress.sensitivity.forms import accumulate, accumulate_entries
from fitcompress.sensitivity.layout import SINGLE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.probe import Probe
    from fitcompress.sensitivity.weights import Weight, WeightIndex

__all__ = ["Run"]


@dataclass(eq=False)
class _Use:
    """A caught call on its way through backpropagation.

    Attributes:
        call: The call; it holds its input until the gradient has come.
        layout: Where the samples are in that.
        version: How often the input had been changed in place when it was caught.
        arrived: Whether the gradient has come.
    """

    call: Call
    layout: Layout
    version: int
    arrived: bool = False


Pairs = list[tuple[_Use, torch.Tensor]]


class Run:
    """The passage of one micro-batch through the model and back.

    Args:
        index: The weights to look for.
        probe: What is known of the model.
        batch: B.
        squares: (weight, device) → where Σ_i G_i ∘ G_i is summed, or None.
        squared: Called with a weight and that when they are complete.
        activations: Whether to square the gradients of inputs, too.

    Attributes:
        capture: Catches the calls.
        norms: Weight → ‖G_i‖², float64 [B].
        forms: Weight → the form of these.
        activations: Weight → Σ_i ‖∂ℓ_i/∂x_i‖², where x_i is the input of that weight
            alone: what a tensor changes by way of others that use it is theirs.
        irregular: Whether a call's input is not what the probe has seen, so that the
            samples may be anywhere in it.
    """

    def __init__(
        self,
        index: WeightIndex,
        probe: Probe,
        batch: int,
        squares: Callable[[Weight, torch.device], torch.Tensor | None],
        squared: Callable[[Weight, torch.Tensor | None], None],
        *,
        activations: bool = False,
    ) -> None:
        self.capture = Capture(index, self._caught, apart=activations)
        self.norms: dict[Weight, torch.Tensor] = {}
        self.forms: dict[Weight, str] = {}
        self.activations: dict[Weight, torch.Tensor] = {}
        self._irregular = False
        self._probe, self._batch = probe, batch
        self._squares, self._squared = squares, squared
        self._watching, self._backward = activations, False
        self._uses: dict[Weight, list[_Use]] = {}
        self._waiting: dict[Weight, Pairs] = {}

    def inputs(self, x: Any) -> Any:
        """Return the inputs cut off from any graph, differentiable if that is asked."""

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            wanted = self._watching and tensor.is_floating_point()
            tensor = tensor.detach()
            return self.capture.anchored(tensor.clone()) if wanted else tensor

        return with_tensors(x, cut)

    def _caught(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        assert call.input is not None
        uses = self._uses.setdefault(call.part.weight, [])
        layout = self._layout(call, len(uses))
        if self._watching and call.input.requires_grad and not layout.expanded:
            self._watch(call, layout)
        if layout.expanded:
            call.input = call.input.expand(self._batch, *call.input.shape[1:])
            out = out.expand(self._batch, *out.shape[1:])
        call.input = call.input.detach()
        if self._probe.copy_inputs:
            call.input = call.input.clone()
        use = _Use(call, layout, call.input._version)
        uses.append(use)
        out = self.capture.anchored(out)
        out.register_hook(lambda grad: self._arrived(use, grad))  # type: ignore[no-untyped-call]
        return out

    def _layout(self, call: Call, number: int) -> Layout:
        """Return where the samples are in the input of a weight's call."""
        assert call.input is not None
        if self._batch == 1:
            return SINGLE
        places = self._probe.places.get(call.part.weight, [])
        if number >= len(places) or not places[number].fits(call.input, self._batch):
            self._irregular = True
            return SINGLE  # never used
        return places[number].layout

    @property
    def irregular(self) -> bool:
        """Whether samples may not be where the probe has seen them."""
        if self._batch == 1:
            return False
        fewer = any(
            len(self._uses.get(weight, [])) != len(places)
            for weight, places in self._probe.places.items()
        )
        return self._irregular or self.capture.irregular or fewer

    @property
    def stale(self) -> bool:
        """Whether an input was changed in place since it was caught."""
        return any(
            use.call.input is not None and use.call.input._version != use.version
            for uses in self._uses.values()
            for use in uses
        )

    def _watch(self, call: Call, layout: Layout) -> None:
        """Sum up the squares of the gradient of a call's input, through this call."""
        assert call.input is not None
        weight = call.part.weight

        def arrived(grad: torch.Tensor) -> None:
            total = grad.detach().float().square().sum(dtype=torch.float64)
            self.activations[weight] = self.activations.get(weight, 0) + total

        call.input.register_hook(arrived)  # type: ignore[no-untyped-call]

    def backward(self, loss: torch.Tensor) -> None:
        """Run backpropagation; gradients arrive at the hooks.

        Raises:
            NonFiniteError: A gradient is NaN or infinite.
        """
        self._backward = True
        try:
            # Times B: of the sum of the losses. Done here, halves do not underflow.
            torch.autograd.grad(
                loss,
                [self.capture.anchor],
                grad_outputs=torch.full_like(loss, self._batch),
                allow_unused=True,
            )
            for weight, pairs in self._waiting.items():
                self._add(weight, pairs)
        finally:
            self.close()
        for weight, norms in self.norms.items():
            if not bool(torch.isfinite(norms).all()):
                raise NonFiniteError(
                    f"a gradient of layer {weight.name!r} is not finite",
                    got=f"squared norms of {norms.sum().item()} in all",
                    wanted="finite gradients",
                    fix="look for NaN in the data, and for overflow in half precision",
                )

    def close(self) -> None:
        """Let go of inputs and gradients."""
        self._uses.clear()
        self._waiting.clear()
        self.capture.caught = lambda _, out: out

    def _arrived(self, use: _Use, grad: torch.Tensor) -> None:
        weight = use.call.part.weight
        if not self._backward or use.arrived:
            raise UnsupportedLayerError(
                f"the model differentiates through layer {weight.name!r} itself",
                got="a gradient before that of the loss, or a second one",
                wanted="a loss whose gradient is taken once",
            )
        use.arrived = True
        if len(self._uses[weight]) == 1:
            self._add(weight, [(use, grad.detach())])
        else:
            self._waiting.setdefault(weight, []).append((use, grad.detach()))

    def _add(self, weight: Weight, pairs: Pairs) -> None:
        """Add the squares of a weight whose gradient is the sum over ``pairs``."""
        if weight.name in self.capture.unsupported:
            return
        device = pairs[0][1].device
        norms = torch.zeros(self._batch, dtype=torch.float64, device=device)
        squares = self._squares(weight, device)
        for first, rows, members in _by_rows(weight, pairs):
            target = None if squares is None else squares[first : first + rows]
            terms = [
                self._term(use, grad).widened(use.call.part.first - first, rows)
                for use, grad in members
            ]
            self.forms[weight] = _accumulate(terms, rows, target, norms)
        self._squared(weight, squares)
        self.norms[weight] = norms
        for use, _ in pairs:
            use.call.input = None

    def _term(self, use: _Use, grad: torch.Tensor) -> Contraction | Entries:
        make = entries if use.call.kind == "entries" else contraction
        return make(use.call, grad, use.layout, self._batch)


def _accumulate(
    terms: list[Contraction | Entries],
    rows: int,
    squares: torch.Tensor | None,
    norms: torch.Tensor,
) -> str:
    """Add the squares of a sum of gradients of the same rows; return the form."""
    looked_up = [term for term in terms if isinstance(term, Entries)]
    if len(looked_up) == len(terms):
        together = Entries(
            torch.cat([term.indices for term in looked_up], 1),
            torch.cat([term.values for term in looked_up], 1),
        )
        return accumulate_entries(together, squares, norms, rows)
    products = [
        term.dense(rows) if isinstance(term, Entries) else term for term in terms
    ]
    return accumulate(
        products[0] if len(products) == 1 else joined(products), squares, norms
    )


def _by_rows(weight: Weight, pairs: Pairs) -> list[tuple[int, int, Pairs]]:
    """Split the uses of a weight by the rows that they use: (first, count, uses).

    Parts of a packed projection are apart; where they overlap they are seen as uses of
    the whole weight.
    """
    groups: dict[tuple[int, int], Pairs] = {}
    for use, grad in pairs:
        part = use.call.part
        groups.setdefault((part.first, part.rows), []).append((use, grad))
    apart = all(
        first + rows <= after
        for (first, rows), (after, _) in itertools.pairwise(sorted(groups))
    )
    if apart:
        return [(first, rows, members) for (first, rows), members in groups.items()]
    return [(0, weight.rows, pairs)]
