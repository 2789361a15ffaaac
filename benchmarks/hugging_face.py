"""Transformers: accuracy or loss, and KL, against bytes on disk, ours and others.

    python benchmarks/hugging_face.py --sst2 FOLDER --stories FOLDER --data DIR
        [--keep DIR] [--rows "ours*" "uniform*"] [--against "uniform*"]

`--sst2` is a BERT classifier, see `sst2.py`, scored on the 872 sentences of `dev.tsv`;
`--stories` a language model with `sampled_tokens.npy` beside it, scored on the last
quarter of its sequences. Embeddings are compressed and counted in every row. Bytes are
those of a file that was loaded before it was scored, for our rows; `text_peers.py` says
how others are counted, `coded` are bytes of the same codes in our packed file. Others
that `--against` names get a row of ours of at most their bytes, and at most their coded
bytes; of `auto_quantize` and of pruning, the bits that lose least. KL is that from the
dense model, nats a label. Seconds are those of a processor that made the model, without
`measure`, once per network; of a row that was interrupted, those since it was resumed.
Rows, and what ours start from, stay in the folder `--keep`.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fitcompress as fc
import text_peers
from fitcompress.data.batches import take
from fitcompress.data.text import TextDataset, load_sentences, load_tokens
from fitcompress.errors import FitcompressError
from fitcompress.files import write_atomically
from fitcompress.hugging_face import build_model, load_model, load_tokenizer
from fitcompress.model.costs import dense_bytes
from fitcompress.train import divergence
from harness import Result, parser, start
from text_peers import Peer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from torch import nn

UNIFORM = (8, 4, 3)
EMBEDDINGS = (8, 6, 5, 4, 3, 2)  # bits, beside those that ``auto_quantize`` chooses
LOST = 1.5  # points, of the accuracy, at most
RISE = {15.0: 0.025, 11.0: 0.13}  # nats a token, at most
LARGEST = 0.3  # share of the float32 bytes above which ours loses nothing anyway
CLOSE = 0.99  # of another's bytes: a file of ours that is as large
SKIPPED = (
    FitcompressError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    ValueError,
)


@dataclass
class Network:
    """A trained model and its data.

    Attributes:
        name: For rows.
        folder: Where it lies.
        source: Its data.
        sizes: Shares of the float32 bytes that ours are to take, per cent.
        tuned: The same of those that are fine-tuned.
        others: The same of those that others choose or prune for.
        samples: That calibrate; half of them measure.
        tune: Samples of a pass of fine-tuning, and passes.
        keep: Folder of rows and files.
    """

    name: str
    folder: Path
    source: TextDataset
    sizes: tuple[float, ...]
    tuned: tuple[float, ...]
    others: tuple[float, ...]
    samples: int
    tune: tuple[int, int]
    keep: Path

    @cached_property
    def model(self) -> nn.Module:
        """The dense model."""
        return load_model(self.folder)

    @cached_property
    def bytes(self) -> int:
        """Its float32 bytes."""
        return dense_bytes(self.model)

    def calibration(self) -> list[Any]:
        """Return the batches that calibrate."""
        return [
            dict(x) if y is None else {**x, "labels": y}
            for x, y in take(self.source.calibration(), self.samples)
        ]

    def size(self, share: float) -> int:
        """Return the bytes of a share, per cent."""
        return fc.Budget(size=f"{share}%").size_bytes(self.bytes)

    def table(self) -> fc.Sensitivity:
        """Return the sensitivity, measured once."""
        path = self.keep / f"{self.name}.sensitivity"
        if not path.exists():
            fc.measure(
                self.model,
                self.calibration(),
                samples=self.samples // 2,
                checkpoint=path.with_suffix(".measure"),
            ).save(path)
        return fc.Sensitivity.load(path)

    def scored(self, method: str, made: Peer, seconds: float) -> dict[str, Any]:
        """Return the row of a model."""
        score = fc.evaluate(made.model, self.source.testing(), progress=False)
        kl = divergence(self.model, made.model, self.source.testing())
        row = {
            "network": self.name,
            "method": method,
            "bytes": made.bytes,
            "share": 100 * made.bytes / self.bytes,
            "accuracy": score.accuracy,
            "loss": score.loss,
            "kl": kl,
            "seconds": seconds,
        }
        row |= {"coded": made.coded} if made.coded else {}
        return row | ({"note": made.note} if made.note else {})


def ours(net: Network, size: int) -> Peer:
    """Compress to a number of bytes without training, through a file."""
    path = packed(net, size)
    if not path.exists():
        groups = fc.fused_groups(net.model)
        plan = fc.search(net.table(), fc.Budget(size=size, groups=groups))
        small = fc.apply(
            net.model,
            plan,
            net.calibration(),
            samples=net.samples,
            checkpoint=path.with_suffix(".apply"),
        )
        fc.save(small, path)
    return loaded(net, path)


def tuned(net: Network, size: int) -> Peer:
    """Compress, and fine-tune once on the dense model's outputs, through a file."""
    ours(net, size)
    path, (samples, passes) = packed(net, size, "tuned"), net.tune
    if not path.exists():
        loader = net.source.training(32)
        loader.items = loader.items[:samples]
        small = fc.load(packed(net, size), build_model(net.folder), trainable=True)
        told = fc.finetune(
            small,
            loader,
            teacher=net.model,
            validation=net.source.validating(),
            epochs=passes,
            thread_count=1,
            checkpoint=path.with_suffix(".finetune"),
        )
        print(told)
        fc.save(small, path)
    return loaded(net, path)


