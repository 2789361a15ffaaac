"""Native tensor operations: the inner loops of measuring, training and compensating.

The kernels live in the shared library `_ops.so` and are registered with torch as
`torch.ops.fitcompress.*` when this package is imported. They run on the CPU, on torch's
own threads, and, in a build with CUDA (`has_cuda`), on CUDA tensors. Results do not
depend on the number of threads. `fitcompress.reference` has their twins in plain torch,
except of those that are a few lines of it themselves.

Only `fake_quantize_prune` has a gradient; the other functions detach their arguments.
"""

from fitcompress.ops.compensate import error_feedback_sweep, input_moments_
from fitcompress.ops.distortion import (
    CLIPS,
    DistortionTable,
    distortion_table,
    level_mask,
)
from fitcompress.ops.fisher import ghost_norms_, square_accumulate_, winograd_norms_
from fitcompress.ops.histogram import MAGNITUDE_BINS, magnitude_histogram
from fitcompress.ops.library import has_cuda, instruction_set
from fitcompress.ops.masks import pack_mask, unpack_mask
from fitcompress.ops.quantize import fake_quantize_prune

__all__ = [
    "CLIPS",
    "MAGNITUDE_BINS",
    "DistortionTable",
    "distortion_table",
    "error_feedback_sweep",
    "fake_quantize_prune",
    "ghost_norms_",
    "has_cuda",
    "input_moments_",
    "instruction_set",
    "level_mask",
    "magnitude_histogram",
    "pack_mask",
    "square_accumulate_",
    "unpack_mask",
    "winograd_norms_",
]
