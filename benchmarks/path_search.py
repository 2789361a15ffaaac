"""Path search: expansions per second of each mode, on tables like those of networks.

    python benchmarks/path_search.py [--layers 22 60 200] [--modes beam best_first]
        [--grids N] [--sparsities N] [--expansions N] [--repeats N]

Tables are random and smooth: squared step lengths grow fourfold per bit that goes,
layers differ in size and Fisher information by factors of up to a hundred, every cell
by a tenth. The budget is 30 % of the cost at the start. ``expansions`` per second are
those of a whole call: checking and arranging the tables and undoing steps included.
Times are CPU time, median of the repeats, modes in turns.

An expansion takes a node and makes its L + 1 children comparable. At least it reads
a cell a layer (48 bytes in use of 64), adds four sums and takes a square root, two
multiplications and a comparison a child: about 25 operations a layer, or a tenth of
a microsecond for 22 layers at one operation a cycle. ``best_first`` waits for memory
besides: the node's f (8 bytes a layer) are written and read again when a sibling comes
up, and the table of known levels is read at random two to four times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fitcompress import _core
from harness import compare, parser, start

LAYERS, MODES = (22, 60, 200), ("greedy", "beam", "best_first")
MILLION, JUDGED = 1e6, 22


def tables(layers: int, grids: int, sparsities: int, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of a search that stand for a network."""
    rng = np.random.default_rng(seed)
    cells = layers, grids, sparsities
    weights = np.exp(rng.uniform(np.log(400), np.log(40_000), layers)).astype(np.int64)
    fisher = (weights * np.exp(rng.normal(size=layers)) * 1e-4).reshape(-1, 1, 1)
    bits = np.linspace(8, 2, grids)
    shares = np.linspace(0, 0.9, sparsities)
    step = np.exp2(-bits).reshape(1, -1, 1)
    lost = 0.3 * shares**3
    noise = np.exp(0.1 * rng.normal(size=(2, *cells)))
    coarser = np.diff(step, axis=1, append=step[:, -1:]) ** 2
    sparser = np.diff(lost, append=lost[-1:])
    cost = weights.reshape(-1, 1, 1) * bits.reshape(1, -1, 1) * (1 - 0.8 * shares)
    return {
        "grid_length": fisher * coarser * (1 - shares) * noise[0],
        "prune_length": 0.1 * fisher * sparser * noise[1],
        "norm": fisher * (1 - lost) * (1 + 0.01 * step),
        "distortion": fisher * (0.5 * step**2 + 0.05 * lost),
        "cost": cost.astype(np.int64),
        "reference_cost": 32 * int(weights.sum()),
        "start_length": 0.1,
        "budget": int(0.3 * int(cost[:, 0, 0].sum())),
        "lam": 1.0,
        "beam_width": 64,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    arguments.add_argument("--grids", type=int, default=12)
    arguments.add_argument("--sparsities", type=int, default=10)
    arguments.add_argument("--expansions", type=int, default=200_000)
    arguments.add_argument("--repeats", type=int, default=7)
    given = arguments.parse_args()
    result = start(given)
    turns = 2 if given.quick else given.repeats
    for layers in given.layers:
        t = tables(layers, given.grids, given.sparsities)

        def search(mode: str, t: dict[str, Any] = t) -> Any:
            return _core.path_search(**t, mode=mode, max_expansions=given.expansions)

        calls = {mode: lambda mode=mode: search(mode) for mode in given.modes}
        answers = {mode: search(mode) for mode in given.modes}
        found = compare(calls, turns)
        for mode, timing in found.timings.items():
            answer = answers[mode]
            rate = answer["expansions"] / timing.cpu.median
            result.row(
                layers=layers,
                mode=mode,
                status=answer["status"],
                expansions=answer["expansions"],
                per_second=rate,
                **timing.cells(),
            )
            if layers == JUDGED and not given.quick:
                result.bar(
                    f"{mode}, {layers} layers: expansions a second",
                    rate,
                    MILLION,
                    "at least",
                )
    result.finish()


if __name__ == "__main__":
    main()
