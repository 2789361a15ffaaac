"""The report's figures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from fitcompress.errors import MissingDependencyError

if TYPE_CHECKING:
    from fitcompress.report.summary import Report

__all__ = ["front_figure", "layers_figure", "to_svg"]

BLUE, ORANGE, GREY = "#2563a8", "#d9822b", "#888888"


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed",
            fix="pip install 'fitcompress[demo]'",
        ) from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def layers_figure(report: Report) -> Any:
    """Return bars of bits per weight and share of zeros, layer by layer."""
    plt = _pyplot()
    rows = report.layers
    width = min(12.0, max(6.0, 0.4 * len(rows) + 2))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(width, 5.5), sharex=True)
    place = range(len(rows))
    top.bar(place, [r.bits_per_weight for r in rows], color=BLUE)
    top.set_ylabel("bits per weight\n(in the file)")
    bottom.bar(place, [100 * r.sparsity for r in rows], color=ORANGE)
    bottom.set_ylabel("zeros, %")
    bottom.set_ylim(0, 100)
    bottom.set_xticks(
        list(place), [r.name for r in rows], rotation=70, ha="right", fontsize=8
    )
    top.set_title("Bits and sparsity of every layer")
    return _finish(figure, top, bottom)


def front_figure(report: Report) -> Any:
    """Return file size against predicted loss rise, with the chosen plan."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    dense = report.before["bytes"]
    points = [(100 * b / dense, d) for b, d in report.front if d > 0]
    if points:
        axes.plot(
            *zip(*points, strict=True), color=GREY, lw=1.5, label="front (predicted)"
        )
    size = 100 * report.after["bytes"] / dense
    found = (
        (report.predicted_loss_rise, "o", BLUE, "this plan, predicted"),
        (report.measured_loss_rise, "D", ORANGE, "this model, measured"),
    )
    for value, marker, color, label in found:
        if value:  # nothing else has a place on a logarithmic axis
            axes.plot(size, value, marker, color=color, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("file, % of the float32 bytes")
    axes.set_ylabel("loss rise, nats")
    axes.set_title("Size against loss")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=8)
    return _finish(figure, axes)


def to_svg(figure: Any) -> str:
    """Return a figure as an ``<svg>`` element."""
    plt = _pyplot()
    out = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fitcompress"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _finish(figure: Any, *axes: Any) -> Any:
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    return figure
