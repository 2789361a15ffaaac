"""The table of levels: against prune-then-quantize by hand, and as a file."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

import fitcompress as fc
from fitcompress.errors import FormatError, OptionError, OutputError
from fitcompress.model import compressible_layers
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.sensitivity.labels import sampled_label_loss
from fitcompress.sensitivity.levels import SPARSITIES, layer_sparsities, step_ladder


def fisher_of(net, images) -> dict[str, torch.Tensor]:
    """What `measure` sees: batches of 32, labels seeded by batch number."""
    estimator = FisherEstimator(net, compressible_layers(net))
    for number, x in enumerate(images.split(32)):
        generator = torch.Generator().manual_seed(number)
        estimator.update(
            x, None, lambda out, _, g=generator: sampled_label_loss(out, g)
        )
    return {n: estimator.moments.diagonal(n) for n in estimator.moments.squares}


def by_hand(weight: torch.Tensor, grid: fc.Grid, share: float) -> torch.Tensor:
    """Drop the smallest weights, round the others."""
    if grid.bits is None:
        quantized = (weight / grid.step).round() * grid.step
    else:
        limit = 2 ** (grid.bits - 1) - 1
        delta = weight.abs().amax(1, keepdim=True) / limit
        quantized = (weight / delta).round().clamp(-limit, limit) * delta
    count = int(share * weight.numel())
    dropped = weight.abs().flatten().argsort(stable=True)[:count]
    quantized.view(-1)[dropped] = 0
    return quantized


@pytest.mark.parametrize("layer", ["conv", "deep", "head"])
@pytest.mark.parametrize("cell", [(0, 0), (4, 0), (6, 6), (20, 0), (40, 3), (-1, -1)])
def test_cells_equal_pruning_then_quantizing_by_hand(
    net, images, sensitivity, layer, cell
) -> None:
    i, (g, s) = sensitivity.names.index(layer), cell
    weight = dict(net.named_modules())[layer].weight.detach().flatten(1)
    share = float(sensitivity.sparsity[i, s])
    there = by_hand(weight, sensitivity.grids[g], share)
    fisher = fisher_of(net, images)[layer].double()
    error = 0.5 * (fisher * (weight - there).double().square()).sum()
    assert sensitivity.distortion[i, g, s] == pytest.approx(float(error), rel=1e-4)
    norm = float((fisher * there.double().square()).sum())
    assert sensitivity.norm[i, g, s] == pytest.approx(norm, rel=1e-4)
    assert sensitivity.nonzeros[i, g, s] == there.count_nonzero()
    trace = float(fisher.sum())
    assert sensitivity.fisher_trace[i] == pytest.approx(trace, rel=1e-5)


def test_sizes_are_entropies_plus_scales(net, sensitivity) -> None:
    i = sensitivity.names.index("head")
    weight = net.head.weight.detach()
    for g in (5, 30):
        grid = sensitivity.grids[g]
        top = weight.abs().amax(1, keepdim=True)
        delta = grid.step or top / (2 ** (grid.bits - 1) - 1)
        codes = (weight / delta).round()
        counts = codes.unique(return_counts=True)[1].double()
        entropy = float((counts * (weight.numel() / counts).log2()).sum())
        scales = 32 if grid.bits is None else 16 * len(weight)
        assert sensitivity.size_bits[i, g, 0] == np.ceil(entropy) + scales
        largest = int(codes.abs().max())
        bits = grid.bits or largest.bit_length() + 1
        assert sensitivity.weight_bits[i, g] == bits
        assert (sensitivity.bops()[i, g] == 504 * bits * 32).all()


def test_the_table_has_the_expected_axes(sensitivity) -> None:
    assert sensitivity.distortion.shape == (4, 7 + 49, len(SPARSITIES))
    assert [g.bits for g in sensitivity.grids[:7]] == [8, 7, 6, 5, 4, 3, 2]
    steps = [g.step for g in sensitivity.grids[7:]]
    ratios = np.diff(np.log2(steps))
    np.testing.assert_allclose(ratios, 1 / 8, rtol=1e-5)
    assert sensitivity.samples == 96
    assert sensitivity.sizes.tolist() == [144, 72, 504, 35]
    assert sensitivity.provenance["labels"] == "sampled"


def test_the_coarsest_step_is_four_times_the_mean_weight(net) -> None:
    layers = compressible_layers(net)
    rms = torch.cat([x.matrix().flatten() for x in layers]).square().mean().sqrt()
    assert step_ladder(layers)[-1] == pytest.approx(4 * float(rms), rel=1e-5)


def test_one_threshold_drops_the_same_magnitudes_everywhere(net) -> None:
    layers = compressible_layers(net)
    shares = layer_sparsities(layers, (0.0, 0.5, 0.9))
    total = sum(x.size for x in layers)
    for s, sparsity in enumerate((0.0, 0.5, 0.9)):
        dropped = [int(shares[i][s] * x.size) for i, x in enumerate(layers)]
        ordered = [x.matrix().abs().flatten().sort().values for x in layers]
        bins = torch.cat(ordered).sort().values.view(torch.int32) >> 16
        count = int(sparsity * total)
        assert 0 <= count - sum(dropped) < int((bins == bins[count]).sum())
        gone = [o[:d].max() for o, d in zip(ordered, dropped, strict=True) if d]
        kept = [
            o[d:].min() for o, d in zip(ordered, dropped, strict=True) if d < len(o)
        ]
        assert not gone or max(gone) <= min(kept)


def test_layers_of_zeros_and_tiny_weights_can_be_measured(net, images) -> None:
    with torch.no_grad():
        net.deep.weight.zero_()
        net.out.weight.mul_(1e-6)
    table = fc.measure(net, [images[:16]], progress=False)
    assert (table.sparsity < 1).all()
    i = table.names.index("deep")
    assert (table.nonzeros[i] == 0).all()
    assert (table.distortion[i] == 0).all()
    plan = fc.search(table, fc.Budget(size=1200), masks=True)
    assert plan.size_bytes <= 1200
    small = fc.apply(net, plan, [images[:16]], progress=False)
    assert not small.deep.weight.any()


def test_a_model_of_zeros_can_be_measured(images, net) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    table = fc.measure(net, [images[:8]], progress=False)
    assert not table.distortion.any()


def test_chosen_grids_and_sparsities(net, images) -> None:
    grids = (fc.Grid(bits=5), fc.Grid(step=0.1), fc.Grid(step=0.3))
    table = fc.measure(
        net, [images[:8]], grids=grids, sparsities=(0.0, 0.5), progress=False
    )
    assert table.grids == grids
    assert table.distortion.shape == (4, 3, 2)
    with pytest.raises(ValueError, match="grids are out of order"):
        fc.measure(net, [images[:8]], grids=grids[::-1], progress=False)


def test_measuring_twice_gives_the_same_numbers(
    net, images, loader, sensitivity
) -> None:
    again = fc.measure(net, loader, progress=False)
    other = fc.measure(net, loader, seed=1, progress=False)
    assert np.array_equal(again.distortion, sensitivity.distortion)
    assert not np.array_equal(other.distortion, sensitivity.distortion)


def test_a_sensitivity_survives_its_file(sensitivity, tmp_path) -> None:
    file = tmp_path / "s.safetensors"
    sensitivity.save(file)
    loaded = fc.Sensitivity.load(file)
    for item in dataclasses.fields(sensitivity):
        a, b = getattr(sensitivity, item.name), getattr(loaded, item.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b
    budget = fc.Budget(size=1200)
    assert fc.search(loaded, budget) == fc.search(sensitivity, budget)


def test_files_that_are_missing_cut_or_something_else(sensitivity, tmp_path) -> None:
    file = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError):
        fc.Sensitivity.load(file)
    with pytest.raises(OutputError):
        sensitivity.save(tmp_path)
    sensitivity.save(file)
    whole = file.read_bytes()
    cuts = [*range(0, 400, 7), *range(400, len(whole), len(whole) // 40)]
    for length in [*cuts, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="sensitivity"):
            fc.Sensitivity.load(file)
    for content in (b"", b"text", whole + b"x", safetensors.numpy.save({})):
        file.write_bytes(content)
        with pytest.raises(FormatError, match=r"sensitivity.*To fix it"):
            fc.Sensitivity.load(file)
    with pytest.raises(FormatError):
        fc.Sensitivity.load(tmp_path)


def rewrite(table: fc.Sensitivity, file, change) -> None:
    """Save a table after a change of its header or arrays."""
    table.save(file)
    arrays = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        meta = json.loads(opened.metadata()["fitcompress.sensitivity"])
    meta = change(meta, arrays) or meta
    header = {"fitcompress.sensitivity": json.dumps(meta)}
    file.write_bytes(safetensors.numpy.save(arrays, header))


DAMAGE = {
    "version": lambda m, a: m.update(version=9),
    "no version": lambda m, a: m.pop("version"),
    "a list": lambda m, a: [1],
    "a number": lambda m, a: 7,
    "names": lambda m, a: m.update(names=["a"]),
    "grids": lambda m, a: m.update(grids=[[4, None]]),
    "no grids": lambda m, a: m.update(grids=None),
    "samples": lambda m, a: m.update(samples="many"),
    "overhead": lambda m, a: m.update(overhead_bytes=1.5),
    "missing array": lambda m, a: a.__delitem__("norm"),
    "extra array": lambda m, a: a.update(more=a["norm"]),
    "shape": lambda m, a: a.update(norm=a["norm"][:2]),
    "flat": lambda m, a: a.update(distortion=a["distortion"].ravel()),
    "NaN": lambda m, a: a["distortion"].__setitem__((0, 0, 0), np.nan),
    "negative": lambda m, a: a["distortion"].__setitem__((0, 0, 0), -1.0),
    "negative size": lambda m, a: a["size_bits"].__setitem__((0, 0, 0), -1),
    "sizes as floats": lambda m, a: a.update(size_bits=a["size_bits"] * 1.0),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_a_format_error(sensitivity, tmp_path, change) -> None:
    file = tmp_path / "s.safetensors"
    rewrite(sensitivity, file, lambda m, a: None)
    fc.Sensitivity.load(file)
    rewrite(sensitivity, file, change)
    with pytest.raises(FormatError):
        fc.Sensitivity.load(file)


def test_a_flipped_bit_anywhere_is_noticed(net, tmp_path) -> None:
    table = fc.measure(
        net,
        [torch.randn(8, 2, 6, 6)],
        grids=(fc.Grid(bits=4), fc.Grid(step=0.1)),
        sparsities=(0.0, 0.5),
        progress=False,
    )
    path = tmp_path / "sensitivity.safetensors"
    table.save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(good), 300, replace=False):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        with contextlib.suppress(FormatError):
            # A space in the header's padding may turn into another one's equal.
            again = fc.Sensitivity.load(path)
            assert np.array_equal(again.distortion, table.distortion)
            assert np.array_equal(again.size_bits, table.size_bits)


@pytest.mark.parametrize("sparsities", [(), (0.1, 0.5), (0.0, 0.5, 0.5), (0.0, 1.0)])
def test_bad_sparsities_are_told_before_any_work(net, sparsities) -> None:
    with pytest.raises(OptionError, match="sparsities are out of order"):
        fc.measure(net, iter(()), sparsities=sparsities, progress=False)