def packed(net: Network, size: int, kind: str = "ours") -> Path:
    """Return where a packed file is kept."""
    return net.keep / f"{net.name}-{kind}-{size}.safetensors"


def loaded(net: Network, path: Path) -> Peer:
    """Return a packed file, loaded."""
    return Peer(fc.load(path, build_model(net.folder)), path.stat().st_size)


def rows(net: Network) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Yield what there is to compare, by name."""
    model = net.model
    for share in net.sizes:
        yield f"ours {share:g}%", lambda s=share: ours(net, net.size(s))
    for share in net.tuned:
        yield f"ours {share:g}%, tuned", lambda s=share: tuned(net, net.size(s))
    for bits in UNIFORM:
        yield f"uniform {bits} bits", lambda b=bits: text_peers.uniform(model, b)
        yield (
            f"uniform {bits} bits, least squares",
            lambda b=bits: text_peers.uniform(model, b, fitted=True),
        )
        for grouped in (False, True):
            name = f"torchao {bits} bits, " + ("groups of 32" if grouped else "rows")
            yield (
                name,
                lambda b=bits, g=grouped: text_peers.torchao_rounded(
                    model, b, grouped=g
                ),
            )
    for share in net.others:
        size = net.size(share)
        for bits in (8, 6, 4, 3):
            yield (
                f"magnitude {share:g}%, {bits} bits",
                lambda b=bits, s=size: text_peers.pruned(model, b, s),
            )
        for bits in EMBEDDINGS:
            yield (
                f"auto_quantize {share:g}%, embeddings {bits}",
                lambda b=bits, s=size: text_peers.auto_quantized(
                    model, net.calibration(), s, embedding_bits=b
                ),
            )


def rivals(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return others' rows, of those for a share the best of their kind alone."""
    best: dict[str, dict[str, Any]] = {}
    for row in found:
        name = row["method"]
        if not name.startswith(("ours", "float")):
            kind = name.partition("%")[0]
            if kind not in best or row["loss"] < best[kind]["loss"]:
                best[kind] = row
    return list(best.values())


def sizes(row: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the name of a row, and its bytes, for each way that they are stored."""
    name, coded = row["method"], row.get("coded")
    both = [(name, row["bytes"])]
    return [*both, (f"{name}, entropy-coded", coded)] if coded else both


def untrained(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our rows without fine-tuning."""
    return [
        row
        for row in found
        if row["method"].startswith("ours") and "tuned" not in row["method"]
    ]


def known(net: Network, name: str, make: Callable[[], Peer]) -> dict[str, Any]:
    """Return a row from the folder, or make it."""
    path = net.keep / f"{net.name}, {name}.json"
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text())
        return row
    begin = time.process_time()
    made = make()
    row = net.scored(name, made, time.process_time() - begin)
    write_atomically(path, json.dumps(row).encode())
    return row


