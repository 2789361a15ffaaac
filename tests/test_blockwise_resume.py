"""Runs over shards that end early go on where they were."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockwise_nets import Stopped, calibration, network, plan_of, run, saved, stop_at
from fitcompress.blockwise import rows
from fitcompress.blockwise import run as runs
from fitcompress.blockwise.work import Work
from fitcompress.errors import FormatError, OptionError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder, its plan, the file, and the number of writes of rows and stages."""
    path = tmp_path_factory.mktemp("finished")
    net = network()
    folder, plan, counts = saved(net, path / "net"), plan_of(net), {}
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((rows.RowWriter, "write"), (Work, "put")):
            stop_at(patch, place, name, 10**9, counts)
        data = run(folder, plan, path / "file")
    return folder, plan, data, counts


def finished_layers(path: Path) -> set[str]:
    """Return the layers of the stages that a stopped run has finished."""
    work = Work(path, json.loads((path / "run.json").read_text())["fitcompress_run"])
    stages = [file.stem for file in path.glob("*.stage")]
    return {name for stage in stages for name in work.layers(stage)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", ["write", "put"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    name, share, finished, tmp_path, monkeypatch
) -> None:
    folder, plan, data, counts = finished
    at = 1 + round(share * (counts[name] - 1))
    place = rows.RowWriter if name == "write" else Work
    with monkeypatch.context() as patch:
        stop_at(patch, place, name, at)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    done = finished_layers(tmp_path / "file.work")
    assert done if share == 1 else at > 1 or not done
    calls = []
    with monkeypatch.context() as patch:
        real = runs.compensated
        patch.setattr(
            runs,
            "compensated",
            lambda *a, **k: calls.append(k["name"]) or real(*a, **k),
        )
        assert run(folder, plan, tmp_path / "file") == data
    # What was finished is not done again, and everything else once.
    assert sorted(calls) == sorted(set(plan.levels) - done - {"model.embed_tokens"})


KILLED = """
import os, signal, sys, torch
import fitcompress as fc
from fitcompress.blockwise import rows
sys.path.insert(0, sys.argv[1])
import blockwise_nets as t
real, calls = rows.RowWriter.write, []
def write(self, first, values):
    calls.append(1)
    if len(calls) == 60:
        real(self, first, values[:1])  # half of it
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, first, values)
rows.RowWriter.write = write
t.run(t.Path(sys.argv[2]), t.plan_of(t.network()), t.Path(sys.argv[3]))
"""


def test_killed_within_a_block_it_goes_on(finished, tmp_path) -> None:
    folder, plan, data, _ = finished
    script = [sys.executable, "-c", KILLED, Path(__file__).parent, folder]
    done = subprocess.run([*script, tmp_path / "file"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list((tmp_path / "file.work").glob("*.partial"))
    assert run(folder, plan, tmp_path / "file") == data


def test_a_folder_of_another_run_is_left_alone(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 4)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    before = sorted((tmp_path / "file.work").iterdir())
    with pytest.raises(OptionError, match="another run"):
        run(folder, plan, tmp_path / "file", tokens=calibration(31))
    assert sorted((tmp_path / "file.work").iterdir()) == before


def test_a_work_folder_that_was_there_is_emptied_and_stays(finished, tmp_path) -> None:
    folder, plan, data, _ = finished
    place, link = tmp_path / "place", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    (place / ".run.json-abc").write_bytes(b"left by a kill")
    assert run(folder, plan, tmp_path / "file", work=link) == data
    assert link.is_dir() and not list(place.iterdir())


def test_files_of_others_in_a_work_folder_are_kept(tmp_path) -> None:
    work = Work(tmp_path / "work", "key")
    (work.path / "notes.txt").write_text("mine")
    Work(tmp_path / "work", "key").forget()
    assert [path.name for path in work.path.iterdir()] == ["notes.txt"]


def test_a_damaged_stage_is_an_error(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 4)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    stage = tmp_path / "file.work" / "block-0000-0.stage"
    stage.write_bytes(stage.read_bytes()[:50])
    with pytest.raises(FormatError, match="block-0000-0"):
        run(folder, plan, tmp_path / "file")


def test_work_of_another_version_is_left_alone(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 1)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    monkeypatch.setattr(runs, "__version__", "0")
    with pytest.raises(OptionError, match="another run"):
        run(folder, plan, tmp_path / "file")
