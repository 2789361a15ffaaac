"""A fine-tuning run on disk, so that a killed one goes on and ends the same."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from fitcompress.files import check_writable, write_atomically
from fitcompress.quantize.rate import Rate

if TYPE_CHECKING:
    import os

    from torch import nn

    from fitcompress.train.rate_control import RateControl

__all__ = ["TrainingState"]

logger = logging.getLogger(__name__)


class TrainingState:
    """Everything that the next step depends on: weights, moments, prices, step number.

    Args:
        path: The file.
        key: Settings that must be equal for the file to be used.
        model: The model under training.
        optimizer: Its optimizer.
        rate: Its rate control.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: RateControl,
    ) -> None:
        self.path, self.key = check_writable(path), key
        self.model, self.optimizer, self.rate = model, optimizer, rate
        digest = sum(float(t.double().abs().sum()) for t in model.state_dict().values())
        self.key += f"-{digest.hex()}"  # of the model as it was given

    def save(self, done: int) -> None:
        """Write the state after ``done`` steps, atomically."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        for index, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{index}/{name}"] = value
        for index, (_, grid) in enumerate(self.rate.layers):
            assert grid.rate is not None
            tensors[f"lengths/{index}"] = grid.rate.lengths
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        info = {"key": self.key, "done": done, "weight": self.rate.weight.hex()}
        data = safetensors.torch.save(tensors, {"finetune": json.dumps(info)})
        write_atomically(self.path, data)

    def restore(self) -> int:
        """Load the state, if there is a fitting one; return how many steps are done."""
        if not self.path.exists():
            return 0
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                info = json.loads((file.metadata() or {})["finetune"])
                if info["key"] != self.key:
                    logger.warning("%s belongs to another run and is not used", self.path)
                    return 0
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            logger.warning("%s is damaged and not used: %s", self.path, error)
            return 0
        model = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith("model/")}
        self.model.load_state_dict(model)
        parameters = self._parameters()
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                self.optimizer.state[parameters[int(index)]][name] = value
        self.rate.weight = float.fromhex(info["weight"])
        for index, (_, grid) in enumerate(self.rate.layers):
            grid.rate = Rate(tensors[f"lengths/{index}"], self.rate.weight)
        return int(info["done"])

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
