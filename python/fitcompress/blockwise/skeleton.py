"""A decoder of Hugging Face without its values: what it is made of, and in what order.

A block is taken apart into two halves, each with a norm before it and its sum added to
the residual stream h:

    h ← h + o(a),     a = attention(norm₁(h)) without its output projection o
    h ← h + down(m),  m = mlp(norm₂(h)) without its output projection down

so the layers of a block form four groups, each of which reads one input: q/k/v, o,
gate/up, down. Everything else, positions, masks and activation functions, is what the
model's own classes compute.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fitcompress.errors import (
    FormatError,
    MissingDependencyError,
    UnsupportedLayerError,
)
from fitcompress.model import Layer, compressible_layers

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

__all__ = ["Group", "Skeleton", "call_half"]

logger = logging.getLogger(__name__)

OUTPUTS = {"self_attn": "o_proj", "mlp": "down_proj"}
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
TRIAL = 8  # tokens by which a block is compared with its halves
CLOSE = 1e-4


class _CaughtError(Exception):
    """Ends a forward pass at the first block."""


@dataclass(frozen=True)
class Group:
    """Layers that read one input.

    Attributes:
        half: ``self_attn`` or ``mlp``.
        output: Whether it is the output projection of that half.
        layers: The layers, in the order of the model.
    """

    half: str
    output: bool
    layers: tuple[Layer, ...]


class Skeleton:
    """The modules of a causal language model on the meta device.

    Args:
        folder: A model of Hugging Face, ``config.json`` and its tensors.

    Attributes:
        model: The whole model, without values.
        layers: Its compressible layers.
        version: Of transformers.

    Raises:
        MissingDependencyError: transformers is not installed.
        FormatError: The folder has no config that transformers can read.
        UnsupportedLayerError: It is no decoder of the kind above.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, __version__
        except ImportError as error:
            raise MissingDependencyError(
                "blocks of decoders are run by transformers, which is not installed",
                fix="pip install 'fitcompress[hf]'",
            ) from error
        try:
            config = AutoConfig.from_pretrained(
                Path(folder), local_files_only=True, trust_remote_code=False
            )
            build: Any = AutoModelForCausalLM
            with torch.device("meta"):
                model = build.from_config(config, trust_remote_code=False)
            inner: Any = getattr(model, "model", None)
            if isinstance(getattr(inner, "rotary_emb", None), nn.Module):
                inner.rotary_emb = type(inner.rotary_emb)(config=config)  # with values
        except Exception as error:  # whatever a damaged config provokes
            raise FormatError(
                f"{folder} is no model that transformers can build",
                got=" ".join(str(error).split())[:300] or type(error).__name__,
                wanted="a folder with config.json of a causal language model",
            ) from error
        self.model: nn.Module = model.eval()
        self.config = config
        self.version: str = __version__
        self._inner: Any = inner
        for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
            if not isinstance(getattr(self._inner, part, None), nn.Module):
                raise self._unsupported(f"a model without {part}")
        if type(self._inner.embed_tokens).forward is not nn.Embedding.forward:
            raise self._unsupported(
                f"an embedding of class {type(self._inner.embed_tokens).__name__}"
            )
        self.layers = compressible_layers(model)
        self._by_name = {layer.name: layer for layer in self.layers}
        self._prefix = "model."
        self._calls: dict[tuple[int, int], dict[str, Any]] = {}
        self._caller = -1

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._inner.layers)

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return int(self._inner.embed_tokens.embedding_dim)

    @property
    def embedding(self) -> Layer:
        """The embedding, perhaps tied to the head."""
        return self._layer(f"{self._prefix}embed_tokens")

    @cached_property
    def head(self) -> Layer | None:
        """The head if its weight is its own."""
        return self._by_name.get("lm_head")

    def block(self, number: int) -> nn.Module:
        """Return a block."""
        return cast("nn.Module", self._inner.layers[number])

    def block_name(self, number: int) -> str:
        """Return what the names of its tensors begin with."""
        return f"{self._prefix}layers.{number}"

    def groups(self, number: int) -> list[Group]:
        """Return the four groups of a block, in the order in which they run.

        Raises:
            UnsupportedLayerError: It has layers that belong to none.
        """
        block, prefix = self.block(number), self.block_name(number)
        found, known = [], set()
        for half, output in OUTPUTS.items():
            module = getattr(block, half, None)
            norm = getattr(block, NORMS[half], None)
            if not isinstance(getattr(module, output, None), nn.Linear) or norm is None:
                raise self._unsupported(
                    f"{prefix} without {half}.{output} and its norm"
                )
            own = [
                layer
                for layer in self.layers
                if layer.name.startswith(f"{prefix}.{half}.")
            ]
            last = f"{prefix}.{half}.{output}"
            first = tuple(layer for layer in own if layer.name != last)
            if not first or not all(isinstance(x.module, nn.Linear) for x in own):
                raise self._unsupported(f"{prefix}.{half} of other layers than Linear")
            found.append(Group(half, False, first))
            found.append(Group(half, True, (self._layer(last),)))
            known |= {layer.name for layer in own}
        for layer in self.layers:
            if layer.name.startswith(f"{prefix}.") and layer.name not in known:
                raise self._unsupported(f"the layer {layer.name!r}")
        return found

    def check_known(self, names: set[str]) -> None:
        """Raise if a layer is neither the head nor one of these.

        Raises:
            UnsupportedLayerError: There is one.
        """
        for layer in self.layers:
            if layer.name not in names and layer is not self.head:
                raise self._unsupported(f"the layer {layer.name!r} outside of blocks")

    def inner(self, number: int, half: str) -> nn.Module:
        """Return a half without its output projection, to be filled with values."""
        module = copy.deepcopy(getattr(self.block(number), half))
        setattr(module, OUTPUTS[half], nn.Identity())
        return cast("nn.Module", module)

    def norm(self, number: int, half: str) -> tuple[str, nn.Module]:
        """Return the name and a copy of the norm before a half."""
        name = NORMS[half]
        return f"{self.block_name(number)}.{name}", copy.deepcopy(
            getattr(self.block(number), name)
        )

    def last_norm(self) -> tuple[str, nn.Module]:
        """Return the name and a copy of the norm before the head."""
        return f"{self._prefix}norm", copy.deepcopy(self._inner.norm)

    def arguments(self, number: int, sequences: int, length: int) -> dict[str, Any]:
        """Return what the model calls a block with, besides the hidden states.

        Raises:
            UnsupportedLayerError: The model calls it with more, or does something to
                the hidden states before the block besides what blocks do.
        """
        if number != self._caller:  # masks are large: only those of one block are kept
            self._calls.clear()
            self._caller = number
        if (sequences, length) not in self._calls:
            self._calls[sequences, length] = self._arguments(number, sequences, length)
        return self._calls[sequences, length]

    def _arguments(self, number: int, sequences: int, length: int) -> dict[str, Any]:
        caught: dict[str, Any] = {}

        def catch(_: nn.Module, given: Any, named: dict[str, Any]) -> None:
            caught.update(named)
            if given:
                caught["hidden_states"], caught["more"] = given[0], given[1:]
            raise _CaughtError

        # Blocks may be called differently by their number: those before stay in their
        # places, and pass on what they are given.
        embed, before = self._inner.embed_tokens, self._inner.layers[:number]
        states = torch.linspace(1, 2, self.width).expand(sequences, length, -1)
        handle = self.block(number).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            embed.forward = lambda *_, **__: states
            for block in before:
                block.forward = _unchanged
            with torch.no_grad():
                ids = torch.zeros(sequences, length, dtype=torch.long)
                self._inner(input_ids=ids, use_cache=False)
        except _CaughtError:
            pass
        finally:
            handle.remove()
            for module in (embed, *before):
                vars(module).pop("forward", None)
        given = caught.pop("hidden_states", None)
        if given is None or given.is_meta or not torch.equal(given, states):
            raise self._unsupported(
                f"{type(self._inner).__name__}, which changes hidden states between "
                f"the embedding and {self.block_name(number)}"
            )
        if caught.pop("more", ()):
            raise self._unsupported("blocks that are called with unnamed arguments")
        return caught

    @torch.no_grad()
    def check_halves(
        self, number: int, states: torch.Tensor, fill: Callable[[nn.Module, str], None]
    ) -> None:
        """Raise unless a block computes what its halves do, one after the other.

        Args:
            number: Of the block.
            states: Hidden states [1, positions, width].
            fill: Gives a module the values of the dense network, by its name.

        Raises:
            UnsupportedLayerError: It does not.
        """
        states, name = states[:, :TRIAL], self.block_name(number)
        named = self.arguments(number, *states.shape[:2])
        block = copy.deepcopy(self.block(number))
        fill(block, name)
        whole = block(states, **named)
        whole = whole[0] if isinstance(whole, tuple) else whole
        for half, output in OUTPUTS.items():
            module = getattr(block, half)
            project = getattr(module, output)
            setattr(module, output, nn.Identity())
            normed = getattr(block, NORMS[half])(states)
            states = states + project(call_half(module, half, normed, named))
        change = float((states - whole).norm() / whole.norm().clamp_min(1e-30))
        if not change <= CLOSE:
            raise self._unsupported(
                f"{name} of class {type(block).__name__}, whose outputs differ by "
                f"{100 * change:.2g} % from those of its halves"
            )

    def _layer(self, name: str) -> Layer:
        if name not in self._by_name:
            raise self._unsupported(f"{name!r} as something that is not compressible")
        return self._by_name[name]

    def _unsupported(self, got: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            "the model cannot be taken apart block by block",
            got=got,
            wanted="blocks as those of Llama: h + o(attention(norm(h))), then h + "
            "down(mlp(norm(h)))",
            fix="use apply with the whole model in memory",
        )


def _unchanged(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stand in for a block."""
    return hidden_states


def call_half(
    module: nn.Module, half: str, normed: torch.Tensor, named: dict[str, Any]
) -> torch.Tensor:
    """Return what a half without its output projection computes.

    Args:
        module: From :meth:`Skeleton.inner`, filled with values.
        half: ``self_attn`` or ``mlp``.
        normed: Its inputs, [sequences, length, width].
        named: What blocks are called with.
    """
    out = module(normed) if half == "mlp" else module(hidden_states=normed, **named)
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found
