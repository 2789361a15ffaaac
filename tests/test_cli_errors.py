"""The command line: exit codes, and errors of one line."""

from pathlib import Path

import pytest
import torch

from command_line import DIGITS, MODEL
from fitcompress.zoo import DigitsNet

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
