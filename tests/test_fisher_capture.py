"""Which weights are caught, where samples lie, and what is left out by name."""

import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from fisher_oracle import assert_exact, probe_of, squares_one_by_one
from fitcompress.errors import (
    CalibrationError,
    NonFiniteError,
    UnsupportedLayerError,
)
from fitcompress.sensitivity import FisherEstimator
from fitcompress.sensitivity.moments import FisherMoments


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % 3


class Encoder(nn.Module):
    """torch's own encoder layer: packed attention projections."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.out, self.dim = nn.Linear(8, 3), int(batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.token(x) + self.place(torch.arange(x.shape[1])[None])
        if not self.dim:
            hidden = hidden.transpose(0, 1)
        return self.out(self.layer(hidden).mean(self.dim))


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_as_many_tokens_as_samples(batch_first) -> None:
    # Six tokens of six samples: shapes alone do not tell which is which.
    torch.manual_seed(0)
    model = Encoder(batch_first).eval()
    x = torch.randint(11, (6, 6))
    estimator = assert_exact(model, x, labels(6), cross_entropy)
    assert "layer.self_attn.in_proj_weight" in estimator.moments.names
    assert "layer.self_attn.out_proj" in estimator.moments.names


def test_attention_without_gradients_elsewhere() -> None:
    # The fused path of torch would be taken: nothing requires a gradient.
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Flatten(),
        nn.Linear(40, 3),
    ).eval()
    assert_exact(model, torch.randn(4, 5, 8), labels(4), cross_entropy)
    assert torch.backends.mha.get_fastpath_enabled()


class CrossAttention(nn.Module):
    """Separate projections, and packed ones used whole, in two parts and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(5, 8), nn.Linear(5, 7)
        self.cross = nn.MultiheadAttention(8, 2, kdim=5, vdim=7, batch_first=True)
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.cross(self.query(x), x, self.value(x))[0]
        h = h + self.packed(h, h, h)[0]
        h = h + self.packed(h, h.tanh(), h.tanh())[0]
        h = h + self.packed(h, h.tanh(), h * 2)[0]
        return self.out(h.mean(1))


def test_parts_of_a_packed_weight_that_overlap() -> None:
    torch.manual_seed(0)
    assert_exact(
        CrossAttention().eval(), torch.randn(4, 3, 5), labels(4), cross_entropy
    )


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


def test_tied_and_reused_weights_sum_before_they_are_squared() -> None:
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randint(11, (5, 4))
    estimator = assert_exact(model, x, torch.randint(11, (5, 4)), token_loss)
    assert estimator.moments.names == ("matrix", "token", "twice")


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


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_windows_folded_into_the_batch(alternating, count) -> None:
    torch.manual_seed(0)
    model, x = Windows(alternating).eval(), torch.randn(count, 4, 2, 5)
    assert_exact(model, x, labels(count), cross_entropy)


def test_samples_that_are_equal_do_not_hide_where_they_lie() -> None:
    torch.manual_seed(0)
    model, x = Windows(True).eval(), torch.randn(4, 4, 2, 5)
    x[1] = x[2] = x[0]
    assert_exact(model, x, labels(4), cross_entropy)


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


def test_other_uses_are_named_once(caplog) -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(5, 4, 8)
    others = ("positions", "scaled", "left")
    with caplog.at_level(logging.WARNING):
        estimator = FisherEstimator(model)
        for _ in range(3):
            estimator.update(x, labels(5), cross_entropy)
    assert len(caplog.records) == 3
    assert "no Fisher moments of positions: it enters add" in caplog.text
    assert estimator.moments.names == ("out",)
    assert estimator.moments.unsupported["scaled"] in (
        "it enters norm",
        "it enters div",
    )
    assert_exact(model, x, labels(5), cross_entropy, others)


def test_recurrent_layers_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    others = ("cell.weight_ih_l0", "cell.weight_hh_l0")
    estimator = assert_exact(
        Recurrent().eval(), torch.randn(4, 6, 4), labels(4), cross_entropy, others
    )
    assert "gru" in estimator.moments.unsupported["cell.weight_ih_l0"]


