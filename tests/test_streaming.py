"""Tables of models in shards: the same numbers, little memory, bad files."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fitcompress as fc
from fitcompress import ops
from fitcompress.errors import (
    FormatError,
    NoCompressibleLayerError,
    NonFiniteError,
    OptionError,
)
from fitcompress.sensitivity import streaming
from fitcompress.sensitivity.levels import histogram_sparsities
from fitcompress.sensitivity.streaming import measure_shards
from fitcompress.sensitivity.table import Grid

GRIDS = (Grid(bits=8), Grid(bits=3), Grid(step=0.05), Grid(step=0.2))
SHARES = (0.0, 0.5, 0.9)


@pytest.fixture
def weights():
    make = torch.Generator().manual_seed(0)
    return {
        "a.weight": 0.1 * torch.randn(40, 60, generator=make),
        "b.weight": torch.randn(16, 8, 3, 3, generator=make).bfloat16(),
        "b.bias": torch.zeros(16),
        "embed.weight": torch.randn(50, 40, generator=make),
        "c.weight": torch.ones(40, 60, dtype=torch.int8),
    }


def measured(path, **options):
    usual = {"grids": GRIDS, "sparsities": SHARES, "exclude": "*embed*"}
    return measure_shards(path, **usual | {"progress": False} | options)


def same(a, b) -> None:
    assert a.names == b.names
    for name in ("distortion", "size_bits", "nonzeros", "norm", "sparsity"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def file(tmp_path, weights):
    save_file(weights, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def split(folder, weights) -> None:
    folder.mkdir()
    names = sorted(weights)
    where = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for part in set(where.values()):
        save_file({n: weights[n] for n in names if where[n] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))


def test_tables_are_those_of_the_op_on_the_same_weights(file, weights) -> None:
    table = measured(file, fisher={"a": 3.0, "b": 0.5})
    assert table.names == ("a", "b")
    assert table.fisher_trace.tolist() == [3.0, 0.5]
    for i, name in enumerate(table.names):
        matrix = weights[f"{name}.weight"].flatten(1)
        shares = table.sparsity[i].tolist()
        trace = float(table.fisher_trace[i])
        want = ops.distortion_table(matrix, trace, [8, 3], [0.05, 0.2], shares)
        assert np.array_equal(table.distortion[i], want.distortion.numpy())
        assert np.array_equal(table.nonzeros[i], want.nnz.numpy())
    left = 16 + 50 * 40 + 40 * 60
    assert table.overhead_bytes == 2 * left
    assert table.dense_bytes == 4 * (left + 40 * 60 + 16 * 72)
    assert table.provenance["skipped_dtypes"] == {"I8": 1}


def test_shards_give_what_one_file_gives(file, tmp_path, weights) -> None:
    split(tmp_path / "parts", weights)
    for path in ("parts", "parts/model.safetensors.index.json"):
        same(measured(tmp_path / path), measured(file))


def test_diagonals_may_lie_in_shards(file, tmp_path, weights) -> None:
    diagonals = {n: torch.rand(weights[n].shape) for n in ("a.weight", "b.weight")}
    save_file(diagonals, tmp_path / "fisher.safetensors")
    table = measured(file, fisher=tmp_path / "fisher.safetensors")
    want = [float(d.double().sum()) for d in diagonals.values()]
    assert table.fisher_trace == pytest.approx(want, rel=1e-12)


def test_a_killed_measurement_resumes_to_the_same_table(
    file, tmp_path, monkeypatch
) -> None:
    whole, saved = measured(file), tmp_path / "partial"
    original, calls = ops.distortion_table, []

    def killed(*args, **named):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **named)

    monkeypatch.setattr(ops, "distortion_table", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(file, checkpoint=saved)
    assert saved.exists()
    same(measured(file, checkpoint=saved), whole)
    assert len(calls) == 3
    assert not saved.exists()


def interrupt(monkeypatch, *args, **options) -> None:
    """Measure until the checkpoint has one layer."""
    save = streaming._save

    def saved(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(streaming, "_save", saved)
        measured(*args, **options)


def scaled(weights, factor, path) -> None:
    names = ("a.weight", "b.weight")
    save_file({n: torch.full(weights[n].shape, factor) for n in names}, path)


def test_a_checkpoint_of_other_diagonals_is_not_used(
    file, tmp_path, weights, monkeypatch
) -> None:
    saved, fisher = tmp_path / "partial", tmp_path / "fisher"
    scaled(weights, 1.0, fisher)
    interrupt(monkeypatch, file, fisher=fisher, checkpoint=saved)
    scaled(weights, 100.0, fisher)
    table = measured(file, fisher=fisher, checkpoint=saved)
    same(table, measured(file, fisher=fisher))
    assert table.fisher_trace.tolist() == [240000, 115200]


def test_a_checkpoint_of_other_traces_is_not_used(file, tmp_path, monkeypatch) -> None:
    first, other = (
        {"a": torch.tensor(value), "b": torch.tensor(1.0)}
        for value in (0.123456, 0.123459)  # alike as they are printed
    )
    saved = tmp_path / "partial"
    interrupt(monkeypatch, file, fisher=first, checkpoint=saved)
    table = measured(file, fisher=other, checkpoint=saved)
    assert table.fisher_trace[0] == float(other["a"])


def test_moments_are_not_summed_up_without_a_checkpoint(file, monkeypatch) -> None:
    monkeypatch.setattr(streaming.ShardFisher, "key", lambda self: 1 / 0)
    measured(file, fisher={"a": 1.0, "b": 1.0})


def test_a_checkpoint_of_the_same_magnitudes_is_not_used(
    file, tmp_path, weights, monkeypatch
) -> None:
    saved = tmp_path / "partial"
    interrupt(monkeypatch, file, checkpoint=saved)
    weights["a.weight"] = weights["a.weight"].flatten().flip(0).view(40, 60)
    save_file(weights, file)
    same(measured(file, checkpoint=saved), measured(file))


def test_a_checkpoint_of_other_weights_is_not_used(file, tmp_path) -> None:
    saved = tmp_path / "partial"
    saved.write_bytes(b"no checkpoint")
    same(measured(file, checkpoint=saved), measured(file))


def test_a_weight_that_is_not_finite_is_named(file, weights) -> None:
    weights["b.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        measured(file)


def test_a_truncated_file_is_a_format_error(file) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"one\.safetensors"):
        measured(file)


def test_an_index_must_fit_its_files(tmp_path, weights) -> None:
    split(tmp_path / "parts", weights)
    (tmp_path / "parts" / "part-1.safetensors").unlink()
    with pytest.raises(FormatError, match="part-1"):
        measured(tmp_path / "parts")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x.weight": "part-0.safetensors"}}))
    with pytest.raises(FormatError, match=r"x\.weight"):
        measured(tmp_path / "parts")


def test_results_beside_the_shards_are_no_part_of_them(tmp_path, file, weights) -> None:
    first = measured(file.parent)
    first.save(file.with_name("sensitivity.safetensors"))
    fc.FisherMoments().save(file.with_name("moments.safetensors"))
    packed = {"__metadata__": {"format": "fitcompress"}}
    header = json.dumps(packed).encode()
    size = len(header).to_bytes(8, "little")
    file.with_name("small.safetensors").write_bytes(size + header)
    again = measured(file.parent)
    same(again, first)
    assert again.dense_bytes == first.dense_bytes
    with pytest.raises(FormatError, match=r"sensitivity.*no tensors of a model"):
        measured(file.with_name("sensitivity.safetensors"))


def test_a_checkpoint_does_not_overwrite_the_shards(file) -> None:
    before = file.read_bytes()
    with pytest.raises(OptionError, match="overwrite"):
        measured(file, checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200000,
        b'{"weight_map": ' + b"[" * 200000,
        b'{"weight_map": {"a.weight": "a\\u0000b"}}',
        b'{"weight_map": {"a.weight": ""}}',
        b'{"weight_map": {"a.weight": ".."}}',
    ],
    ids=range(5),
)
def test_impossible_indices_and_headers(tmp_path, text) -> None:
    index, header = tmp_path / "x.index.json", tmp_path / "x.safetensors"
    index.write_bytes(text)
    with pytest.raises(FormatError):
        measured(index)
    header.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FormatError):
        measured(header)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FormatError):
        measured(tmp_path / "folder.json")


def test_one_pattern_is_one(file) -> None:
    assert measured(file, include="a*").names == ("a",)
    assert measured(file, exclude="a*").names == ("b", "embed")
    assert "embed" in measure_shards(file, grids=GRIDS, progress=False).names
    with pytest.raises(NoCompressibleLayerError):
        measured(file, include="x.*")


def test_a_tensor_in_two_files_is_a_format_error(file, weights) -> None:
    save_file(weights, file.with_name("two.safetensors"))
    with pytest.raises(FormatError, match="two files"):
        measured(file.parent)


def test_missing_fisher_and_macs_name_the_layer(file) -> None:
    with pytest.raises(OptionError, match="b"):
        measured(file, fisher={"a": 1.0})
    with pytest.raises(OptionError, match="b"):
        measured(file, macs={"a": 1})


def test_histogram_counts_by_hand_and_like_a_sort() -> None:
    weight = torch.randn(100, 70, generator=torch.Generator().manual_seed(1))
    counts = ops.magnitude_histogram(weight)
    keys = weight.abs().flatten().sort().values.view(torch.int32) >> 16
    assert torch.equal(counts, torch.bincount(keys, minlength=2**15))
    assert torch.equal(ops.magnitude_histogram(weight.t()), counts)
    with pytest.raises(ValueError, match="not finite"):
        ops.magnitude_histogram(torch.tensor([float("inf")]))


def test_a_common_threshold_falls_short_by_less_than_a_bin() -> None:
    make = torch.Generator().manual_seed(2)
    parts = [torch.randn(500, generator=make), 3 * torch.randn(900, generator=make)]
    counts = [ops.magnitude_histogram(part) for part in parts]
    shares = histogram_sparsities([c.to_sparse() for c in counts], (0.0, 0.4))
    dropped = [int(row[1] * len(p)) for row, p in zip(shares, parts, strict=True)]
    edges = torch.cat(parts).abs().sort().values.view(torch.int32) >> 16
    edge = int(edges[560])
    assert dropped == [int(c[:edge].sum()) for c in counts]
    assert 0 <= 560 - sum(dropped) < int(sum(c[edge] for c in counts))
    assert streaming.SPARSITIES[0] == 0


MEMORY = """
import sys
import fitcompress as fc

