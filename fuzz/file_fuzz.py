"""Damages whole packed files and reads them: a typed error, or the exact data.

    python fuzz/file_fuzz.py COUNT [SEED] [FOLDER]

Files whose checksums were not repaired must be refused or mean what they meant. Others
may mean something else, but the same on every way of reading: ``read``, ``PackedFile``
layer by layer, codes times scales, and ``load``, which leaves the model alone when it
refuses. What breaks a rule, takes longer than a second, or more than twice the memory
that the file declares goes to FOLDER, by default ``findings``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from attacks import good, network
from mutations import damaged

from fitcompress.errors import FormatError, PlanMismatchError
from fitcompress.storage.packed_file import PackedFile
from fitcompress.storage.save_load import PackedModel, load, read

State = dict[str, torch.Tensor]
SECONDS = 1.0
ALLOWED = 64 << 20  # bytes of memory that are no finding
ADDRESSES = 12 << 30


def same(a: State, b: State) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return list(a) == list(b) and all(
        x.dtype == b[key].dtype and torch.equal(bits(x), bits(b[key]))
        for key, x in a.items()
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, which compare NaN with NaN."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def peak_since(start: int | None = None) -> int:
    """Return the peak of resident memory; without ``start``, forget it first."""
    if start is None:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 - (start or 0)
    return 0


def check_ways(file: Path, whole: PackedModel) -> None:
    """Raise unless every way of reading says the same."""
    with PackedFile(file) as packed:
        for name in packed.names:
            stored, dense = packed.stored(name), packed.weight(name)
            assert torch.equal(bits(dense), bits(whole.dense[name])), name
            values = stored.codes.float() * stored.scale.reshape(-1, 1)
            weight = stored.view.weight_of(values.to(dense.dtype), stored.level.shape)
            assert torch.equal(bits(weight), bits(dense)), name


def check_load(file: Path, model: torch.nn.Module, whole: PackedModel | None) -> bool:
    """Whether the file loads into ``model``; raise if it does so wrongly."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load(file, model)
    except PlanMismatchError:  # before codes are decoded, which may be damaged too
        assert same(dict(model.state_dict()), before)
        return False
    except FormatError:
        assert whole is None
        assert same(dict(model.state_dict()), before)
        return False
    assert whole is not None
    own = dict(model.state_dict())
    assert all(torch.equal(bits(own[k]), bits(v)) for k, v in whole.state().items())
    return True


def examine(file: Path, truth: State, repaired: bool, model: torch.nn.Module) -> str:
    """Return what became of one damaged file."""
    try:
        whole = read(file)
    except FormatError:
        check_load(file, model, None)
        return "refused"
    state = whole.state()
    check_ways(file, whole)
    loads = check_load(file, copy.deepcopy(model), whole)
    if same(state, truth):
        return "read, the same data"
    assert repaired, "damage changed data"
    return "read, other data" if loads else "read, for another model"


def declared(file: Path) -> int:
    """Return the bytes of all weights that a file declares, as far as it opens."""
    total = 0
    with contextlib.suppress(FormatError), PackedFile(file) as packed:
        for name in packed.names:
            with contextlib.suppress(FormatError):
                total += 4 * math.prod(packed.stored(name).level.shape)
    return total


def main() -> None:
    """Run, and print how many files of each kind there were."""
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    findings = Path(sys.argv[3] if len(sys.argv) > 3 else "findings")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    torch.set_num_threads(1)
    draw, totals = random.Random(seed), Counter[str]()
    bases, model, slowest, largest = [good(), good("adaptive")], network(), 0.0, 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "file"
        truths = []
        for base in bases:
            file.write_bytes(base)
            truths.append(read(file).state())
        for number in range(count):
            which = draw.randrange(len(bases))
            data, repaired = damaged(bases[which], draw)
            file.write_bytes(data)
            start, before = time.monotonic(), peak_since()
            try:
                result = examine(file, truths[which], repaired, model)
            except Exception as error:
                result = f"FINDING {type(error).__name__}"
            seconds, grown = time.monotonic() - start, peak_since(before)
            slowest, largest = max(slowest, seconds), max(largest, grown)
            if seconds > SECONDS:
                result = f"FINDING slow, {result}"
            if grown > ALLOWED and grown > 2 * declared(file) + ALLOWED:
                result = f"FINDING large, {result}"
            totals[result] += 1
            if result.startswith("FINDING"):
                findings.mkdir(exist_ok=True)
                (findings / f"{seed}-{number}").write_bytes(data)
                print(number, result, f"{seconds:.2f} s", f"{grown >> 20} MiB")
    for result, n in totals.most_common():
        print(f"{n:8} {result}")
    print(f"slowest {slowest:.3f} s, most memory {largest >> 20} MiB")


if __name__ == "__main__":
    main()
