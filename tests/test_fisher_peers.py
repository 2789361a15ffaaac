"""The ways to Fisher moments that are compared: exact where they say so."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fitcompress.zoo import BertEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fisher
import fisher_peers
import harness
from fisher_peers import Case, hooks

EXACT = ["loop", "vmap", "hooks"]
BOTH = [False, True]


class Net(nn.Module):
    """Strides, groups, dilation, a pool, a bias, and a Linear for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, groups=2, padding=(2, 1))
        self.third = nn.Conv2d(12, 16, (1, 2), dilation=2, groups=4)
        self.short = nn.Conv2d(12, 16, 1, stride=(1, 2), bias=False)
        self.each = nn.Linear(16, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.first(x))))
        x = torch.relu(self.second(x))
        y = self.third(x)
        x = self.each((y + self.short(x)[..., : y.shape[3]]).flatten(2).mT).relu()
        return self.last(x.mean(1))


def images() -> Case:
    torch.manual_seed(0)
    return Case(Net(), torch.randn(5, 3, 13, 15), torch.arange(5) % 4)


def tokens() -> Case:
    torch.manual_seed(0)
    model = BertEncoder(4, width=16, depth=1, heads=2, tokens=7, length=9)
    return Case(model, torch.randint(7, (5, 9)), torch.arange(5) % 4)


@pytest.fixture(params=[images, tokens])
def case(request) -> Case:
    return request.param()


def values(name: str, case: Case, diagonal: bool) -> dict[str, torch.Tensor]:
    found = fisher_peers.CANDIDATES[name](case, diagonal)
    found.step()
    return found.values()


@pytest.mark.parametrize("diagonal", BOTH)
def test_the_reference_is_the_mean_square_of_single_gradients(case, diagonal) -> None:
    found = fisher_peers.reference(case, diagonal)
    model = case.copy().model.double()
    wanted = {layer.name: 0.0 for layer in case.layers}
    for i in range(5):
        x = case.x[i : i + 1]
        model.zero_grad()
        out = model(x.double() if x.is_floating_point() else x)
        (-out.log_softmax(1)[0, case.y[i]]).backward()
        for layer in case.layers:
            gradient = model.get_submodule(layer.name).weight.grad
            square = layer.matrix_of(gradient).square() / 5
            wanted[layer.name] += square if diagonal else square.sum()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("diagonal", BOTH)
@pytest.mark.parametrize("name", EXACT)
def test_exact_candidates_agree(case, name, diagonal) -> None:
    wanted = fisher_peers.reference(case, diagonal)
    found = values(name, case, diagonal)
    assert found.keys() == wanted.keys()
    for layer in case.layers:
        shape = (layer.rows, layer.columns) if diagonal else ()
        assert found[layer.name].shape == shape
    assert fisher.deviation(found, wanted) < 2e-6


@pytest.mark.parametrize("diagonal", BOTH)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_hooks_agree_in_small_chunks(case, diagonal, chunk, monkeypatch) -> None:
    monkeypatch.setattr(hooks, "CHUNK", chunk)
    wanted = fisher_peers.reference(case, diagonal)
    assert fisher.deviation(values("hooks", case, diagonal), wanted) < 2e-6


@pytest.mark.parametrize("name", [*EXACT, "shortcut"])
def test_further_batches_are_averaged(case, name) -> None:
    found = fisher_peers.CANDIDATES[name](case, False)
    found.step()
    once = found.values()
    found.step()
    torch.testing.assert_close(found.values(), once)


def test_the_shortcut_is_another_number_but_for_one_sample(case) -> None:
    wanted = fisher_peers.reference(case, True)
    assert fisher.deviation(values("shortcut", case, True), wanted) > 0.1
    one = Case(case.model, case.x[:1], case.y[:1])
    wanted = fisher_peers.reference(one, True)
    assert fisher.deviation(values("shortcut", one, True), wanted) < 2e-6


@pytest.mark.parametrize("name", [*EXACT, "shortcut"])
def test_the_network_is_left_as_it_was(case, name) -> None:
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    values(name, case, True)
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert not any(m._forward_hooks for m in case.model.modules())
    assert not case.model.training
    torch.testing.assert_close(dict(case.model.state_dict()), before, rtol=0, atol=0)


def test_plain_leaves_gradients_and_no_moments(case) -> None:
    plain = fisher_peers.Plain(case)
    plain.step()
    assert plain.values() == {}
    assert all(p.grad is not None for p in case.model.parameters())


def test_the_reference_opens_the_relus_that_the_batch_opens() -> None:
    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x) - 1))

    case = Case(Edge(), torch.tensor([[1.0, 2.0**-30]]), torch.tensor([0]))
    nn.init.ones_(case.model.a.weight)  # 1 + 2^-30 is 1 in float32, more in float64
    found = fisher_peers.reference(case, False)
    assert found["a"] == 0
    assert found["b"] == 0


def test_a_cost_is_judged_and_what_is_missing_is_named(monkeypatch) -> None:
    class Absent(fisher_peers.Loop):
        def add(self) -> None:
            raise ImportError("not here")

    class Broken(fisher_peers.Loop):
        def add(self) -> None:
            raise RuntimeError("not this network\nand more")

    kinds = {"ours": fisher_peers.Hooks, "absent": Absent, "broken": Broken}
    monkeypatch.setattr(fisher, "CANDIDATES", {**fisher_peers.CANDIDATES, **kinds})
    monkeypatch.setattr(fisher, "build", lambda name, quick: images())
    names = ["plain", "ours", "loop", "shortcut", "absent", "broken"]
    result = harness.Result()
    columns = fisher.cost("r20", "trace", names, result, 1, quick=True)
    assert list(columns) == names[:4]
    assert columns["plain"]["ratio"] == 1
    assert columns["shortcut"]["exact"] is False
    assert result.skipped == {
        "r20: absent trace": "not here",
        "r20: broken trace": "RuntimeError: not this network",
    }
    assert [bar.limit for bar in result.bars] == [1.10, 1e-6, 1.0]
    assert "ours over loop" in result.bars[2].name


def test_memory_is_that_of_the_batch() -> None:
    # In a process of its own: here the allocator may hold enough from other tests.
    command = [sys.executable, fisher.__file__, "--quick"]
    command += ["--memory-of", "r18-32", "diagonal", "loop"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["peak"]
    # 11.2 M squares, 45 MB, a gradient of each and the activations of one sample.
    assert found is None or 45e6 < found < 400e6


@pytest.mark.parametrize(
    ("name", "library"),
    [("backpack", "backpack"), ("opacus", "opacus"), ("curvlinops", "curvlinops")],
)
@pytest.mark.parametrize("make", [fisher_peers.tiny, tokens])
@pytest.mark.filterwarnings("ignore")
def test_libraries_agree_or_are_named(make, name, library) -> None:
    case = make()  # without groups, which BackPACK gets wrong
    kind = fisher_peers.CANDIDATES[name]
    if importlib.util.find_spec(library) is None:
        with pytest.raises(ImportError, match=library):
            kind(case, False)
        return
    for diagonal in BOTH[: len(kind.quantities)]:
        wanted = fisher_peers.reference(case, diagonal)
        found = values(name, case.copy(), diagonal)
        assert found.keys() == wanted.keys()
        assert not kind.exact or fisher.deviation(found, wanted) < 1e-4
