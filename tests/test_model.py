"""Which layers can be compressed, their inputs as columns, and what they cost."""

import pytest
import torch
from torch import nn

from fitcompress.errors import NoCompressibleLayerError, UnsupportedLayerError
from fitcompress.model import compressible_layers, fingerprint, padded_input, patches
from fitcompress.model.costs import bops, count_macs, dense_bytes, overhead_bytes
from fitcompress.model.patches import output_columns


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in compressible_layers(model)]


def test_layers_come_in_the_order_of_the_model_with_their_matrices(net) -> None:
    layers = compressible_layers(net)
    assert [layer.name for layer in layers] == ["conv", "deep", "head", "out"]
    # conv: 8 outputs of 2 channels × 3×3; deep: 8 groups of one channel × 3×3.
    assert [(x.rows, x.columns, x.groups) for x in layers] == [
        (8, 18, 1),
        (8, 9, 8),
        (7, 72, 1),
        (5, 7, 1),
    ]
    assert torch.equal(layers[0].matrix(), net.conv.weight.detach().flatten(1))
    assert [layer.size for layer in layers] == [144, 72, 504, 35]


def test_a_model_may_be_a_layer_itself() -> None:
    assert names(nn.Linear(3, 2)) == [""]


def test_a_weight_that_layers_share_is_one_layer() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    assert names(model) == ["0", "1"]
    assert compressible_layers(model)[0].tied == (("2", model[2]),)


def test_weights_shared_with_other_kinds_of_modules_stay_in_float() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Bilinear(2, 2, 4))
    model[2].other = model[0].weight
    assert names(model) == ["1"]


def test_a_module_that_is_used_twice_counts_once() -> None:
    twice = nn.Linear(4, 4)
    assert names(nn.Sequential(twice, nn.ReLU(), twice)) == ["0"]


def test_attention_leaves_its_output_projection_alone() -> None:
    # It is a Linear that is never called: attention reads its weight.
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert names(model) == ["linear1", "linear2"]


def test_other_parametrizations_stay_in_float() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert names(nn.Sequential(normed, nn.Linear(4, 4))) == ["1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.ReLU(),
        nn.EmbeddingBag(3, 2),
        nn.Linear(2, 2).double(),
        nn.Sequential(nn.BatchNorm1d(3), nn.LSTM(3, 2)),
    ],
    ids=["relu", "embedding", "float64", "recurrent"],
)
def test_a_model_without_compressible_layers_says_what_it_has(model) -> None:
    with pytest.raises(NoCompressibleLayerError, match=r"got .*wanted .*To fix it: "):
        compressible_layers(model)


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": "same"},
    {
        "kernel_size": 4,
        "padding": "same",
        "dilation": 2,
    },  # uneven: one more on the right
    {"kernel_size": 2, "padding": 2, "dilation": 3, "stride": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 2, "groups": 4, "stride": 3},  # depthwise
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 5, "padding": "valid"},
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_weight_times_patches_is_the_convolution(dims, options) -> None:
    if dims == 3 and options.get("padding_mode") == "reflect":
        options = {**options, "padding": 1}  # torch reflects 3-d inputs by less
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(4, 8, bias=False, **options)
    x = torch.randn(2, 4, *(7, 9, 8)[:dims])
    with torch.no_grad():
        y = module(x)
        columns = patches(module, x)
        assert columns.shape[:2] == (module.groups, 2)
        weight = module.weight.reshape(module.groups, -1, columns.shape[-1])
        product = torch.einsum("goi,gbpi->gbpo", weight, columns)
        torch.testing.assert_close(product, output_columns(module, y))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_windows_of_a_padded_input_are_what_the_weight_multiplies(
    dims, options
) -> None:
    if dims == 3 and options.get("padding_mode") == "reflect":
        options = {**options, "padding": 1}  # torch reflects 3-d inputs by less
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(4, 8, bias=False, **options)
    x = torch.randn(2, 4, *(7, 9, 8)[:dims])
    padded, kernel, stride, dilation = padded_input(module, x)
    assert padded.dim() == 5
    weight = module.weight.reshape(8, -1, *kernel)
    y = nn.functional.conv3d(
        padded, weight, None, stride, 0, dilation, groups=module.groups
    )
    torch.testing.assert_close(y.reshape(module(x).shape), module(x))
    assert torch.equal(padded_input(module, x[0])[0], padded[:1])
    assert padded_input(module, x.bfloat16())[0].dtype == torch.float32


def test_the_padded_input_of_a_linear_layer_is_its_positions() -> None:
    module, x = nn.Linear(3, 2), torch.randn(5, 4, 3)
    padded, *window = padded_input(module, x)
    assert torch.equal(padded, x.reshape(20, 3, 1, 1, 1))
    assert window == [[1, 1, 1]] * 3
    assert padded_input(module, x[0, 0])[0].shape == (1, 3, 1, 1, 1)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "slice"])