def test_a_weight_that_is_only_looked_at_is_measured() -> None:
    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.shape[0] == 3
            assert self.weight.numel() > 0
            assert torch.isfinite(self.weight.detach()).all()
            return super().forward(x.to(self.weight.dtype))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Looks(5, 3)).eval()
    assert_exact(model, torch.randn(4, 4), labels(4), cross_entropy)


def test_a_weight_that_a_parametrization_computes() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Half())
    x = torch.randn(6, 4)
    estimator = FisherEstimator(model)
    estimator.update(x, labels(6), cross_entropy)
    # The gradient for the original is half of that for the weight in use.
    wanted = squares_one_by_one(model, x, labels(6), cross_entropy)
    found = estimator.moments.squares["0"]
    original = wanted["0.parametrizations.weight.original"].float()
    torch.testing.assert_close(found, 4 * original)
    assert estimator.moments.names == ("0", "2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_a_compiled_model_is_measured_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(6, 4)
    found = []
    for each in (model, torch.compile(model)):
        estimator = FisherEstimator(each)
        estimator.update(x, labels(6), cross_entropy)
        found.append(estimator.moments)
    assert found[0].names == found[1].names
    for name in found[0].names:
        assert torch.equal(found[0].squares[name], found[1].squares[name])


def test_in_place_activations_and_frozen_first_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(1, 3, 3),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, 3),
    ).eval()  # fmt: skip

    class Unsqueezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[1](self.layers[0](x))
            return self.layers[2:](x[:, None])

    assert_exact(Unsqueezed(), torch.randn(5, 2, 7), labels(5), cross_entropy)
    model[0].requires_grad_(False)
    estimator = FisherEstimator(Unsqueezed())
    estimator.update(torch.randn(5, 2, 7), labels(5), cross_entropy)
    assert "layers.0" in estimator.moments.names
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


class Experts(nn.Module):
    """Each token goes to the expert that its first value chooses."""

    def __init__(self, selecting: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.out, self.selecting = nn.Linear(4, 3), selecting

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 4]
        flat = self.inner(x).flatten(0, 1)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = (x.flatten(0, 1)[:, 0] > 0) == bool(number)
            if self.selecting == "list":
                rows = torch.tensor([i for i, c in enumerate(chosen.tolist()) if c])
            else:
                rows = chosen.nonzero()[:, 0]
            mixed = mixed.index_add(0, rows, expert(flat[rows]).tanh())
        return self.out(mixed.view(x.shape).mean(1))


