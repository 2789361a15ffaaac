"""Cholesky factors in place, against dense algebra."""

from __future__ import annotations

import pytest
import torch

from fitcompress.compensate import cholesky
from fitcompress.compensate.cholesky import (
    cholesky_,
    inverse_factor,
    invert_triangle_,
    solved,
)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch) -> None:
    monkeypatch.setattr(cholesky, "PANEL", 8)


def positive(count: int) -> torch.Tensor:
    torch.manual_seed(count)
    half = torch.randn(count, 2 * count + 1, dtype=torch.float64)
    square = half @ half.T  # some BLAS round its two triangles differently
    return (square + square.T) / 2 + torch.eye(count, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 37])
def test_factors_solutions_and_inverses(count) -> None:
    matrix = positive(count)
    lower = matrix.clone()
    assert cholesky_(lower)
    torch.testing.assert_close(lower, torch.linalg.cholesky(matrix))
    right = torch.randn(count, 3, dtype=torch.float64)
    found = solved(lower, right)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right))
    inverse = lower.clone()
    invert_triangle_(inverse)
    assert torch.equal(inverse, inverse.tril())
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(inverse @ lower, eye)


@pytest.mark.parametrize("count", [1, 8, 21])
def test_the_factor_of_the_inverse(count) -> None:
    matrix = positive(count)
    lower = matrix.flip(0, 1)
    assert cholesky_(lower)
    upper = inverse_factor(lower)
    wanted = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    torch.testing.assert_close(upper, wanted)


@pytest.mark.parametrize("place", [0, 9, 20])
def test_a_matrix_that_is_not_positive_stays_as_it_was(place) -> None:
    matrix = positive(21)
    matrix[place, place] = -1
    before = matrix.clone()
    assert not cholesky_(matrix)
    assert torch.equal(matrix, before)
