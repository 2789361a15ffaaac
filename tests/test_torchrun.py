"""The command line under torchrun, and what the environment says of processes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

import fitcompress as fc
from distributed_tables import equal
from fitcompress.cli import main


def test_torchrun_of_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    source = "import torch\nfrom torch import nn\n\n\ndef build():\n"
    source += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "tiny_digits.py").write_text(source)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    command = [
        *("fitcompress", "measure", "--model", "tiny_digits:build", "--json", "-"),
        *("--weights", "w.pt", "--dataset", "digits", "--samples", "300", "--out"),
    ]

    def alone(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", list(arguments))
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    monkeypatch.chdir(tmp_path)
    assert alone(*command, "one") == 0
    wanted = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", "-m", *command, "two"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    equal(*(fc.Sensitivity.load(tmp_path / name) for name in ("two", "one")))
    values = json.loads(done.stdout)  # of one process
    assert values["samples"] == wanted["samples"] == 300
    assert values["losses"] == pytest.approx(wanted["losses"])
    assert done.stderr.count("wrote two") == 1
    made = {path.name for path in tmp_path.iterdir()}
    assert made - {"__pycache__"} == {"tiny_digits.py", "w.pt", "one", "two"}
    monkeypatch.setenv("RANK", "0")  # as clusters set them
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert alone("fitcompress", "pareto", "none") == 1
    assert "one process" not in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")  # as torchrun does
    assert alone("fitcompress", "pareto", "one") == 1
    assert "OptionError: the environment variable WORLD_S" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert alone("fitcompress", "--version") == 0
    assert capsys.readouterr().out.strip() == fc.__version__
    assert alone("fitcompress", "pareto", "one") == 1
    error = capsys.readouterr().err
    assert "OptionError: this command runs in one process; got 2" in error
    (tmp_path / "shard.safetensors").write_bytes(save({"a.weight": torch.ones(40, 40)}))
    assert alone("fitcompress", "measure", "--shards", "shard.safetensors") == 1
    assert "OptionError: this cannot be shared out" in capsys.readouterr().err
