"""Models whose moments are known from per-sample gradients of torch.func."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy


class Twice(nn.Module):
    """One layer at two places: its gradients are summed before they are squared."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.inner(x).tanh()).tanh())


class Windows(nn.Module):
    """Folds the positions of a sample into the batch before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x.reshape(-1, 4)).tanh().reshape(len(x), -1))


class Overwrites(nn.Module):
    """Changes a layer's input in place after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.inner(x)
        x += 1
        return self.out(torch.tanh(x + y))


class Named(nn.Module):
    """Calls a layer with its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(input=self.inner(x).tanh())


class Tokens(nn.Module):
    """Embeds tokens; three per sample, some of them twice."""

    def __init__(self, positions: str = "") -> None:
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.place = nn.Embedding(4, 4) if positions else None
        self.positions = positions
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.token(x)
        if self.place is not None:
            # The same for all samples: without a batch dimension, with one of size one,
            # or a scalar at a time.
            places = torch.arange(x.shape[1])
            if self.positions == "one":
                hidden = hidden + self.place(places[None])
            elif self.positions == "scalars":
                hidden = hidden + torch.stack([self.place(i) for i in places])
            else:
                hidden = hidden + self.place(places)
        return self.out(self.inner(hidden).tanh().mean(1))


class Sized(nn.Module):
    """Asks a transposed convolution for one of the sizes that its stride allows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mean = nn.ConvTranspose2d(2, 3, 2, 3), Mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(self.inner(x, output_size=(10, 9)).tanh())


class TokensOfTwo(nn.Module):
    """Two lookups in one table, the samples' windows folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = self.table(x.reshape(-1, 2)).reshape(len(x), -1, 4)
        return windows.sum(1) * self.table(x[:, 0])


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).mean(2)


def frozen(model: nn.Module) -> nn.Module:
    model[0].requires_grad_(False)
    return model


def normed() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), Mean(), nn.Linear(4, 3))


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, Mean())


CASES = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "sequence": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)
        ),
        (5, 4),
    ),
    "conv1d": (lambda: sequential(nn.Conv1d(2, 4, 3, 2), nn.Conv1d(4, 3, 2)), (2, 9)),
    "groups": (
        lambda: sequential(
            nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1, groups=3)
        ),
        (4, 6, 6),
    ),
    "depthwise, dilated, circular": (
        lambda: sequential(
            nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, padding_mode="circular")
        ),
        (3, 5, 5),
    ),
    "same padding": (
        lambda: sequential(nn.Conv2d(2, 3, (5, 3), padding="same")),
        (2, 5, 5),
    ),
    "conv3d": (lambda: sequential(nn.Conv3d(2, 3, 2, stride=(1, 2, 1))), (2, 3, 4, 3)),
    "transposed, 1d": (
        lambda: sequential(
            nn.ConvTranspose1d(4, 6, 4, 2, padding=1, groups=2), nn.Conv1d(6, 3, 2)
        ),
        (4, 5),
    ),
    "transposed, 2d": (
        lambda: sequential(
            nn.Conv2d(2, 4, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, (1, 2), (3, 2), groups=3),
        ),
        (2, 4, 3),
    ),
    "transposed, 3d": (
        lambda: sequential(
            nn.ConvTranspose3d(2, 3, (2, 3, 1), (1, 2, 2), output_padding=(0, 1, 1))
        ),
        (2, 3, 2, 3),
    ),
    "output size of the call": (Sized, (2, 3, 3)),
    "embedding": (Tokens, [(3,), 5]),
    "embedding of one token": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)),
        [(), 7],
    ),
    "embedding, twice": (
        lambda: nn.Sequential(TokensOfTwo(), nn.Tanh(), nn.Linear(4, 3)),
        [(6,), 5],
    ),
    "positions without batch": (lambda: Tokens("none"), [(4,), 5]),
    "positions in a batch of one": (lambda: Tokens("one"), [(4,), 5]),
    "positions one by one": (lambda: Tokens("scalars"), [(4,), 5]),
    "batch norm": (normed, (2, 5, 5)),
    "reused layer": (Twice, (4,)),
    "folded batch": (Windows, (3, 4)),
    "overwritten input": (Overwrites, (4,)),
    "input by name": (Named, (4,)),
    "in-place activation": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        (4,),
    ),
    "frozen first layer": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))),
        (4,),
    ),
}


def make_case(name: str, samples: int = 20) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = CASES[name]
    if isinstance(shape, list):  # of indices below the second number
        return build().eval(), torch.randint(shape[1], (samples, *shape[0]))
    return build().eval(), torch.randn(samples, *shape)


def oracle(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Per-sample gradients of every parameter, [N, …], one sample at a time."""
    parameters = {k: p.detach().double() for k, p in model.named_parameters()}
    buffers = {
        k: b.double() if b.is_floating_point() else b for k, b in model.named_buffers()
    }
    x = x.double() if x.is_floating_point() else x

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor):
        out = functional_call(model, (values, buffers), (x[None],))
        return cross_entropy(out, y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
