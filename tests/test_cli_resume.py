"""The command line: interrupted and killed commands go on where they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import DIGITS, MODEL, done
from fitcompress.compensate.compressor import Compressor


def test_an_interruption_says_how_to_go_on(run, tiny_files, monkeypatch) -> None:
    from fitcompress.cli import plans

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "find_plan", interrupted)
    result = run("search", "s", "--size", 900)
    assert result.code == 130
    assert "run the same command" in result.err


def test_a_killed_command_goes_on_where_it_was(run, tiny_files, monkeypatch) -> None:
    from fitcompress.sensitivity import estimate
    from fitcompress.sensitivity.fisher import FisherEstimator

    arguments = ("measure", *MODEL, *DIGITS, "--samples", 300)
    done(run(*arguments, "--out", "whole"))
    monkeypatch.setattr(estimate, "SAVE_EVERY", -1.0)
    real, calls = FisherEstimator.update, []

    def killed(self: FisherEstimator, *args: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FisherEstimator, "update", killed)
    assert run(*arguments, "--out", "resumed").code == 130
    assert Path("resumed.partial").exists()
    assert not Path("resumed").exists()
    done(run(*arguments, "--out", "resumed"))
    assert Path("resumed").read_bytes() == Path("whole").read_bytes()
    assert not Path("resumed.partial").exists()
    assert len(calls) == 4  # one, killed at the second, two more


@pytest.mark.parametrize("survived", [0, 1, 3])
def test_a_killed_compression_goes_on_where_it_was(
    run, tiny_files, monkeypatch, survived
) -> None:
    from fitcompress.sensitivity import estimate
    from fitcompress.sensitivity.fisher import FisherEstimator

    arguments = ("compress", *MODEL, *DIGITS, "--size", 900, "--samples", 520)
    done(run(*arguments, "--out", "whole"))
    monkeypatch.setattr(estimate, "SAVE_EVERY", -1.0)
    calls = []

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == survived + 1:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    # Three batches are measured, then comes the first attempt at the one layer.
    for owner, name in ((FisherEstimator, "update"), (Compressor, "at")):
        monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    files = set(tiny_files.iterdir())
    result = run(*arguments, "--out", "resumed")
    assert result.code == 130
    assert "run the same command" in result.err
    part = {0: set(), 1: {"measure"}, 3: {"sensitivity"}}[survived]
    left = {p.name for p in set(tiny_files.iterdir()) - files}
    assert left - {"__pycache__"} == {f"resumed.partial.{name}" for name in part}
    done(run(*arguments, "--out", "resumed"))
    assert Path("resumed").read_bytes() == Path("whole").read_bytes()
    left = {p.name for p in set(tiny_files.iterdir()) - files}
    assert left - {"__pycache__"} == {"resumed"}