def peak():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith("VmHWM"))

def run(path):
    fc.measure_shards(path, sparsities=[0.0, 0.5, 0.9], progress=False)

run(sys.argv[1])
before = peak()
run(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_layer_at_a_time_is_in_memory(tmp_path) -> None:
    layer = torch.randn(1024, 1024)
    save_file({"a.weight": layer}, tmp_path / "one.safetensors")
    many = {f"{i}.weight": layer + i for i in range(40)}
    save_file(many, tmp_path / "many.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("one", "many")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *files],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 20 * 1024


@pytest.mark.parametrize("diagonal", [True, False])
def test_moments_of_a_model(tmp_path, diagonal) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 40)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    moments = fc.measure_fisher(
        model, [torch.randn(64, 40)], diagonal=diagonal, progress=False
    )
    table = fc.measure_shards(
        tmp_path / "model.safetensors",
        fisher=moments,
        grids=GRIDS,
        sparsities=SHARES,
        progress=False,
    )
    assert table.names == ("0", "2")
    assert table.samples == 64
    bits = [g.bits for g in GRIDS if g.bits]
    steps = [g.step for g in GRIDS if g.step]
    for row, name in enumerate(table.names):
        weight = model.get_submodule(name).weight
        known = moments.diagonal(name) if diagonal else moments.mean_trace(name)
        cells = ops.distortion_table(weight, known, bits, steps, table.sparsity[row])
        assert torch.equal(torch.tensor(table.distortion[row]), cells.distortion)
        assert table.fisher_trace[row] == moments.mean_trace(name)