def test_patches_of_an_input_in_any_layout(layout) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 2, 3, stride=2)
    x = torch.randn(2, 4, 8, 6)
    same = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "slice": torch.cat([x, x], 1)[:, 4:],
    }[layout]
    assert torch.equal(patches(module, same), patches(module, x))


def test_patches_of_a_single_image_without_batch_dimension() -> None:
    module, x = nn.Conv2d(3, 2, 3), torch.randn(3, 5, 5)
    assert torch.equal(patches(module, x), patches(module, x[None]))
    y = module(x).detach()
    assert torch.equal(output_columns(module, y), output_columns(module, y[None]))


def test_patches_of_a_linear_layer_are_its_positions() -> None:
    module = nn.Linear(3, 2)
    assert patches(module, torch.zeros(5, 3)).shape == (1, 5, 1, 3)
    x = torch.randn(5, 4, 2, 3)
    assert torch.equal(patches(module, x), x.reshape(1, 5, 8, 3))
    assert output_columns(module, module(x)).shape == (1, 5, 8, 2)


@pytest.mark.parametrize(("skip", "offset"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_subsampled_patches_are_a_subset_in_every_dimension(skip, offset) -> None:
    module = nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(2, 2, 6, 7)
    every = patches(module, x).reshape(1, 2, 6, 7, -1)
    wanted = every[:, :, offset::skip, offset::skip]
    some = patches(module, x, skip=skip, offset=offset)
    assert torch.equal(some, wanted.flatten(2, 3))


def test_subsampling_leaves_at_least_one_position_per_dimension() -> None:
    module = nn.Conv2d(2, 2, 3)
    x = torch.randn(1, 2, 3, 9)  # one row of positions, seven columns
    some = patches(module, x, skip=4, offset=3)
    assert torch.equal(some, patches(module, x)[:, :, 3::4])


def test_other_modules_cannot_be_unfolded() -> None:
    with pytest.raises(UnsupportedLayerError, match="Bilinear"):
        patches(nn.Bilinear(2, 2, 2), torch.zeros(1, 2))
    with pytest.raises(UnsupportedLayerError, match="Bilinear"):
        padded_input(nn.Bilinear(2, 2, 2), torch.zeros(1, 2))


def test_multiply_accumulates_by_hand(net, images) -> None:
    # conv: 6·6 positions × 8·18; deep, stride 2: 3·3 × 8·9; linear layers: once.
    wanted = {"conv": 36 * 144, "deep": 9 * 72, "head": 504, "out": 35}
    assert count_macs(net, images[:1]) == wanted
    assert count_macs(net, images[:5]) == wanted  # of one sample, whatever the batch


def test_a_layer_that_runs_twice_costs_twice() -> None:
    twice = nn.Linear(4, 4)
    model = nn.Sequential(twice, nn.ReLU(), twice)
    assert count_macs(model, torch.zeros(3, 4)) == {"0": 32}


class Windows(nn.Module):
    """Folds windows of its input into the batch, as shifted-window transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, 3)).reshape(len(x), -1)


def test_positions_that_are_folded_into_the_batch_count() -> None:
    assert count_macs(Windows(), torch.zeros(5, 12)) == {"linear": 4 * 6}


def test_counting_leaves_modes_and_hooks_as_they_were(net, images) -> None:
    net.train()
    net.norm.eval()  # a frozen norm inside a model in training
    count_macs(net, images[:1])
    assert net.training
    assert not net.norm.training
    assert not any(m._forward_hooks for m in net.modules())


def test_bit_operations_are_macs_times_both_widths() -> None:
    assert bops(1000, 32) == 1000 * 32 * 32
    assert bops(1000, 4, 8) == 32_000


def test_dense_bytes_count_shared_parameters_once(net) -> None:
    # 144 + 72+8 + 504+7 + 35+5 weights and biases, 16 of the norm.
    assert dense_bytes(net) == 4 * 791
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert dense_bytes(tied) == 64


def test_overhead_counts_two_numbers_per_folded_channel_and_biases(net) -> None:
    with_norm = overhead_bytes(net, compressible_layers(net))
    net.norm = nn.Identity()
    without = overhead_bytes(net, compressible_layers(net))
    assert with_norm - without == 8 * 2 * 2 + 13  # and one index entry


def test_overhead_counts_what_the_file_holds(net) -> None:
    without = overhead_bytes(net, compressible_layers(net))
    net.register_buffer("cache", torch.zeros(1000), persistent=False)
    assert overhead_bytes(net, compressible_layers(net)) == without
    net.register_buffer("kept", torch.zeros(1000))
    assert overhead_bytes(net, compressible_layers(net)) == without + 4000 + 13


def test_overhead_does_not_count_grids(net, small) -> None:
    wanted = overhead_bytes(net, compressible_layers(net))
    assert overhead_bytes(small, compressible_layers(small)) == wanted
    assert dense_bytes(small) == dense_bytes(net)


def test_the_fingerprint_knows_names_shapes_weights_and_buffers(net) -> None:
    def of(model: nn.Module) -> str:
        return fingerprint(model, compressible_layers(model))

    first = of(net)
    assert of(net) == first
    assert of(net.bfloat16().float()) != first  # rounded weights
    net.conv.weight.data.copy_(net.conv.weight.bfloat16())
    before = of(net)
    net.norm.running_mean[0] += 1
    assert of(net) != before
    assert of(nn.Sequential(net)) != of(net)


def test_embeddings_are_matrices_of_their_entries() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 4))
    table, linear = compressible_layers(model)
    assert (table.one_hot, linear.one_hot) == (True, False)
    assert (table.rows, table.columns, table.groups) == (6, 4, 1)
    assert torch.equal(table.matrix(), model[0].weight.detach())
    assert count_macs(model, torch.zeros(2, 3).long()) == {"0": 0, "1": 3 * 16}
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        padded_input(model[0], torch.zeros(2, 3).long())


def test_embeddings_that_do_more_than_look_up_stay_in_float() -> None:
    class Scaled(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(
        nn.Embedding(6, 4, max_norm=1.0),
        nn.Embedding(6, 4, sparse=True),
        Scaled(6, 4),
        nn.Embedding(6, 4, scale_grad_by_freq=True),
    )
    assert names(model) == ["3"]


TRANSPOSED = [
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 2, "stride": 3, "dilation": 2, "groups": 4},  # gaps; depthwise
    {"kernel_size": 3, "padding": 3, "stride": 2},  # more padding than kernel: cropped
    {"kernel_size": 3, "dilation": 3, "output_padding": 2},
    {"kernel_size": 1, "padding": 1, "stride": 3, "output_padding": 2},
]


def transposed(dims: int, inputs: int, outputs: int, **options) -> nn.Module:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return kind(inputs, outputs, **options)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_matrix_times_patches_is_the_transposed_convolution(dims, options) -> None:
    torch.manual_seed(0)
    module = transposed(dims, 4, 8, bias=False, **options)
    (layer,) = compressible_layers(module)
    x = torch.randn(2, 4, *(4, 5, 3)[:dims])
    with torch.no_grad():
        y = module(x)
        assert (layer.rows, layer.columns) == (8, layer.size // 8)
        matrix = layer.matrix().reshape(layer.groups, -1, layer.columns)
        columns = patches(module, x)
        product = torch.einsum("goi,gbpi->gbpo", matrix, columns)
        torch.testing.assert_close(product, output_columns(module, y))
        # The same from windows that are not unfolded.
        padded, kernel, stride, dilation = padded_input(module, x)
        weight = layer.matrix().reshape(8, -1, *kernel)
        again = nn.functional.conv3d(
            padded, weight, None, stride, 0, dilation, layer.groups
        )
        torch.testing.assert_close(again.reshape(y.shape), y)
        assert torch.equal(padded_input(module, x[0])[0], padded[:1])


def test_matrices_and_weights_of_transposed_convolutions_by_hand() -> None:
    # Two groups of two inputs and one output, a kernel of two: [4, 1, 2].
    module = nn.ConvTranspose1d(4, 2, 2, groups=2)
    weight = torch.arange(8.0).reshape(4, 1, 2)
    module.weight = nn.Parameter(weight)
    (layer,) = compressible_layers(module)
    assert layer.matrix().tolist() == [[1, 0, 3, 2], [5, 4, 7, 6]]
    assert torch.equal(layer.weight_of(layer.matrix()), weight)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_matrix_goes_back_to_its_weight(dims, groups) -> None:
    for module in (
        transposed(dims, 8, 12, kernel_size=(2, 3, 4)[:dims], groups=groups),
        nn.Conv2d(8, 12, (2, 3), groups=groups),
    ):
        (layer,) = compressible_layers(module)
        weight = module.weight.detach()
        matrix = layer.matrix_of(weight)
        assert matrix.shape == (12, layer.columns)
        assert torch.equal(layer.weight_of(matrix), weight)


def test_patches_for_an_output_size_of_the_call() -> None:
    torch.manual_seed(0)
    module, x = (
        nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False),
        torch.randn(1, 2, 4, 4),
    )
    y = module(x, output_size=(10, 9)).detach()
    columns = patches(module, x, output_shape=y.shape)[0]
    matrix = compressible_layers(module)[0].matrix()
    torch.testing.assert_close(columns @ matrix.T, output_columns(module, y)[0])
    padded = padded_input(module, x, output_shape=y.shape)[0]
    assert padded.shape == (1, 2, 1, 12, 11)


def test_multiply_accumulates_of_a_transposed_convolution_by_hand() -> None:
    # Each of 4·5·5 input values meets 3 output channels of its group × 3×3.
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    assert count_macs(module, torch.zeros(2, 4, 5, 5)) == {"": 100 * 27}


def test_transposed_convolutions_that_do_something_else_are_left_alone() -> None:
    class Scaled(nn.ConvTranspose1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    normed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(2, 2, 3))
    assert names(nn.Sequential(Scaled(2, 2, 3), normed, nn.Linear(2, 2))) == ["2"]
