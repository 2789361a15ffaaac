"""Memorised sensitivity data are told by their loss."""

import math
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fitcompress as fc
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.errors import DataError, EmptyLoaderError, MemorisedDataWarning
from fitcompress.sensitivity.memorised import compare_losses, mean_losses

SETTINGS = {"grids": [fc.Grid(bits=4)], "sparsities": (0.0,), "progress": False}


@pytest.fixture
def net():
    net = torch.nn.Linear(3, 3)
    net.weight.data = 4 * torch.eye(3)
    net.bias.data.zero_()
    return net


def sure(count):
    """Inputs far from every boundary, as if learned by heart."""
    return [2 * torch.eye(3).repeat(count, 1)]


def unsure(count):
    return [0.2 * torch.eye(3).repeat(count, 1)]


def test_the_entropy_is_that_of_the_outputs(net) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    p = net(x).detach().double().softmax(-1)
    entropy = -(p * p.log()).sum(1)
    found = mean_losses(net, x.split(7), None, None, progress=False)
    assert set(found) == {"sampled"}
    assert found["sampled"].mean == pytest.approx(float(entropy.mean()), rel=1e-5)
    error = float(entropy.std()) / math.sqrt(40)
    assert found["sampled"].error == pytest.approx(error, rel=1e-5)
    few = mean_losses(net, x.split(7), None, 10, progress=False)
    assert few["sampled"].mean == pytest.approx(float(entropy[:10].mean()), rel=1e-5)


def test_with_labels_it_is_their_loss(net) -> None:
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 3
    batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 24, 5)]
    wanted = float(F.cross_entropy(net(x).detach(), y))
    own = mean_losses(net, batches, F.cross_entropy, None, progress=False)
    usual = mean_losses(net, batches, None, None, progress=False)
    for found in (own, usual):
        assert found["data"].mean == pytest.approx(wanted, rel=1e-5)
        assert 0 < found["data"].error < 1
    other = [(x, y.float()), (x, y)]  # not all are labels
    assert "data" not in mean_losses(net, other, None, None, progress=False)


def test_memorised_data_are_warned_of_with_numbers(net) -> None:
    net.train()
    with pytest.warns(MemorisedDataWarning, match=r"nats.*held-out"):
        table = fc.measure(net, sure(8), validation=unsure(8), **SETTINGS)
    losses = table.provenance["losses"]
    assert losses["loss"] < 0.1 * losses["validation_loss"]
    assert net.training


@pytest.mark.parametrize("generator", [False, True])
def test_data_like_those_of_validation_are_not(net, generator) -> None:
    loader = iter(unsure(8)) if generator else unsure(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemorisedDataWarning)
        table = fc.measure(net, loader, validation=unsure(4), **SETTINGS)
        again = fc.measure(net, unsure(8), **SETTINGS)
    assert "losses" not in again.provenance
    assert (again.distortion == table.distortion).all()


def test_labels_tell_more_than_outputs(net) -> None:
    """The network is as sure of held-out inputs, and wrong."""
    y = torch.arange(3).repeat(8)
    right, wrong = [(sure(8)[0], y)], [(sure(8)[0], (y + 1) % 3)]
    with pytest.warns(MemorisedDataWarning):
        found = compare_losses(net, right, wrong, None, None, progress=False)
    assert found["labels"] == "data"


def test_scatter_is_no_evidence(net) -> None:
    """One unsure sample among sure ones leaves the mean too uncertain."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemorisedDataWarning)
        mixed = [torch.cat([sure(1)[0][:2], unsure(1)[0][:1]])]
        compare_losses(net, mixed, unsure(1), None, None, progress=False)


def test_bad_validation_data_are_refused(net) -> None:
    with pytest.raises(EmptyLoaderError):
        fc.measure(net, sure(2), validation=[], **SETTINGS)
    with pytest.raises(DataError):
        fc.measure(net, sure(2), validation=["text"], **SETTINGS)


def test_plain_images_can_be_asked_for() -> None:
    source = load_dataset("digits")
    plain = torch.cat([x for x, _ in source.calibration(3, augment=False)])
    augmented = torch.cat([x for x, _ in source.calibration(3)])
    rows = {tuple(x.flatten().tolist()) for x in source.train[0]}
    assert {tuple(x.flatten().tolist()) for x in plain} == rows
    assert not torch.equal(plain, augmented)


@pytest.mark.data
def test_memorised_images_of_cifar10() -> None:
    folder = Path(os.environ["FITCOMPRESS_DATA"])
    weights = folder / "resnet-cifar10" / "resnet20-12fca82f.th"
    model = trained_model("resnet20", weights)
    source = load_dataset("cifar10", folder)
    test = [tuple(part[:512] for part in source.test)]
    with pytest.warns(MemorisedDataWarning):
        found = compare_losses(
            model,
            source.calibration(augment=False),
            test,
            None,
            512,
            progress=False,
        )
    assert found["loss"] < 0.1 < found["validation_loss"]
