"""Small decoders in folders, their plans, and runs that end early."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fitcompress as fc
from fitcompress.model import compressible_layers

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
PLAIN = fc.Compensation(beam=1, shared=False)
STEP = fc.Grid(step=0.25)


def network(kind=LlamaConfig, **options):
    torch.manual_seed(0)
    config = kind(**SMALL | {"tie_word_embeddings": False} | options)
    net = AutoModelForCausalLM.from_config(config).eval()
    for name, value in net.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return net


def plan_of(net, grid=STEP, sparsity=0.0, **options) -> fc.Plan:
    return fc.Plan(
        {
            each.name: fc.Level(grid, sparsity, each.shape, distortion=0.125)
            for each in compressible_layers(net)
        },
        **options,
    )


def calibration(sequences: int = 32, length: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(32, (sequences, length), generator=generator)


def saved(net, folder: Path) -> Path:
    net.save_pretrained(folder)
    return folder


def run(folder: Path, plan: fc.Plan, out: Path, **options) -> bytes:
    options = {"compensation": PLAIN, "progress": False} | options
    size = fc.compensate_shards(
        folder, plan, options.pop("tokens", calibration()), out, **options
    )
    data = out.read_bytes()
    assert size == len(data)
    assert not out.with_name(f"{out.name}.work").exists()
    return data


class Stopped(BaseException):
    """As good as a kill for what is on disk."""


def stop_at(patch, place, name, number, counts=None) -> None:
    """Let the so many-th call of a method end the run before it does anything."""
    real, counts = getattr(place, name), {} if counts is None else counts

    def stop(*args, **named):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == number:
            raise Stopped
        return real(*args, **named)

    patch.setattr(place, name, stop)
