"""Several processes: the numbers of one, errors in all, kills survived."""

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy

import fitcompress as fc
from conftest import build_tiny_net
from distributed_nets import Tokens, batches, inputs, token_batches
from fitcompress.cli import main
from fitcompress.ranks import Ranks
from fitcompress.sensitivity.checkpoint import Checkpoint
from processes import run_processes, succeeded

DIFFERENT = "DistributedError: the processes measure with different "
GRIDS = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
OPTIONS = {"grids": GRIDS, "sparsities": (0.0, 0.5), "progress": False}


def equal(found: fc.Sensitivity, wanted: fc.Sensitivity, rtol: float = 1e-6) -> None:
    for field in fields(fc.Sensitivity):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(b, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0, err_msg=field.name)
        elif field.name == "loss":
            assert a == pytest.approx(b, rel=rtol)
        elif field.name != "provenance":
            assert a == b, field.name


DATA = """
from conftest import build_tiny_net
from distributed_nets import batches, sampled_loader
from torch.nn.functional import cross_entropy

grids = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
options = dict(grids=grids, sparsities=(0.0, 0.5), progress=False)
calls = []
net = build_tiny_net()
net.head.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
table = fc.measure(net, batches(), samples=34, **options)
print(sum(calls))
table.save(folder / f"split-{rank}")
table = fc.measure(
    build_tiny_net(), iter(batches()), samples=None, activation_bits=(8, 4), **options
)
table.save(folder / f"inputs-{rank}")
table = fc.measure(
    torch.nn.parallel.DistributedDataParallel(build_tiny_net()),
    sampled_loader(), cross_entropy, samples=None, **options,
)
table.save(folder / f"sampler-{rank}")
table = fc.measure(
    build_tiny_net(), sampled_loader(), cross_entropy, samples=13, **options
)
table.save(folder / f"few-{rank}")
table = fc.measure(build_tiny_net(), batches()[:1], **options)
table.save(folder / f"one-{rank}")
fisher = fc.measure_fisher(build_tiny_net(), batches(), progress=False)
fisher.save(folder / f"fisher-{rank}")
"""


def test_two_processes_equal_one(tmp_path) -> None:
    calls = succeeded(run_processes(tmp_path, DATA))
    x, y = inputs(), torch.arange(36) % 5
    net = build_tiny_net()
    wanted = {
        "split": fc.measure(net, batches(), samples=34, **OPTIONS),
        "inputs": fc.measure(
            net, batches(), samples=None, activation_bits=(8, 4), **OPTIONS
        ),
        "sampler": fc.measure(net, [(x[:35], y[:35])], cross_entropy, **OPTIONS),
        "few": fc.measure(net, [(x[:13], y[:13])], cross_entropy, **OPTIONS),
        "one": fc.measure(net, batches()[:1], **OPTIONS),
    }
    for name, alone in wanted.items():
        mine, other = (fc.Sensitivity.load(tmp_path / f"{name}-{r}") for r in (0, 1))
        equal(other, mine, rtol=0)
        equal(mine, alone)
    assert wanted["split"].samples == 34
    # 6 + 5 + 4 + 1 and 6 + 6 + 6: each has measured its own, after 5 to look at
    assert [int(each) for each in calls] == [16 + 5, 18 + 5]
    fisher = fc.measure_fisher(net, batches(), progress=False)
    found = fc.FisherMoments.load(tmp_path / "fisher-1")
    assert found.samples == fisher.samples == 36
    for name in fisher.names:
        assert found.mean_trace(name) == pytest.approx(fisher.mean_trace(name))


ERRORS = """
import time
from conftest import build_tiny_net
from distributed_nets import batches, failing, sampled_loader

def attempt(name, loader, loss_fn=None, net=None, **options):
    try:
        fc.measure(net or build_tiny_net(), loader, loss_fn, progress=False, **options)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")

def infinite(out, y):
    return torch.nn.functional.cross_entropy(out, y) * (float("inf") if rank else 1)

attempt("fails", failing(3 if rank else 99, OSError("no disk")))
attempt("empty", [] if rank else batches())
attempt("other data", batches()[rank:])
attempt("other seed", batches(), seed=rank)
attempt("loss", batches(), infinite)
torch.manual_seed(rank)
attempt("other weights", batches(), net=torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(72, 5)))
wrong = sampled_loader()
wrong.sampler.rank = 0
attempt("other part", wrong)
attempt("checkpoint", batches(), checkpoint=folder / ("none/file" if rank else "file"))

def hanging():
    for number, batch in enumerate(batches()):
        while number == 3 and rank and not (folder / "done").exists():
            time.sleep(0.1)
        yield batch

group = dist.new_group(timeout=timedelta(seconds=5))
attempt("hangs", hanging(), group=group)
(folder / "done").touch()
sys.stdout.flush()
dist.barrier()

def dying():
    for number, batch in enumerate(batches()):
        if number == 3 and rank:
            os.kill(os.getpid(), 9)
        yield batch

attempt("dies", dying())
sys.stdout.flush()
os._exit(0)
"""


