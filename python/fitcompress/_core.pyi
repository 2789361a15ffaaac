"""Types of the native module ``_core``: entropy coder and searches."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import NotRequired

class PathTrace(TypedDict):
    grids: NDArray[np.int64]
    sparsity: NDArray[np.int64]
    g: NDArray[np.float64]
    f: NDArray[np.float64]
    cost: NDArray[np.int64]

class PathResult(TypedDict):
    grids: NDArray[np.int64]
    sparsity: int
    length: float
    distortion: float
    cost: int
    expansions: int
    status: Literal["reached", "exhausted", "limit", "interrupted"]
    moves: list[tuple[int, int]]
    trace: NotRequired[PathTrace]

class KnapsackResult(TypedDict):
    status: Literal["solved", "stopped", "infeasible"]
    choice: NDArray[np.int64]
    bound: float
    nodes: int
    interrupted: bool
    timed_out: bool

def encode(
    codes: NDArray[np.int32],
    /,
    *,
    coding: Literal["smallest", "adaptive", "static"] = "smallest",
    threads: int = 1,
) -> bytes: ...
def decode(
    data: bytes, rows: int, cols: int, *, largest: int = ..., threads: int = 1
) -> NDArray[np.int32]: ...
def dequantize(
    data: bytes,
    rows: int,
    cols: int,
    scales: NDArray[np.float32],
    *,
    largest: int = ...,
    threads: int = 1,
) -> NDArray[np.float32]: ...
def path_search(
    grid_length: NDArray[np.float64],
    prune_length: NDArray[np.float64],
    norm: NDArray[np.float64],
    distortion: NDArray[np.float64],
    cost: NDArray[np.int64],
    start_length: float,
    budget: int,
    reference_cost: int,
    lam: float,
    mode: Literal["greedy", "beam", "best_first"],
    beam_width: int,
    max_expansions: int,
    max_seconds: float = ...,
    progress: Callable[[int, int], object] | None = None,
    metric: Callable[[NDArray[np.int64], int], tuple[Any, ...]] | None = None,
    exact: bool = False,
    trace: bool = False,
) -> PathResult: ...
def knapsack(
    cost: NDArray[np.int64],
    value: NDArray[np.float64],
    limit: NDArray[np.int64],
    gap: float,
    seconds: float,
    progress: Callable[[float, float], None] | None,
) -> KnapsackResult: ...
def convex_front(
    cost: NDArray[np.int64], value: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