@pytest.mark.parametrize("selecting", ["nonzero", "list"])
def test_experts_that_see_some_of_the_tokens(selecting) -> None:
    torch.manual_seed(0)
    model, x = Experts(selecting).eval(), torch.randn(6, 5, 4)
    # Two samples with as many tokens for each expert: they look regular.
    x[0, :, 0] = x[1, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    if selecting == "list":
        x[1, 0, 0] = -1.0
    assert_exact(model, x, labels(6), cross_entropy)


class Function(nn.Module):
    """A model of layers and a function of them and the input."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def places(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])[None]


def in_place(m: Function, x: torch.Tensor) -> torch.Tensor:
    single = [torch.relu_(m.conv(torch.relu_(m.stem(z)))) for z in x.mT]
    return m.out(torch.stack(single).mean(2))


# Positions that all samples share, and are not merely broadcast to them; models whose
# results are views that are overwritten, inputs that require a gradient, and so on.
TRICKY = {
    "one position row": lambda m, x: m.out(m.inner(x + m.place(places(x))[0]).mean(1)),
    "positions averaged": lambda m, x: m.out(
        m.inner(x + m.place(places(x)).mean(0)).mean(1)
    ),
    "positions flattened": lambda m, x: m.out(
        m.inner(x + m.place(places(x)).view(-1, 4)[: x.shape[1]]).mean(1)
    ),
    "inputs with gradients": lambda m, x: m.out(
        m.inner((x + m.place(places(x))).detach().requires_grad_()).mean(1)
        + m.place(places(x)).mean(1)
    ),
    "no gradient": lambda m, x: m.out(
        m.inner(x).mean(1) + without_gradient(m, x) + m.place(places(x)).mean(1)
    ),
    "rows by value": lambda m, x: m.out(
        torch.zeros(len(x), 4).index_add(
            0,
            (x[..., 0] > 0).nonzero()[:, 0],
            m.inner(x[x[..., 0] > 0]).tanh() + m.place(places(x)).mean(),
        )
    ),
}  # fmt: skip


def without_gradient(m: Function, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return m.inner(x).mean(1)


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_models(name) -> None:
    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 4), "place": nn.Embedding(5, 4)}
    model = Function(TRICKY[name], **layers, out=nn.Linear(4, 3)).eval()
    assert_exact(model, torch.randn(6, 5, 4), labels(6), cross_entropy)


def test_a_view_that_is_overwritten() -> None:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv1d(4, 4, 2), "conv": nn.Conv1d(4, 4, 2)}
    model = Function(in_place, **layers, out=nn.Linear(4, 3)).eval()
    assert_exact(model, torch.randn(6, 5, 4), labels(6), cross_entropy)


def test_other_shapes_are_looked_at_anew() -> None:
    # With a single step both ways to fold look alike.
    torch.manual_seed(0)
    model = Windows(True).eval()
    estimator = FisherEstimator(model)
    wanted = 0.0
    for steps in (1, 4):
        x = torch.randn(4, steps, 2, 5)
        estimator.update(x, labels(4), cross_entropy)
        squares = squares_one_by_one(model, x, labels(4), cross_entropy)
        wanted += float(squares["inner.weight"].sum())
    assert float(estimator.moments.trace["inner"][0]) == pytest.approx(wanted, rel=1e-6)


def test_a_loss_with_a_layer_in_it() -> None:
    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    model = Function(lambda m, x: m.inner(x).transpose(0, 1), **layers).eval()

    def loss(hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model.head(hidden).mean(0), y)

    assert_exact(model, torch.randn(4, 4, 4), labels(4), loss)


def test_rows_of_a_weight_that_overlap() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))

    def used(m: Function, x: torch.Tensor) -> torch.Tensor:
        h = x @ weight[0:4] + x.tanh() @ weight[2:6]
        h = h + F.embedding((x[..., 0] > 0).long(), weight[1:4])
        return m.out(F.linear(h, weight[1:5]).mean(1))

    model = Function(used, out=nn.Linear(4, 3)).eval()
    model.weight = weight
    assert_exact(model, torch.randn(5, 3, 4), labels(5), cross_entropy)


def test_other_arguments_of_a_product_are_looked_at() -> None:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(2, 3))
    model = Function(
        lambda m, x: torch.addmm(bias[:1], m.inner(x), m.out.weight.t()),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3, bias=False),
    ).eval()
    model.bias = bias
    assert_exact(model, torch.randn(5, 4), labels(5), cross_entropy, ("bias",))


class Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1


def test_computed_weights_are_known_by_what_they_are() -> None:
    torch.manual_seed(0)
    model = Function(
        lambda m, x: F.linear(
            m.first(m.second(x) @ m.second.weight.t()) @ m.other, m.table.weight
        ),
        first=nn.Linear(4, 4),
        second=nn.Linear(4, 4),
        table=nn.Linear(4, 3, bias=False),
    ).eval()
    model.register_buffer("other", torch.randn(4, 4))
    for layer in (model.first, model.second, model.table):
        nn.utils.parametrize.register_parametrization(layer, "weight", Same())
    x = torch.randn(5, 4)
    wanted = squares_one_by_one(model, x, labels(5), cross_entropy)
    estimator = FisherEstimator(model)
    estimator.update(x, labels(5), cross_entropy)
    assert estimator.moments.names == ("first", "second", "table")
    for name in estimator.moments.names:
        original = wanted[f"{name}.parametrizations.weight.original"].float()
        torch.testing.assert_close(estimator.moments.squares[name], original)


def test_gradients_within_the_model_are_refused() -> None:
    def energy(m: Function, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        total = m.out(m.inner(x).tanh()).sum()
        return torch.autograd.grad(total, x, create_graph=True)[0]

    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 4), "out": nn.Linear(4, 1)}
    model = Function(energy, **layers).eval()
    with pytest.raises(UnsupportedLayerError, match="differentiates through"):
        FisherEstimator(model).update(torch.randn(5, 4), labels(5), cross_entropy)


def test_an_unsupported_weight_stays_away(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(5, 4, 8)
    estimator = FisherEstimator(model)
    for _ in range(2):
        estimator.update(x, labels(5), cross_entropy)
    moments = estimator.moments
    assert set(moments.trace) == set(moments.squares) == set(moments.forms) == {"out"}
    moments.save(tmp_path / "file")
    loaded = FisherMoments.load(tmp_path / "file")
    resumed = FisherEstimator(model, moments=loaded)
    resumed.update(x, labels(5), cross_entropy)
    assert resumed.moments.names == ("out",)


def test_a_batch_that_fails_half_way_spoils_the_estimator() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).eval(), torch.randn(6, 4)
    estimator = FisherEstimator(model, memory=1)

    def broken(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(out, y) + (out - out.detach()).abs().sqrt().sum()

    with pytest.raises(NonFiniteError, match="a gradient of layer 'weight'"):
        estimator.update(x, labels(6), broken)
    with pytest.raises(CalibrationError, match="failed half-way"):
        estimator.update(x, labels(6), cross_entropy)


def test_nothing_is_kept_between_updates() -> None:
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randint(11, (5, 4))
    estimator = FisherEstimator(model)
    kept = []
    model.twice.register_forward_hook(lambda *a: kept.append(weakref.ref(a[2])))
    gc.disable()
    try:
        estimator.update(x, torch.randint(11, (5, 4)), token_loss)
    finally:
        gc.enable()
    assert kept
    assert not any(ref() is not None for ref in kept)


def norm(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Linear(5, 3))


@pytest.mark.parametrize("model", [norm(), norm(track_running_stats=False).eval()])
def test_norms_that_couple_samples_are_refused(model) -> None:
    with pytest.raises(CalibrationError, match=r"batch norm.*'1'.*model.eval\(\)"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


def test_active_dropout_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))
    with pytest.raises(CalibrationError, match=r"dropout.*'1'"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


@pytest.mark.parametrize(
    "mix", [lambda h: h - h.mean(0), lambda h: h - 0.5 * h[:1], lambda h: h.cumsum(0)]
)
def test_outputs_that_depend_on_other_samples_are_refused(mix) -> None:
    torch.manual_seed(0)
    model = Function(lambda m, x: mix(m.out(x)), out=nn.Linear(4, 3)).eval()
    with pytest.raises(UnsupportedLayerError, match="the model does not see"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


def test_other_layers_that_mix_samples_are_refused() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedLayerError, match="'2' does not see the samples"):
        FisherEstimator(model).update(torch.randn(6, 4), labels(6), cross_entropy)


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "vocab_size": 50,
    }  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_labels=3)
    )
    gpt = transformers.GPT2LMHeadModel(  # Conv1D layers, tied embeddings
        transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    tokens = torch.randint(50, (6, 7))
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[1, 4:] = 0
    x = {"input_ids": tokens, "attention_mask": mask}

    def last(output: object, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output.logits, y)

    def each(output: object, y: torch.Tensor) -> torch.Tensor:
        return token_loss(output.logits, y)

    for model, y, loss in ((bert, labels(6), last), (gpt, tokens.flip(0), each)):
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.1)
        estimator = assert_exact(model.eval(), x, y, loss)
        assert not probe_of(estimator).alone
