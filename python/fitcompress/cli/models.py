"""Models and checkpoints by name."""

import contextlib
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from fitcompress.data import DATASETS, Dataset, load_dataset
from fitcompress.data.batches import tensors
from fitcompress.data.text import LONGEST, TextDataset, load_sentences, load_tokens
from fitcompress.errors import DataError, FormatError, OptionError, PlanMismatchError
from fitcompress.hugging_face import folder as hugging_face
from fitcompress.methods import prune_channels
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.search import Plan
from fitcompress.zoo import BUILT_IN

__all__ = [
    "TOKENS",
    "build_model",
    "check_data",
    "fitting_data",
    "load_checkpoint",
    "model_folder",
    "trained_model",
]

HUGGING_FACE = "hf:"
SENTENCES, TOKENS = "tsv", "tokens"

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
        name: A built-in, ``hf:DIR`` for a folder of Hugging Face, or
            ``package.module:factory``; the current folder is searched.
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
    if (folder := model_folder(name)) is not None:
        return hugging_face.build_model(folder)
    module, _, factory = name.partition(":")
    if not factory:
        raise DataError(
            "unknown model",
            got=name,
            wanted=f"{', '.join(sorted(BUILT_IN))}, hf:DIR, or package.module:factory",
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


def model_folder(name: str) -> Path | None:
    """Return the folder in ``hf:DIR``, or None for models of other kinds."""
    if not name.startswith(HUGGING_FACE):
        return None
    return Path(name.removeprefix(HUGGING_FACE))


def trained_model(name: str, weights: Path | None = None) -> nn.Module:
    """Return a model with the weights of a checkpoint, in eval mode.

    Args:
        name: As for :func:`build_model`.
        weights: The checkpoint; None for those in a folder of Hugging Face.

    Raises:
        OptionError: There is neither.
        PlanMismatchError: The checkpoint does not fit the model.
    """
    if weights is None:
        if (folder := model_folder(name)) is None:
            raise OptionError(
                f"model {name} has no weights of its own",
                wanted="--weights FILE, or --model hf:DIR",
            )
        return hugging_face.load_model(folder)
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


def fitting_data(
    name: str, model: nn.Module, dataset: str, data: Path | None
) -> Dataset | TextDataset:
    """Return the data of a model, after it has run on a sample.

    Args:
        name: Of the model; the tokenizer comes with its folder.
        model: It.
        dataset: ``tsv`` for labelled sentences, ``tokens`` for sequences of tokens, or
            what :func:`fitcompress.data.load_dataset` knows.
        data: Its folder or file.

    Raises:
        DataError: There are no such data, or the model does not run on them.
    """
    if dataset not in (known := (*sorted(DATASETS), SENTENCES, TOKENS)):
        raise DataError("unknown data set", got=dataset, wanted=", ".join(known))
    source: Dataset | TextDataset
    if dataset == TOKENS:
        source = load_tokens(data, vocabulary=_vocabulary(model))
    elif dataset == SENTENCES:
        if (folder := model_folder(name)) is None:
            raise DataError(
                "sentences need the tokenizer of a model",
                got=f"--model {name}",
                wanted="--model hf:DIR",
            )
        tokenizer = hugging_face.load_tokenizer(folder)
        source = load_sentences(data, tokenizer, longest=_longest(model))
    else:
        source = load_dataset(dataset, data)
    check_data(model, source)
    return source


def _longest(model: nn.Module) -> int:
    """Return how many tokens of a sentence are used: no more than it has positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LONGEST, positions) if isinstance(positions, int) else LONGEST


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens a model of Hugging Face embeds, None if it is not one."""
    owner: Any = model
    embedding = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        embedding = owner.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_data(model: nn.Module, source: Dataset | TextDataset) -> None:
    """Raise if ``model`` does not run on the data.

    Raises:
        DataError: It does not.
    """
    shapes = "no batch"
    try:
        x = source.example()
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(x))
        with evaluating(model), torch.no_grad():
            call_model(model, x)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"the model does not run on the inputs of {source.name}",
            got=f"{shapes}: {' '.join(str(error).split())[:200]}",
            fix="name the data set that the model was made for",
        ) from error
