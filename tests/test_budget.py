"""What a budget may look like, and what it means."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fitcompress as fc
from fitcompress.search import BudgetError


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (1234, 1234),
        (1234.9, 1234),
        ("1234", 1234),
        ("1_234 B", 1234),
        ("40KB", 40_000),
        ("40 kib", 40_960),
        ("1.5MB", 1_500_000),
        ("1.5MiB", 3 * 2**19),
        (".5GB", 500_000_000),
        ("1GiB", 2**30),
        ("2e3", 2000),
        ("5%", 50_000),
        (" 0.1 % ", 1000),
        ("150%", 1_500_000),
        ("2bpw", 62_500),  # of 250 000 weights
        ("2.1 bpw", 65_625),
    ],
)
def test_sizes_of_a_model_of_a_million_bytes(size, wanted) -> None:
    budget = fc.Budget(size=size)
    assert budget.size_bytes(10**6) == wanted
    assert budget.costs == ("size",)


def test_bit_operations() -> None:
    assert fc.Budget(bops="2%").bops_limit(10**9) == 2 * 10**7
    assert fc.Budget(bops=5e8).bops_limit(10**9) == 5 * 10**8
    assert fc.Budget(bops=1).costs == ("bops",)


NO_BUDGET = [
    "",
    "%",
    "five",
    "5%%",
    "5 % %",
    "-5%",
    "1,5%",
    "0x10",
    "5 TB",
    "inf",
    "nan",
]
NO_BUDGET += ["nan", "1e400", "1e308GB", "1e308%", "1e308bpw", "0%", "٥"]


@pytest.mark.parametrize("size", [*NO_BUDGET, 0, -1, math.inf, math.nan, True, [5]])
def test_what_is_no_budget(size) -> None:
    with pytest.raises(BudgetError, match=r"got .*wanted a positive number"):
        fc.Budget(size=size)


@pytest.mark.parametrize("bops", ["5KB", "2bpw", 0, "1e308%"])
def test_what_is_no_budget_of_bit_operations(bops) -> None:
    with pytest.raises(BudgetError, match="cannot be understood"):
        fc.Budget(bops=bops)


def test_a_budget_bounds_at_least_one_cost() -> None:
    with pytest.raises(BudgetError, match=r"got none.*wanted size.*To fix it"):
        fc.Budget()
    both = fc.Budget(size="5%", bops="5%", latency_ms=2)
    assert both.costs == ("size", "bops", "latency")
    assert both.size_bytes(1000) == 50
    assert both.bops_limit(1000) == 50
    assert both.latency_ns() == 2_000_000
    with pytest.raises(BudgetError, match="does not bound the size"):
        fc.Budget(bops=1).size_bytes(10)
    with pytest.raises(BudgetError, match="does not bound the bit operations"):
        fc.Budget(size=1).bops_limit(10)
    with pytest.raises(BudgetError, match="does not bound the latency"):
        fc.Budget(size=1).latency_ns()


@pytest.mark.parametrize("latency", [0, -1, math.inf, math.nan, "4ms"])
def test_what_is_no_latency(latency) -> None:
    with pytest.raises(BudgetError, match=r"got .*wanted a positive number of milli"):
        fc.Budget(latency_ms=latency)


def test_a_layer_is_in_one_group() -> None:
    for groups in ((("a", "b"), ("b", "c")), (("a", "a"),), ("ab",)):
        with pytest.raises(BudgetError, match="in one group only"):
            fc.Budget(size=1, groups=groups)
    assert fc.Budget(size=1, groups=[["a", "b"]]).groups == (("a", "b"),)


def test_budgets_describe_themselves() -> None:
    assert str(fc.Budget(size="5%")) == "size ≤ 5%"
    assert str(fc.Budget(bops=7)) == "bops ≤ 7"
    both = fc.Budget(size="5%", latency_ms=4)
    assert str(both) == "size ≤ 5% and latency ≤ 4 ms"


@given(st.integers(1, 2**38), st.sampled_from(["", "B", "KB", "MiB"]))
def test_whole_numbers_are_exact(number, unit) -> None:
    factor = {"": 1, "B": 1, "KB": 1000, "MiB": 2**20}[unit]
    assert fc.Budget(size=f"{number}{unit}").size_bytes(1) == number * factor


@given(st.integers(1, 100), st.integers(0, 10**12))
def test_shares_of_any_size_are_rounded_down(percent, dense) -> None:
    limit = fc.Budget(size=f"{percent}%").size_bytes(dense)
    assert limit == dense * percent // 100


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_typed_error(text) -> None:
    try:
        budget = fc.Budget(size=text)
    except BudgetError:
        return
    assert isinstance(budget.size_bytes(10**6), int)
    assert budget.size_bytes(10**6) >= 0
