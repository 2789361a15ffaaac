"""Options of ``measure_shards`` that cannot be: found early, and the layer is named."""

import pytest
import torch
from safetensors.torch import save_file

import fitcompress as fc
from fitcompress.errors import FormatError, NonFiniteError, OptionError
from fitcompress.sensitivity import streaming
from fitcompress.sensitivity.shards import Shards


@pytest.fixture
def file(tmp_path):
    make = torch.Generator().manual_seed(0)
    layers = {f"{n}.weight": torch.randn(40, 60, generator=make) for n in "ab"}
    save_file(layers, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def unread(monkeypatch):
    """The weights must not be read."""
    monkeypatch.setattr(streaming, "_histogram", lambda *_: pytest.fail("read"))


def measured(path, **options):
    return fc.measure_shards(path, progress=False, **options)


def moments(shape, samples=4):
    made = fc.FisherMoments(samples=samples, loss=1.0)
    for name in "ab":
        made.trace[name] = torch.ones(2, dtype=torch.float64)
        made.squares[name] = torch.ones(40, 60)
    made.squares["b"] = torch.ones(shape)
    return made


@pytest.mark.parametrize(
    ("trace", "error"),
    [
        (float("nan"), NonFiniteError),
        (float("inf"), NonFiniteError),
        (-1.0, OptionError),
        ("much", OptionError),
        (None, OptionError),
    ],
)
def test_traces_that_are_none(file, unread, trace, error) -> None:
    with pytest.raises(error, match=" b "):
        measured(file, fisher={"a": 1.0, "b": trace})


@pytest.mark.parametrize("shape", [(60, 40), (40, 3), (80, 30), (2400,)])
def test_moments_of_another_shape(file, unread, shape) -> None:
    with pytest.raises(FormatError, match="diagonal of b has another shape"):
        measured(file, fisher=moments(shape))


def test_moments_of_no_sample(file, unread) -> None:
    with pytest.raises(OptionError, match="no sample"):
        measured(file, fisher=moments((40, 60), samples=0))


def test_layers_that_lack_something(file, unread, tmp_path) -> None:
    fisher = tmp_path / "fisher"
    known = moments((40, 60))
    del known.trace["b"], known.squares["b"]
    save_file({"a.weight": torch.ones(40, 60)}, fisher)
    for given in ({"a": 1.0}, known, fisher):
        with pytest.raises(OptionError, match="no Fisher information; got b"):
            measured(file, fisher=given)
    save_file({f"{n}.weight": torch.ones(60, 40) for n in "ab"}, fisher)
    with pytest.raises(FormatError, match="a has another shape"):
        measured(file, fisher=fisher)
    for macs in (float("nan"), -1, 1.5):
        with pytest.raises(OptionError, match="MACs of b"):
            measured(file, macs={"a": 1, "b": macs})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_diagonals_with_impossible_numbers(file, tmp_path, value) -> None:
    diagonal = torch.ones(40, 60)
    diagonal[1, 2] = value
    save_file({"a.weight": torch.ones(40, 60), "b.weight": diagonal}, tmp_path / "f")
    known = moments((40, 60))
    known.squares["b"] = diagonal
    for given in (tmp_path / "f", known):
        with pytest.raises((NonFiniteError, OptionError), match=r"of b is"):
            measured(file, fisher=given)


@pytest.mark.parametrize("sparsities", [(), (0.5,), (0.0, 0.5, 0.2), (0.0, 1.0)])
def test_levels_are_looked_at_first(file, unread, sparsities) -> None:
    with pytest.raises(OptionError, match="sparsities"):
        measured(file, sparsities=sparsities)
    with pytest.raises(OptionError, match="grids"):
        measured(file, grids=[fc.Grid(step=2.0), fc.Grid(step=1.0)])


@pytest.mark.parametrize("scale", [3e38, 1e38, 1e-38, 1e-42, 1e-45])
def test_weights_at_the_ends_of_float32(tmp_path, scale) -> None:
    save_file({"a.weight": torch.full((40, 60), scale)}, tmp_path / "m")
    table = measured(tmp_path / "m")
    steps = [g.step for g in table.grids if g.step]
    assert len(set(steps)) == 49
    assert torch.tensor(steps).float().tolist() == steps
    assert min(steps) >= torch.finfo(torch.float32).tiny


def test_an_error_of_a_table_names_the_layer(file, monkeypatch) -> None:
    def fail(*_):
        raise ValueError("too large")

    monkeypatch.setattr(streaming.TableColumns, "add", fail)
    with pytest.raises(NonFiniteError, match=r"a\.weight .*: too large"):
        measured(file)


def test_readable_says_what_cannot_be_read(tmp_path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "m")
    with pytest.raises(FormatError, match="got I8"):
        Shards(tmp_path / "m").readable("a")
