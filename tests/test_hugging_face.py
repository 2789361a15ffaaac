"""Models of Hugging Face through the five lines, dict batches, padding, ties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fitcompress as fc
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.data import split_batch, take
from fitcompress.data.batches import batch_size, digest, join, part
from fitcompress.model import compressible_layers
from fitcompress.model.positions import aligned_labels, counted, counted_rows
from fitcompress.quantize import grid_of
from fitcompress.refinement import Refinement
from fitcompress.storage.save_load import read
from fitcompress.train import divergence
from fitcompress.train.distillation import distillation_loss
from hugging_face_nets import batches, bert, llama, masked_bert

EMBEDDING = "model.embed_tokens"
GRIDS = [fc.Grid(step=0.05 * 2**i) for i in range(4)]


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x, _ = split_batch(batch)
    with torch.no_grad():
        return model(**x).logits


def rounded(model: nn.Module, step: float = 0.25) -> nn.Module:
    layers = compressible_layers(model)
    grid = fc.Grid(step=step)
    plan = fc.Plan({x.name: fc.Level(grid, 0.0, x.shape) for x in layers})
    return fc.apply(model, plan, progress=False)


def test_inputs_by_name_are_cut_joined_and_digested_like_tensors() -> None:
    batch = batches("tokens", 1)[0]
    x, y = split_batch(batch)
    assert "labels" not in x and y is batch["labels"]
    assert split_batch((x, "given"))[1] == "given"
    assert batch_size(x) == 8
    again = join([part(x, slice(3)), part(x, slice(3, 8))])
    assert all(torch.equal(again[key], x[key]) for key in x)
    assert digest(again) == digest(x) != digest(part(x, torch.arange(8).flip(0)))
    assert [batch_size(x) for x, _ in take([batch, batch], 11)] == [8, 3]


@pytest.mark.parametrize(
    ("make", "labels"), [(llama, "tokens"), (bert, "class"), (masked_bert, "tokens")]
)
def test_the_five_lines(make, labels, tmp_path) -> None:
    net, data = make(), batches(labels)
    budget = fc.Budget(size="45%", groups=fc.fused_groups(net))
    small = fc.compress(net, data, budget, progress=False)
    size = fc.save(small, tmp_path / "f")
    assert size <= 0.45 * 4 * sum(p.numel() for p in net.parameters())
    loaded = fc.load(tmp_path / "f", make())
    trainable = fc.load(tmp_path / "f", make(), trainable=True)
    expected = logits(small, data[0])
    assert torch.equal(logits(loaded, data[0]), expected)
    assert torch.equal(logits(trainable, data[0]), expected)
    before, after = (fc.evaluate(m, data, progress=False) for m in (net, small))
    assert abs(after.loss - before.loss) < 0.2
    shown = fc.report(net, small, data, progress=False)
    assert shown.measured_loss_rise == divergence(net, small, data)


def test_whole_training_ends_closer_to_the_teacher(tmp_path) -> None:
    net, data = llama(), batches("tokens", 8)
    small = rounded(net, 0.3)
    result = fc.finetune(
        small,
        data,
        fc.label_loss(net),
        teacher=net,
        validation=data,
        epochs=3,
        size="60%",
        lr=0.02,
        progress=False,
    )
    assert result.after < 0.95 * result.before
    weight = small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, weight)
    fc.save(small, tmp_path / "f")
    assert torch.equal(fc.load(tmp_path / "f", llama()).lm_head.weight, weight)


def test_the_loss_of_a_causal_model_is_that_of_hugging_face() -> None:
    net, data = llama(), batches("tokens", 1)
    with torch.no_grad():
        own = net(**data[0]).loss
    score = fc.evaluate(net, data, progress=False)
    assert math.isclose(score.loss, float(own), rel_tol=1e-5)
    labels = data[0]["labels"]
    assert score.samples == int((labels[:, 1:] != -100).sum())
    # A sample is a sequence: each counts alike in a loss_fn.
    z = logits(net, data[0])
    each = [
        F.cross_entropy(z[i, :-1], labels[i, 1:]) for i in range(len(labels))
    ]  # ignores −100
    loss = fc.label_loss(net)(z, labels)
    assert torch.allclose(loss, torch.stack(each).mean(), atol=1e-6)


def test_labels_are_aligned_by_what_the_model_predicts() -> None:
    labels = torch.tensor([[1, 2, -100]])
    assert aligned_labels(llama(), labels).tolist() == [[2, -100, -100]]
    assert aligned_labels(masked_bert(), labels) is labels
    x = {"attention_mask": torch.tensor([[1, 0, 1]])}
    assert counted(masked_bert(), x).tolist() == [[True, False, True]]
    assert counted(masked_bert(), x, labels).tolist() == [[True, False, False]]
    assert counted(masked_bert(), torch.zeros(1, 3)) is None


def test_rows_of_a_layer_are_those_of_no_padding() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    x = torch.arange(8.0).reshape(2, 2, 2)
    linear, table = nn.Linear(2, 1), nn.Embedding(3, 1)
    assert counted_rows(linear, x, [mask]).tolist() == [[0, 1], [2, 3], [4, 5]]
    flat = counted_rows(linear, x.flatten(0, 1), [mask])
    assert flat.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert counted_rows(linear, x, [torch.ones(2, 2) > 0]) is x
    pooled = torch.ones(2, 2)  # one row a sample, as wide as the sequence is long
    assert counted_rows(linear, pooled, [mask]) is pooled
    ids = torch.tensor([[0, 1], [2, 2]])
    assert counted_rows(table, ids, [mask]).tolist() == [0, 1, 2]
    image = torch.ones(2, 2, 4)
    assert counted_rows(nn.Conv1d(2, 1, 1), image, [mask]) is image


def test_layers_wait_with_inputs_without_padding() -> None:
    net, (batch,) = bert(), batches("class", 1)
    x, _ = split_batch(batch)
    layers = {layer.name: layer.module for layer in compressible_layers(net)}
    with Lockstep(net, layers, [x]) as passes:
        rows = {}
        while (reached := passes.advance()) is not None:
            rows[reached[0]] = reached[1][0].shape[0]
    tokens = int(x["attention_mask"].sum())
    assert tokens < x["input_ids"].numel()
    assert rows["bert.embeddings.word_embeddings"] == tokens
    assert rows["bert.encoder.layer.0.attention.self.query"] == tokens
    assert rows["classifier"] == 8


@pytest.mark.parametrize("make", [llama, masked_bert])
def test_what_stands_in_padding_changes_nothing(make) -> None:
    net = make()
    one, other = (batches(count=2, padding=token) for token in (0, 7))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    tables = [
        fc.measure(net, data, grids=GRIDS, sparsities=(0.0,), progress=False)
        for data in (one, other)
    ]
    assert (tables[0].distortion == tables[1].distortion).all()
    plan = fc.search(tables[0], fc.Budget(size="30%"))
    small, same = (fc.apply(net, plan, data, progress=False) for data in (one, other))
    for name, value in small.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert divergence(net, small, one) == divergence(net, small, other)
    refined = [
        fc.refine(tables[0], net, data, refinement=Refinement(plans=0), progress=False)
        for data in (one, other)
    ]
    assert (refined[0].distortion == refined[1].distortion).all()


def test_divergence_is_that_of_sequences_without_padding() -> None:
    net, small = llama(), rounded(llama())
    data = batches()
    alone = [
        {"input_ids": row[:length][None]}
        for batch in data
        for row, length in zip(
            batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True
        )
    ]
    assert math.isclose(
        divergence(net, small, data), divergence(net, small, alone), rel_tol=1e-4
    )


def test_distillation_averages_positions_that_count() -> None:
    found, wanted = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    each = [
        distillation_loss(found[i, :n], wanted[i, :n]) for i, n in enumerate((2, 1))
    ]
    loss = distillation_loss(found, wanted, mask)
    assert torch.allclose(loss, sum(each) / 2)
    # All positions alike, without a mask.
    whole = distillation_loss(found.flatten(0, 1), wanted.flatten(0, 1))
    assert torch.allclose(distillation_loss(found, wanted), whole)


def test_tied_embeddings_are_one_layer() -> None:
    net = llama()
    layers = {layer.name: layer for layer in compressible_layers(net)}
    assert "lm_head" not in layers
    assert [name for name, _ in layers[EMBEDDING].tied] == ["lm_head"]
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    assert "lm_head" in {layer.name for layer in compressible_layers(net)}


def test_the_fisher_of_a_tied_weight_is_that_of_both_uses() -> None:
    net, data = llama(), batches("tokens", 1)
    table = fc.measure(net, data, fc.label_loss(net), progress=False)
    trace = 0.0
    for i in range(8):
        x, y = split_batch(part(data[0], slice(i, i + 1)))
        weight = net.model.embed_tokens.weight
        loss = fc.label_loss(net)(net(**x), y)
        trace += float(torch.autograd.grad(loss, weight)[0].square().sum()) / 8
    found = table.fisher_trace[table.names.index(EMBEDDING)]
    assert math.isclose(found, trace, rel_tol=1e-4)


def test_a_tied_weight_stays_tied_and_is_saved_once(tmp_path) -> None:
    small = rounded(llama())
    assert grid_of(small.lm_head) is grid_of(small.model.embed_tokens)
    assert [layer.name for layer in compressible_layers(small)] == [
        layer.name for layer in compressible_layers(llama())
    ]
    fc.save(small, tmp_path / "f")
    packed = read(tmp_path / "f")
    assert EMBEDDING in packed.weights and "lm_head" not in packed.weights
    assert packed.leftovers.aliases["lm_head.weight"] == f"{EMBEDDING}.weight"
    weight = small.lm_head.weight.detach().clone()
    for trainable in (False, True):
        loaded = fc.load(tmp_path / "f", llama(), trainable=trainable)
        assert torch.equal(loaded.lm_head.weight, weight)
        plain = fc.remove(loaded)
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        assert torch.equal(plain.lm_head.weight, weight)
    macs = fc.measure(small, batches(), progress=False)
    assert macs.macs[macs.names.index(EMBEDDING)] == 32 * 16 * 10  # of the head


def test_weights_shared_by_two_linears_are_rounded(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)
        )
        net[2].weight = net[0].weight
        return net.eval()

    net, data = make(), [torch.randn(64, 4)]
    small = fc.compress(net, data, fc.Budget(size=540), progress=False)
    assert torch.equal(small[0].weight, small[2].weight)
    codes = small[0].weight / grid_of(small[0]).scale
    assert torch.allclose(codes, (net[0].weight / grid_of(small[0]).scale).round())
    fc.save(small, tmp_path / "f")
    assert torch.equal(fc.load(tmp_path / "f", make())(data[0]), small(data[0]))


def test_methods_that_train_refuse_shared_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    with pytest.raises(fc.errors.UnsupportedLayerError, match="shared with '1'"):
        fc.methods.PruningTernary().run(net, [torch.randn(8, 4)], progress=False)


def test_fused_groups() -> None:
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    groups = fc.fused_groups(llama())
    assert len(groups) == 4
    assert tuple(f"{attention}.{x}_proj" for x in "qkv") in groups
    assert (f"{mlp}.gate_proj", f"{mlp}.up_proj") in groups
    assert fc.fused_groups(llama(), [("gate_proj", "up_*")]) == tuple(
        g for g in groups if "mlp" in g[0]
    )
    inner = "bert.encoder.layer.0.attention.self"
    assert (f"{inner}.query", f"{inner}.key", f"{inner}.value") in fc.fused_groups(
        bert()
    )
    net, data = llama(), batches()
    table = fc.measure(net, data, progress=False)
    plan = fc.search(table, fc.Budget(size="15%", groups=groups))
    for group in groups:
        assert len({plan.levels[name].grid for name in group}) == 1


def test_queries_of_cross_attention_stay_alone() -> None:
    block = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("q_proj", "k_proj", "v_proj")})
    net = nn.ModuleDict({"self_attn": block})
    net["encoder_attn"] = nn.ModuleDict(
        {n: nn.Linear(2, 2) for n in ("q_proj", "k_proj", "v_proj")}
    )
    assert fc.fused_groups(net) == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    )
