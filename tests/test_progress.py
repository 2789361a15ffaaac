"""Progress goes to the standard error stream, and only where it is wanted."""

import io
import sys

import pytest

from fitcompress import progress
from fitcompress.progress import Bar, track


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch) -> Terminal:
    """Make the standard error stream a terminal; in the test, or pytest undoes it."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_without_a_terminal_a_line_comes_every_ten_seconds(clock, capsys) -> None:
    with Bar("count", 100) as bar:
        for _ in range(30):  # 30 steps of one second
            clock.now += 1
            bar.advance(note="loss 1.5")
    out, err = capsys.readouterr()
    assert out == ""
    # Ten steps took ten seconds, so the other 90 take 90.
    assert err.splitlines() == [
        "count: 10/100, 90 s left, loss 1.5",
        "count: 20/100, 80 s left, loss 1.5",
        "count: 30/100, 70 s left, loss 1.5",
    ]


def test_an_unknown_total_has_no_time_left(clock, capsys) -> None:
    with Bar("count", None) as bar:
        clock.now += 11
        bar.advance(3)
    assert capsys.readouterr() == ("", "count: 3\n")


def test_short_work_shows_nothing(clock, capsys, monkeypatch) -> None:
    terminal = make_terminal(monkeypatch)
    for item in track(range(9), "count"):
        clock.now += 0.1 * (item > 0)
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_a_disabled_bar_counts_and_shows_nothing(clock, capsys, monkeypatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Bar("count", 5, enabled=False) as bar:
        for _ in range(5):
            clock.now += 60
            bar.advance()
    assert bar.done == 5
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_a_bar_leaves_the_standard_output_alone(clock, capsys, monkeypatch) -> None:
    terminal = make_terminal(monkeypatch)
    stdout = sys.stdout
    with Bar("a [bar]", 4) as bar:
        clock.now += 2
        bar.advance(note="loss [0.5]")
        assert sys.stdout is stdout
        print("for a pipe")
        clock.now += 2
        bar.advance()
    assert capsys.readouterr().out == "for a pipe\n"
    assert sys.stderr is terminal
    assert "a [bar]" in terminal.getvalue()
    assert "loss [0.5]" in terminal.getvalue()


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_an_interruption_shows_the_cursor_again(clock, monkeypatch) -> None:
    terminal = make_terminal(monkeypatch)

    def work() -> None:
        for _ in track(range(9), "count"):
            clock.now += 2
            if clock.now > 106:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    shown = terminal.getvalue()
    assert HIDE in shown
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert sys.stderr is terminal


def test_tracking_yields_everything_and_knows_the_length(clock, capsys) -> None:
    found = []
    for item in track([3, 1, 2], "count"):
        found.append(item)
        clock.now += 6
    assert found == [3, 1, 2]
    assert capsys.readouterr().err == "count: 2/3, 6 s left\n"
    assert list(track(iter([3, 1]), "count", enabled=False)) == [3, 1]
