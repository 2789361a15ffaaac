"""A report as text for the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fitcompress.report.summary import Report

__all__ = ["MOVED", "input_bits", "to_text", "totals"]

WIDTH = 100
MOVED = (
    "moved: |ŵ − w|² / |w|², squared distance of the weights from the dense ones. "
    "Compensation and\ntraining move them on purpose to keep the outputs; it does not "
    "measure quality and may exceed 100 %."
)


def totals(report: Report) -> list[tuple[str, str, str, str]]:
    """Return rows (quantity, before, after, change) of the whole network."""
    before, after = report.before, report.after
    rows = []
    if "accuracy" in after:
        change = after["accuracy"] - before["accuracy"]
        rows.append(
            (
                "accuracy",
                f"{before['accuracy']:.2f} %",
                f"{after['accuracy']:.2f} %",
                f"{change:+.2f} points",
            )
        )
        change = after["loss"] - before["loss"]
        rows.append(
            (
                "loss, nats",
                f"{before['loss']:.4f}",
                f"{after['loss']:.4f}",
                f"{change:+.4f}",
            )
        )
    share = after["bytes"] / before["bytes"]
    rows.append(
        (
            "bytes on disk",
            f"{before['bytes']:,.0f}",
            f"{after['bytes']:,.0f}",
            f"{100 * share:.2f} %, {1 / share:.1f}× smaller",
        )
    )
    if "bops" in after:
        share = after["bops"] / before["bops"]
        planned = report.plan.bops
        saved = f"{100 * share:.2f} %"
        if planned:
            saved += f", predicted {100 * planned / before['bops']:.2f} %"
        rows.append(("BOPs", f"{before['bops']:.3g}", f"{after['bops']:.3g}", saved))
    measured = report.measured_loss_rise
    rows.append(
        (
            "loss rise, nats",
            f"predicted {report.predicted_loss_rise:.4g}",
            "" if measured is None else f"measured (KL) {measured:.4g}",
            "prediction: before compensation",
        )
    )
    return rows


def input_bits(report: Report) -> list[str]:
    """Return what each layer's input lies on, or nothing if all are in float."""
    bits = [row.activation_bits for row in report.layers]
    if not any(bits):
        return []
    return ["float" if number is None else f"{number} bit" for number in bits]


def to_text(report: Report) -> str:
    """Return the before ⇒ after tables as plain text."""
    layers = Table(title="Layers, before ⇒ after", title_justify="left")
    layers.add_column("layer", overflow="fold")
    inputs = input_bits(report)
    columns = ["weights", "grid", "bits/weight", "zeros", "bytes", "moved"]
    for column in [*columns, "input"] if inputs else columns:
        layers.add_column(column, justify="right")
    for number, row in enumerate(report.layers):
        layers.add_row(
            row.name,
            f"{row.weights:,}",
            row.grid,
            f"32 ⇒ {row.bits_per_weight:.2f}",
            f"{100 * row.sparsity:.1f} %",
            f"{row.bytes_before:,} ⇒ {row.bytes_after:,}",
            f"{100 * row.relative_error:.2g} %",
            *inputs[number : number + 1],
        )
    whole = Table(title="Network, before ⇒ after", title_justify="left")
    for column in ("", "before", "after", "change"):
        whole.add_column(column, justify="left" if not column else "right")
    for total in totals(report):
        whole.add_row(*total)
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None)
    console.print(layers)
    console.print(MOVED, soft_wrap=True)
    console.print(whole)
    console.print(f"Plan, as predicted: {report.plan.summary()}", soft_wrap=True)
    for note in report.notes:
        console.print(note, soft_wrap=True, markup=False)
    return out.getvalue()
