"""What others make of transformers: bytes as counted by hand, codes as rounded."""

import sys
from pathlib import Path

import pytest
import torch

import fitcompress as fc
from fitcompress.model import compressible_layers
from fitcompress.storage.save_load import layer_bytes, packed_bytes
from hugging_face_nets import batches, bert, llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import text_peers

# 2 layers of 16 × 16, two of 8 × 16, 16 × 16, three of 24 × 16 or 16 × 24; embedding
WEIGHTS = 2 * (256 + 128 + 128 + 256 + 3 * 384) + 32 * 16
ROWS = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16) + 32
# torchao and modelopt warn when they are imported
quiet = pytest.mark.filterwarnings("ignore")


def left(model):
    """Bytes of a packed file that hold no layer."""
    small = text_peers.uniform(model, 2).model
    return len(packed_bytes(small)) - sum(layer_bytes(small).values())


@torch.no_grad()
def squares(model, other):
    """Squared differences of all weights."""
    both = compressible_layers(model), compressible_layers(other)
    return sum(
        float((x.weight - y.weight).square().sum()) for x, y in zip(*both, strict=True)
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_uniform_bits_are_counted_fixed_and_coded(bits):
    model = llama()
    made = text_peers.uniform(model, bits)
    assert abs(made.bytes - (WEIGHTS * bits + ROWS * 16) / 8 - left(model)) < 8
    assert made.coded == len(packed_bytes(made.model))
    fitted = text_peers.uniform(model, bits, fitted=True)
    assert abs(fitted.bytes - made.bytes) < 8
    gain = squares(model, made.model) - squares(model, fitted.model)
    assert gain > 0 if bits == 3 else gain == 0  # of 8 bits the largest weight's is it


def test_pruned_takes_the_fewest_zeros_within_the_size():
    model = llama()
    size = text_peers.uniform(model, 4).coded - 300
    made = text_peers.pruned(model, 4, size)
    assert size - 100 < made.bytes <= size
    with pytest.raises(ValueError, match="do not get into"):
        text_peers.pruned(model, 4, 100)
    with pytest.raises(ValueError, match="no zeros"):
        text_peers.pruned(model, 4, 10 * size)


@quiet
@pytest.mark.parametrize("net", [llama, bert])
def test_torchao_counts_scales_of_rows_or_groups(net, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(text_peers, "GROUP", 16)  # does not divide 24
    model = net()
    rows = text_peers.torchao_rounded(model, 4, grouped=False)
    groups = text_peers.torchao_rounded(model, 4, grouped=True)
    assert rows.bytes == pytest.approx(text_peers.uniform(model, 4).bytes, abs=8)
    assert groups.bytes == rows.bytes  # 16 inputs are one group, 24 none
    monkeypatch.setattr(text_peers, "GROUP", 8)
    more = text_peers.torchao_rounded(model, 4, grouped=True)
    scales = sum(x.size // 8 - x.rows for x in compressible_layers(model))
    assert more.bytes - rows.bytes == 2 * scales
    assert 0 < squares(model, more.model) < squares(model, rows.model)


def test_codes_of_others_are_packed_as_they_are(tmp_path):
    model = llama()
    bits = {x.name: 2 + i % 7 for i, x in enumerate(compressible_layers(model))}
    scales = {
        x.name: text_peers._round_(x.weight, bits[x.name])
        for x in compressible_layers(model)
    }
    small = text_peers._on_grids(model, bits, scales)
    fc.save(small, tmp_path / "small")
    again = fc.load(tmp_path / "small", llama())
    for mine, theirs in zip(
        compressible_layers(again), compressible_layers(model), strict=True
    ):
        scale = scales[mine.name].reshape(-1, 1)
        codes = (theirs.weight / scale).round()
        assert codes.unique().numel() > 2 ** bits[mine.name] // 2
        assert (codes.abs() <= 2 ** (bits[mine.name] - 1)).all()
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-3, atol=1e-6)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("net", [llama, bert])
def test_auto_quantize_keeps_to_the_size(net):
    pytest.importorskip("modelopt")
    model = net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    given = batches("tokens" if net is llama else "class", count=2)
    size = text_peers.uniform(model, 4).bytes
    made = text_peers.auto_quantized(model, given, size, embedding_bits=6)
    assert 0.9 * size < made.bytes <= size
    assert made.coded < 1.05 * made.bytes
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    with pytest.raises(ValueError, match="leave"):
        text_peers.auto_quantized(model, given, size // 2, embedding_bits=8)
