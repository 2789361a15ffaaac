"""The demo: its numbers agree, and what is left of a run is used."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import fitcompress as fc
from fitcompress import demo
from fitcompress.cli.demo import demo as command
from fitcompress.errors import BudgetInfeasibleError, OutputError
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.train import finetuning
from fitcompress.zoo import DigitsNet

SIZE = "8%"


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Train for two epochs and fine-tune for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN_EPOCHS", 2)
        patch.setattr(demo, "TUNING", {**demo.TUNING, "epochs": 1})
        yield


def run(folder: Path, **options) -> tuple[demo.DemoResult, str]:
    lines: list[str] = []
    result = demo.run_demo(folder, **{"size": SIZE, "say": lines.append, **options})
    return result, "\n".join(lines)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, demo.DemoResult, str]:
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, *run(folder)


@pytest.fixture
def folder(first, tmp_path) -> Path:
    """A copy of a finished demo."""
    shutil.copytree(first[0], tmp_path / "copy")
    return tmp_path / "copy"


FILES = {*demo.STAGES, "demo.json", "report.html"}


def test_its_numbers_agree_with_its_files(first) -> None:
    folder, result, said = first
    values = result.values
    assert {path.name for path in folder.iterdir()} == FILES
    assert values["bytes_before"] == 4 * sum(
        p.numel() for p in DigitsNet().parameters()
    )
    limit = int(0.08 * values["bytes_before"])
    for name, key in (("small", "without_training"), ("tuned", "after")):
        packed = folder / f"{name}.safetensors"
        assert values[f"bytes_{key}"] == packed.stat().st_size <= limit
        net = fc.load(packed, DigitsNet())
        test = demo.load_dataset("digits").testing()
        score = fc.evaluate(net, test, progress=False)
        assert values[f"accuracy_{key}"] == score.accuracy
    assert values["bit_exact"]
    assert values["resumed"] == []
    assert values["accuracy_before"] > 80
    assert values["accuracy_after"] > values["accuracy_before"] - 5
    assert math.isfinite(values["predicted_loss_rise"])
    assert values["measured_loss_rise"] > 0
    assert values["divergence_after"] <= values["divergence_without_training"]
    assert values["fine_tuning_kept"] == (
        (folder / "small.safetensors").read_bytes()
        != (folder / "tuned.safetensors").read_bytes()
    )
    json.dumps(values)
    assert "path (beam)" in said
    assert "every weight and output is bit-identical: yes" in str(result.report)
    assert "measured (KL)" in str(result.report)
    assert result.page.read_text().count("<svg") == 2


def test_a_finished_demo_is_only_read(first, folder) -> None:
    before = contents(folder)
    result, said = run(folder)
    del before["report.html"]  # says how the file was checked
    assert contents(folder).items() >= before.items()
    assert result.values["resumed"] == list(demo.STAGES)
    assert "resumed from trained.safetensors" in said
    assert "packed again, it gives the same bytes: yes" in str(result.report)
    changing = ("resumed", "seconds")
    same = {k: v for k, v in first[1].values.items() if k not in changing}
    assert same == {k: v for k, v in result.values.items() if k not in changing}


def test_a_missing_last_stage_is_made_again(folder) -> None:
    before = contents(folder)
    (folder / "tuned.safetensors").unlink()
    result, _ = run(folder)
    assert contents(folder) == before
    assert result.values["resumed"] == list(demo.STAGES[:-1])
    assert result.values["bit_exact"]


@pytest.mark.parametrize("damage", [b"{}", None])
def test_a_stage_that_is_made_again_voids_later_ones(folder, damage) -> None:
    before = contents(folder)
    plan = folder / "plan.json"
    if damage is None:
        plan.unlink()
    else:
        plan.write_bytes(damage)
    result, said = run(folder)
    assert contents(folder) == before
    assert result.values["resumed"] == list(demo.STAGES[:2])
    assert ("made again" in said) == (damage is not None)


def killed_while_measuring(patch: pytest.MonkeyPatch) -> None:
    real, calls = FisherEstimator.update, []

    def update(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    patch.setattr(FisherEstimator, "update", update)
    patch.setattr("fitcompress.sensitivity.estimate.SAVE_EVERY", -1.0)


def killed_before_saving(patch: pytest.MonkeyPatch) -> None:
    def save(*_):
        raise KeyboardInterrupt

    patch.setattr(demo, "save", save)


def killed_while_tuning(patch: pytest.MonkeyPatch) -> None:
    real = finetuning._Trainer._step

    def step(self, number, batch):
        if number == 10:
            raise KeyboardInterrupt
        return real(self, number, batch)

    patch.setattr(finetuning._Trainer, "_step", step)
    patch.setattr(finetuning, "SAVE_EVERY", -1.0)


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (killed_while_measuring, "sensitivity.safetensors.partial"),
        (killed_before_saving, "small.safetensors.partial"),
        (killed_while_tuning, "tuned.safetensors.partial"),
    ],
)
def test_a_killed_demo_goes_on_to_the_same_files(folder, kill, left) -> None:
    before = contents(folder)
    stage = demo.STAGES.index(left.removesuffix(".partial"))
    for name in demo.STAGES[stage:]:
        (folder / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert not any((folder / name).exists() for name in demo.STAGES[stage:])
    if kill is not killed_before_saving:
        assert (folder / left).exists()
    result, _ = run(folder)
    assert contents(folder) == before
    assert result.values["resumed"] == list(demo.STAGES[:stage])


def test_other_settings_start_over(folder) -> None:
    before = contents(folder)
    result, _ = run(folder, size="9%")
    assert result.values["resumed"] == []
    assert contents(folder)["trained.safetensors"] == before["trained.safetensors"]
    assert contents(folder)["tuned.safetensors"] != before["tuned.safetensors"]
    limit = int(0.09 * result.values["bytes_before"])
    assert 0.95 * limit < result.values["bytes_after"] <= limit


def test_files_of_somebody_else_are_left_alone(tmp_path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(OutputError, match=r"plan\.json.*another --out"):
        run(tmp_path)
    assert contents(tmp_path) == {"plan.json": b"mine"}


def test_bad_input_is_told(tmp_path, folder) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot create"):
        run(file / "folder")
    with pytest.raises(ValueError, match="got 'five'"):
        run(tmp_path / "new", size="five")
    assert not (tmp_path / "new").exists()
    with pytest.raises(BudgetInfeasibleError):
        run(folder, size="0.1%")


def test_a_file_of_other_weights_is_noticed(folder) -> None:
    small = fc.load(folder / "tuned.safetensors", DigitsNet(), trainable=True)
    x = torch.zeros(1, 1, 8, 8)
    assert demo._loads_exactly(folder / "tuned.safetensors", small, x)
    # The outputs for zeros stay: only the weights tell.
    original = small.features[0].parametrizations.weight.original
    with torch.no_grad():
        original.neg_()
    assert not demo._loads_exactly(folder / "tuned.safetensors", small, x)


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "TRAIN_EPOCHS", 24)
    monkeypatch.setattr(demo, "TUNING", {**demo.TUNING, "epochs": 6})
    command(tmp_path / "out", json=tmp_path / "values.json")
    values = json.loads((tmp_path / "values.json").read_text())
    assert values["accuracy_before"] > 98
    assert values["accuracy_before"] - values["accuracy_after"] <= 1.0
    assert values["bytes_after"] <= 0.05 * values["bytes_before"]
    # The start is so good that rounding decides whether six epochs improve on it.
    assert values["divergence_after"] <= values["divergence_without_training"] < 0.01
    assert values["measured_loss_rise"] < values["predicted_loss_rise"]
    out = capsys.readouterr().out
    assert "before ⇒ after" in out
    assert "measured (KL)" in out
    assert "report.html" in out
