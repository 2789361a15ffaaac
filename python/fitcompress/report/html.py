"""A report as one self-contained page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fitcompress.files import check_writable, write_atomically
from fitcompress.report.plots import front_figure, layers_figure, to_svg
from fitcompress.report.text import MOVED, input_bits, totals

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from fitcompress.report.summary import Report

__all__ = ["to_html", "write_html"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
.note { color: #555; }
"""


def to_html(report: Report) -> str:
    """Return the page: totals, figures, layers; no script, no link to anywhere."""
    inputs = input_bits(report)
    layer_rows = [
        (
            row.name,
            f"{row.weights:,}",
            row.grid,
            f"{row.bits_per_weight:.2f}",
            f"{100 * row.sparsity:.1f} %",
            f"{row.bytes_before:,}",
            f"{row.bytes_after:,}",
            f"{100 * row.relative_error:.2g} %",
            *inputs[number : number + 1],
        )
        for number, row in enumerate(report.layers)
    ]
    columns = ["layer", "weights", "grid", "bits/weight", "zeros", "bytes before",
               "bytes after", "moved", *["input"][: len(inputs)]]  # fmt: skip
    notes = "".join(f"<p class='note'>{escape(n)}</p>" for n in report.notes)
    figures = [layers_figure(report)]
    if report.front:
        figures.insert(0, front_figure(report))
    drawn = "".join(f"<figure>{to_svg(f)}</figure>" for f in figures)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>fitcompress report</title><style>{STYLE}</style></head><body>"
        "<h1>Before ⇒ after</h1>"
        f"{_table(('', 'before', 'after', 'change'), totals(report))}"
        f"<p class='note'>Plan, as predicted: {escape(report.plan.summary())}</p>"
        f"{notes}"
        f"<h2>Figures</h2>{drawn}"
        f"<h2>Layers</h2>{_table(columns, layer_rows)}"
        f"<p class='note'>{escape(MOVED)}</p>"
        "<p class='note'>Unstructured zeros make the file smaller; ordinary kernels do "
        "not run faster for them.</p></body></html>"
    )


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page, atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    check_writable(path)
    write_atomically(path, to_html(report).encode())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
