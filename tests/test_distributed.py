"""Several processes: the numbers of one, errors in all, kills survived."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch.nn.functional import cross_entropy

import fitcompress as fc
from conftest import build_tiny_net
from distributed_nets import (
    Tokens,
    batches,
    inputs,
    squared,
    token_batches,
    whole_tokens,
)
from distributed_tables import equal
from processes import run_processes, succeeded

DIFFERENT = "DistributedError: the processes measure with different "
GRIDS = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
OPTIONS = {"grids": GRIDS, "sparsities": (0.0, 0.5), "progress": False}
HEAD = """
from conftest import build_tiny_net
from distributed_nets import *
from fitcompress.sensitivity import estimate

grids = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(step=0.1), fc.Grid(step=0.3))
options = dict(grids=grids, sparsities=(0.0, 0.5), progress=False)

def attempt(name, net, loader, loss_fn=None, **more):
    try:
        fc.measure(net, loader, loss_fn, **(options | more))
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")

def infinite(out, y):
    return out.square().mean() * (float("inf") if rank else 1)
"""
DATA = """
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
    sampled_loader(), label_loss, samples=None, **options,
)
table.save(folder / f"sampler-{rank}")
table = fc.measure(
    build_tiny_net(), sampled_loader(), label_loss, samples=13, **options
)
table.save(folder / f"few-{rank}")
table = fc.measure(build_tiny_net(), batches()[:1], **options)
table.save(folder / f"one-{rank}")
fisher = fc.measure_fisher(build_tiny_net(), batches(), progress=False)
fisher.save(folder / f"fisher-{rank}")
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """What two processes have saved, and the lines that each has written."""
    folder = tmp_path_factory.mktemp("measured")
    texts = succeeded(run_processes(folder, HEAD + DATA + FSDP))
    return folder, [text.splitlines() for text in texts]


def test_two_processes_equal_one(measured) -> None:
    tmp_path, lines = measured
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
    assert [int(each[0]) for each in lines] == [16 + 5, 18 + 5]
    fisher = fc.measure_fisher(net, batches(), progress=False)
    found = fc.FisherMoments.load(tmp_path / "fisher-1")
    assert found.samples == fisher.samples == 36
    for name in fisher.names:
        assert found.mean_trace(name) == pytest.approx(fisher.mean_trace(name))


ERRORS = """
attempt("fails", build_tiny_net(), failing(3 if rank else 99, OSError("no disk")))
late = RuntimeError("DataLoader timed out after 5 seconds")
attempt("own words", build_tiny_net(), failing(3 if rank else 99, late))
attempt("empty", build_tiny_net(), [] if rank else batches())
attempt("other data", build_tiny_net(), batches()[rank:])
attempt("other seed", build_tiny_net(), batches(), seed=rank)
attempt("loss", build_tiny_net(), batches(), infinite)
torch.manual_seed(rank)
other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 5))
attempt("other weights", other, batches())
wrong = sampled_loader()
wrong.sampler.rank = 0
attempt("other part", build_tiny_net(), wrong)
path = folder / ("none/file" if rank else "file")
attempt("checkpoint", build_tiny_net(), batches(), checkpoint=path)
if rank:  # alone, whatever is initialised
    fc.compress(build_tiny_net(), batches(), fc.Budget(size="50%"), progress=False)
dist.barrier()

def dying():
    for number, batch in enumerate(batches()):
        if number == 5 and rank:
            os.kill(os.getpid(), 9)
        yield batch

estimate.SAVE_EVERY = -1.0
attempt("dies", build_tiny_net(), dying(), checkpoint=folder / "killed")
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, list[CompletedProcess[str]]]:
    """What became of two processes, the second one killed in the end."""
    folder = tmp_path_factory.mktemp("failed")
    return folder, run_processes(folder, HEAD + ERRORS)


def test_what_fails_in_one_fails_in_all(failed) -> None:
    first, second = failed[1]
    assert first.returncode == 0, first.stderr
    assert second.returncode == -9, second.stderr
    found = [
        dict(line.split(": ", 1) for line in process.stdout.splitlines())
        for process in (first, second)
    ]
    one = "DistributedError: process 1 of 2 failed; got "
    expected = {
        "fails": (one + "OSError: no disk", "OSError: no disk"),
        "own words": (one + "RuntimeError: DataL", "RuntimeError: DataLoader timed"),
        "empty": (one + "EmptyLoaderError", "EmptyLoaderError"),
        "other data": (DIFFERENT + "data",) * 2,
        "other seed": (DIFFERENT + "options",) * 2,
        "other weights": (DIFFERENT + "weights",) * 2,
        "loss": (one + "NonFiniteError", "NonFiniteError"),
        "other part": (one + "OptionError", "OptionError"),
        "checkpoint": (one + "OutputError", "OutputError"),
    }
    for name, starts in expected.items():
        for each, start in zip(found, starts, strict=True):
            assert each.get(name, "").startswith(start), (name, found)
    dies = "DistributedError: another process of the group is gone"
    assert found[0]["dies"].startswith(dies), found


RESUMED = """
estimate.SAVE_EVERY = -1.0
calls = []

def run(name, net, loader, **more):
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    calls.clear()
    fc.measure(net, iter(loader), **options, **more).save(folder / f"{name}-{rank}")
    print(len(calls))