def test_what_fails_in_one_fails_in_all(tmp_path) -> None:
    first, second = run_processes(tmp_path, ERRORS)
    assert first.returncode == 0, first.stderr
    found = [
        dict(line.split(": ", 1) for line in process.stdout.splitlines())
        for process in (first, second)
    ]
    expected = {
        "fails": ("DistributedError: process 1 of 2 failed; got OSError: no d", "OSE"),
        "empty": ("DistributedError: process 1 of 2 failed; got EmptyLo", "EmptyLoad"),
        "other data": (DIFFERENT + "data",) * 2,
        "other seed": (DIFFERENT + "opt",) * 2,
        "other weights": (DIFFERENT + "we",) * 2,
        "loss": ("DistributedError: process 1 of 2 failed; got NonFinite", "NonFinite"),
        "other part": ("DistributedError: process 1 of 2 failed; got Option", "Option"),
        "checkpoint": ("DistributedError: process 1 of 2 failed; got Output", "Output"),
    }  # fmt: skip
    for name, starts in expected.items():
        for text, start in zip((each.get(name) for each in found), starts, strict=True):
            assert text is not None, (name, found)
            assert text.startswith(start), (name, text)
    for each in (found[0]["hangs"], found[1]["hangs"], found[0]["dies"]):
        assert each.startswith("DistributedError: another process of the group")
    assert "timed out" in found[0]["hangs"].lower()
    assert second.returncode == -9


KILLED = """
from conftest import build_tiny_net
from distributed_nets import batches
from fitcompress.sensitivity import estimate
{model}

estimate.SAVE_EVERY = -1.0
grids = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
calls = []
net.register_forward_pre_hook(lambda *_: calls.append(1))

def loader():
    for number, batch in enumerate(data):
        if number == {last} and rank:
            os.kill(os.getpid(), 9)
        yield batch

options = dict(grids=grids, sparsities=(0.0, 0.5), progress=False)
try:
    table = fc.measure(net, loader(), checkpoint=folder / "state", **options)
except DistributedError:
    os._exit(3)
table.save(folder / f"resumed-{{rank}}")
print(len(calls))
calls.clear()
fc.measure(net, loader(), **options).save(folder / f"whole-{{rank}}")
print(len(calls))
"""
TINY = "net, data = build_tiny_net(), batches()"
SHARDED = "from distributed_nets import *\nnet, data = shard(Tokens()), token_batches()"


@pytest.mark.parametrize(("model", "last"), [(TINY, 5), (SHARDED, 4)])
def test_killed_and_resumed(tmp_path, model, last) -> None:
    code = KILLED.format(model=model, last=last)
    first, second = run_processes(tmp_path, code)
    assert (first.returncode, second.returncode) == (3, -9), first.stderr
    files = {f"state.rank{rank}-of-2" for rank in (0, 1)}
    assert {path.name for path in tmp_path.glob("state*")} == files
    code = KILLED.format(model=model, last=-1)
    resumed, whole = map(int, succeeded(run_processes(tmp_path, code))[0].split())
    assert resumed < whole
    assert not list(tmp_path.glob("state*"))
    found = fc.Sensitivity.load(tmp_path / "resumed-0")
    equal(found, fc.Sensitivity.load(tmp_path / "whole-1"), rtol=0)
    net, data = (
        (build_tiny_net(), batches()) if model is TINY else (Tokens(), token_batches())
    )
    equal(found, fc.measure(net, data, **OPTIONS))


