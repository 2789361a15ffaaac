"""The benchmark harness: order of the turns, statistics, bars, result files."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fitcompress.errors import OutputError

# Scripts import the harness as their own folder's: what running one of them does.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import end_to_end
import harness
from harness.memory import peak_rise


class Clock:
    """A clock that only candidates move: cpu 1 s and wall 2 s per unit of work."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.now, 2 * self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_turns_are_interleaved_and_every_candidate_comes_first_once(clock) -> None:
    ran: list[str] = []

    def work(name: str, seconds: float):
        def run() -> None:
            ran.append(name)
            clock.now += seconds

        return run

    found = harness.compare(
        {"a": work("a", 1.0), "b": work("b", 3.0), "c": work("c", 2.0)},
        repeats=3,
        clock=clock,
    )
    # Once for the memory, once for the number of calls, then the turns.
    assert ran[:6] == ["a", "b", "c", "a", "b", "c"]
    assert ran[6:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found.timings["b"].cpu_seconds == (3.0, 3.0, 3.0)
    assert found.timings["b"].wall.median == 6.0
    assert found.ratio("b", "c").median == 1.5


def test_short_calls_are_repeated_and_reported_per_call(clock) -> None:
    def run() -> None:
        clock.now += 0.001

    timing = harness.compare({"a": run}, 2, shortest=0.02, clock=clock).timings["a"]
    assert timing.calls == 10  # of 2 ms wall each
    assert timing.cpu_seconds == pytest.approx((0.001, 0.001))


def test_what_is_not_installed_is_skipped_by_name(clock) -> None:
    def make():
        import no_such_package_anywhere

        return no_such_package_anywhere.run

    found = harness.compare(
        {"ours": lambda: None, "peer": harness.peer(make)}, 1, shortest=0, clock=clock
    )
    assert list(found.timings) == ["ours"]
    assert "no_such_package_anywhere" in found.skipped["peer"]


def test_a_candidate_that_fails_is_an_error() -> None:
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harness.compare({"a": run}, 1)


def test_no_repeats_are_an_error() -> None:
    with pytest.raises(ValueError, match="got 0"):
        harness.compare({"a": lambda: None}, 0)


def test_spread_is_the_order_statistics() -> None:
    assert harness.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == harness.Spread(
        median=3.0, minimum=1.0, q1=2.0, q3=4.0, maximum=5.0
    )
    assert harness.Spread.of([2]).q3 == 2.0


def test_memory_of_a_candidate_is_what_it_touches() -> None:
    size = 64 << 20
    rise = peak_rise(lambda: bytearray(b"x") * size)
    assert rise is None or 0.9 * size < rise < 3 * size


@pytest.mark.parametrize(
    ("value", "limit", "direction", "holds"),
    [
        (1.0, 1.0, "at most", True),
        (1.1, 1.0, "at most", False),
        (1.0, 1.0, "at least", True),
        (0.9, 1.0, "at least", False),
        (float("nan"), 1.0, "at most", False),
        (float("nan"), 1.0, "at least", False),
    ],
)
def test_a_bar_holds_on_its_good_side(value, limit, direction, holds) -> None:
    assert harness.Bar("x", value, limit, direction).holds is holds


def test_the_file_has_everything_after_every_step(tmp_path) -> None:
    path = tmp_path / "result.json"
    result = harness.Result(path)
    result.row(method="ours", seconds=1.5)
    result.bar("seconds", 1.5, 1.0)
    result.skip("peer", "not installed")
    found = json.loads(path.read_text())
    assert found["rows"] == [{"method": "ours", "seconds": 1.5}]
    assert found["bars"] == [
        {
            "name": "seconds",
            "value": 1.5,
            "limit": 1.0,
            "direction": "at most",
            "holds": False,
        }
    ]
    assert found["skipped"] == {"peer": "not installed"}
    assert found["machine"]["torch"] == torch.__version__
    assert found["finished"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_the_file_is_json_even_without_a_number(tmp_path) -> None:
    path = tmp_path / "result.json"
    harness.Result(path).row(seconds=float("nan"))
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["rows"] == [{"seconds": None}]


def test_losing_cells_and_failing_bars_are_printed(tmp_path, capsys) -> None:
    result = harness.Result(tmp_path / "result.json")
    result.row(method="ours", seconds=2.0, note=None)
    result.row(method="peer", seconds=1.0, exact=True)
    result.bar("ours over peer", 2.0, 1.0)
    result.bar("answers", 5, 5, "at least")
    result.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "seconds", "note", "exact"]
    assert lines[1].split() == ["ours", "2", "–", "–"]
    assert lines[2].split() == ["peer", "1", "–", "yes"]
    assert lines[3] == "FAILS  ours over peer: 2, at most 1"
    assert lines[4] == "holds  answers: 5, at least 5"
    assert lines[5] == "1 of 2 bars fail"
    assert json.loads((tmp_path / "result.json").read_text())["finished"] is True


def test_the_command_tells_what_ran_but_not_where() -> None:
    arguments = ["/somewhere/bench.py", "--data", "/a/b", "--json=/c/d.json", "--quick"]
    wanted = "python bench.py --data b --json=d.json --quick"
    assert harness.command_line(arguments) == wanted


def test_options(tmp_path) -> None:
    made = harness.parser("One line.\n\nMore.", threads=2)
    assert made.description == "One line."
    arguments = made.parse_args(["--quick", "--json", str(tmp_path / "r.json")])
    assert arguments.quick
    assert arguments.threads == 2
    before = torch.get_num_threads()
    try:
        assert harness.start(arguments).path == tmp_path / "r.json"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(SystemExit):
        made.parse_args(["--threads", "0"])


def test_a_file_that_cannot_be_written_is_told_first(tmp_path) -> None:
    arguments = harness.parser("x").parse_args(["--json", str(tmp_path / "no" / "r")])
    with pytest.raises(OutputError):
        harness.start(arguments)


def test_end_to_end_judges_the_file_that_it_loaded() -> None:
    pytest.importorskip("sklearn")
    from fitcompress.data import load_dataset
    from fitcompress.zoo import DigitsNet

    torch.manual_seed(0)
    result = harness.Result()
    network = end_to_end.Network(
        name="net",
        model=DigitsNet().eval(),
        build="digits",
        data=load_dataset("digits"),
        result=result,
        samples=32,
        seed=0,
    )
    network.untrained(network.measure(), 10.0, 100.0)
    assert [row["method"] for row in result.rows] == [
        "dense",
        "measure, once",
        "compensated",
        "rounded, no data",
    ]
    small = result.rows[2]
    assert small["bytes"] <= result.rows[0]["bytes"] / 10
    assert small["kl"] < result.rows[3]["kl"]
    assert small["exact"] is True
    # Points lost, bytes and bit-exactness; of the rounded file the last two.
    assert [bar.limit for bar in result.bars] == [100.0, 25415, 1, 25415, 1]
    assert all(bar.holds for bar in result.bars)


def test_end_to_end_notices_other_bits() -> None:
    torch.manual_seed(0)
    saved = torch.nn.Sequential(torch.nn.Linear(3, 2))
    loaded = torch.nn.Sequential(torch.nn.Linear(3, 2))
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(4, 3)
    assert end_to_end.same_bits(saved, loaded, x)
    with torch.no_grad():
        loaded[0].bias[0] = torch.nextafter(loaded[0].bias[0], torch.tensor(9.0))
    assert not end_to_end.same_bits(saved, loaded, x)
