"""``report``: a dense model against its compressed copy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fitcompress.data.batches import take
from fitcompress.errors import PlanMismatchError
from fitcompress.model import compressible_layers
from fitcompress.model.costs import bops, count_macs, dense_bytes
from fitcompress.model.devices import device_of, to_device
from fitcompress.quantize import activations, plan_of
from fitcompress.search.selection import pareto
from fitcompress.storage.save_load import coded_weights, layer_bytes, packed_bytes
from fitcompress.train.evaluation import divergence, evaluate

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search.plan import Plan
    from fitcompress.search.problem import Family
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["LayerRow", "Report", "report"]


@dataclass(frozen=True)
class LayerRow:
    """One layer, before ⇒ after.

    Attributes:
        name: Qualified name of the module.
        weights: How many it has.
        grid: What they lie on, ``"4 bit"`` or ``"Δ=0.1"``.
        weight_bits: Bits that hold its largest code.
        bits_per_weight: Bits in the file per weight, scales included.
        sparsity: Share of its weights that are zero.
        bytes_before: In float32.
        bytes_after: In the file.
        relative_error: How far its weights moved, ‖ŵ − w‖² / ‖w‖². Compensation moves
            weights on purpose, so that the outputs stay: no measure of quality.
        activation_bits: Bits of its input; None for float.
    """

    name: str
    weights: int
    grid: str
    weight_bits: int
    bits_per_weight: float
    sparsity: float
    bytes_before: int
    bytes_after: int
    relative_error: float
    activation_bits: int | None = None


@dataclass(frozen=True)
class Report:
    """A dense model against its compressed copy; ``str()`` gives text, ``html`` a page.

    Attributes:
        layers: One row per compressed layer.
        before: Totals of the dense model: bytes, and with data accuracy, loss, bops.
        after: The same of the compressed one, measured: bytes as packed, bops of the
            bits that its codes and its quantized activations need. The plan's are
            predictions.
        plan: Its plan.
        predicted_loss_rise: What the plan predicted, nats.
        measured_loss_rise: Mean KL divergence to the dense model on the data, or None.
        front: (bytes, predicted loss rise) along the whole front, if known.
        notes: Further lines to show.
    """

    layers: tuple[LayerRow, ...]
    before: dict[str, float]
    after: dict[str, float]
    plan: Plan
    predicted_loss_rise: float
    measured_loss_rise: float | None
    front: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        from fitcompress.report.text import to_text

        return to_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "layers": [asdict(row) for row in self.layers],
            "before": self.before,
            "after": self.after,
            "predicted_loss_rise": self.predicted_loss_rise,
            "measured_loss_rise": self.measured_loss_rise,
            "predicted_bytes": self.plan.size_bytes,
            "predicted_bops": self.plan.bops,
            "plan": self.plan.summary(),
        }

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page with plots, readable offline.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OutputError: The file cannot be written.
        """
        from fitcompress.report.html import write_html

        write_html(self, path)


def report(
    model: nn.Module,
    small: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    sensitivity: Sensitivity | None = None,
    notes: tuple[str, ...] = (),
    progress: bool = True,
) -> Report:
    """Compare a dense model with its compressed copy.

    Both are left as they are; batches are moved to the device of each.

    Args:
        model: The dense network.
        small: What ``apply``, ``compress`` or ``load(…, trainable=True)`` returned.
        loader: Labelled batches to score both on, as for :func:`evaluate`; can be
            iterated several times.
        sensitivity: Adds the front of size against predicted loss.
        notes: Further lines to show.
        progress: Show a bar with the time left.

    Returns:
        The comparison.

    Raises:
        PlanMismatchError: ``small`` is not compressed, or the dense model or the
            sensitivity belong to another network.
        DataError: The batches have no labels, or labels that do not fit.
        EmptyLoaderError: The loader yields nothing.
    """
    plan = plan_of(small)
    plan.check({layer.name: layer.shape for layer in compressible_layers(model)})
    if sensitivity is not None and set(sensitivity.names) != set(plan.levels):
        raise PlanMismatchError(
            "the sensitivity belongs to another model",
            got=f"layers {', '.join(sensitivity.names[:4])}, …",
            wanted=f"layers {', '.join(list(plan.levels)[:4])}, …",
            fix="leave it out, or measure this model",
        )
    before: dict[str, float] = {"bytes": dense_bytes(model)}
    after: dict[str, float] = {"bytes": len(packed_bytes(small))}
    rows = _rows(model, small)
    measured = None
    if loader is not None:
        for side, network in ((before, model), (after, small)):
            score = evaluate(network, loader, progress=progress)
            side["accuracy"], side["loss"] = score.accuracy, score.loss
        measured = divergence(model, small, loader, progress=progress)
        inputs, _ = next(take(loader, 1))
        macs = count_macs(model, to_device(inputs, device_of(model)))
        bits = {row.name: row.weight_bits for row in rows}
        inputs = {row.name: row.activation_bits or 32 for row in rows}
        before["bops"] = sum(bops(m, 32) for m in macs.values())
        after["bops"] = sum(
            bops(m, bits.get(n, 32), inputs.get(n, 32)) for n, m in macs.items()
        )
    front: tuple[tuple[int, float], ...] = ()
    if sensitivity is not None:
        plans = pareto(sensitivity, family=_family(plan))
        front = tuple((p.size_bytes, p.distortion) for p in plans)
    return Report(
        layers=rows,
        before=before,
        after=after,
        plan=plan,
        predicted_loss_rise=plan.distortion,
        measured_loss_rise=measured,
        front=front,
        notes=notes,
    )


def _family(plan: Plan) -> Family:
    steps = {level.grid.step is not None for level in plan.levels.values()}
    if len(steps) > 1:
        return "any"
    return "step" if steps.pop() else "bits"


def _rows(model: nn.Module, small: nn.Module) -> tuple[LayerRow, ...]:
    dense = {layer.name: layer.matrix() for layer in compressible_layers(model)}
    sizes = layer_bytes(small)
    inputs = dict(activations(small))
    rows = []
    for coded in coded_weights(small):
        weight = coded.view.matrix_of(coded.weight()).float()
        count, original = coded.codes.numel(), dense[coded.name]
        error = float(
            (weight - original).square().sum() / original.square().sum().clamp(1e-30)
        )
        largest = int(coded.codes.abs().max())
        level = coded.level
        rows.append(
            LayerRow(
                name=coded.name,
                weights=count,
                grid=str(level.grid),
                weight_bits=level.grid.bits or max(1, (2 * largest).bit_length()),
                bits_per_weight=8 * sizes[coded.name] / count,
                sparsity=1 - int(coded.codes.count_nonzero()) / count,
                bytes_before=4 * count,
                bytes_after=sizes[coded.name],
                relative_error=error,
                activation_bits=inputs[coded.name].bits
                if coded.name in inputs
                else None,
            )
        )
    return tuple(rows)
