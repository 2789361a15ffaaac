"""Compressed models as files that other runtimes read."""

from fitcompress.export.onnx_file import export_onnx
from fitcompress.export.report import ExportedLayer, ExportReport

__all__ = ["ExportReport", "ExportedLayer", "export_onnx"]
