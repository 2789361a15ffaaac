"""Layers that runtimes compute as one, found by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fitcompress.model.layers import compressible_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

__all__ = ["FUSED", "fused_groups", "groups_of_names"]

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, BART, CLIP
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),  # Llama, Mistral, Qwen
    ("w1", "w3"),  # Mixtral
    ("wi_0", "wi_1"),  # T5
)
"""Last parts of the names of layers that read the same input, queries first."""

CROSS = ("*cross*", "encoder_attn", "EncDecAttention")


def fused_groups(
    model: nn.Module, patterns: Sequence[Sequence[str]] = FUSED
) -> tuple[tuple[str, ...], ...]:
    """Return groups of layers that must share a level where a runtime fuses them.

    The projections of queries, keys and values, and those of a gate and what it gates,
    read the same input; runtimes for language models stack them into one matrix, which
    has one number of bits. Layers are told by their names: those of one module whose
    last parts are in the same pattern. Queries of cross-attention read another input
    than keys and values, and stay alone.

    Args:
        model: The network.
        patterns: The last parts of the names in a group, with ``*`` and ``?`` as in
            file names. They replace the known ones: ``(*FUSED, ("a", "b"))`` adds one.

    Returns:
        Names in groups of two or more, for ``Budget(groups=…)``. Being plain tuples,
        they can be filtered and joined to others; a name may be in one group only.

    Example:
        >>> import torch, fitcompress as fc
        >>> block = torch.nn.ModuleDict(
        ...     {n: torch.nn.Linear(4, 4) for n in ("query", "key", "value", "output")}
        ... )
        >>> fc.fused_groups(block)
        (('query', 'key', 'value'),)
        >>> budget = fc.Budget(size="20%", groups=fc.fused_groups(block))
    """
    return groups_of_names((x.name for x in compressible_layers(model)), patterns)


def groups_of_names(
    names: Iterable[str], patterns: Sequence[Sequence[str]] = FUSED
) -> tuple[tuple[str, ...], ...]:
    """Return groups as :func:`fused_groups` does, of layers with these names."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        for number, pattern in enumerate(patterns):
            places = [i for i, each in enumerate(pattern) if fnmatchcase(own, each)]
            if not places:
                continue
            if places[0] or not _crosses(parent):
                found.setdefault((parent, number), []).append(name)
            break
    return tuple(tuple(group) for group in found.values() if len(group) > 1)


def _crosses(parent: str) -> bool:
    return any(fnmatchcase(p, each) for p in parent.split(".") for each in CROSS)