run("tiny", build_tiny_net(), batches(), checkpoint=folder / "killed")
run("tiny-whole", build_tiny_net(), batches())
stopped = failing(4, OSError("no disk"), token_batches())
attempt("stopped", shard(Tokens()), stopped, checkpoint=folder / "sharded-state")
assert len(list(folder.glob("sharded-state*"))) == 2
dist.barrier()
run("sharded", shard(Tokens()), token_batches(), checkpoint=folder / "sharded-state")
run("sharded-whole", shard(Tokens()), token_batches())
"""


def test_killed_and_resumed(failed) -> None:
    folder = failed[0]
    files = {f"killed.rank{rank}-of-2" for rank in (0, 1)}
    assert {path.name for path in folder.glob("killed*")} == files
    texts = succeeded(run_processes(folder, HEAD + RESUMED))
    assert not list(folder.glob("killed*"))
    assert not list(folder.glob("sharded-state*"))
    for text in texts:
        tiny, tiny_whole, error, sharded, sharded_whole = text.splitlines()
        assert int(tiny) < int(tiny_whole)
        assert int(sharded) < int(sharded_whole)
        assert error == "stopped: OSError: no disk"
    alone = {
        "tiny": fc.measure(build_tiny_net(), batches(), **OPTIONS),
        "sharded": fc.measure(Tokens(), token_batches(), **OPTIONS),
    }
    for name, wanted in alone.items():
        found = fc.Sensitivity.load(folder / f"{name}-0")
        equal(found, fc.Sensitivity.load(folder / f"{name}-whole-1"), rtol=0)
        equal(found, wanted)


FSDP = """
for tied in (False, True):
    model = shard(Tokens(tied))
    before = [p.to_local().clone() for p in model.parameters()]
    table = fc.measure(model, token_batches(), activation_bits=8, **options)
    table.save(folder / f"sharded-{tied}-{rank}")
    after = [p.to_local() for p in model.parameters()]
    assert all(map(torch.equal, before, after))
fisher = fc.measure_fisher(model, token_batches(), diagonal=True, progress=False)
fisher.save(folder / f"diagonal-{rank}")
rule = fc.masks.Fisher(fisher)
table = fc.measure(model, token_batches(), masks=rule, samples=9, **options)
table.save(folder / f"masks-{rank}")
table = fc.measure(
    shard(Tokens()), sampled_tokens(), squared, activation_bits=8, **options
)
table.save(folder / f"tokens-{rank}")
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

def bad_label(out, y):
    if rank:
        raise ValueError("bad label")
    return out.square().mean()

attempt("loss", model, token_batches(), infinite)
attempt("bad label", shard(Tokens()), token_batches(), bad_label)
unused = Tokens()
unused.extra = nn.Linear(12, 12)
unused = shard(unused)
attempt("unreached", unused, token_batches()[1:3])  # of unequal shapes
attempt("refine", model, token_batches(), refine=fc.Refinement())
own = [dist.new_group([number]) for number in range(2)][rank]
attempt("mesh", model, token_batches(), group=own)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.device_mesh import init_device_mesh
flat = FullyShardedDataParallel(Tokens(), device_id=torch.device("cpu"))
attempt("FSDP1", flat, token_batches())
mesh = init_device_mesh("cpu", (2,))
parallel = parallelize_module(Tokens(), mesh, {"blocks.0.up": ColwiseParallel()})
attempt("tensor parallel", parallel, token_batches())
"""


def test_sharded_models_are_measured_as_whole_ones(measured) -> None:
    tmp_path, lines = measured
    for tied in (False, True):
        model = Tokens(tied)
        wanted = fc.measure(model, token_batches(), activation_bits=8, **OPTIONS)
        found = [fc.Sensitivity.load(tmp_path / f"sharded-{tied}-{r}") for r in (0, 1)]
        equal(found[1], found[0], rtol=0)
        equal(found[0], wanted)
    fisher = fc.measure_fisher(model, token_batches(), diagonal=True, progress=False)
    loaded = fc.FisherMoments.load(tmp_path / "diagonal-1")
    assert loaded.samples == fisher.samples
    for name in fisher.names:
        torch.testing.assert_close(
            loaded.squares[name], fisher.squares[name], rtol=1e-5, atol=1e-12
        )
    rule = fc.masks.Fisher(fisher)
    masked = fc.measure(model, token_batches(), masks=rule, samples=9, **OPTIONS)
    equal(fc.Sensitivity.load(tmp_path / "masks-0"), masked, rtol=1e-5)
    tokens = [whole_tokens().tensors]
    wanted = fc.measure(Tokens(), tokens, squared, activation_bits=8, **OPTIONS)
    equal(fc.Sensitivity.load(tmp_path / "tokens-0"), wanted)
    assert float(lines[0][1]) <= 6 / 11  # of the 11 rows of the head
    first, second = (dict(e.split(": ", 1) for e in each[2:]) for each in lines)
    one = "DistributedError: process 1 of 2 failed; got "
    assert first["loss"].startswith(one + "NonFiniteError")
    assert first["bad label"].startswith(one + "ValueError: bad label")
    assert second["bad label"] == "ValueError: bad label"
    unreached = "CalibrationError: the loss does not depend on layer 'extra'"
    assert unreached in first["unreached"]
    assert unreached in second["unreached"]
    for told in (first, second):
        assert told["refine"].startswith("OptionError: a sharded model cannot be ref")
        assert "other processes than the group's; got a mesh of 2" in told["mesh"]
        assert told["FSDP1"].startswith("UnsupportedLayerError: the model is wrapped")
        assert told["tensor parallel"].startswith("UnsupportedLayerError: parameter '")
