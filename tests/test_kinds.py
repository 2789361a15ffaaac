"""Embeddings and transposed convolutions from end to end, beside the other kinds."""

import copy

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.model import compressible_layers
from fitcompress.quantize import grid_of
from fitcompress.storage.save_load import read


class Decoder(nn.Module):
    """A table of 12 words and one of 3 places, and three transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, padding_idx=0)
        self.places = nn.Embedding(3, 6)
        self.wide = nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1, groups=2)
        self.flat = nn.ConvTranspose2d(8, 6, (2, 3), (2, 1), output_padding=(1, 0))
        self.deep = nn.ConvTranspose3d(6, 4, (1, 2, 2), dilation=(1, 2, 1), bias=False)
        self.out = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.words(x) + self.places(torch.arange(x.shape[1]))
        hidden = self.wide(hidden.transpose(1, 2)).relu()
        hidden = self.flat(hidden[:, :, None]).relu()
        hidden = self.deep(hidden[:, :, None]).relu()
        return self.out(hidden.flatten(2).mean(2))


NAMES = ["words", "places", "wide", "flat", "deep", "out"]


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def words() -> torch.Tensor:
    return torch.randint(12, (48, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table(decoder, words) -> fc.Sensitivity:
    return fc.measure(decoder, words.split(16), progress=False)


def shrink(model: nn.Module, table: fc.Sensitivity, family: str) -> nn.Module:
    budget = fc.Budget(size=1100 if family == "step" else 1500)
    return fc.apply(model, fc.search(table, budget, family=family), progress=False)


def test_every_level_is_measured(decoder, table) -> None:
    assert list(table.names) == NAMES
    assert (table.fisher_trace > 0).all()
    assert (table.macs[:2] == 0).all()
    # wide: 6·3 inputs × 4 outputs of the group × 4; flat: 8·6 × 6·6; deep: 6·3·8 × 4·4.
    assert table.macs[2:].tolist() == [18 * 16, 48 * 36, 144 * 16, 20]
    # A bits grid has a 16-bit scale for every row.
    rows = [layer.rows for layer in compressible_layers(decoder)]
    assert rows == [12, 3, 8, 6, 4, 5]
    assert (table.size_bits[:, 0, 0] >= 16 * torch.tensor(rows).numpy()).all()


@pytest.mark.parametrize("family", ["step", "bits"])
def test_weights_lie_on_their_grids_and_come_back_from_the_file(
    decoder, words, table, tmp_path, family
) -> None:
    small = shrink(decoder, table, family)
    for layer in compressible_layers(decoder):
        module = small.get_submodule(layer.name)
        grid = grid_of(module)
        assert grid.scale.numel() == (layer.rows if family == "bits" else 1)
        # Without calibration every weight is rounded to the nearest level.
        error = layer.matrix() - layer.matrix_of(module.weight.detach())
        step = grid.scale.reshape(-1, 1)
        kept = layer.matrix_of(module.weight.detach()) != 0
        assert ((error.abs() <= 0.5001 * step) | ~kept).all()
    size = fc.save(small, tmp_path / "f")
    assert size == (tmp_path / "f").stat().st_size
    for trainable in (False, True):
        loaded = fc.load(tmp_path / "f", Decoder(), trainable=trainable)
        assert torch.equal(loaded(words), small(words))
    fc.save(loaded, tmp_path / "again")
    state, again = read(tmp_path / "f").state(), read(tmp_path / "again").state()
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("family", ["step", "bits"])
def test_finetuning_keeps_weights_on_the_grid_and_the_file_in_budget(
    decoder, words, table, tmp_path, family
) -> None:
    small = shrink(decoder, table, family)
    before = {n: small.get_submodule(n).weight.detach().clone() for n in NAMES}
    fc.finetune(
        small, words.split(16), teacher=decoder, epochs=2, lr=0.3, progress=False
    )
    fc.save(small, tmp_path / "f")  # would raise beyond the budget
    changed = []
    for layer in compressible_layers(decoder):
        module = small.get_submodule(layer.name)
        matrix = layer.matrix_of(module.weight.detach())
        grid = grid_of(module)
        codes = grid.codes(module.weight)
        assert torch.equal(matrix, codes.float() * grid.scale.reshape(-1, 1))
        changed.append(not torch.equal(module.weight, before[layer.name]))
    assert any(changed)


def test_the_report_compares_matrices(decoder, table) -> None:
    small = shrink(decoder, table, "bits")
    report = fc.report(decoder, small)
    assert [row.name for row in report.layers] == NAMES
    for row in report.layers:
        dense = decoder.get_submodule(row.name).weight
        error = (small.get_submodule(row.name).weight - dense).norm() / dense.norm()
        assert row.relative_error == pytest.approx(float(error.detach() ** 2), rel=1e-4)


def test_bit_operations_may_be_bounded_where_a_layer_has_none(decoder, table) -> None:
    plan = fc.search(table, fc.Budget(bops="15%"))
    assert plan.bops <= 0.15 * table.macs.sum() * 1024
    # What costs nothing gets the finest grid.
    assert plan.levels["words"].grid == fc.Grid(bits=8)


def test_a_compressed_embedding_trains_in_any_loop(decoder, table, words) -> None:
    small = copy.deepcopy(shrink(decoder, table, "step")).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(words).square().mean().backward()
    latent = small.words.parametrizations.weight.original
    assert not latent.grad[0].any()  # the padding stays
    assert latent.grad[1:].any()
    optimizer.step()
    assert fc.remove(small)(words).isfinite().all()


def test_compensation_works_on_windows_of_transposed_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 3, dilation=2),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(8),
    ).eval()
    x = nn.functional.avg_pool2d(torch.randn(64, 4, 6, 6), 2, 1)
    layers = compressible_layers(model)
    plan = fc.Plan({n.name: fc.Level(fc.Grid(bits=3), 0.0, n.shape) for n in layers})
    rounded = fc.apply(model, plan, progress=False)
    small = fc.apply(model, plan, x.split(32), progress=False)
    for layer in layers:  # every code within the range of its row
        assert grid_of(small.get_submodule(layer.name)).scale.numel() == layer.rows
    fresh = nn.functional.avg_pool2d(torch.randn(64, 4, 6, 6), 2, 1)
    errors = [
        float((net(fresh) - model(fresh)).detach().square().sum())
        for net in (small, rounded)
    ]
    assert errors[0] < 0.7 * errors[1]
