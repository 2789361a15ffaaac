"""Forward passes that begin in the middle of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import nn

__all__ = ["Replay"]


class Replay:
    """The forward pass of one batch, known up to any layer.

    A first pass keeps the outputs of the layers. A later one, from layer l on, is
    handed what was kept for every call of a layer before the first of l, and computes
    the rest: right as long as nothing before l has changed, through any control flow
    that does not depend on chance. Use as a context manager, within which ``model`` is
    not for others.

    Args:
        model: In eval mode.
        modules: Layer name → module whose output, one tensor, is kept.
        x: The batch, as :func:`call_model` takes it.

    Attributes:
        output: Of the first pass.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        x: Any,
    ) -> None:
        self._model, self._modules, self._x = model, dict(modules), x
        self._kept: list[torch.Tensor] = []
        self._first: dict[str, int] = {}
        self._calls, self._from = 0, 0
        self.output: Any = None

    def __enter__(self) -> Replay:
        for name, module in self._modules.items():
            self._patch(name, module)
        try:
            self._from = 0
            self.output = self._run()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        self._kept = []

    def run_from(self, *names: str) -> Any:
        """Return the model's output, with all before the first of these as it was.

        Raises:
            KeyError: The first pass never reached one of the layers.
        """
        self._from = min(self._first[name] for name in names)
        return self._run()

    def _run(self) -> Any:
        self._calls = 0
        with torch.no_grad():
            return call_model(self._model, self._x)

    def _patch(self, name: str, module: nn.Module) -> None:
        forward = module.forward

        def known(*args: Any, **named: Any) -> torch.Tensor:
            number = self._calls
            self._calls += 1
            if number < self._from:
                # A copy: what follows may work in place.
                return self._kept[number].clone()
            out: torch.Tensor = forward(*args, **named)
            if self.output is None:
                self._first.setdefault(name, number)
                self._kept.append(out.clone())
            return out

        module.forward = known

    def _restore(self) -> None:
        for module in self._modules.values():
            del module.forward
