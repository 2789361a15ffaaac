"""All methods on one network, one table: accuracy, bytes, bit operations, latency.

    python benchmarks/methods.py --data DIR --weights resnet20-12fca82f.th
        [--methods "uniform*" "path*" "ours*" "bit sharing" "pruning ternary" "galen*"]
        [--keep FOLDER] [--tune 6400] [--sharing 24000x1] [--ternary 48000x3]
        [--galen 512x24]
        [--device cuda] [--json FILE]

Every compressed network gets the same fine-tuning: distillation on so many augmented
training images. ``made`` counts what a method took before that, in CPU seconds and
samples. Accuracy is that of the whole test set; bytes those of the packed file after
fine-tuning; active bytes are kept weights · bits; latency is that of ONNX Runtime, one
image, one thread, sums in integers, over the float network's, measured in turns. Rows
are kept in ``--keep``; a script that was killed goes on from there.

"ours" is this package without a thought: ``measure``, ``search``, ``apply``. Other
methods are held against the largest file of ours that is no larger than theirs.

The papers' protocols, on a GPU: ``--device cuda --tune 14400000 --sharing 48000x200
--ternary 48000x200 --galen 48000x310``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fitcompress as fc
from fitcompress.cli.models import build_model, trained_model
from fitcompress.data import load_dataset
from fitcompress.files import write_atomically
from fitcompress.model.costs import count_macs, dense_bytes
from fitcompress.quantize import activations
from harness import parser, start
from method_runs import AGENTS, TARGET, Method, Setting, active_bytes, methods

if TYPE_CHECKING:
    import argparse

    from harness import Result

SHARING = {"points": 1.5, "times": 60.0}
TERNARY = {"points": 6.0, "share": 1 / 40}
GALEN = 2.0  # points


def file_of(setting: Setting, method: Method, ending: str) -> Path:
    """Return where something of a method is kept."""
    text = repr((setting.network, setting.key(method.name)))
    name = method.name.replace(",", "").replace("/", "-").replace(" ", "-")
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    return setting.folder / f"{name}-{key}.{ending}"


def latency(setting: Setting, path: Path) -> float:
    """Return the latency of a packed network over that of the same one in float.

    Without quantized inputs that is 1: ONNX Runtime then runs float weights.
    """
    small = fc.load(path, build_model(setting.network), trainable=True)
    layers = [name for name, _ in activations(small)]
    if not layers:
        return 1.0
    target = fc.OnnxRuntimeTarget(threads=1, batch=1, turns=31, integer_sums=True)
    with target.open(small, setting.source.test[0][:1], weight_bits=8) as session:
        return session.milliseconds(layers).ratio


def outcome(setting: Setting, method: Method) -> dict[str, Any]:
    """Compress, fine-tune, save, load and score."""
    made = method.make(setting)
    small, testing = made.model, setting.source.testing()
    before = None
    if not made.tuned:
        before = fc.evaluate(small, testing, progress=False).accuracy
    if setting.tune and not made.tuned:
        epochs = -(-setting.tune // len(setting.source.train[0]))
        fc.finetune(
            small,
            setting.training(setting.tune // epochs, seed=2),
            teacher=setting.model,
            validation=[x for x, _ in setting.source.validating()],
            epochs=epochs,
            checkpoint=setting.checkpoint(f"{method.name} tuned"),
            seed=setting.seed,
        )
    after = fc.evaluate(small, testing, progress=False).accuracy
    size = fc.save(small, file_of(setting, method, "safetensors"))
    return {
        "method": method.name,
        "ours": method.ours,
        "before": before,
        "after": after,
        "bytes": size,
        "share": 100 * size / dense_bytes(setting.model),
        "active_bytes": active_bytes(small),
        "bops": made.bops,
        "latency": made.latency,
        "made_cpu_s": made.seconds,
        "made_samples": made.samples,
    }


def known(setting: Setting, method: Method) -> dict[str, Any]:
    """Return the outcome of a method, from the folder if it is there."""
    path = file_of(setting, method, "json")
    if not path.exists():
        found = outcome(setting, method)
        write_atomically(path, json.dumps(found, indent=1).encode())
    cells: dict[str, Any] = json.loads(path.read_text())
    return cells


def judge(result: Result, rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """Hold the rows against the bars that their methods have."""
    named = {row["method"]: row for row in rows}
    if "bit sharing" in named:
        row = named["bit sharing"]
        times, lost = dense["bops"] / row["bops"], dense["after"] - row["after"]
        result.bar(
            "bit sharing: BOPs, times fewer", times, SHARING["times"], "at least"
        )
        result.bar("bit sharing: points lost", lost, SHARING["points"])
    if "pruning ternary" in named:
        row = named["pruning ternary"]
        lost = dense["after"] - row["after"]
        result.bar("ternary: share of the bytes", row["share"] / 100, TERNARY["share"])
        result.bar("ternary: points lost", lost, TERNARY["points"])
    for agent in AGENTS:
        if (name := f"galen, {agent}") in named:
            row = named[name]
            result.bar(f"{name}: latency", row["latency"], TARGET)
            result.bar(f"{name}: points lost", dense["after"] - row["after"], GALEN)
    ours = sorted((r for r in rows if r["ours"]), key=lambda r: r["bytes"])
    for row in rows:
        smaller = [r for r in ours if r["bytes"] <= row["bytes"] and not r["bops"]]
        if not row["ours"] and smaller:
            ahead = smaller[-1]["after"] - row["after"]
            name = f"{smaller[-1]['method']} above {row['method']}, points"
            result.bar(name, ahead, 0.0, "at least")


def main() -> None:
    made = parser(__doc__ or "", threads=None)
    made.add_argument("--data", type=Path, help="CIFAR-10, binary")
    made.add_argument("--weights", required=True, type=Path)
    made.add_argument("--network", default="resnet20")
    made.add_argument("--methods", nargs="*", default=["*"], help="names or patterns")
    made.add_argument("--keep", type=Path, help="folder of rows and checkpoints")
    made.add_argument("--tune", type=int, default=6400, help="samples")
    made.add_argument("--sharing", type=_passes, default="24000x1", metavar="NxPASSES")
    made.add_argument("--ternary", type=_passes, default="48000x3", metavar="NxPASSES")
    made.add_argument("--galen", type=_passes, default="512x24", metavar="NxEPISODES")
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    result = start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, result, arguments.keep or Path(folder))
    result.finish()


def run(arguments: argparse.Namespace, result: Result, folder: Path) -> None:
    """Make the rows that were asked for, and judge them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trained_model(arguments.network, arguments.weights).to(arguments.device)
    name = "digits" if arguments.network == "digits" else "cifar10"
    quick = arguments.quick
    setting = Setting(
        network=arguments.network,
        model=model,
        source=load_dataset(name, arguments.data),
        folder=folder,
        tune=640 if quick else arguments.tune,
        sharing=(640, 1) if quick else arguments.sharing,
        ternary=(640, 1) if quick else arguments.ternary,
        galen=(12, 256) if quick else arguments.galen[::-1],
        seed=arguments.seed,
    )
    example = setting.source.test[0][:1].to(arguments.device)
    dense = {
        "method": "float",
        "after": fc.evaluate(model, setting.source.testing(), progress=False).accuracy,
        "bytes": dense_bytes(model),
        "share": 100.0,
        "bops": 32 * 32 * sum(count_macs(model, example).values()),
        "latency": 1.0,
    }
    result.row(**dense)
    wanted = [
        method
        for method in methods()
        if any(fnmatch.fnmatch(method.name, name) for name in arguments.methods)
    ]
    rows = [known(setting, method) for method in wanted]
    for method, row in zip(wanted, rows, strict=True):  # nothing else computes now
        if row["latency"] is None:
            row["latency"] = latency(setting, file_of(setting, method, "safetensors"))
        result.row(**row)
    judge(result, rows, dense)


def _passes(text: str) -> tuple[int, int]:
    samples, _, passes = text.partition("x")
    return int(samples), int(passes or 1)


if __name__ == "__main__":
    main()
