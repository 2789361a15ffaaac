"""Forward passes that wait at every layer until its weights are final.

To compensate a layer one needs its inputs in the network compressed so far, and those
of the dense network. Running the network from the start for every layer would cost a
whole forward pass each. Here each batch's pass runs in a thread of its own, stops where
it reaches a compressible layer for the first time, hands the input over, and goes on
with the new weights once the layer is done: one pass in all, through any control flow.
Only one thread runs at a time, so nothing depends on timing.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fitcompress.compensate.residuals import watch_residuals
from fitcompress.errors import CalibrationError
from fitcompress.model.forward import call_model
from fitcompress.model.patches import layer_input
from fitcompress.model.positions import attention_masks, counted_rows
from fitcompress.threads import adopt_threads

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from types import TracebackType

    from torch import nn

    from fitcompress.compensate.residuals import Residual

__all__ = ["Lockstep", "Reached", "not_reached"]


class _AbandonedError(BaseException):
    """Ends a pass whose result nobody waits for; nothing that a model may catch."""


class _Pass:
    """The forward pass of one batch, in a thread that runs only when resumed."""

    def __init__(self, model: nn.Module, x: Any) -> None:
        self.arrival: tuple[str, torch.Tensor] | None = None
        self.added: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.abandoned = self.finished = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._model, self._x, self._masks = model, x, attention_masks(x)
        self._seen: set[str] = set()
        self._residuals: dict[str, torch.Tensor] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Run until the next new layer or the end."""
        self.arrival = self.added = None
        self._go.release()
        self._stopped.acquire()
        if self.finished:
            self._thread.join()

    def arrive(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        """Called within the pass, before layer ``name`` uses its input ``x``."""
        if name in self._seen:
            return
        self._seen.add(name)
        self.arrival = (name, counted_rows(module, x.detach(), self._masks))
        added = self._residuals.pop(name, None)
        if added is not None:
            self.added = counted_rows(module, added, self._masks)
        del added
        self._wait()

    def keep(self, name: str, added: torch.Tensor) -> None:
        """Called within the pass, with what is added to the outputs of a layer."""
        if name not in self._seen:
            self._residuals[name] = added.detach()

    def owns_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self.abandoned:
            raise _AbandonedError

    def _run(self) -> None:
        self._go.acquire()
        adopt_threads()
        try:
            if not self.abandoned:
                with torch.no_grad():
                    call_model(self._model, self._x)
        except _AbandonedError:
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        self._stopped.release()


class Reached(NamedTuple):
    """A layer that all passes have reached.

    Attributes:
        name: Of the layer.
        inputs: Its input for every batch, without padding.
        added: What is added to its outputs, likewise, or None.
    """

    name: str
    inputs: list[torch.Tensor]
    added: list[torch.Tensor] | None


class Lockstep:
    """The forward passes of several batches, all waiting at the same layer.

    Use as a context manager; leaving it ends the passes, wherever they are.

    Args:
        model: The network, in eval mode; layers may be changed while passes wait.
        modules: Layer name → module, where to wait.
        batches: Inputs.
        residuals: Layer name → what is added to its outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        batches: Iterable[Any],
        residuals: dict[str, Residual] | None = None,
    ) -> None:
        self._model, self._modules, self._batches = model, modules, list(batches)
        self._residuals = residuals or {}
        self._passes: list[_Pass] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Lockstep:
        def keep(name: str, added: torch.Tensor) -> None:
            for waiting in self._passes:
                if waiting.owns_this_thread():
                    waiting.keep(name, added)

        # First: a layer's own input may be what is added to its output.
        self._hooks.enter_context(watch_residuals(self._model, self._residuals, keep))

        for name, module in self._modules.items():

            def wait(
                module: nn.Module,
                args: tuple[Any, ...],
                named: dict[str, Any],
                name: str = name,
            ) -> None:
                for waiting in self._passes:
                    if waiting.owns_this_thread():
                        waiting.arrive(name, module, layer_input(args, named))

            handle = module.register_forward_pre_hook(wait, with_kwargs=True)
            self._hooks.callback(handle.remove)
        self._passes = [_Pass(self._model, x) for x in self._batches]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for waiting in self._passes:
            if not waiting.finished:
                waiting.abandoned = True
                waiting.resume()
        self._hooks.close()

    def advance(self) -> Reached | None:
        """Go on to the next new layer.

        Returns:
            The layer and its inputs, or None at the end of the network.

        Raises:
            CalibrationError: Different batches reach different layers.
        """
        for waiting in self._passes:
            waiting.resume()
            if waiting.error is not None:
                raise waiting.error
        arrivals = [waiting.arrival for waiting in self._passes]
        names = {None if arrival is None else arrival[0] for arrival in arrivals}
        if len(names) > 1:
            raise CalibrationError(
                "batches take different ways through the model",
                got=f"layers {', '.join(sorted(map(str, names)))} at the same time",
                wanted="the same order of layers for every batch",
                fix="calibrate with batches of one kind",
            )
        if None in names:
            return None
        added = [w.added for w in self._passes if w.added is not None]
        return Reached(
            str(names.pop()),
            [a[1] for a in arrivals if a is not None],
            added if len(added) == len(arrivals) else None,
        )


def not_reached(layers: Iterable[str], done: Container[str]) -> CalibrationError:
    """Return the error for passes that end before all layers are done.

    Args:
        layers: Names of all.
        done: Names of those that were reached.
    """
    names = list(layers)
    missing = [name for name in names if name not in done]
    return CalibrationError(
        f"the calibration data never reach layer {missing[0]!r}",
        got=f"{len(missing)} of {len(names)} layers not reached",
        wanted="a forward pass that uses every compressible layer",
        fix="calibrate with inputs that exercise it, or remove the layer",
    )
