"""The command line: the whole flow on the digits, and what each command takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fitcompress as fc
from command_line import DIGITS, MODEL, done, tiny
from fitcompress.cli.plans import MethodName
from fitcompress.compensate.compressor import Compressor
from fitcompress.data import load_dataset
from fitcompress.storage.save_load import read
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of the digits network after three epochs."""
    torch.manual_seed(0)
    net = DigitsNet()
    train(net, load_dataset("digits").training(), epochs=3, progress=False)
    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    torch.save(net.state_dict(), path)
    return path


def test_the_whole_flow_on_the_digits(run, trained, tmp_path) -> None:
    model = ("--model", "digits", "--weights", trained)
    samples = ("--samples", 96)
    done(run("measure", *model, *DIGITS, *samples, "--json", "m.json"))
    measured = json.loads(Path("m.json").read_text())
    assert measured["samples"] == 96
    assert len(measured["fisher_trace"]) == 5

    result = done(run("search", "sensitivity.safetensors", "--size", "8%"))
    plan = fc.Plan.load("plan.json")
    limit = plan.limit_bytes
    assert limit == int(4 * sum(p.numel() for p in DigitsNet().parameters()) * 0.08)
    assert plan.size_bytes <= limit
    assert plan.summary() in result.out

    front = done(run("pareto", "sensitivity.safetensors", "--json", "-", "--points", 5))
    points = json.loads(front.out[front.out.index("{") :])["front"]
    assert len(points) == 5

    done(run("apply", "plan.json", *model, *DIGITS, *samples, "--json", "a.json"))
    packed = Path("small.safetensors")
    size = packed.stat().st_size
    assert 0.9 * limit < size <= limit
    assert json.loads(Path("a.json").read_text())["bytes_after"] == size

    scores = {}
    for name, options in {
        "dense": ("--weights", trained),
        "small": ("--packed", packed),
    }.items():
        arguments = ("evaluate", "--model", "digits", *DIGITS, *options)
        result = done(run(*arguments, "--json", "e.json"))
        scores[name] = json.loads(Path("e.json").read_text())
        assert f"accuracy {scores[name]['accuracy']:.2f} %" in result.out
    assert scores["small"]["bytes"] == size
    assert scores["dense"]["accuracy"] > 80
    assert scores["small"]["accuracy"] > scores["dense"]["accuracy"] - 5

    done(run("unpack", packed, "--json", "u.json"))
    dense = safetensors.torch.load_file("dense.safetensors")
    net = DigitsNet()
    net.load_state_dict(dense)
    assert json.loads(Path("u.json").read_text())["tensors"] == len(dense)
    done(
        run("evaluate", "--model", "digits", *DIGITS, "--weights", "dense.safetensors")
    )

    page = ("--html", "r.html", "--sensitivity", "sensitivity.safetensors")
    result = done(run("report", packed, *model, *DIGITS, *page, "--json", "r.json"))
    report = json.loads(Path("r.json").read_text())
    assert report["after"]["bytes"] == size
    assert report["after"]["accuracy"] == scores["small"]["accuracy"]
    assert report["before"]["accuracy"] == scores["dense"]["accuracy"]
    assert f"{size:,}" in result.out
    assert "<svg" in Path("r.html").read_text()
    left = {p.name for p in tmp_path.iterdir()}
    assert not any(".partial" in name or name.startswith(".") for name in left)


def test_bits_are_learnt_by_training(run, trained) -> None:
    model = ("--model", "digits", "--weights", trained)
    options = ("--bops", "4%", "--epochs", 1, "--prune", "features.6=8")
    result = done(run("run", "bit-sharing", *model, *DIGITS, *options, "--json", "b"))
    values = json.loads(Path("b").read_text())
    assert values["bops"] <= values["bops_limit"]
    assert values["bytes_after"] == Path("small.safetensors").stat().st_size
    plan = fc.Plan.load("plan.json")
    assert plan.bops == values["bops"]
    assert plan.summary() in result.out
    assert plan.levels["features.0"].activation_bits == 8
    assert not Path("small.safetensors.partial").exists()
    again = ("--out", "again.safetensors", "--samples", 96)
    done(run("apply", "plan.json", *model, *DIGITS, *again))
    for wrong in (
        ("--ladder", "2,3"),
        ("--ladder", "2;4"),
        ("--prune", "features.6"),
        ("--prune", "nothing=4"),
        ("--plan", "small.safetensors"),
    ):
        assert run("run", "bit-sharing", *model, *DIGITS, *options, *wrong).code in (
            1,
            2,
        )


def test_packing_without_data_and_compressing_in_one_go(run, tiny_files) -> None:
    done(run("pack", "plan.json", *MODEL, "--out", "rounded"))
    assert Path("rounded").stat().st_size <= 900
    arguments = ("compress", *MODEL, *DIGITS, "--size", 900, "--samples", 64)
    done(run(*arguments, "--out", "once"))
    assert Path("once").stat().st_size <= 900
    done(run(*arguments, "--out", "twice"))
    assert Path("once").read_bytes() == Path("twice").read_bytes()
    done(run("compress", *MODEL, *DIGITS, "--bops", "5%", "--out", "few"))
    assert "input" in done(run("inspect", "few")).out
    assert "a budget bounds a cost" in run("compress", *MODEL, *DIGITS).err


