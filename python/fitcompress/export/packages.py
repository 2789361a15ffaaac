"""The optional packages that an export needs."""

from __future__ import annotations

import importlib

from fitcompress.errors import MissingDependencyError

__all__ = ["check_packages"]

NEEDED = ("onnx", "onnx_ir", "onnxscript")


def check_packages() -> None:
    """Raise unless everything that writes ONNX files can be imported.

    Raises:
        MissingDependencyError: Names what is missing and the command that installs it.
    """
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingDependencyError(
                "an ONNX file needs a package that is not installed",
                got=str(error),
                wanted=name,
                fix="pip install 'fitcompress[onnx]'",
            ) from error
