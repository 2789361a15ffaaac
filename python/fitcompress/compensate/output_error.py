"""Masks by the error of a layer's outputs on calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.lockstep import Lockstep, not_reached
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import find_outlets
from fitcompress.compensate.statistics import gather
from fitcompress.compensate.target import Normal, solve
from fitcompress.data.batches import part
from fitcompress.errors import PlanMismatchError
from fitcompress.model import check_finite, compressible_layers
from fitcompress.model.copies import copy_of
from fitcompress.progress import Bar
from fitcompress.quantize import fold_norms_, remove
from fitcompress.sensitivity.mask_rules import tensors_digest
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from fitcompress.compensate.outlets import Outlet
    from fitcompress.model import Layer

__all__ = ["OutputError"]


@dataclass(frozen=True, eq=False)
class OutputError:
    """w_j² / [H⁻¹]_jj: how far a layer's outputs move when w_j alone is dropped.

    H = E[x xᵀ] + δ is the second moment of the layer's inputs in the dense network, δ
    the ridge; a covariance where a bias or norm restores the mean, as in ``apply``. It
    is the squared error per position once all other weights of the row have made up
    for w_j, of the weight 1/[H⁻¹]_jj, which is all that is kept. The rows of an
    embedding are looked up alone: 1/[H⁻¹]_jj is how often an entry is, plus δ.

    The order is that for dropping one weight; ``apply`` without a rule does better, as
    it starts anew after each round of drops and refits.

    Attributes:
        curvature: Layer name → 1/[H⁻¹]_jj, float32: [groups, columns], or of an
            embedding [rows, 1].
        shapes: Layer name → shape of the weight.

    Source: Optimal Brain Surgeon, Hassibi and Stork 1992; OBC, Frantar, Singh, Alistarh
    2022, arXiv 2208.11580.
    """

    curvature: Mapping[str, torch.Tensor] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def name(self) -> str:
        """``output error``."""
        return "output error"

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return w_j² / [H⁻¹]_jj, float32 [rows, columns].

        Raises:
            PlanMismatchError: The layer is unknown, or of another shape.
        """
        if self.shapes.get(layer.name) != layer.shape:
            raise PlanMismatchError(
                f"the mask rule {self.name!r} does not fit layer {layer.name!r}",
                got=self.shapes.get(layer.name, "no such layer"),
                wanted=layer.shape,
                fix="measure the rule on this model",
            )
        matrix = layer.matrix()
        curvature = self.curvature[layer.name].to(matrix.device)
        each = layer.rows // len(curvature)
        return matrix.square() * curvature.repeat_interleave(each, 0)

    def digest(self) -> str:
        """Return a hash of all curvatures."""
        return tensors_digest(self.name, self.curvature)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        samples: int | None = 512,
        compensation: Compensation | None = None,
        progress: bool = True,
    ) -> OutputError:
        """Measure the inputs of all layers: one forward pass, and an inverse a layer.

        Args:
            model: The trained network; unchanged.
            loader: Yields inputs or (inputs, …) from the training distribution.
            samples: How many to use, None for all.
            compensation: Its damping and whether biases take up means; None for the
                defaults of ``apply``.
            progress: Show a bar with the time left.

        Raises:
            NoCompressibleLayerError: The model has nothing to compress.
            EmptyLoaderError: The loader yields nothing.
            NonFiniteError: A weight or an input is NaN or infinite.
            CalibrationError: A layer is never reached, or samples of a batch are mixed.

        Example:
            >>> import torch, fitcompress as fc
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> inputs = [torch.randn(64, 8)]
            >>> rule = fc.masks.OutputError.measure(net, inputs, progress=False)
            >>> rule.curvature["0"].shape
            torch.Size([1, 8])
        """
        options = compensation or Compensation()
        check_finite(model)
        dense = remove(copy_of(model), activations=True).eval()
        layers = {layer.name: layer for layer in compressible_layers(dense)}
        modules = {name: layer.module for name, layer in layers.items()}
        with threads(FIXED), torch.no_grad():
            batches = prepare(dense, modules, loader, samples).batches
            folded = copy_of(dense)
            fold_norms_(folded)
            outlets = find_outlets(
                folded, list(layers.values()), part(batches[0], slice(16))
            )
            found: dict[str, torch.Tensor] = {}
            with (
                Lockstep(dense, modules, batches) as passes,
                Bar("masks: output errors", len(layers), enabled=progress) as bar,
            ):
                for _ in layers:
                    reached = passes.advance()
                    if reached is None:
                        raise not_reached(layers, found)
                    name, inputs, _ = reached
                    found[name] = _curvature(
                        layers[name], inputs, outlets[name], options
                    )
                    bar.advance(note=name)
        return cls(found, {name: layer.shape for name, layer in layers.items()})


def _curvature(
    layer: Layer, inputs: list[torch.Tensor], outlet: Outlet, options: Compensation
) -> torch.Tensor:
    """Return 1/[H⁻¹]_jj of one layer, given its inputs."""
    if layer.one_hot:
        ids = torch.cat([x.reshape(-1) for x in inputs])
        share = torch.bincount(ids, minlength=layer.rows).double() / max(len(ids), 1)
        return (share + options.damping * share.mean()).float().reshape(-1, 1)
    moments = gather(layer, inputs, inputs)
    centered = outlet.module is not None and options.bias
    dense = layer.matrix().reshape(layer.groups, -1, layer.columns)
    found = torch.empty(layer.groups, layer.columns, dtype=torch.float64)
    for group, weight in enumerate(dense):
        normal = Normal.of(moments, group, centered=centered)
        target = solve(
            weight,
            normal,
            None,
            normal,
            damping=options.damping,
            drift=0.0,
            name=layer.name,
        )
        found[group, target.order.cpu()] = target.inverse.reciprocal().cpu()
    return found.float()
