"""Models in folders as ``save_pretrained`` writes them; nothing is fetched or run."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fitcompress.errors import DataError, FormatError, OptionError, OutputError
from fitcompress.files import check_no_input
from fitcompress.hugging_face.packages import import_transformers
from fitcompress.quantize import activations, remove

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import nn

__all__ = ["build_model", "load_model", "load_tokenizer", "save_pretrained"]

CONFIG = "config.json"

# Names of which a folder with a tokenizer has at least one.
TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def build_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Return the model that a folder describes, with fresh weights, in eval mode.

    Its class is the first of the configuration's ``architectures``. Code that comes
    with the folder is not run.

    Args:
        folder: With a ``config.json``.

    Raises:
        DataError: There is no such folder, or its model needs code of its own.
        FormatError: The configuration is damaged.
        MissingDependencyError: transformers is not installed.
    """
    config = _config(folder)
    kind = _class_of(config, folder)
    with _reading(folder), _default_dtype(getattr(config, "dtype", None)):
        model: nn.Module = kind(config)
    return model.eval()


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Return the model in a folder, with its weights and in their type, in eval mode.

    Args:
        folder: As ``save_pretrained`` writes it, the weights in safetensors.

    Raises:
        DataError: There is no such folder, or its model needs code of its own.
        FormatError: Configuration or weights are damaged, or weights are missing.
        MissingDependencyError: transformers is not installed.
    """
    kind = _class_of(_config(folder), folder)
    with _reading(folder):
        model, found = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # no pickles
            dtype="auto",
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise FormatError(
            f"the folder {folder} lacks weights of its model",
            got=f"no {', '.join(missing[:3])}" + (" …" if len(missing) > 3 else ""),
            wanted=f"all weights of {kind.__name__}",
            fix="save the trained model, its head included, with save_pretrained",
        )
    whole: nn.Module = model
    return whole.eval()


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Return the tokenizer in a folder.

    Raises:
        DataError: It needs code of its own.
        FormatError: There is none, or it is damaged.
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    with _reading(folder, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )


def save_pretrained(
    small: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Write a compressed model as a folder that ``from_pretrained`` loads.

    The weights are dense and have exactly the values of the packed file; those that
    were tied are tied, and stand in the folder once. The folder is as large as that of
    the dense model: the packed file is what is small.

    Args:
        small: What ``apply``, ``compress`` or ``load`` returned; unchanged.
        folder: Where to; made if it does not exist.
        tokenizer: Folder whose tokenizer, if there is one, is copied too.

    Raises:
        OptionError: It is no model of Hugging Face, or it quantizes inputs of layers,
            which such a folder cannot say; or ``folder`` is that of ``tokenizer``.
        OutputError: The folder cannot be written, or is a file.
    """
    import_transformers()
    check_no_input(folder, [] if tokenizer is None else [tokenizer])
    if Path(folder).is_file():
        raise OutputError(
            f"cannot write {folder}",
            got="a file of that name",
            wanted="a folder, new or there already",
            fix="choose another name",
        )
    if not hasattr(small, "save_pretrained"):
        raise OptionError(
            "this is no model of Hugging Face",
            got=type(small).__name__,
            wanted="a model that has save_pretrained",
            fix="use fitcompress.save, or fitcompress unpack",
        )
    if any(True for _ in activations(small)):
        raise OptionError(
            "a folder of Hugging Face cannot say how inputs are quantized",
            got="a plan with activation bits",
            wanted="a plan for weights alone",
            fix="use fitcompress.save, or remove(model, activations=True) first",
        )
    plain: Any = remove(copy.deepcopy(small))
    held = None
    if tokenizer is not None and not _lacks_tokenizer(tokenizer):
        held = load_tokenizer(tokenizer)
    try:
        plain.save_pretrained(str(folder))
        if held is not None:
            held.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {folder}",
            got=str(error)[:200],
            wanted="a folder that can be written to and has room",
            fix="choose another place",
        ) from error


def _lacks_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Say whether it is a folder without one; what is no folder is told when read."""
    found = any(True for name in TOKENIZERS for _ in Path(folder).glob(name))
    return Path(folder).is_dir() and not found


def _config(folder: str | os.PathLike[str]) -> Any:
    transformers = import_transformers()
    if not Path(folder, CONFIG).is_file():
        raise DataError(
            f"{folder} is no folder of a model",
            got=f"no {CONFIG}",
            wanted="a folder on this machine, as save_pretrained writes it",
            fix="download the model first; nothing is fetched here",
        )
    with _reading(folder):
        raw, _ = transformers.PreTrainedConfig.get_config_dict(
            str(folder), local_files_only=True
        )
        own_code = raw.get("model_type") not in transformers.CONFIG_MAPPING
        if not own_code:
            return transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    raise _own_code(folder, f"model type {raw.get('model_type')!r}")


def _class_of(config: Any, folder: str | os.PathLike[str]) -> Any:
    transformers = import_transformers()
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not names:
        raise FormatError(
            f"{Path(folder, CONFIG)} does not say what model it is",
            got=f"architectures {str(names)[:50]}" if names else "no architectures",
            wanted='"architectures": ["LlamaForCausalLM"], say',
            fix="save the model again with save_pretrained",
        )
    with _reading(folder):
        kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise _own_code(folder, f"architecture {names[0]!r}")
    return kind


def _own_code(folder: str | os.PathLike[str], got: str) -> DataError:
    return DataError(
        f"the model in {folder} needs code that is not part of transformers",
        got=got,
        wanted="a model that transformers knows; code in a folder is not run",
        fix="load it in a module of your own: --model package.module:factory",
    )


@contextlib.contextmanager
def _reading(folder: str | os.PathLike[str], what: str = "model") -> Iterator[None]:
    """Say that what transformers parses is damaged, whatever it raises then.

    Errors of its checks of configurations, say, derive from ``Exception`` alone.
    """
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):  # transformers' advice to run it
            raise _own_code(folder, f"a {what} with code of its own") from error
        raise FormatError(
            f"the {what} in {folder} cannot be read",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            wanted="a folder as save_pretrained writes it",
            fix="copy or save it again",
        ) from error


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
