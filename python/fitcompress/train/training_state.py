"""A training run on disk, so that a killed one goes on and ends the same."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch

from fitcompress.errors import FormatError
from fitcompress.files import check_writable
from fitcompress.model.devices import device_of
from fitcompress.model.layers import fingerprint
from fitcompress.quantize.rate import Rate
from fitcompress.train.state_file import read_state, write_state

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import nn

    from fitcompress.quantize import WeightGrid

__all__ = ["Pricing", "TrainingState"]

logger = logging.getLogger(__name__)

ENTRY = "finetune"


class Pricing(Protocol):
    """What holds a network to its budget while it trains.

    Attributes:
        weight: The price of what is bounded.
        layers: Modules whose grids have prices of their own, with these grids.
    """

    weight: float

    @property
    def layers(self) -> Sequence[tuple[nn.Module, WeightGrid]]:
        """Modules and grids."""


class TrainingState:
    """Everything that the next step depends on.

    Weights and their float32 copies, moments, prices, step number, and the state of
    torch's random generators, which dropout draws from.

    Args:
        path: The file.
        key: Settings that must be equal for the file to be used.
        model: The model under training; its values now become part of the key.
        optimizer: Its optimizer.
        rate: What prices bits, if anything does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Pricing | None = None,
    ) -> None:
        self.path, self.key = check_writable(path), f"{key}-{fingerprint(model, [])}"
        self.model, self.optimizer, self.rate = model, optimizer, rate
        self._random: dict[str, torch.Tensor] = {}

    def save(self, done: int) -> None:
        """Write the state after ``done`` steps, atomically."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        own = {tensor.data_ptr() for tensor in tensors.values()}
        for index, parameter in enumerate(self._parameters()):
            if parameter.data_ptr() not in own:
                tensors[f"copy/{index}"] = parameter
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{index}/{name}"] = value
        for index, grid in enumerate(self._grids()):
            assert grid.rate is not None
            tensors[f"lengths/{index}"] = grid.rate.lengths
        tensors["random/cpu"] = torch.get_rng_state()
        device = device_of(self.model)
        if device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(device)
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        info = {"key": self.key, "done": done, "weight": self._weight().hex()}
        write_state(self.path, ENTRY, tensors, info)

    def restore(self) -> int:
        """Load the state, if there is a fitting one; return how many steps are done."""
        if not self.path.exists():
            return 0
        try:
            tensors, info = read_state(self.path, ENTRY)
            key, done = info["key"], int(info["done"])
        except (FormatError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged and not used: %s", self.path, error)
            return 0
        if key != self.key:
            logger.warning("%s belongs to another run and is not used", self.path)
            return 0
        self._load(tensors)
        if self.rate is not None:
            self.rate.weight = float.fromhex(info["weight"])
        for index, grid in enumerate(self._grids()):
            lengths = tensors[f"lengths/{index}"].to(grid.scale.device)
            grid.rate = Rate(lengths, self._weight())
        self._random = {k: v for k, v in tensors.items() if k.startswith("random/")}
        return done

    def restore_random(self) -> None:
        """Give the random generators the state that :meth:`restore` found, once.

        Apart from it, because loading the batches that are skipped may draw as well.
        """
        if "random/cpu" in self._random:
            torch.set_rng_state(self._random["random/cpu"])
        device = device_of(self.model)
        if "random/cuda" in self._random and device.type == "cuda":
            torch.cuda.set_rng_state(self._random["random/cuda"], device)
        self._random = {}

    @torch.no_grad()
    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        begin = "model/"
        self.model.load_state_dict(
            {k[len(begin) :]: v for k, v in tensors.items() if k.startswith(begin)}
        )
        for index, parameter in enumerate(self._parameters()):
            if f"copy/{index}" in tensors:
                parameter.copy_(tensors[f"copy/{index}"])
            begin = f"optimizer/{index}/"
            for key, value in tensors.items():
                if key.startswith(begin):
                    # Adam keeps its step counters on the CPU.
                    place = parameter.device if value.dim() else value.device
                    self.optimizer.state[parameter][key[len(begin) :]] = value.to(place)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _grids(self) -> list[WeightGrid]:
        return [] if self.rate is None else [grid for _, grid in self.rate.layers]

    def _weight(self) -> float:
        return 0.0 if self.rate is None else self.rate.weight
