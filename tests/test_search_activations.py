"""Activation bits as a part of a level: in the table, in the search, in the plan."""

import itertools

import numpy as np
import pytest
import safetensors.numpy

import fitcompress as fc
from fitcompress.errors import FormatError, OptionError
from fitcompress.methods import Lagrangian, PathSearch

EXACT = Lagrangian(errors="rounded", fisher_power=1)
INPUTS = (None, 8, 4)


def make_table(layers=3, grids=2, sparsities=2, seed=0, inputs=INPUTS, **changes):
    """Return a table of fixed-point grids with random distortions."""
    rng = np.random.default_rng(seed)
    cells = (layers, grids, sparsities)
    rise = np.cumsum(np.cumsum(rng.exponential(size=cells), 1), 2)
    hurt = np.cumsum(rng.exponential(size=(layers, len(inputs))), 1)
    hurt[:, 0] = 0
    bits = [8, 4, 2][:grids]
    values = {
        "names": tuple(f"layer{i}" for i in range(layers)),
        "shapes": ((10, 10),) * layers,
        "macs": rng.integers(100, 1000, layers),
        "fisher_trace": rng.exponential(size=layers),
        "fisher_error": np.zeros(layers),
        "grids": tuple(fc.Grid(bits=b) for b in bits),
        "sparsity": np.tile(np.linspace(0, 0.9, sparsities), (layers, 1)),
        "distortion": rise,
        "size_bits": np.broadcast_to(100 * np.array(bits)[None, :, None], cells).astype(
            np.int64
        ),
        "nonzeros": np.ones(cells, np.int64),
        "weight_bits": np.tile(bits, (layers, 1)),
        "grid_length": rng.exponential(size=cells),
        "prune_length": rng.exponential(size=cells),
        "norm": 1 + rng.exponential(size=cells),
        "overhead_bytes": 10,
        "dense_bytes": 400 * layers,
        "samples": 1,
        "loss": 1.0,
        "activation_bits": inputs,
        "activation_distortion": hurt,
        "activation_trace": rng.exponential(size=layers),
    }
    return fc.Sensitivity(**values | changes)


def every_plan(table):
    """Yield (bit operations, distortion) of every plan, masks aside."""
    layers, grids, _ = table.distortion.shape
    choices = list(itertools.product(range(grids), range(len(table.activation_bits))))
    for plan in itertools.product(choices, repeat=layers):
        bops = distortion = 0
        for i, (g, a) in enumerate(plan):
            width = table.activation_bits[a] or 32
            bops += int(table.macs[i] * table.weight_bits[i, g] * width)
            distortion += table.distortion[i, g, 0] + table.activation_distortion[i, a]
        yield bops, float(distortion)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2])
def test_plans_are_within_the_budget_and_the_proven_gap(seed, share):
    table = make_table(seed=seed)
    limit = int(share * table.macs.sum() * 1024)
    plan = fc.search(table, fc.Budget(bops=limit), method=EXACT)
    best = min(d for bops, d in every_plan(table) if bops <= limit)
    assert plan.bops <= limit
    assert plan.gap is not None
    assert plan.distortion >= best - 1e-12
    assert plan.distortion * (1 - plan.gap) <= best + 1e-12


def test_a_level_sums_up_weights_and_input():
    table = make_table()
    plan = fc.search(table, fc.Budget(bops="2%"), method=EXACT)
    assert {level.activation_bits for level in plan.levels.values()} & {8, 4}
    for i, level in enumerate(plan.levels.values()):
        g = table.grids.index(level.grid)
        a = table.activation_bits.index(level.activation_bits)
        s = list(table.sparsity[i]).index(level.sparsity)
        weights, inputs = table.distortion[i, g, s], table.activation_distortion[i, a]
        assert level.distortion == weights + inputs
        width = level.activation_bits or 32
        assert level.bops == table.macs[i] * level.grid.bits * width
    assert plan.bops == sum(level.bops for level in plan.levels.values())
    assert fc.Plan.from_json(plan.to_json()) == plan


def test_inputs_stay_in_float_where_that_saves_nothing():
    table = make_table(inputs=INPUTS)
    plan = fc.search(table, fc.Budget(size="60%"), family="bits")
    assert all(level.activation_bits is None for level in plan.levels.values())
    plan = fc.search(table, fc.Budget(bops="30%"), activations=False)
    assert all(level.activation_bits is None for level in plan.levels.values())
    # An embedding multiplies nothing
    table = make_table(macs=np.array([0, 500, 500]))
    plan = fc.search(table, fc.Budget(bops="2%"), method=EXACT)
    assert plan.levels["layer0"].activation_bits is None
    assert plan.levels["layer0"].bops == 0


def test_a_path_does_not_choose_activation_bits():
    table = make_table()
    with pytest.raises(OptionError, match="activations=False"):
        fc.search(table, fc.Budget(bops="20%"), method=PathSearch())
    plan = fc.search(
        table, fc.Budget(bops="20%"), method=PathSearch(), activations=False
    )
    assert plan.bops <= int(table.macs.sum()) * 1024 // 5


def test_the_front_uses_activation_bits():
    plans = fc.pareto(make_table(), kind="bops", method=EXACT)
    used = {level.activation_bits for p in plans for level in p.levels.values()}
    assert used == {None, 8, 4}
    costs = [plan.bops for plan in plans]
    assert costs == sorted(costs)


def test_saving_and_loading(tmp_path):
    table = make_table()
    table.save(tmp_path / "s.safetensors")
    loaded = fc.Sensitivity.load(tmp_path / "s.safetensors")
    assert loaded.activation_bits == INPUTS
    np.testing.assert_array_equal(
        loaded.activation_distortion, table.activation_distortion
    )
    np.testing.assert_array_equal(loaded.activation_trace, table.activation_trace)


def test_files_of_the_first_version_load(tmp_path):
    from fitcompress.sensitivity import table as module

    table = make_table(inputs=(None,), activation_trace=np.zeros(0))
    path = tmp_path / "s.safetensors"
    table.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        meta = module.json.loads(file.metadata()["fitcompress.sensitivity"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del meta["activation_bits"], meta["crc32"]
    arrays = {k: v for k, v in arrays.items() if not k.startswith("activation")}
    meta["version"] = 1
    meta["crc32"] = module._checksum(meta, arrays)
    text = {"fitcompress.sensitivity": module.json.dumps(meta)}
    path.write_bytes(safetensors.numpy.save(arrays, text))
    loaded = fc.Sensitivity.load(path)
    assert loaded.activation_bits == (None,)
    assert loaded.activation_distortion.shape == (3, 1)
    assert not loaded.activation_trace.any()


@pytest.mark.parametrize(
    "change",
    [
        {"activation_bits": (8, 4, 2)},
        {"activation_bits": (None, 8, 1)},
        {"activation_bits": (None, 8)},
        {"activation_distortion": np.full((3, 3), np.nan)},
        {"activation_trace": np.zeros(2)},
    ],
)
def test_bad_tables(change):
    with pytest.raises(FormatError):
        make_table(**change)


@pytest.mark.parametrize("bits", [1, 17, 8.0, True])
def test_bad_levels(bits):
    with pytest.raises(ValueError, match="activation_bits"):
        fc.Level(fc.Grid(bits=4), 0.0, (2, 2), activation_bits=bits)
