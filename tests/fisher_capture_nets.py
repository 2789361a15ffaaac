"""Networks whose samples or weights are hard to find, and their labels."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % 3


class Products(nn.Module):
    """A weight as a matrix product, in both orientations, tied to other uses."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight
        self.twice = nn.Linear(8, 8)
        self.matrix = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.twice(self.twice(self.token(x)).tanh())
        flat = torch.addmm(self.bias, hidden.flatten(0, 1), self.matrix)
        hidden = (flat.view(hidden.shape) @ self.matrix.t()).tanh()
        hidden = F.linear(torch.matmul(hidden, self.matrix), self.matrix.T)
        return self.head(hidden)


def token_loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.flatten(0, 1), y.flatten())


class Windows(nn.Module):
    """Places of a sample folded into the batch, one after the other or alternating."""

    def __init__(self, alternating: bool) -> None:
        super().__init__()
        self.alternating = alternating
        self.conv, self.inner = nn.Conv1d(2, 4, 3), nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 2, 5]
        batch, steps = x.shape[:2]
        x = x.transpose(0, 1) if self.alternating else x
        h = self.conv(x.flatten(0, 1)).relu().mean(2)
        h = self.inner(h).tanh()
        shape = (steps, batch) if self.alternating else (batch, steps)
        return self.out(h.view(*shape, 4).mean(0 if self.alternating else 1))


class Added(nn.Module):
    """Positions as a parameter that is added, a matrix that is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 4, 8))
        self.scaled = nn.Parameter(torch.randn(8, 8))
        self.left = nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + self.positions
        hidden = F.linear(hidden, self.scaled / self.scaled.norm())
        return self.out((self.left @ hidden).mean(1))


class Function(nn.Module):
    """A model of layers and a function of them and the input."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)
