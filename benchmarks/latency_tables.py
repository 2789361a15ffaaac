"""How well latency tables predict whole networks, against tables of single layers.

    python benchmarks/latency_tables.py

Four untrained networks in ONNX Runtime, batch 1. A table is fitted to whole networks
with some layers in integers; other networks, drawn anew, are then measured and
predicted: by the table, by a sum over layers fitted to the same measurements, by
layers made integer one at a time, and by layers timed alone. Errors are root mean
squares over these networks, in per cent of the float network's latency.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

import fitcompress as fc
from fitcompress.latency.interplay import make_patterns
from fitcompress.latency.networks import integer_network
from fitcompress.model import compressible_layers
from fitcompress.zoo import BUILT_IN
from harness import parser, start

BITS = {"weight_bits": 8, "activation_bits": 8}
TARGET = fc.OnnxRuntimeTarget(turns=9, shortest_ms=10)


def convolutions() -> nn.Module:
    parts: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        parts += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def linears() -> nn.Module:
    widths = (256, 512, 512, 512, 512, 10)
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


NETWORKS = {
    "digits": (BUILT_IN["digits"], (1, 8, 8)),
    "four convolutions": (convolutions, (3, 32, 32)),
    "five linear layers": (linears, (256,)),
    "resnet20": (BUILT_IN["resnet20"], (3, 32, 32)),
}


def ratios(
    net: nn.Module, x: torch.Tensor, names: list[str], patterns: np.ndarray
) -> np.ndarray:
    """Measure networks, [M, L] → latency over the float network's, [M]."""
    small = integer_network(net, x, names, **BITS)
    with TARGET.open(small, x, weight_bits=8) as session:
        rows = [np.array(names)[pattern].tolist() for pattern in patterns]
        return np.array([session.milliseconds(row).ratio for row in rows])


def alone(net: nn.Module, x: torch.Tensor, names: list[str]) -> np.ndarray:
    """Time every layer on its own, integer minus float milliseconds, [L]."""
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for layer in compressible_layers(net):

        def keep(_: nn.Module, args: tuple, name: str = layer.name) -> None:
            inputs[name] = args[0].detach()

        handles.append(layer.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    gains = []
    for name in names:
        single = nn.Sequential(net.get_submodule(name))
        small = integer_network(single, inputs[name], ["0"], **BITS)
        with TARGET.open(small, inputs[name], weight_bits=8) as session:
            timing = session.milliseconds(["0"])
        gains.append((timing.ratio - 1) * timing.reference_ms)
    return np.array(gains)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="*", default=list(NETWORKS))
    arguments = made.parse_args()
    result = start(arguments)
    for name in arguments.networks:
        build, shape = NETWORKS[name]
        torch.manual_seed(0)
        net = build().eval()
        x = torch.randn(2, *shape)
        table = fc.measure_latency(net, x, TARGET, progress=False)
        names, layers = list(table.names), len(table.names)
        # Others than those of the fit, where there are enough.
        known = {tuple(row) for row in table.patterns.tolist()}
        every = make_patterns(layers, 2 * len(known), seed=1)
        fresh = [row for row in every.tolist() if tuple(row) not in known]
        count = 6 if arguments.quick else 24
        patterns = np.array(fresh[:count])
        measured = ratios(net, x, names, patterns)
        singles = ratios(net, x, names, np.eye(layers, dtype=np.bool_)) - 1
        whole = table.patterns.astype(float)
        sums = np.linalg.lstsq(whole, table.ratios - 1, rcond=None)[0]
        gains = {
            "layers timed alone": alone(net, x, names) / table.float_ms,
            "one layer at a time": singles,
            "sum over layers, fitted": sums,
        }
        found = {"latency table": table.fit.predict(patterns)}
        found |= {label: 1 + patterns @ gain for label, gain in gains.items()}
        for label, predicted in found.items():
            miss = predicted - measured
            result.row(
                network=name,
                predicted_by=label,
                error_percent=100 * float(np.sqrt(np.mean(miss**2))),
                worst_percent=100 * float(np.abs(miss).max()),
                correlation=float(np.corrcoef(predicted, measured)[0, 1]),
                own_estimate_percent=100 * table.fit.error
                if label == "latency table"
                else None,
                float_ms=table.float_ms,
                all_integer=float(table.ratios[table.patterns.all(axis=1)][0]),
                fastest=float(min(measured.min(), table.ratios.min())),
                slowest=float(max(measured.max(), table.ratios.max())),
                spread_percent=100 * float(np.median(table.spread)),
                fitted_to=len(table.ratios),
                tested_on=len(patterns),
            )
    result.finish()


if __name__ == "__main__":
    main()
