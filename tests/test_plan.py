"""Plans as values and as files."""

import contextlib
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fitcompress as fc
from fitcompress.errors import FormatError, OutputError, PlanMismatchError

SHAPES = {"a": (4, 3), "b.c": (2, 4, 3, 3)}


def make_plan(**changes) -> fc.Plan:
    levels = {
        "a": fc.Level(fc.Grid(bits=4), 0.5, (4, 3), 0.25, 99, 1000),
        "b.c": fc.Level(fc.Grid(step=0.1), 0.0, (2, 4, 3, 3), 1e-3, 77, 2000),
    }
    values = {
        "levels": levels,
        "method": "by hand",
        "distortion": 0.251,
        "size_bytes": 50,
        "bops": 3000,
        "limit_bytes": 60,
        "status": "OPTIMAL",
        "gap": 0.0,
        "details": {"why": ["not"]},
    }
    return fc.Plan(**values | changes)


def test_a_plan_survives_its_file(tmp_path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert fc.Plan.load(tmp_path / "plan.json") == plan
    assert list(plan.levels) == list(fc.Plan.load(tmp_path / "plan.json").levels)
    bare = make_plan(limit_bytes=None, gap=None)
    assert fc.Plan.from_json(bare.to_json()) == bare


@given(
    st.floats(0, 1),
    st.floats(min_value=1e-30, max_value=1e30),
    st.floats(0, 1e12),
    st.text(min_size=1),
)
def test_numbers_and_names_survive_exactly(sparsity, step, loss, name) -> None:
    level = fc.Level(fc.Grid(step=step), sparsity, (3,), loss, 2**60, 2**60)
    plan = fc.Plan({name: level}, distortion=loss, bops=2**60)
    assert fc.Plan.from_json(plan.to_json()) == plan


def test_a_searched_plan_survives(sensitivity) -> None:
    for method in (None, fc.methods.PathSearch()):
        plan = fc.search(sensitivity, fc.Budget(size=1300), method=method)
        assert fc.Plan.from_json(plan.to_json()) == plan
        assert (
            plan.size_bytes
            == -(-sum(x.size_bits for x in plan.levels.values()) // 8)
            + sensitivity.overhead_bytes
        )


def damaged(change) -> str:
    values = json.loads(make_plan().to_json())
    change(values)
    return json.dumps(values)


def level(values: dict) -> dict:
    return values["levels"]["a"]


DAMAGE = {
    "version": lambda v: v.update(fitcompress_plan=2),
    "no version": lambda v: v.pop("fitcompress_plan"),
    "no levels": lambda v: v.pop("levels"),
    "empty": lambda v: v.update(levels={}),
    "levels as a list": lambda v: v.update(levels=[1]),
    "unknown key": lambda v: v.update(more=1),
    "limit as text": lambda v: v.update(limit_bytes="60"),
    "negative limit": lambda v: v.update(limit_bytes=-1),
    "size as text": lambda v: v.update(size_bytes="60"),
    "loss as text": lambda v: v.update(distortion="small"),
    "loss missing": lambda v: v.update(distortion=None),
    "gap as text": lambda v: v.update(gap="none"),
    "method as a number": lambda v: v.update(method=7),
    "level as a number": lambda v: v["levels"].update(a=7),
    "two grids": lambda v: level(v).update(step=1.0),
    "no grid": lambda v: level(v).update(bits=None),
    "half a bit": lambda v: level(v).update(bits=3.5),
    "bits as text": lambda v: level(v).update(bits="4"),
    "too many bits": lambda v: level(v).update(bits=17),
    "step zero": lambda v: level(v).update(bits=None, step=0),
    "step as a flag": lambda v: level(v).update(bits=None, step=True),
    "infinite step": lambda v: level(v).update(bits=None, step=float("inf")),
    "sparsity": lambda v: level(v).update(sparsity=1.5),
    "sparsity NaN": lambda v: level(v).update(sparsity=float("nan")),
    "sparsity as text": lambda v: level(v).update(sparsity="0.5"),
    "shape as text": lambda v: level(v).update(shape="43"),
    "infinite shape": lambda v: level(v).update(shape=[float("inf")]),
    "extra": lambda v: level(v).update(extra=1),
    "bits of the file as text": lambda v: level(v).update(size_bits="1"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_plan_is_a_format_error(change) -> None:
    with pytest.raises(FormatError, match="plan"):
        fc.Plan.from_json(damaged(change))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "7", '"plan"', "{", "[" * 100_000, '{"a":' * 5000]
)
def test_what_is_no_plan_is_a_format_error(text) -> None:
    with pytest.raises(FormatError, match=r"no plan.*To fix it"):
        fc.Plan.from_json(text)


@given(st.data())
def test_a_truncated_or_changed_plan_is_a_plan_or_a_format_error(data) -> None:
    text = make_plan().to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(FormatError):
        fc.Plan.from_json(text[:place])
    other = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    with contextlib.suppress(FormatError):
        assert isinstance(fc.Plan.from_json(other), fc.Plan)


def test_files_that_are_missing_or_no_text(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        fc.Plan.load(tmp_path / "nothing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="no text"):
        fc.Plan.load(tmp_path / "binary")
    with pytest.raises(OutputError, match=r"cannot write.*To fix it"):
        make_plan().save(tmp_path / "no" / "plan.json")
    assert not (tmp_path / "no").exists()


def test_a_plan_knows_its_model() -> None:
    make_plan().check(SHAPES)
    cases = [
        ({"a": (4, 3)}, "'b.c' that the model lacks"),
        (SHAPES | {"d": (1,)}, "'d' that the plan lacks"),
        (SHAPES | {"a": (3, 4)}, r"'a' has another shape.*\(3, 4\).*\(4, 3\)"),
    ]
    for shapes, message in cases:
        with pytest.raises(PlanMismatchError, match=message + r".*To fix it"):
            make_plan().check(shapes)


def test_grids_and_levels_check_themselves() -> None:
    for wrong in (
        {},
        {"bits": 4, "step": 1.0},
        {"bits": 1},
        {"bits": 4.0},
        {"bits": True},
        {"step": -1.0},
        {"step": float("nan")},
    ):
        with pytest.raises(ValueError, match="got"):
            fc.Grid(**wrong)
    with pytest.raises(ValueError, match=r"got -0\.1"):
        fc.Level(fc.Grid(bits=4), -0.1, (1,))
    with pytest.raises(ValueError, match="at least one level"):
        fc.Plan({})
    assert [str(fc.Grid(bits=4)), str(fc.Grid(step=0.125))] == ["4 bit", "Δ=0.125"]


def test_plans_do_not_change() -> None:
    plan = make_plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.distortion = 0.0
    summary = plan.summary()
    for part in ("by hand", "OPTIMAL", "gap 0 %", "0.251 nats", "50 bytes", "3e+03"):
        assert part in summary
    assert "gap" not in make_plan(gap=None).summary()


def test_a_plan_for_another_model_changes_nothing(net) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(PlanMismatchError):
        fc.apply(net, make_plan(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
