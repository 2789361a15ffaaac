"""Sums of squared per-sample gradients: what a Fisher estimate is."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from fitcompress.errors import DataError, FormatError
from fitcompress.files import write_atomically

if TYPE_CHECKING:
    import os

__all__ = ["FisherMoments"]

FORMAT, VERSION = "fitcompress-fisher", 1
KINDS = ("trace", "squares", "activations")  # of sums


@dataclass
class FisherMoments:
    """Sums over samples of squared gradients, so that estimates can be merged.

    With G_i the gradient of the loss ℓ_i of sample i for a weight, in nats,

        F = (1/N) Σ_i G_i ∘ G_i,    T = (1/N) Σ_i ‖G_i‖² = Σ_j F_j    (nats²).

    Attributes:
        trace: Weight name → float64 [Σ_i ‖G_i‖², Σ_i ‖G_i‖⁴].
        squares: Weight name → Σ_i G_i ∘ G_i, [n, m]: the weight's shape with all
            dimensions but the first flattened. In float32, as large as the weights: a
            thousand batches cost an element about 1e-6 of its value. Empty for an
            estimate of traces.
        activations: Weight name → Σ_i ‖∂ℓ_i/∂x_i‖², x the input of the layer. Empty
            unless asked for.
        samples: N.
        loss: Σ_i ℓ_i, nats.
        batches: Batches consumed, for resuming.
        forms: Weight name → how its norms were computed in the last batch: ``outer``,
            ``ghost``, ``direct``, ``winograd`` or ``rows``, see
            :mod:`fitcompress.sensitivity.forms`.
        unsupported: Weight name → why there are no moments of it.
    """

    trace: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0
    batches: int = 0
    forms: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that were measured, in the order of the model."""
        return tuple(self.trace)

    @property
    def mean_loss(self) -> float:
        """Mean of ℓ_i, nats."""
        return self.loss / max(self.samples, 1)

    def diagonal(self, name: str) -> torch.Tensor:
        """Return F of one weight, float32 [n, m].

        Raises:
            DataError: Only traces were measured.
        """
        if name not in self.squares:
            raise DataError(
                f"the Fisher diagonal of {name!r} was not measured",
                got="traces only" if name in self.trace else f"no weight {name!r}",
                fix="measure with diagonal=True",
            )
        return (self.squares[name] / max(self.samples, 1)).float()

    def mean_trace(self, name: str) -> float:
        """Return T of one weight, nats²."""
        return float(self.trace[name][0]) / max(self.samples, 1)

    def mean_activation(self, name: str) -> float:
        """Return T_a = (1/N) Σ_i ‖∂ℓ_i/∂x_i‖² of the input of a layer, nats²."""
        return float(self.activations[name]) / max(self.samples, 1)

    def relative_error(self, name: str) -> float:
        """Return the standard error of T divided by T; 0 where T is 0, ∞ if N < 2.

        The ‖G_i‖² are taken as independent draws: their sample variance over N is the
        squared standard error of their mean.
        """
        first, second = self.trace[name].tolist()
        count, mean = self.samples, first / max(self.samples, 1)
        if mean == 0:
            return 0.0
        if count < 2:
            return float("inf")
        variance = max(second / count - mean * mean, 0.0) * count / (count - 1)
        return float((variance / count) ** 0.5 / mean)

    @property
    def largest_relative_error(self) -> float:
        """The largest relative standard error of all weights."""
        return max((self.relative_error(name) for name in self.names), default=0.0)

    def add_norms(self, name: str, norms: torch.Tensor) -> None:
        """Count samples of a weight, ``norms`` = ‖G_i‖² of each, float64 [B]."""
        norms = norms.cpu()
        sums = self.trace.setdefault(name, torch.zeros(2, dtype=torch.float64))
        sums += torch.stack([norms.sum(), norms.square().sum()])

    def merge(self, other: FisherMoments) -> FisherMoments:
        """Return the moments of the samples of both, which must not overlap.

        Raises:
            DataError: They are of different weights or kinds.
        """
        for kind in KINDS:
            mine, others = (
                {name: tuple(t.shape) for name, t in getattr(m, kind).items()}
                for m in (self, other)
            )
            if mine != others:
                differing = sorted(set(mine.items()) ^ set(others.items()))
                raise DataError(
                    f"moments of different models or kinds cannot be merged ({kind})",
                    got=f"{len(mine)} and {len(others)} weights, differing in "
                    + ", ".join(dict.fromkeys(name for name, _ in differing[:3])),
                    wanted="the same weights of the same shapes",
                    fix="merge estimates of one model with the same options",
                )
        merged = copy.deepcopy(self)
        for kind in KINDS:
            for name, sums in getattr(merged, kind).items():
                sums += getattr(other, kind)[name].to(sums.device)
        merged.samples += other.samples
        merged.loss += other.loss
        merged.batches += other.batches
        merged.forms |= other.forms
        merged.unsupported |= other.unsupported
        return merged

    def all_reduce(self, group: Any = None, *, squares: bool = True) -> None:
        """Add up the moments of all processes of a ``torch.distributed`` group.

        Each process counts its own samples, which must not overlap. Weights that only
        some of them have reached count as zero in the others; those that one of them
        could not measure are left out.

        Args:
            group: The process group; None is the default one.
            squares: Whether to add up F, too; else each process keeps what it has.
        """
        import torch.distributed as dist

        kinds = [kind for kind in KINDS if squares or kind != "squares"]
        mine = {
            "sizes": {
                (kind, name): tuple(sums.shape)
                for kind in kinds
                for name, sums in getattr(self, kind).items()
            },
            "unsupported": self.unsupported,
            "forms": self.forms,
        }
        all_: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(all_, mine, group=group)
        for other in all_:
            self.unsupported = {**other["unsupported"], **self.unsupported}
            self.forms = {**other["forms"], **self.forms}
        sizes = {key: size for other in all_ for key, size in other["sizes"].items()}
        counts = torch.tensor(
            [self.samples, self.loss, self.batches], dtype=torch.float64
        )
        sums = [counts]
        for (kind, name), size in sizes.items():  # in the same order everywhere
            held = getattr(self, kind)
            if name not in self.unsupported:
                dtype = torch.float32 if kind == "squares" else torch.float64
                sums.append(held.setdefault(name, torch.zeros(size, dtype=dtype)))
            else:
                held.pop(name, None)
                self.forms.pop(name, None)
        gpu = "nccl" in str(dist.get_backend(group))
        for tensor in sums:
            there = tensor.cuda() if gpu and not tensor.is_cuda else tensor
            dist.all_reduce(there, group=group)
            if there is not tensor:
                tensor.copy_(there)
        self.samples, self.batches = int(counts[0]), int(counts[2])
        self.loss = float(counts[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the moments to a ``.safetensors`` file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        write_atomically(path, self.to_bytes({}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FisherMoments:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: The file is damaged, of another kind or a newer version.
        """
        return cls.from_file(path)[0]

    def to_bytes(self, extra: dict[str, Any]) -> bytes:
        """Return the contents of a file, ``extra`` among the metadata."""
        tensors = {
            f"{kind}/{name}": sums.detach().cpu().contiguous()
            for kind in KINDS
            for name, sums in getattr(self, kind).items()
            if name in self.trace
        }
        counts = {
            "version": VERSION,
            "samples": self.samples,
            "loss": float(self.loss).hex(),
            "batches": self.batches,
            "names": list(self.trace),  # a file's tensors come in another order
            "forms": self.forms,
            "unsupported": self.unsupported,
            **extra,
        }
        made: bytes = safetensors.torch.save(tensors, {FORMAT: json.dumps(counts)})
        return made

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str]
    ) -> tuple[FisherMoments, dict[str, Any]]:
        """Return the moments in a file and its metadata.

        Raises:
            FormatError: The file is damaged, of another kind or a newer version.
        """
        try:
            with safetensors.safe_open(Path(path), framework="pt") as file:
                counts = json.loads((file.metadata() or {})[FORMAT])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            version = counts["version"]
            if isinstance(version, int) and version > VERSION:
                raise FormatError(
                    f"{path} was written by a newer version",
                    got=f"version {version}",
                    wanted=f"at most {VERSION}",
                    fix="upgrade fitcompress",
                )
            moments = cls(
                samples=int(counts["samples"]),
                loss=float.fromhex(counts["loss"]),
                batches=int(counts["batches"]),
                forms=dict(counts["forms"]),
                unsupported=dict(counts["unsupported"]),
            )
            for kind in KINDS:
                sums = getattr(moments, kind)
                for name in counts["names"]:
                    if f"{kind}/{name}" in tensors:
                        sums[name] = tensors.pop(f"{kind}/{name}")
            if tensors or list(moments.trace) != counts["names"]:
                raise KeyError(*tensors)
            _check(moments)
        except (
            OSError,
            safetensors.SafetensorError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"{path} holds no Fisher moments, or is damaged",
                got=f"{type(error).__name__}: {error}",
                wanted="a file written by FisherMoments.save",
            ) from error
        return moments, counts


def _check(moments: FisherMoments) -> None:
    """Raise a ValueError for tensors that no estimate has."""
    if moments.samples < 0 or moments.batches < 0:
        message = "negative counts"
        raise ValueError(message)
    for kind, dims in (("trace", 1), ("squares", 2), ("activations", 0)):
        dtype = torch.float32 if kind == "squares" else torch.float64
        for name, sums in getattr(moments, kind).items():
            good = sums.dtype == dtype and sums.dim() == dims
            if not good or (kind == "trace" and len(sums) != 2):
                message = f"{kind} of {name!r}: {sums.dtype} {tuple(sums.shape)}"
                raise ValueError(message)
