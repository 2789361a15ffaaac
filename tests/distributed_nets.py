"""What the tests of several processes measure, in each of them and alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SIZES = (6, 6, 5, 6, 4, 6, 3)  # of batches: 36 samples

Batch = tuple[torch.Tensor, torch.Tensor]


def inputs() -> torch.Tensor:
    """36 smooth inputs [36, 2, 6, 6]."""
    noise = torch.randn(36, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return 2 * nn.functional.avg_pool2d(noise, 3, 1)


def batches(sizes: tuple[int, ...] = SIZES) -> list[Batch]:
    """Batches of unequal sizes."""
    x = inputs()[: sum(sizes)]
    y = torch.arange(len(x)) % 5
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def sampled_loader() -> DataLoader[Any]:
    """35 samples in batches of 4; two processes get 18 each, one of them twice."""
    data = TensorDataset(inputs()[:35], torch.arange(35) % 5)
    return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))


def failing(after: int, error: Exception, whole: Any = None) -> Iterator[Any]:
    """Batches, and an error instead of number ``after``."""
    for number, batch in enumerate(whole or batches()):
        if number == after:
            raise error
        yield batch


class Block(nn.Module):
    """Two linear maps around a non-linearity, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(12),
            nn.Linear(12, 20),
            nn.Linear(20, 12, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tokens(nn.Module):
    """A small language model, 11 tokens; its head shares the embedding if ``tied``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def token_batches() -> list[dict[str, torch.Tensor]]:
    """Five batches of sequences of unequal sizes and lengths."""
    made = torch.Generator().manual_seed(2)
    shapes = ((4, 7), (4, 7), (3, 7), (4, 5), (2, 5))
    return [{"input_ids": torch.randint(11, s, generator=made)} for s in shapes]


def whole_tokens() -> TensorDataset:
    """Ten sequences of one length."""
    made = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randint(11, (10, 7), generator=made))


def sampled_tokens() -> DataLoader[Any]:
    """Those sequences in batches of 3; each of two processes gets 5."""
    data = whole_tokens()
    return DataLoader(data, 3, sampler=DistributedSampler(data, shuffle=False))


def squared(out: torch.Tensor, _: Any) -> torch.Tensor:
    """A loss without labels."""
    return out.square().mean()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model by FSDP2, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (*getattr(model, "blocks", ()), model):
        fully_shard(part, mesh=mesh)
    return model


def convolutions() -> nn.Sequential:
    """A convolution and two linear maps, of 2×6×6 inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(128, 12), nn.Linear(12, 4)),
    )


def labelled_parts() -> list[Batch]:
    """24 of those inputs in four batches."""
    x = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(4))
    return list(zip(x.split(6), (torch.arange(24) % 4).split(6), strict=True))


label_loss = cross_entropy
