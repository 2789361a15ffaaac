"""Models and checkpoints by name."""

import importlib
import pickle
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from fitcompress.data import Dataset
from fitcompress.errors import DataError, FormatError, OptionError, PlanMismatchError
from fitcompress.methods import prune_channels
from fitcompress.model.modes import evaluating
from fitcompress.search import Plan
from fitcompress.zoo import BUILT_IN

__all__ = ["build_model", "check_data", "load_checkpoint", "trained_model"]

# What reading a damaged checkpoint may raise.
UNREADABLE = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_model(name: str, channels: Path | None = None) -> nn.Module:
    """Return the model called ``name``, untrained.

    Args:
        name: A built-in, or ``package.module:factory``; the current folder is searched.
        channels: Plan file of ``Galen``, for the network without the channels that it
            removed.

    Raises:
        DataError: There is no such model.
        OptionError: The plan says nothing of channels.
        PlanMismatchError: It is for another model.
    """
    model = _dense_model(name)
    if channels is None:
        return model
    kept = Plan.load(channels).details.get("kept_channels")
    if kept is None:
        raise OptionError(
            f"{channels} says nothing of channels",
            got="a plan without kept_channels",
            wanted="what `run galen` wrote",
            fix="leave --channels out",
        )
    return prune_channels(model, kept)


def _dense_model(name: str) -> nn.Module:
    if name in BUILT_IN:
        return BUILT_IN[name]()
    module, _, factory = name.partition(":")
    if not factory:
        raise DataError(
            "unknown model",
            got=name,
            wanted=f"{', '.join(sorted(BUILT_IN))}, or package.module:factory",
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            "the model cannot be made", got=str(error), wanted=name
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise DataError(f"{name} returned no module", got=type(model).__name__)
    return model


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint; nothing in the file is executed.

    Accepts ``.safetensors``, and torch files that hold tensors only, bare or under
    ``state_dict``, with or without the prefix ``module.``.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is damaged or holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise FormatError(
            f"{path} is no checkpoint that can be read safely",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            wanted=".safetensors, or a torch file of tensors",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        torch.is_tensor(v) for v in state.values()
    ):
        raise FormatError(f"{path} holds no state dict", got=type(state).__name__)
    return {key.removeprefix("module."): value for key, value in state.items()}


def trained_model(name: str, weights: Path) -> nn.Module:
    """Return a model with the weights of a checkpoint, in eval mode.

    Raises:
        PlanMismatchError: The checkpoint does not fit the model.
    """
    model = build_model(name)
    state = load_checkpoint(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PlanMismatchError(
            f"{weights} does not fit model {name}",
            got="; ".join(str(error).splitlines()[1:3])[:300],
            fix="name the model that the checkpoint was saved from",
        ) from error
    return model.eval()


def check_data(model: nn.Module, source: Dataset) -> None:
    """Raise if ``model`` does not run on the data.

    Raises:
        DataError: It does not.
    """
    x = source.test[0][:1]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"the model does not run on the inputs of {source.name}",
            got=f"{tuple(x.shape)}: {' '.join(str(error).split())[:200]}",
            fix="name the data set that the model was made for",
        ) from error
