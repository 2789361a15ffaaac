"""What a model consists of: compressible layers, their views as matrices, and costs."""

from fitcompress.model.layers import (
    Layer,
    check_finite,
    check_untied,
    compressible_layers,
    fingerprint,
)
from fitcompress.model.matrix_view import MatrixView
from fitcompress.model.patches import padded_input, patches

__all__ = [
    "Layer",
    "MatrixView",
    "check_finite",
    "check_untied",
    "compressible_layers",
    "fingerprint",
    "padded_input",
    "patches",
]
