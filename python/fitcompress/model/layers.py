"""Which layers can be compressed, and the matrix that each one's weight is.

A weight is seen as a matrix of ``rows`` output channels by ``columns`` inputs (input
channels of the group × kernel positions): codes, masks, Fisher moments and compensation
all work on that view, see ``matrix_view``. The rows of an embedding are its entries.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fitcompress.errors import (
    NoCompressibleLayerError,
    NonFiniteError,
    UnsupportedLayerError,
)
from fitcompress.model.matrix_view import TRANSPOSED, MatrixView
from fitcompress.model.sharding import local, whole

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Layer",
    "check_finite",
    "check_untied",
    "compressible_layers",
    "fingerprint",
]

logger = logging.getLogger(__name__)

COMPRESSIBLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *TRANSPOSED,
    nn.Embedding,
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One compressible layer.

    Attributes:
        name: Qualified name of the module, as in ``model.named_modules()``.
        module: The module itself; its ``weight`` is what is compressed.
        groups: Groups of a convolution, 1 otherwise.
        tied: Name and module of every further one with the same weight.
    """

    name: str
    module: nn.Module
    groups: int
    tied: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the module uses it."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def view(self) -> MatrixView:
        """How the weight is a matrix."""
        return MatrixView.of(self.module)

    @property
    def one_hot(self) -> bool:
        """Whether the layer looks rows of its weight up, as an embedding does.

        Its inputs are indices, not numbers: each row is used alone and whole.
        """
        return isinstance(self.module, nn.Embedding)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that use the weight."""
        return (self.module, *(module for _, module in self.tied))

    @property
    def rounded_alone(self) -> bool:
        """Whether no error of a weight is made up for with the inputs as they are now.

        Rows that are looked up stand alone; a shared weight has several inputs, which
        are not known where it is used first.
        """
        return self.one_hot or bool(self.tied)

    @property
    def rows(self) -> int:
        """Output channels; entries of an embedding."""
        return self.view.shape(self.shape)[0]

    @property
    def columns(self) -> int:
        """Inputs of one output: input channels of its group × kernel positions.

        Of an embedding, the length of an entry.
        """
        return self.size // self.rows

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.numel()

    def matrix(self) -> torch.Tensor:
        """The weight, detached, as a float32 matrix [rows, columns].

        Of a sharded model, the whole of it: all processes must call this.
        """
        return self.matrix_of(whole(self.weight.detach())).float()

    def matrix_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the weight's shape as a matrix [rows, columns]."""
        return self.view.matrix_of(tensor)

    def weight_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix [rows, columns] in the weight's shape."""
        return self.view.weight_of(matrix, self.shape)


def compressible_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of ``model`` that can be compressed, in the order of the model.

    Linear and 1-, 2- and 3-dimensional convolutions, transposed ones included, with any
    stride, padding, dilation and groups; embeddings, unless they renormalise their
    entries or have sparse gradients. A weight that several modules share, as tied
    embeddings do, is one layer, named after the first of them; it stays in float if one
    of them is of another kind. So do weights with a parametrization such as weight
    norm, and the projections of ``nn.MultiheadAttention``, which are never called as
    layers.

    Args:
        model: The trained network.

    Returns:
        At least one layer.

    Raises:
        NoCompressibleLayerError: There is none.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    sharing: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, COMPRESSIBLE) or ".parametrizations." in name:
            continue
        if _usable(name, module):
            sharing.setdefault(id(_parameter(module)), []).append((name, module))
    layers = []
    for key, found in sharing.items():
        (name, module), *tied = found
        views = {(MatrixView.of(each), _groups(each)) for _, each in found}
        if len(found) < owners[key] or len(views) > 1:
            logger.info("%s shares its weight with another kind of module", name)
            continue
        layers.append(Layer(name, module, _groups(module), tuple(tied)))
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise NoCompressibleLayerError(
            "the model has no layer that can be compressed",
            got=f"modules of type {', '.join(kinds)}",
            wanted="a Linear, convolution or Embedding with a float weight of its own",
            fix="pass the network itself, not a scripted or quantized copy of it",
        )
    return layers


def _groups(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def _parameter(module: nn.Module) -> torch.Tensor:
    """Return the parameter behind the weight, the latent one of a weight on a grid."""
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        latent = module.get_submodule("parametrizations.weight").original
        assert isinstance(latent, torch.Tensor)
        return latent
    assert isinstance(module.weight, torch.Tensor)
    return module.weight


def _usable(name: str, module: nn.Module) -> bool:
    if isinstance(
        module, NonDynamicallyQuantizableLinear
    ):  # attention reads its weight
        return False
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        chain = module.get_submodule("parametrizations.weight").children()
        if all(getattr(p, "holds_grid", False) for p in chain):
            return True
        logger.info("%s has a parametrized weight and stays in float", name)
        return False
    for kind in (*TRANSPOSED, nn.Embedding):
        if isinstance(module, kind) and type(module).forward is not kind.forward:
            logger.info("%s has a forward of its own and stays in float", name)
            return False
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.sparse
    ):
        logger.info("%s is renormalised or sparse and stays in float", name)
        return False
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or weight.dtype not in FLOATS:
        return False
    return weight.numel() > 0


def check_untied(layers: Iterable[Layer]) -> None:
    """Raise if a layer's weight is shared, which few methods can train.

    Raises:
        UnsupportedLayerError: Names the first one.
    """
    for layer in layers:
        if layer.tied:
            raise UnsupportedLayerError(
                f"the weight of {layer.name!r} is shared with {layer.tied[0][0]!r}",
                wanted="layers with weights of their own for this method",
                fix="use measure, search and apply, or give each a copy of the weight",
            )


def check_finite(model: nn.Module) -> None:
    """Raise if a parameter or a norm's statistic is NaN or infinite, or a buffer NaN.

    Other buffers may well be infinite: masks of attention hold −∞.

    Raises:
        NonFiniteError: Names the first such tensor and counts its bad entries.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor) or not tensor.is_floating_point():
            continue
        tensor = local(tensor)
        strict = name in parameters or name.endswith(("running_mean", "running_var"))
        good = torch.isfinite(tensor) if strict else ~torch.isnan(tensor)
        bad = tensor.numel() - int(good.sum())
        if bad:
            raise NonFiniteError(
                f"{name} has values that are NaN or infinite",
                got=f"{bad} of {tensor.numel()}",
                wanted="finite numbers only",
                fix="load the checkpoint again or train with a smaller learning rate",
            )


def fingerprint(model: nn.Module, layers: list[Layer]) -> str:
    """Return a short hash of the layers' names and shapes and of all values.

    Recognises checkpoints: equal for the same model with the same weights only.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([[layer.name, layer.shape] for layer in layers]).encode())
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            flat = local(tensor).detach().cpu().contiguous().reshape(-1)
            digest.update(name.encode())
            digest.update(
                flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            )
    return digest.hexdigest()[:16]
