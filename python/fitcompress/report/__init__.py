"""What happened, for people: text and HTML, before ⇒ after."""

from fitcompress.report.summary import LayerRow, Report, report

__all__ = ["LayerRow", "Report", "report"]