@pytest.mark.parametrize(
    "command", [("compress", "--size", 900), ("apply", "plan.json")]
)
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), fc.Compensation()),
        (("--drift", 0.5, "--beam", 4), fc.Compensation(drift=0.5, beam=4)),
        (("--no-bias",), fc.Compensation(bias=False)),
        (("--bias", "--drift", 0), fc.Compensation(drift=0.0)),
    ],
)
def test_options_of_compensation(
    run, tiny_files, monkeypatch, command, options, wanted
) -> None:
    seen = []
    real = Compressor.__init__

    def look(self: Compressor, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs["compensation"])
        real(self, *args, **kwargs)

    monkeypatch.setattr(Compressor, "__init__", look)
    done(run(*command, *MODEL, *DIGITS, "--samples", 64, *options, "--out", "o"))
    # `compress` searches again before it lets scales be widened.
    assert {dataclasses.replace(each, widen=True) for each in seen} == {wanted}


def test_every_method_and_grid_family(run, tiny_files) -> None:
    for method in MethodName:
        for bound in (("--size", "900"), ("--bops", "20%")):
            done(run("search", "s", *bound, "--method", method.value, "--json", "j"))
            found = json.loads(Path("j").read_text())
            assert found["size_bytes"] <= 900 or bound[0] == "--bops"
    done(run("search", "s", "--size", 900, "--grids", "bits"))
    levels = fc.Plan.load("plan.json").levels.values()
    assert {level.grid.family for level in levels} == {"bits"}


def test_json_on_the_standard_output_is_json_alone(run, tiny_files) -> None:
    for arguments in (
        ("search", "s", "--size", 900),
        ("pareto", "s"),
        ("unpack", "p"),
        ("versions",),
        ("evaluate", "--model", "tiny_digits:build", *DIGITS, "--packed", "p"),
    ):
        assert isinstance(json.loads(done(run(*arguments, "--json", "-")).out), dict)


def test_versions_and_help(run) -> None:
    assert done(run("--version")).out.strip() == fc.__version__
    assert "torch" in done(run("versions")).out
    assert "measure" in done(run("--help")).out
    for command in ("measure", "search", "apply", "evaluate", "report", "unpack"):
        assert "--json" in done(run(command, "--help")).out


W = ("--model", "tiny_digits:build", "--weights")


def test_checkpoints_may_be_wrapped(run, tiny_files) -> None:
    state = {f"module.{k}": v for k, v in tiny().state_dict().items()}
    torch.save({"state_dict": state}, "wrapped.pt")
    done(run("pack", "plan.json", *W, "wrapped.pt", "--out", "a"))
    done(run("pack", "plan.json", *W, "w.safetensors", "--out", "b"))
    assert read("a").state().keys() == read("b").state().keys()
    assert Path("a").read_bytes() == Path("b").read_bytes()


def test_measure_refines(run, tiny_files) -> None:
    done(run("measure", *MODEL, *DIGITS, "--samples", "64", "--refine"))
    refined = fc.Sensitivity.load("sensitivity.safetensors").provenance["calibrated"]
    assert refined["errors"] == "compensated"
    failed = run("measure", "--shards", ".", "--refine")
    assert failed.code
    assert "leave --refine out" in failed.err


def test_measure_does_not_overwrite_what_it_reads(run) -> None:
    safetensors.torch.save_file({"a.weight": torch.randn(40, 30)}, "one.safetensors")
    before = Path("one.safetensors").read_bytes()
    Path("link").symlink_to("one.safetensors")
    for out in ("one.safetensors", "./one.safetensors", "link"):
        for option in ("--out", "--json"):
            failed = run("measure", "--shards", ".", option, out)
            assert failed.code
            assert "overwrite" in failed.err
    assert Path("one.safetensors").read_bytes() == before
    done(run("measure", "--shards", "."))  # writes into the folder
    first = fc.Sensitivity.load("sensitivity.safetensors")
    done(run("measure", "--shards", "."))
    second = fc.Sensitivity.load("sensitivity.safetensors")
    assert first.dense_bytes == second.dense_bytes


def test_measure_takes_shards_or_a_model(run) -> None:
    safetensors.torch.save_file({"a.weight": torch.randn(40, 30)}, "one.safetensors")
    done(run("measure", "--shards", "one.safetensors", "--out", "s.safetensors"))
    assert fc.Sensitivity.load("s.safetensors").names == ("a",)
    both = run("measure", "--shards", "one.safetensors", "--dataset", "digits")
    assert both.code
    assert "takes the place" in both.err
    for option in ("--samples", "--data", "--seed"):
        unused = run("measure", "--shards", "one.safetensors", option, "7")
        assert unused.code
        assert f"leave {option} out" in unused.err
    for bits in ("8²", "8,999999", "9" * 5000, "-8"):
        model = ("--model", "x", "--weights", "w", "--dataset", "digits")
        failed = run("measure", *model, "--activation-bits", bits)
        assert failed.code
        assert "Traceback" not in failed.err
    neither = run("measure")
    assert neither.code
    assert "--shards" in neither.err
