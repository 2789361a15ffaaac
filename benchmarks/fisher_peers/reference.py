"""What candidates are held to: batches of one sample, in float64.

The same loop in float32 is off by up to 2e-6 itself. One thing is taken from float32:
which ReLUs are open, and which inputs pools take. Of their millions of inputs a few are
so close that rounding decides, and one that flips moves a layer by 1e-5 and more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from fisher_peers.case import Case

__all__ = ["reference"]

RELUS = (F.relu, torch.relu, torch.Tensor.relu)
POOLS = (F.max_pool2d, torch.max_pool2d)


class Choices(TorchFunctionMode):
    """Notes what a batch's ReLUs and pools choose, and has single samples choose so.

    Attributes:
        sample: The sample that runs, None while notes are taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[torch.Tensor] = []
        self.sample: int | None = None
        self.next = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run anything but ReLUs and pools as it is."""
        kwargs = kwargs or {}
        if func in RELUS:
            x: torch.Tensor = args[0]
            return x * self._noted(lambda: x > 0)
        if func in POOLS:
            kwargs["return_indices"] = True
            chosen = self._noted(lambda: F.max_pool2d(*args, **kwargs)[1])
            values = args[0].flatten(2).gather(2, chosen.flatten(2))
            return values.view(chosen.shape)
        return func(*args, **kwargs)

    def _noted(self, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.sample is None:
            self.notes.append(choose())
            return self.notes[-1]
        self.next += 1
        note = self.notes[(self.next - 1) % len(self.notes)]
        return note[self.sample : self.sample + 1]


def reference(case: Case, diagonal: bool) -> dict[str, torch.Tensor]:
    """Return the mean over samples by layer: traces, or diagonals as matrices."""
    choices = Choices()
    with torch.no_grad(), choices:
        case.model(case.x)
    exact = case.copy()
    exact.model.double()
    x = case.x.double() if case.x.is_floating_point() else case.x
    totals = {layer.name: torch.zeros((), dtype=torch.float64) for layer in case.layers}
    for i, y in enumerate(case.y.split(1)):
        choices.sample = i
        with choices:
            loss = case.loss(exact.model(x[i : i + 1]), y)
        gradients = torch.autograd.grad(loss, exact.weights)
        for layer, gradient in zip(case.layers, gradients, strict=True):
            square = layer.matrix_of(gradient.square_())
            totals[layer.name] = totals[layer.name] + (
                square if diagonal else square.sum()
            )
    return {name: total.div_(len(x)) for name, total in totals.items()}
