"""Whether a search can be, before any work is spent on it."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import digest, take
from fitcompress.errors import DataError, OptionError
from fitcompress.methods.dense import dense_layers

if TYPE_CHECKING:
    from fitcompress.methods.galen.method import Galen

__all__ = ["check_input", "check_loader", "check_options", "check_seed", "check_target"]

FEWEST = {
    "episodes": 1,
    "warm_up": 0,
    "retrain_epochs": 0,
    "retrain_samples": 1,
    "finetune_epochs": 0,
    "calibration_samples": 1,
    "sensitivity_samples": 1,
}
LARGEST_SEED = 2**63 - 1


def check_options(method: Galen) -> None:
    """Raise unless the options can be used.

    Raises:
        OptionError: One cannot.
    """
    method.actions()
    for name, least in FEWEST.items():
        value = getattr(method, name)
        if value is None and name == "retrain_samples":
            continue
        if type(value) is not int or value < least:
            raise OptionError(
                name, got=repr(value), wanted=f"a whole number, {least} or more"
            )
    for name in ("target", "learning_rate"):
        value = getattr(method, name)
        if not _is_number(value) or value <= 0:
            raise OptionError(name, got=repr(value), wanted="a number > 0")
    if not _is_number(method.beta) or method.beta > 0:
        raise OptionError("beta", got=repr(method.beta), wanted="a number, at most 0")
    for name in ("one_sided", "reconstruct"):
        value = getattr(method, name)
        if type(value) is not bool:
            raise OptionError(name, got=repr(value), wanted="True or False")


def check_seed(seed: object) -> None:
    """Raise unless everything can be drawn from a seed.

    Raises:
        OptionError: It cannot.
    """
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise OptionError(
            "seed", got=repr(seed), wanted=f"a whole number, 0 to {LARGEST_SEED}"
        )


def check_input(model: object, example: object, *, trains: bool) -> None:
    """Raise unless a model can be searched with an example.

    Args:
        model: The network.
        example: One input.
        trains: Whether it is retrained.

    Raises:
        DataError: The example is no tensor with a batch.
        OptionError: The model is none, compressed already, not in float32, or has
            nothing to train.
        NoCompressibleLayerError: It has no layer that can be compressed.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedLayerError: Layers share a weight.
    """
    if not isinstance(model, nn.Module):
        raise OptionError("model", got=type(model).__name__, wanted="a torch.nn.Module")
    if not torch.is_tensor(example) or not example.dim() or not len(example):
        raise DataError(
            "the example is no input",
            got=type(example).__name__,
            wanted="a tensor with its batch dimension",
        )
    dense_layers(model)
    if trains and not any(p.requires_grad for p in model.parameters()):
        raise OptionError(
            "there is nothing to train",
            got="no parameter with requires_grad",
            fix="unfreeze the model, or use retrain_epochs=0 and finetune_epochs=0",
        )


def check_loader(name: str, loader: Any) -> None:
    """Raise unless a loader can be read more than once.

    Raises:
        DataError: It cannot, or a batch cannot be used.
        EmptyLoaderError: It yields nothing, the first time or the second.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            once = iter(loader) is loader
        except TypeError as error:
            raise DataError(
                f"{name} cannot be read",
                got=type(loader).__name__,
                wanted="a loader of batches",
            ) from error
        first, second = (digest(next(take(loader, 1))[0]) for _ in range(2))
    if once and first != second:
        raise DataError(
            f"{name} can be read only once",
            got=type(loader).__name__,
            wanted="a loader that starts anew for every pass",
            fix="pass a list of the batches, or a DataLoader",
        )


def check_target(target: Any) -> None:
    """Raise unless a target can time networks beside another one.

    Raises:
        OptionError: It cannot.
        FitcompressError: As the target raises them.
    """
    if not hasattr(target, "fingerprint") or not callable(
        getattr(target, "open", None)
    ):
        raise OptionError(
            "latency_target",
            got=type(target).__name__,
            wanted="a LatencyTarget, such as OnnxRuntimeTarget()",
        )
    parameters = inspect.signature(target.open).parameters.values()
    if not any(
        x.name == "reference" or x.kind is inspect.Parameter.VAR_KEYWORD
        for x in parameters
    ):
        raise OptionError(
            "the target cannot time a network beside another one",
            got=f"open of {type(target).__name__} without reference=",
            wanted="open(model, example_input, *, weight_bits, reference=None)",
            fix="let reference name the session whose network is timed in turns",
        )


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]
