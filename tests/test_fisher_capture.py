"""Which weights are caught, and where samples lie."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fisher_capture_nets import Function, Products, Windows, labels, token_loss
from fisher_oracle import assert_exact, probe_of, squares_one_by_one
from fitcompress.sensitivity import FisherEstimator


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


def test_tied_and_reused_weights_sum_before_they_are_squared() -> None:
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randint(11, (5, 4))
    estimator = assert_exact(model, x, torch.randint(11, (5, 4)), token_loss)
    assert estimator.moments.names == ("matrix", "token", "twice")


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
