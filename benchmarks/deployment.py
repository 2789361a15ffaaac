"""Compressed models as ONNX files: bytes, agreement with PyTorch, and latency.

    python benchmarks/deployment.py --data DIR --weights FILE

ResNet-20 on CIFAR-10, six plans, one of them with sums in integers as well. For each:
the size of the packed file and of the ONNX file, and on how many of all test images
ONNX Runtime and PyTorch name the same class. Then milliseconds per call on one thread
at batch 1 and 64, in turns, of PyTorch in float, of ONNX Runtime in float, and of the
exported files, "folded" with weights made float when the session starts
(``session.disable_quant_qdq``). The same for two untrained networks without shortcuts:
five wide convolutions, three linear layers.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort
import torch
from torch import nn

import fitcompress as fc
from fitcompress.cli.models import build_model, trained_model
from fitcompress.data import load_dataset
from fitcompress.export.onnx_file import serialized
from fitcompress.export.placeholders import trace
from fitcompress.model import compressible_layers
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    activations,
    attach_activation,
)
from harness import Result, compare, parser, start

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.data import Dataset

AGREEMENT = 99.5  # % of the images on which both name the same class
AGREEMENT_OF_SUMS = 99.0  # the same where sums are rounded, too
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A plan to export.

    Attributes:
        bits: Of all weights; None searches entropy-coded steps.
        activation_bits: Of all inputs of layers, or None.
        size: Budget of the searched plan.
        min_bits: Of the integers in the file.
        sums: Whether sums of shortcuts are in integers, too.
    """

    bits: int | None = None
    activation_bits: int | None = None
    size: str = ""
    min_bits: int = 2
    sums: bool = False


CASES = {
    "8-bit weights": Case(8),
    "4-bit weights": Case(4),
    "8-bit weights and inputs": Case(8, 8),
    "7-bit weights, 8-bit inputs": Case(7, 8),
    "7-bit weights, 8-bit inputs and sums": Case(7, 8, sums=True),
    "4-bit weights, 8-bit inputs": Case(4, 8),
    "the same, stored as INT8": Case(4, 8, min_bits=8),
    "steps, 6.7 %": Case(size="6.7%"),
}


def compressed(net: nn.Module, case: Case, source: Dataset, samples: int) -> nn.Module:
    """Return the network at the levels of a case, errors compensated."""
    loader = source.calibration(0)
    if case.bits is None:
        budget = fc.Budget(size=case.size)
        return fc.compress(net, loader, budget, samples=samples, progress=False)
    grid, inputs = fc.Grid(bits=case.bits), case.activation_bits
    levels = {
        layer.name: fc.Level(grid, 0.0, layer.shape, activation_bits=inputs)
        for layer in compressible_layers(net)
    }
    return fc.apply(net, fc.Plan(levels), loader, samples=samples, progress=False)


def session(path: Path, *, folded: bool = False) -> ort.InferenceSession:
    """Return a session on one thread; ``folded``: weights to float as it starts."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if folded:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(made: ort.InferenceSession) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from inputs to outputs."""
    name = made.get_inputs()[0].name
    return lambda x: torch.from_numpy(made.run(None, {name: x.numpy()})[0])


@torch.no_grad()
def classes(run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> torch.Tensor:
    """Return the class that a network names for every image."""
    return torch.cat([run(part).argmax(1) for part in images.split(250)])


def float_file(net: nn.Module, example: torch.Tensor, folder: Path) -> Path:
    """Write the network as it is to an ONNX file."""
    graph = trace(net, example, (), (), opset=21, dynamic_shapes=None)
    (folder / "float.onnx").write_bytes(serialized(graph))
    return folder / "float.onnx"


def untrained(net: nn.Module, shape: tuple[int, ...], folder: Path) -> dict[str, Path]:
    """Export a network at random weights; only its speed means anything."""
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    files = {"float": float_file(net, x, folder)}
    for name, case in list(CASES.items())[:3]:
        grid, inputs = fc.Grid(bits=case.bits), case.activation_bits
        levels = {
            layer.name: fc.Level(grid, 0.0, layer.shape)
            for layer in compressible_layers(net)
        }
        small = fc.apply(net, fc.Plan(levels), progress=False)
        for layer in compressible_layers(net) if inputs else ():
            made = ActivationQuantizer(inputs or 8, MinMaxObserver())
            attach_activation(small.get_submodule(layer.name), made)
        with torch.no_grad():
            small(x)
        for _, quantizer in activations(small):
            quantizer.freeze()
        files[name] = folder / f"untrained{len(files)}.onnx"
        fc.export_onnx(small, files[name], x)
    return files


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return untrained networks and the shapes of their inputs."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs, stride in (
        (3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)
    ):  # fmt: skip
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        parts += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    linears = (
        nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 1024),
    )  # fmt: skip
    return {
        "five convolutions": (nn.Sequential(*parts).eval(), SHAPE),
        "three linear layers": (nn.Sequential(*linears).eval(), (1024,)),
    }