def judge(result: Result, net: Network, found: list[dict[str, Any]]) -> None:
    """Hold rows against the bars, and ours against the others of as many bytes."""
    named = {row["method"]: row for row in found}
    dense = named["float"]
    if net.name == "sst2":
        for name in ("ours 15%", "ours 8%, tuned"):
            if name in named:
                lost = dense["accuracy"] - named[name]["accuracy"]
                result.bar(f"{net.name}, {name}: points lost", lost, LOST)
    else:
        for share, most in RISE.items():
            if (name := f"ours {share:g}%") in named:
                rise = named[name]["loss"] - dense["loss"]
                result.bar(f"{net.name}, {name}: nats a token more", rise, most)
    for row in rivals(found):
        for name, size in sizes(row):
            smaller = [x for x in untrained(found) if x["bytes"] <= size]
            if smaller:
                best = max(smaller, key=lambda each: each["bytes"])
                title = f"{net.name}, {best['method']}, {name}:"
                ratio = best["kl"] / max(row["kl"], 1e-12)
                result.bar(f"{title} KL over its KL", ratio, 1.0)
                more = best["loss"] - row["loss"]
                result.bar(f"{title} nats above it", more, 0.0)


def run(net: Network, result: Result, wanted: list[str], against: list[str]) -> None:
    """Make the rows of a network that were asked for, and judge them."""
    net.keep.mkdir(parents=True, exist_ok=True)
    dense = Peer(net.model, net.bytes)
    found = [known(net, "float", lambda: dense)]
    result.row(**found[0])

    def add(name: str, make: Callable[[], Peer]) -> None:
        if name.startswith("ours"):
            net.table()  # is in no row's seconds
        try:
            row = known(net, name, make)
        except SKIPPED as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            result.skip(f"{net.name}, {name}", text[:300])
            return
        found.append(row)
        result.row(**row)
        print(row, flush=True)

    for name, make in rows(net):
        if any(fnmatch.fnmatch(name, each) for each in wanted):
            add(name, make)
    for row in rivals(found):
        for name, size in sizes(row):
            small = size <= LARGEST * net.bytes
            if small and any(fnmatch.fnmatch(name, each) for each in against):
                have = [x["bytes"] for x in untrained(found)]
                if not any(CLOSE * size <= each <= size for each in have):
                    add(f"ours at {size} bytes", lambda s=size: ours(net, s))
    judge(result, net, found)


def networks(arguments: argparse.Namespace, keep: Path) -> Iterator[Network]:
    """Yield the networks that were named."""
    quick = arguments.quick
    if arguments.sst2 is not None:
        tokenizer = load_tokenizer(arguments.sst2)
        yield Network(
            "sst2",
            arguments.sst2,
            load_sentences(arguments.data, tokenizer),
            sizes=(15.0, 8.0) if quick else (25.0, 15.0, 12.0, 8.0),
            tuned=(8.0,),
            others=(15.0, 8.0),
            samples=64 if quick else arguments.samples,
            tune=(640, 1) if quick else (arguments.tune, arguments.passes),
            keep=keep,
        )
    if arguments.stories is not None:
        yield Network(
            "stories",
            arguments.stories,
            load_tokens(arguments.stories / "sampled_tokens.npy"),
            sizes=(25.0, 15.0, 12.5, 11.0, 9.5),
            tuned=(),
            others=(15.0, 11.0),
            samples=32 if quick else 256,
            tune=(0, 0),
            keep=keep,
        )


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sst2", type=Path, metavar="FOLDER", help="a BERT classifier")
    made.add_argument("--stories", type=Path, metavar="FOLDER", help="stories260K")
    made.add_argument("--data", type=Path, help="folder of SST-2")
    made.add_argument("--keep", type=Path, help="folder of rows and files")
    made.add_argument("--rows", nargs="*", default=["*"], help="names or patterns")
    made.add_argument("--against", nargs="*", default=["*"], help="others, likewise")
    made.add_argument("--samples", type=int, default=1024, help="that calibrate")
    made.add_argument("--tune", type=int, default=16000, help="sentences of a pass")
    made.add_argument("--passes", type=int, default=1)
    arguments = made.parse_args()
    result = start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for net in networks(arguments, arguments.keep or Path(folder)):
            run(net, result, arguments.rows, arguments.against)
    result.finish()


if __name__ == "__main__":
    main()
