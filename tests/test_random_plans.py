"""Random plans: levels are spread evenly, steps stay around one."""

import numpy as np
import pytest

import fitcompress as fc
from branched_nets import GRIDS, branched_batches, branched_net, branched_table
from fitcompress.refinement.random_plans import draw_inputs, draw_plans, families
from test_search import random_table


@pytest.fixture
def net():
    return branched_net()


@pytest.fixture
def loader():
    return branched_batches()


@pytest.fixture(scope="module")
def table():
    return branched_table()


def test_plans_are_spread_evenly() -> None:
    table = random_table(5, 6, 4, 0)
    for family in families(table):
        grids, masks = draw_plans(table, family, 24, 0)
        again = draw_plans(table, family, 24, 0)
        assert np.array_equal(grids, again[0])
        assert np.array_equal(masks, again[1])
        assert not np.array_equal(grids, draw_plans(table, family, 24, 1)[0])
        assert {table.grids[g].family for g in grids.flat} == {family}
        assert len({tuple(row) for row in grids}) > 20
        if family == "bits":
            for column in grids.T:
                counts = np.bincount(column)[np.unique(grids)]
                assert counts.max() - counts.min() <= 1
            assert not masks[::2].any()
            assert masks[1::2].any()


def test_steps_stay_around_one_of_the_network(net, loader) -> None:
    table = fc.measure(net, loader, samples=32, progress=False)
    grids, masks = draw_plans(table, "step", 16, 0)
    assert not masks.any()
    logs = np.log2([[table.grids[g].step for g in row] for row in grids])
    assert (np.ptp(logs, axis=1) <= 1.0 + 0.25).all()
    assert (np.ptp(logs, axis=1) > 0.2).any()
    assert np.ptp(logs.mean(1)) > 1


def test_inputs_draw_bits_that_tell(net, loader, table) -> None:
    assert draw_inputs(table, "bits", 16, 0) is None
    for given, wanted in (((12, 8, 4, 2), {2, 3}), ((2,), {1}), ((12, 8), {2})):
        with_inputs = fc.measure(
            net,
            loader,
            samples=32,
            grids=GRIDS,
            activation_bits=given,
            progress=False,
        )
        assert draw_inputs(with_inputs, "step", 16, 0) is None
        drawn = draw_inputs(with_inputs, "bits", 16, 0)
        assert drawn.shape == (16, 3)
        assert set(drawn.flat) == wanted
        for column in drawn.T:
            counts = np.bincount(column)[sorted(wanted)]
            assert np.ptp(counts) <= 1
