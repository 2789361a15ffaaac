"""The file of a search: the agent, the sensitivities, and every episode so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import FormatError, OptionError
from fitcompress.methods.galen.outcome import Outcome
from fitcompress.methods.galen.policy import Policy
from fitcompress.methods.galen.sensitivities import Sensitivities
from fitcompress.train.state_file import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fitcompress.methods.galen.agent import Agent

__all__ = ["SearchState", "read_search", "write_search"]

logger = logging.getLogger(__name__)

ENTRY = "galen"
KINDS = ("channels", "weights", "inputs")


@dataclass(frozen=True)
class SearchState:
    """What a file holds.

    Attributes:
        sensitivities: Of the layers.
        history: Policy and outcome of every episode.
        tensors: Of the agent.
        numbers: Of the agent.
    """

    sensitivities: Sensitivities
    history: list[tuple[Policy, Outcome]]
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]

    def restore_(self, agent: Agent) -> None:
        """Bring an agent to where it was, in place.

        Raises:
            FormatError: Some of it is missing, or is another agent's.
        """
        try:
            agent.restore(self.tensors, self.numbers)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(
                "the file of the search lacks a part of the agent",
                got=" ".join(str(error).split())[:200],
                fix="delete it, to search from the start",
            ) from error


def write_search(
    path: Path,
    key: str,
    agent: Agent,
    sensitivities: Sensitivities,
    history: Sequence[tuple[Policy, Outcome]],
) -> None:
    """Write a search to a file, atomically."""
    tensors = agent.tensors()
    for kind in KINDS:
        values = getattr(sensitivities, kind)
        tensors[f"kl/{kind}"] = torch.from_numpy(values).clone()
    numbers: dict[str, Any] = {
        "key": key,
        "agent": agent.numbers(),
        "history": [[p.to_list(), o.to_dict()] for p, o in history],
    }
    write_state(path, ENTRY, tensors, numbers)


def read_search(path: Path, key: str) -> SearchState | None:
    """Return what a file holds; None if there is none, or only a damaged one.

    Raises:
        OptionError: It is that of another search.
    """
    if not path.exists():
        return None
    try:
        tensors, numbers = read_state(path, ENTRY)
        if numbers["key"] == key:
            return _state(tensors, numbers)
    except (FormatError, LookupError, TypeError, ValueError) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return None
    raise OptionError(
        f"{path} belongs to another search",
        got="other options, another seed, network, target or other data",
        wanted="what it was begun with; episodes and finetune_epochs may differ",
        fix="name another checkpoint, or delete this one",
    )


def _state(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> SearchState:
    history = [
        (Policy.from_list(policy), Outcome(**outcome))
        for policy, outcome in numbers["history"]
    ]
    found = Sensitivities(*(tensors[f"kl/{kind}"].numpy() for kind in KINDS))
    return SearchState(found, history, tensors, numbers["agent"])
