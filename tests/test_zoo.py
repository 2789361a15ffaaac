"""The reference models: as large as published, with the outputs that they promise."""

import pytest
import torch

from fitcompress import zoo


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_models_are_as_large_as_published() -> None:
    assert parameters(zoo.resnet20()) == 269_722
    assert parameters(zoo.resnet56()) == 853_018
    assert parameters(zoo.resnet18()) == 11_689_512
    assert parameters(zoo.resnet18(10, small=True)) == 11_173_962
    with torch.device("meta"):
        bert = zoo.BertEncoder()
    # BERT-base, less the 2 · 768 numbers that tell two sentences apart.
    assert parameters(bert) == 109_482_240 - 2 * 768 + 2 * 769


@pytest.mark.parametrize("size", [32, 65])
@pytest.mark.parametrize("small", [True, False])
def test_resnet18_takes_images_of_any_size(size, small) -> None:
    model = zoo.resnet18(7, small=small).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_the_encoder_returns_a_score_per_class() -> None:
    model = zoo.BertEncoder(3, width=16, depth=2, heads=4, tokens=50, length=12)
    tokens = torch.arange(20).view(2, 10)
    out = model(tokens)
    assert out.shape == (2, 3)
    assert not torch.equal(model(tokens.flip(1)), out)  # places count


@pytest.mark.parametrize("name", zoo.BUILT_IN)
def test_built_in_models_are_made_without_arguments(name) -> None:
    assert isinstance(zoo.BUILT_IN[name](), torch.nn.Module)
