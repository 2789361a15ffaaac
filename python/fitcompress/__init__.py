"""Joint pruning and mixed-precision quantization of trained PyTorch networks.

>>> import fitcompress as fc
>>> fc.Budget(size="5%").size_bytes(dense_bytes=1000)
50
"""

from fitcompress import hugging_face, masks, methods, ops
from fitcompress.blockwise import compensate_shards
from fitcompress.compensate import apply
from fitcompress.compensate.options import Compensation
from fitcompress.compression import compress
from fitcompress.export import ExportReport, export_onnx
from fitcompress.latency.command import CommandTarget
from fitcompress.latency.measurement import LatencyCheck, measure_latency
from fitcompress.latency.onnx_runtime import OnnxRuntimeTarget
from fitcompress.latency.table import LatencyTable
from fitcompress.latency.target import LatencySession, LatencyTarget
from fitcompress.latency.timing import Timing
from fitcompress.model.fused_groups import FUSED, fused_groups
from fitcompress.quantize import remove
from fitcompress.refinement import Refinement, calibrate, refine
from fitcompress.report import report
from fitcompress.search import Budget, Level, Plan, Rule, pareto, search
from fitcompress.sensitivity.estimate import measure_fisher
from fitcompress.sensitivity.labels import label_loss
from fitcompress.sensitivity.measurement import measure
from fitcompress.sensitivity.moments import FisherMoments
from fitcompress.sensitivity.moving_metric import MovingMetric
from fitcompress.sensitivity.streaming import measure_shards
from fitcompress.sensitivity.table import Grid, Sensitivity
from fitcompress.storage.inspection import FileContents, inspect
from fitcompress.storage.packed_file import PackedFile
from fitcompress.storage.save_load import load, save
from fitcompress.train import evaluate, finetune
from fitcompress.versions import __version__, show_versions

__all__ = [
    "FUSED",
    "Budget",
    "CommandTarget",
    "Compensation",
    "ExportReport",
    "FileContents",
    "FisherMoments",
    "Grid",
    "LatencyCheck",
    "LatencySession",
    "LatencyTable",
    "LatencyTarget",
    "Level",
    "MovingMetric",
    "OnnxRuntimeTarget",
    "PackedFile",
    "Plan",
    "Refinement",
    "Rule",
    "Sensitivity",
    "Timing",
    "__version__",
    "apply",
    "calibrate",
    "compensate_shards",
    "compress",
    "evaluate",
    "export_onnx",
    "finetune",
    "fused_groups",
    "hugging_face",
    "inspect",
    "label_loss",
    "load",
    "masks",
    "measure",
    "measure_fisher",
    "measure_latency",
    "measure_shards",
    "methods",
    "ops",
    "pareto",
    "refine",
    "remove",
    "report",
    "save",
    "search",
    "show_versions",
]
