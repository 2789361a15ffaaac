"""The command line: the whole flow on the digits, exit codes, one-line errors."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn

import fitcompress as fc
from fitcompress.cli import main
from fitcompress.cli.plans import MethodName
from fitcompress.compensate.compressor import Compressor
from fitcompress.data import load_dataset
from fitcompress.storage.save_load import read
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["fitcompress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        streams = capsys.readouterr()
        return Result(caught.value.code or 0, streams.out, streams.err)

    return call


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of the digits network after three epochs."""
    torch.manual_seed(0)
    net = DigitsNet()
    train(net, load_dataset("digits").training(), epochs=3, progress=False)
    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    torch.save(net.state_dict(), path)
    return path


def tiny() -> nn.Module:
    """What the tests name as `tiny_digits:build`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture
def tiny_files(tmp_path) -> Path:
    """A folder with a factory, its weights, a sensitivity, a plan and a packed file."""
    source = "import torch\nfrom torch import nn\n\n\ndef build():\n"
    source += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n\n\n"
    source += "def nothing():\n    return None\n"
    (tmp_path / "tiny_digits.py").write_text(source)
    model = tiny()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    loader = load_dataset("digits").calibration()
    table = fc.measure(model, loader, samples=64, progress=False)
    table.save(tmp_path / "s")
    plan = fc.search(table, fc.Budget(size=900))
    plan.save(tmp_path / "plan.json")
    fc.save(fc.apply(model, plan, loader, samples=64, progress=False), tmp_path / "p")
    return tmp_path


MODEL = ("--model", "tiny_digits:build", "--weights", "w.safetensors")
DIGITS = ("--dataset", "digits")


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
ERRORS = {
    "no such sensitivity": (("search", "nothing", "--size", "5%"), "nothing"),
    "no budget": (("search", "s"), "BudgetError"),
    "bits for steps": (
        ("search", "s", "--size", "90%", "--bops", "90%", "--grids", "step"),
        "OptionError",
    ),
    "nonsense": (("search", "s", "--size", "five"), "got 'five'"),
    "impossible": (("search", "s", "--size", "10"), "BudgetInfeasibleError"),
    "mixed path": (
        ("search", "s", "--size", "900", "--method", "path", "--grids", "any"),
        "OptionError",
    ),
    "not a table": (("search", "plan.json", "--size", "9%"), "FormatError"),
    "a folder": (("search", ".", "--size", "9%"), "FormatError"),
    "not a plan": (("apply", "s", *MODEL, *DIGITS), "FormatError"),
    "no such plan": (("apply", "nothing", *MODEL, *DIGITS), "nothing"),
    "folder for a plan": (("apply", ".", *MODEL, *DIGITS), "directory"),
    "another model": (
        ("pack", "plan.json", "--model", "digits", "--weights", "digits.pt"),
        "PlanMismatchError",
    ),
    "unknown model": (
        ("pack", "plan.json", "--model", "vgg", "--weights", "w.safetensors"),
        "got vgg",
    ),
    "unknown module": (
        ("pack", "plan.json", "--model", "no.such:f", "--weights", "w.safetensors"),
        "DataError",
    ),
    "unknown factory": (
        ("pack", "plan.json", "--model", "tiny_digits:f", "--weights", "w.safetensors"),
        "DataError",
    ),
    "factory of nothing": (
        ("pack", "plan.json", "--model", "tiny_digits:nothing", "--weights", "w"),
        "returned no module",
    ),
    "no such weights": (("pack", "plan.json", *W, "nothing.pt"), "nothing.pt"),
    "weights are text": (("pack", "plan.json", *W, "plan.json"), "FormatError"),
    "weights are code": (("pack", "plan.json", *W, "evil.pt"), "FormatError"),
    "weights do not fit": (("pack", "plan.json", *W, "digits.pt"), "Mismatch"),
    "unknown data": (("apply", "plan.json", *MODEL, "--dataset", "mnist"), "mnist"),
    "no data folder": (
        ("apply", "plan.json", *MODEL, "--dataset", "cifar10", "--data", "no"),
        "is missing",
    ),
    "no samples": (("measure", *MODEL, *DIGITS, "--samples", "0"), "at least one"),
    "nothing to evaluate": (
        ("evaluate", "--model", "digits", *DIGITS),
        "nothing to evaluate",
    ),
    "wrong drift": (("apply", "plan.json", *MODEL, *DIGITS, "--drift", "2"), "drift"),
    "wrong beam": (
        ("compress", *MODEL, *DIGITS, "--size", "900", "--beam", "0"),
        "OptionError",
    ),
    "no place for the result": (
        ("compress", *MODEL, *DIGITS, "--size", "900", "--out", "no/x"),
        "OutputError",
    ),
    "not packed": (("unpack", "w.safetensors"), "FormatError"),
    "damaged": (("unpack", "damaged"), "FormatError"),
    "another architecture": (
        ("evaluate", "--model", "digits", *DIGITS, "--packed", "p"),
        "PlanMismatchError",
    ),
    "no place for a plan": (
        ("search", "s", "--size", "900", "--out", "no/plan.json"),
        "OutputError",
    ),
    "no place for JSON": (("unpack", "p", "--json", "no/x"), "OutputError"),
    "no place for a page": (
        ("report", "p", *MODEL, *DIGITS, "--html", "no/x"),
        "OutputError",
    ),
}


class Evil:
    """Would write a file if it were unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_write_nothing(run, tiny_files, case) -> None:
    arguments, message = case
    torch.save({"weight": Evil()}, "evil.pt")
    torch.save(DigitsNet().state_dict(), "digits.pt")
    Path("damaged").write_bytes(Path("p").read_bytes()[:-1])
    before = {p.name: p.stat().st_mtime_ns for p in tiny_files.iterdir()}
    result = run(*arguments)
    assert result.code == 1
    lines = [x for x in result.err.splitlines() if not x.startswith("measure")]
    assert len(lines) == 1, result.err
    assert message in lines[0]
    assert "Traceback" not in result.out + result.err
    after = {p.name: p.stat().st_mtime_ns for p in tiny_files.iterdir()}
    after.pop("__pycache__", None)
    assert after == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("search",),
        ("search", "s", "--method", "magic"),
        ("search", "s", "--sizes", "5%"),
        ("measure", "--dataset", "digits"),
        ("measure", *MODEL, *DIGITS, "--samples", "many"),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_code_2(run, arguments) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.err


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