def measure_files(
    net: nn.Module, source: Dataset, folder: Path, result: Result, *, quick: bool
) -> dict[str, Path]:
    """Export every case and compare it with PyTorch; return the files."""
    images, labels = (part[: 500 if quick else None] for part in source.test)
    example = torch.zeros(2, *SHAPE)
    plain = float_file(net, example, folder)
    expected = classes(net, images)
    result.row(
        network="resnet20",
        case="float",
        onnx_bytes=plain.stat().st_size,
        agreement=_percent(classes(runner(session(plain)), images) == expected),
        torch_accuracy=_percent(expected == labels),
    )
    files, made = {"float": plain}, {}
    for name, case in CASES.items():
        plan = (case.bits, case.activation_bits, case.size)
        if plan not in made:
            made[plan] = compressed(net, case, source, 64 if quick else 1024)
        small = made[plan]
        path = folder / f"{len(files)}.onnx"
        packed = fc.save(small, folder / "packed")
        report = fc.export_onnx(
            small,
            path,
            example,
            min_bits=case.min_bits,
            integer_sums=source.calibration(0) if case.sums else None,
        )
        loaded = fc.load(folder / "packed", build_model("resnet20"))
        expected = classes(loaded, images)
        found = classes(runner(session(path)), images)
        agreement = _percent(found == expected)
        result.row(
            network="resnet20",
            case=name,
            packed_bytes=packed,
            onnx_bytes=path.stat().st_size,
            channels_removed=sum(report.removed_channels.values()),
            integer_sums=report.integer_sums,
            agreement=agreement,
            torch_accuracy=_percent(expected == labels),
            onnx_accuracy=_percent(found == labels),
        )
        least = AGREEMENT_OF_SUMS if case.sums else AGREEMENT
        result.bar(f"{name}: same class, %", agreement, least, "at least")
        files[name] = path
    return files


def measure_latency(
    network: str,
    net: nn.Module,
    shape: tuple[int, ...],
    files: dict[str, Path],
    result: Result,
    *,
    quick: bool,
) -> None:
    """Time one call of everything at batch 1 and 64."""
    made = {f"ONNX Runtime, {name}": session(path) for name, path in files.items()}
    for name, path in files.items():
        if name != "float" and CASES[name].activation_bits is None:
            made[f"ONNX Runtime, {name}, folded"] = session(path, folded=True)
    for batch in (1, 64):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        candidates = {name: _call(runner(each), x) for name, each in made.items()}
        candidates["PyTorch, float"] = _call(torch.inference_mode()(net), x)
        found = compare(candidates, 3 if quick else 21, shortest=0.02)
        for name, timing in found.timings.items():
            ratio = found.ratio(name, "ONNX Runtime, float")
            result.row(
                network=network,
                case=name,
                batch=batch,
                ms=1000 * timing.wall.median,
                q1_ms=1000 * timing.wall.q1,
                q3_ms=1000 * timing.wall.q3,
                of_onnx_float=ratio.median,
            )


def _call(run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[], Any]:
    return lambda: run(x)


def _percent(hits: torch.Tensor) -> float:
    return 100 * hits.double().mean().item()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", default=os.environ.get("FITCOMPRESS_DATA"))
    made.add_argument("--weights", type=Path, required=True)
    arguments = made.parse_args()
    result = start(arguments)
    net = trained_model("resnet20", arguments.weights)
    source = load_dataset("cifar10", arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        files = measure_files(net, source, Path(folder), result, quick=arguments.quick)
        quick = arguments.quick
        measure_latency("resnet20", net, SHAPE, files, result, quick=quick)
        for name, (other, shape) in networks().items():
            files = untrained(other, shape, Path(folder))
            measure_latency(name, other, shape, files, result, quick=quick)
    result.finish()


if __name__ == "__main__":
    main()
