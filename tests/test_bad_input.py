"""Every entry tells what is wrong: what it got, what it wanted, how to fix it."""

import copy
import re

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import (
    BudgetInfeasibleError,
    CalibrationError,
    DataError,
    EmptyLoaderError,
    FitcompressError,
    NoCompressibleLayerError,
    NonFiniteError,
    OutputError,
    PlanMismatchError,
)

NAN, INF = float("nan"), float("inf")


def parts(error: BaseException) -> set[str]:
    """Which parts a message has."""
    text = str(error)
    found = {"got": "; got ", "wanted": "; wanted ", "fix": ". To fix it: "}
    return {name for name, mark in found.items() if mark in text}


def test_messages_have_four_parts() -> None:
    error = FitcompressError("it broke", got=1, wanted=2, fix="mend it")
    assert str(error) == "it broke; got 1; wanted 2. To fix it: mend it"
    assert str(FitcompressError("it broke", got=0)) == "it broke; got 0"


class Unreached(nn.Module):
    """Has a layer that its forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).detach()


class Output(nn.Module):
    """Wraps its logits in something else."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: torch.Tensor):
        return self.wrap(self.linear(x))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
linear = nn.Linear(4, 3)
entropy = nn.functional.cross_entropy


def each(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return entropy(out, y, reduction="none")


def no_number(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return entropy(out, y) * NAN


def root(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (entropy(out, y) * 0).sqrt()  # a finite loss whose gradient is not


MEASURE = {
    "no layer": (nn.Tanh(), [X], None, NoCompressibleLayerError, "Tanh"),
    "no batch": (linear, [], None, EmptyLoaderError, "no sample"),
    "no sample": (linear, [X[:0]], None, EmptyLoaderError, "no sample"),
    "other inputs": (linear, [{"x": X}], None, DataError, "got dict of x"),
    "NaN input": (linear, [X * NAN], None, NonFiniteError, "NaN"),
    "NaN input, labels": (linear, [(X * NAN, Y)], entropy, NonFiniteError, "got nan"),
    "infinite input": (linear, [X * INF], None, NonFiniteError, "NaN"),
    "NaN loss": (linear, [(X, Y)], no_number, NonFiniteError, "got nan"),
    "NaN gradient": (linear, [(X, Y)], root, NonFiniteError, "gradient of layer ''"),
    "loss per sample": (linear, [(X, Y)], each, CalibrationError, r"shape \(6,\)"),
    "loss is no tensor": (
        linear,
        [(X, Y)],
        lambda out, y: 1.0,
        CalibrationError,
        "got float",
    ),
    "loss detached": (
        linear,
        [(X, Y)],
        lambda out, y: entropy(out, y).detach(),
        CalibrationError,
        "no gradient",
    ),
    "model detached": (Detached(), [X], None, CalibrationError, "no gradient"),
    "layer not reached": (Unreached(), [X], None, CalibrationError, "'spare'"),
    "output in a list": (Output(lambda y: [y]), [X], None, DataError, "got list"),
    "output of whole numbers": (
        Output(lambda y: y.argmax(1)),
        [X],
        None,
        DataError,
        r"shape \(6,\)",
    ),
}


@pytest.mark.parametrize("case", MEASURE.values(), ids=MEASURE)
def test_measuring_refuses(case) -> None:
    model, loader, loss, kind, message = case
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message) as caught:
        fc.measure(model, loader, loss, progress=False)
    assert parts(caught.value) >= {"fix"}
    assert parts(caught.value) & {"got", "wanted"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training  # a fresh module is


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_are_no_measurement(net, images, samples) -> None:
    with pytest.raises(DataError, match=f"got {samples}; wanted at least one"):
        fc.measure(net, [images], samples=samples, progress=False)


def with_value(net: nn.Module, key: str, value: float) -> nn.Module:
    net.state_dict()[key].view(-1)[3] = value
    return net


WEIGHTS = [("conv.weight", NAN), ("norm.running_var", INF), ("out.bias", NAN)]


@pytest.mark.parametrize(("key", "value"), WEIGHTS)
def test_broken_weights_are_named(net, images, sensitivity, key, value) -> None:
    plan = fc.search(sensitivity, fc.Budget(size="45%"))
    broken = with_value(net, key, value)
    calls = [
        lambda: fc.measure(broken, [images], progress=False),
        lambda: fc.apply(broken, plan, [images], progress=False),
        lambda: fc.apply(broken, plan, progress=False),
        lambda: fc.compress(broken, [images], fc.Budget(size="45%"), progress=False),
    ]
    for call in calls:
        with pytest.raises(NonFiniteError, match=rf"^{re.escape(key)} .*got 1 of") as e:
            call()
        assert parts(e.value) == {"got", "wanted", "fix"}


APPLY = {
    "no batch": ([], EmptyLoaderError, "no sample"),
    "no inputs": (["text"], DataError, "got str"),
    "NaN input": ([torch.full((4, 2, 6, 6), NAN)], NonFiniteError, "NaN"),
    "overflow": ([torch.full((4, 2, 6, 6), 3e38)], NonFiniteError, "not finite"),
}


@pytest.mark.parametrize("case", APPLY.values(), ids=APPLY)
def test_applying_refuses(net, sensitivity, tmp_path, case) -> None:
    loader, kind, message = case
    plan = fc.search(sensitivity, fc.Budget(size="45%"))
    with pytest.raises(kind, match=message) as caught:
        fc.apply(net, plan, loader, checkpoint=tmp_path / "c", progress=False)
    assert parts(caught.value) >= {"wanted", "fix"}
    assert list(tmp_path.iterdir()) == []


def test_applying_needs_every_layer_to_be_reached() -> None:
    model = Unreached()
    levels = {n: fc.Level(fc.Grid(bits=4), 0.0, (3, 4)) for n in ("used", "spare")}
    with pytest.raises(CalibrationError, match=r"'spare'.*got 1 of 2.*To fix it"):
        fc.apply(model, fc.Plan(levels), [X], progress=False)
    fc.apply(model, fc.Plan(levels), progress=False)  # rounding needs no inputs


class Fickle(nn.Module):
    """Takes another way for another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
        return second(first(x))


def test_batches_must_take_the_same_way() -> None:
    model = Fickle().eval()
    levels = {n: fc.Level(fc.Grid(bits=4), 0.0, (4, 4)) for n in "ab"}
    with pytest.raises(CalibrationError, match=r"different ways.*To fix it"):
        fc.apply(model, fc.Plan(levels), [X.abs(), -X.abs()], progress=False)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_errors_of_the_model_itself_come_through() -> None:
    levels = {
        "a": fc.Level(fc.Grid(bits=4), 0.0, (4, 4)),
        "b": fc.Level(fc.Grid(bits=4), 0.0, (4, 5)),
    }
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fc.apply(Fails(), fc.Plan(levels), [X], progress=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fc.measure(Fails(), [X], progress=False)


def test_plans_for_other_models(net, sensitivity, images) -> None:
    plan = fc.search(sensitivity, fc.Budget(size="45%"))
    net.out = nn.Linear(7, 4)
    for calibrate in (None, [images]):
        with pytest.raises(PlanMismatchError, match="'out' has another shape") as e:
            fc.apply(net, plan, calibrate, progress=False)
        assert parts(e.value) == {"got", "wanted", "fix"}


def test_impossible_budgets(net, images) -> None:
    with pytest.raises(BudgetInfeasibleError, match="no plan meets") as caught:
        fc.compress(net, [images], fc.Budget(size="1%"), progress=False)
    assert parts(caught.value) == {"got", "wanted", "fix"}
    assert caught.value.smallest > 31


def test_outputs_are_checked_before_work_starts(net, sensitivity, tmp_path) -> None:
    def loader():
        pytest.fail("work has started")
        yield

    nowhere = tmp_path / "no" / "f"
    plan = fc.search(sensitivity, fc.Budget(size="45%"))
    for place in (nowhere, tmp_path):
        with pytest.raises(OutputError, match=r"cannot write .*To fix it"):
            fc.measure(net, loader(), checkpoint=place, progress=False)
        with pytest.raises(OutputError, match=r"cannot write .*To fix it"):
            fc.apply(net, plan, loader(), checkpoint=place, progress=False)


def test_reports_need_a_compressed_model(net) -> None:
    with pytest.raises(PlanMismatchError, match=r"not compressed.*To fix it"):
        fc.report(net, net)


def test_scoring_needs_labels(net, images) -> None:
    with pytest.raises(DataError, match="labels"):
        fc.evaluate(net, [images], progress=False)
    with pytest.raises(EmptyLoaderError):
        fc.evaluate(net, [], progress=False)
    with pytest.raises(NonFiniteError):
        labels = torch.zeros(len(images)).long()
        fc.evaluate(net, [(images * NAN, labels)], progress=False)