def test_a_checkpoint_is_of_the_same_turn_everywhere(tmp_path, net, images) -> None:
    moments = fc.measure_fisher(net, [images], progress=False)

    class Pair(Ranks):
        """The first of two processes; the other one has the turns ``theirs``."""

        def __init__(self) -> None:
            self.group, self.rank, self.count = None, 0, 2
            self.theirs: list[int] = []

        def gather(self, value):
            return [value, self.theirs]

        def any(self, *flags):
            return list(flags)

    def checkpoint(theirs) -> Checkpoint:
        ranks = Pair()
        ranks.theirs = theirs
        made = Checkpoint(tmp_path / "state", ranks)
        made.key = "key"
        return made

    assert checkpoint([]).load() is None
    checkpoint([]).save(moments, 4)
    file = tmp_path / "state.rank0-of-2"
    old = file.read_bytes()
    checkpoint([]).save(moments, 7)
    for theirs, wanted in (([7], 7), ([4, 7], 7), ([4], None), ([], None)):
        state = checkpoint(theirs)
        assert (state.load() is not None) == (wanted is not None)
        assert state.turn == (wanted or 0)
    # killed after it had written, before all had
    file.rename(tmp_path / "state.rank0-of-2.next")
    file.write_bytes(old)
    for theirs, wanted in (([7], 7), ([4], 4)):
        state = checkpoint(theirs)
        assert state.load() is not None
        assert state.turn == wanted
    state.remove()
    assert not list(tmp_path.glob("state*"))


FSDP = """
from distributed_nets import Tokens, shard, token_batches
from torch import nn

grids = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
options = dict(grids=grids, sparsities=(0.0, 0.5), progress=False)
for tied in (False, True):
    model = shard(Tokens(tied))
    before = [p.to_local().clone() for p in model.parameters()]
    table = fc.measure(model, token_batches(), activation_bits=8, **options)
    table.save(folder / f"sharded-{tied}-{rank}")
    after = [p.to_local() for p in model.parameters()]
    assert all(map(torch.equal, before, after))
fisher = fc.measure_fisher(model, token_batches(), diagonal=True, progress=False)
fisher.save(folder / f"fisher-{rank}")
rule = fc.masks.Fisher(fisher)
table = fc.measure(model, token_batches(), masks=rule, samples=9, **options)
table.save(folder / f"masks-{rank}")
held = {}
from fitcompress.sensitivity.lockstep import Lockstep
keep = Lockstep.keep
def watched(self, held, weight, squares):
    keep(self, held, weight, squares)
    sizes[weight.name] = held[weight.name].numel() / squares.numel()
sizes = {}
Lockstep.keep = watched
fc.measure(model, token_batches(), **options)
print(max(sizes.values()))

def attempt(name, model, **more):
    try:
        fc.measure(model, token_batches(), **options, **more)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")

def infinite(out, y):
    return out.sum() * (float("inf") if rank else 1)

attempt("loss", model, loss_fn=infinite)
attempt("refine", model, refine=fc.Refinement())
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (2,))
parallel = parallelize_module(Tokens(), mesh, {"blocks.0.up": ColwiseParallel()})
attempt("tensor parallel", parallel)
"""


def test_sharded_models_are_measured_as_whole_ones(tmp_path) -> None:
    lines = succeeded(run_processes(tmp_path, FSDP))[0].splitlines()
    for tied in (False, True):
        model = Tokens(tied)
        wanted = fc.measure(model, token_batches(), activation_bits=8, **OPTIONS)
        found = [fc.Sensitivity.load(tmp_path / f"sharded-{tied}-{r}") for r in (0, 1)]
        equal(found[1], found[0], rtol=0)
        equal(found[0], wanted)
    fisher = fc.measure_fisher(model, token_batches(), diagonal=True, progress=False)
    loaded = fc.FisherMoments.load(tmp_path / "fisher-1")
    assert loaded.samples == fisher.samples
    for name in fisher.names:
        torch.testing.assert_close(
            loaded.squares[name], fisher.squares[name], rtol=1e-5, atol=1e-12
        )
    rule = fc.masks.Fisher(fisher)
    masked = fc.measure(model, token_batches(), masks=rule, samples=9, **OPTIONS)
    equal(fc.Sensitivity.load(tmp_path / "masks-0"), masked, rtol=1e-5)
    assert float(lines[0]) <= 6 / 11  # of the 11 rows of the head
    told = dict(line.split(": ", 1) for line in lines[1:])
    assert told["loss"].startswith("DistributedError: process 1 of 2 failed; got NonF")
    assert told["refine"].startswith("OptionError: a sharded model cannot be refined")
    assert told["tensor parallel"].startswith("UnsupportedLayerError: parameter 'block")


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
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert alone("fitcompress", "pareto", "one") == 1
    error = capsys.readouterr().err
    assert "OptionError: this command runs in one process; got 2" in error
    (tmp_path / "shard.safetensors").write_bytes(save({"a.weight": torch.ones(40, 40)}))
    assert alone("fitcompress", "measure", "--shards", "shard.safetensors") == 1
    assert "OptionError: this cannot be shared out" in capsys.readouterr().err
