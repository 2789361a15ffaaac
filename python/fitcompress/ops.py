"""Native tensor operations: the inner loops of measuring, training and compensating.

The kernels live in the shared library `_ops.so` and are registered with torch as
`torch.ops.fitcompress.*` when this module is imported. They run on the CPU, on torch's
own threads, and, in a build with CUDA (`has_cuda`), on CUDA tensors. Results do not
depend on the number of threads. `fitcompress.reference` has the same functions in plain
torch.

Only `fake_quantize_prune` has a gradient; the other functions detach their arguments.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "DistortionTable",
    "distortion_table",
    "error_feedback_sweep",
    "fake_quantize_prune",
    "ghost_norms_",
    "has_cuda",
    "input_moments_",
    "instruction_set",
    "pack_mask",
    "square_accumulate_",
    "unpack_mask",
    "winograd_norms_",
]


class DistortionTable(NamedTuple):
    """What each of G grids costs at each of S sparsities; all tensors are [G, S].

    θ̂ is the weight after prune-then-quantize, F the Fisher diagonal.
    """

    distortion: Tensor
    """D = ½ Σ F (θ − θ̂)², float64; in nats if F is in nats²."""
    nnz: Tensor
    """Number of non-zero codes, int64."""
    entropy_bits: Tensor
    """Number of weights × order-0 entropy of the codes, float64, in bits."""
    grid_length: Tensor
    """Σ F (θ̂_g − θ̂_{g+1})² at the same mask, float64; 0 for the last grid."""
    prune_length: Tensor
    """Σ F θ̂² over weights that leave at the next sparsity; 0 for the last one."""
    norm: Tensor
    """Σ F θ̂², float64."""


def has_cuda() -> bool:
    """Tell whether the CUDA kernels were compiled into this installation."""
    return bool(_library.fitcompress_has_cuda())


def instruction_set() -> str:
    """Name the instruction set that the CPU kernels run on.

    Returns:
        `avx512`, `avx2` or `default`. The environment variable `FITCOMPRESS_ISA`, set
        before the first call, lowers the choice.
    """
    name: bytes = _library.fitcompress_isa()
    return name.decode()


def square_accumulate_(
    moment: Tensor | None,
    norms: Tensor | None,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squares of per-sample weight gradients, element by element and in all.

    With e = output_grad and x = input, the gradient of sample b for output o and input
    channel c at kernel offset k is a sum over the places p of all images n of b:

        G_b[o, (c, k)] = Σ_n Σ_p e[n, o, p] · x[n, c, stride·p + dilation·k]

        moment += scale · Σ_b G_b ∘ G_b,    norms[b] += scale · ‖G_b‖².

    Products are summed in float32; no per-sample gradient is stored as a whole. Costs
    B·P·O·I multiply-adds, with P places and I = C · kernel volume inputs.

    Args:
        moment: [G·O, I] float32 or float64; changed in place. None: not needed.
        norms: [B] float64; changed in place. None: not needed.
        output_grad: [N, G·O, D', H', W'], float32, bfloat16 or float16, any strides.
        input: [N, G·C, D, H, W] of the same type, padded already, with any strides. A
            linear map's P positions lie along the last dimension: [N, C, 1, 1, P].
        kernel: Size of the kernel in depth, height and width.
        stride: Stride of the windows.
        dilation: Dilation of the kernel.
        groups: G.
        images: Consecutive rows of both tensors that make up one sample, N = B·images.
        scale: Factor of all squares.

    Raises:
        ValueError: If shapes, types, devices or values do not fit.

    Source: the empirical Fisher diagonal as used by FIT (Zandonati et al., 2022,
    arXiv 2210.08502).
    """
    torch.ops.fitcompress.square_accumulate_(
        moment,
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


def ghost_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squared norms of per-sample weight gradients, without the gradients.

    For the G_b of `square_accumulate_`,

        ‖G_b‖² = Σ_{p,q} (Σ_o e[o, p] e[o, q]) (Σ_k Σ_c x[c, s p + d k] x[c, s q + d k])

    over all pairs of the sample's positions: cheap where these are few. The right
    factor comes from products of the input's own places, shifted by d k and summed, so
    a kernel of any size costs no more products than one of size 1. Costs about
    ½ B P² (O + C) multiply-adds.

    Args:
        norms: [B] float64; changed in place.
        output_grad: As in `square_accumulate_`.
        input: As in `square_accumulate_`.
        kernel: Size of the kernel in depth, height and width.
        stride: Stride of the windows.
        dilation: Dilation of the kernel.
        groups: G.
        images: Consecutive rows of both tensors that make up one sample.
        scale: Factor of all norms.

    Raises:
        ValueError: If shapes, types, devices or values do not fit.

    Source: Goodfellow, 2015, Efficient per-example gradient computations,
    arXiv 1510.01799; for sequences Li et al., 2021, arXiv 2110.05679.
    """
    torch.ops.fitcompress.ghost_norms_(
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


def winograd_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 3, 3),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squared norms of per-sample gradients of a 3×3 convolution, on the CPU.

    The G_b of `square_accumulate_` by minimal filtering: with the gradient cut into
    tiles e_t of 4 × 4 places, and x_t the 6 × 6 inputs that such a tile sees,

        G_b = A (Σ_t (C e_t Cᵀ) ∘ (D x_t Dᵀ)) Aᵀ,    norms[b] += scale · ‖G_b‖²,

    where A, C and D interpolate and evaluate at the points 0, ±1, ±2 and ∞. The sum
    over tiles is 36 products of matrices. Costs 36·B·T·O·C multiply-adds for T = P/16
    tiles, a quarter of those of the direct form, and the transforms; individual
    elements of G_b are a few times less exact than there, their norm is not.

    Args:
        norms: [B] float64; changed in place.
        output_grad: As in `square_accumulate_`, with D' = 1.
        input: As in `square_accumulate_`.
        kernel: (1, 3, 3).
        stride: (1, 1, 1).
        dilation: (1, 1, 1).
        groups: 1.
        images: Consecutive rows of both tensors that make up one sample.
        scale: Factor of all norms.

    Raises:
        ValueError: If shapes, types, devices or values do not fit, or a tensor is not
            on the CPU.

    Source: Winograd, 1980, Arithmetic complexity of computations; for convolutional
    networks Lavin and Gray, 2016, arXiv 1509.09308.
    """
    for name, tensor in (
        ("norms", norms),
        ("output_grad", output_grad),
        ("input", input),
    ):
        if tensor.device.type != "cpu":
            message = (
                f"winograd_norms_: {name} must be on the CPU, the only device of this "
                f"op, got {tensor.device}"
            )
            raise ValueError(message)
    torch.ops.fitcompress.winograd_norms_(
        norms,
        output_grad.detach(),
        input.detach(),
        list(kernel),
        list(stride),
        list(dilation),
        groups,
        images,
        scale,
    )


def distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
) -> DistortionTable:
    """Tabulate what every weight grid costs at every sparsity.

    The mask at sparsity s drops the ⌊s·n⌋ weights of lowest importance (ties: the lower
    flat index first). Grids, in this order:

    - b bits: per row Δ_r = max|w_r| / (2^{b−1} − 1) over all weights of the row, codes
      clip(round(w/Δ_r), ±(2^{b−1} − 1));
    - step Δ: codes round(w/Δ) without bounds.

    Rounding is half to even, values are float32, sums float64. On CUDA tensors the
    call sorts the importances and waits for the result.

    Args:
        weight: [R, N], float32, bfloat16 or float16; rows are output channels.
        fisher: [R, N] float32, F ≥ 0 in nats²; None for 1 everywhere.
        importance: [R, N] float32, ≥ 0.
        bits: Bits of the fixed-point grids, 2 to 16.
        steps: Steps Δ > 0 of the entropy-coded grids.
        sparsities: Shares of weights to drop, ascending, in [0, 1).

    Returns:
        Six tables of shape [len(bits) + len(steps), len(sparsities)].

    Raises:
        ValueError: If shapes, types, devices or values do not fit, a weight is not
            finite, or a step gives codes beyond 2²².

    Source: section "Distortion" of FITCompress (Zandonati et al., 2023,
    arXiv 2302.07612), computed for all levels at once.
    """
    tables = torch.ops.fitcompress.distortion_table(
        weight.detach(),
        None if fisher is None else fisher.detach(),
        importance.detach(),
        list(bits),
        list(steps),
        list(sparsities),
    )
    return DistortionTable(*tables)


def fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None = None, max_code: int = 0
) -> Tensor:
    """Round a weight to its grid and drop what the mask does not keep.

    ŵ = mask · Δ · clip(round(w/Δ), −q, q), half to even; rows with Δ ≤ 0 become 0.
    Gradients, where k = round(w/Δ) and mask is 1:

    - weight: the incoming gradient if |k| ≤ q, else 0 (straight-through);
    - scale: Σ grad · (k − w/Δ if |k| ≤ q, else ±q) (LSQ).

    Args:
        weight: Any shape, float32, bfloat16 or float16; the first dimension are rows.
        scale: Δ, float32, one element or one a row.
        mask: Bits of `pack_mask`, uint8 [⌈n/8⌉]; None keeps all.
        max_code: q; unbounded if not positive.

    Returns:
        ŵ, contiguous, with the shape and type of the weight.

    Raises:
        ValueError: If shapes, types or devices do not fit.

    Source: Learned step size quantization (Esser et al., 2020, arXiv 1902.08153).
    """
    result: Tensor = torch.ops.fitcompress.fake_quantize_prune(
        weight, scale, mask, max_code
    )
    return result


def error_feedback_sweep(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
    beam: int = 1,
    bits: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Quantize column by column and spread each error over the later columns.

    For j = 0 … N−1: k_j = clip(round(w_j/Δ), −q, q), or 0 where masked or Δ ≤ 0; then
    w_{j'} −= (w_j − k_j Δ) / U_jj · U_jj' for all j' > j.

    With a beam or a rate, codes of a row are searched that make

        Σ_j (w_j − k_j Δ)² / U_jj² + λ Δ² bits[k_j]

    small, which is (w − kΔ) H (w − kΔ)ᵀ plus the price of the bits. Up to `beam` paths,
    partial rows with their own w, are kept. In each column every path proposes the
    nearest code and the nearest on the other side of w_j/Δ; if λ > 0 also the nearest
    code one step towards 0, and 0. Of all proposals the cheapest are kept; ties go to
    the cheaper path, then to the proposal named first. In the end the cheapest path is
    taken. A beam does not always beat a narrower one, but does on average.

    Args:
        weight: [R, N] float64, columns in the order of the sweep.
        factor: U, [N, N] float64, upper triangular, UᵀU = H⁻¹, H the second moments of
            the inputs.
        scale: Δ, float64, one element or one a row.
        mask: [R, N] bool or uint8, non-zero keeps; None keeps all.
        max_code: q; unbounded if not positive.
        beam: Number of paths, 1 to 1024; time and memory grow with it.
        bits: What the codes −h … h cost, in bits, float64 [2h + 1]; codes are limited
            to ±h, too. Needed for a rate.
        rate: λ ≥ 0, the price of a bit, in units of Δ² times those of H.

    Returns:
        Codes k, int32 [R, N].

    Raises:
        ValueError: If shapes, types, devices or values do not fit, a code is not a
            finite 32-bit integer, or a cost is not finite.

    Source: Optimal Brain Compression (Frantar, Singh and Alistarh, 2022,
    arXiv 2208.11580) and GPTQ (Frantar et al., 2022, arXiv 2210.17323). The beam is the
    M-algorithm (Anderson and Mohan, 1984, Sequential coding algorithms: a survey and
    cost analysis); to add the price of the bits is rate–distortion-optimised
    quantization, as in video coding (Sullivan and Wiegand, 1998).
    """
    codes: Tensor = torch.ops.fitcompress.error_feedback_sweep(
        weight.detach(),
        factor.detach(),
        scale.detach(),
        mask,
        max_code,
        beam,
        None if bits is None else bits.detach(),
        rate,
    )
    return codes


def input_moments_(
    second: Tensor,
    cross: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    step: Sequence[int],
) -> None:
    """Add the second moments of a layer's inputs, and their products with its outputs.

    For every sample, every group g and every place p = start + i·step, i = 0, 1, … of
    the convolution's output, let a in R^{K+1} be the patch of the input that the weight
    sees at p, ordered as `weight.flatten(1)`, and then a 1; y in R^O the outputs of the
    group at p. Then

        second[g] += Σ a aᵀ   and   cross[g] += Σ y aᵀ.

    So the last column holds the sums of the inputs and the number of patches. Products
    are summed in float32 over a few hundred patches, beyond that in float64; the
    patches are never stored as a whole. On other devices than the CPU the twin in
    `fitcompress.reference` runs, through the device's matrix product.

    Args:
        second: [G, K+1, K+1] float64; changed in place, on both sides of the diagonal.
        cross: [G, O, K+1] float64; changed in place. None without an output.
        input: [N, G·C, D, H, W] float32, padded already, with any strides;
            K = C · kernel volume. A Linear's is [N, C, 1, 1, 1] with a kernel of 1.
        output: [N, G·O, D', H', W'] float32, with any strides, where
            D' = (D − dilation·(kernel − 1) − 1) // stride + 1, and so on.
        kernel: Size of the kernel in depth, height and width.
        stride: Stride of the convolution.
        dilation: Dilation of the kernel.
        start: First place taken, not negative; none are, if it is beyond the last.
        step: Distance of the places taken, positive.

    Raises:
        ValueError: If shapes, types, devices or values do not fit.

    Source: the normal equations of layer-wise reconstruction, as in Optimal Brain
    Compression (Frantar, Singh and Alistarh, 2022, arXiv 2208.11580).
    """
    input = input.detach()
    output = None if output is None else output.detach()
    place = [list(part) for part in (kernel, stride, dilation, start, step)]
    for name, tensor in (("cross", cross), ("input", input), ("output", output)):
        if tensor is not None and tensor.device != second.device:
            message = (
                f"input_moments_: {name} must be on the device of second, "
                f"{second.device}, got {tensor.device}"
            )
            raise ValueError(message)
    if second.device.type == "cpu":
        torch.ops.fitcompress.input_moments_(second, cross, input, output, *place)
        return
    # The native op checks the arguments, here with tensors that have no samples.
    torch.ops.fitcompress.input_moments_(
        _on_cpu(second, second.shape),
        None if cross is None else _on_cpu(cross, cross.shape),
        _on_cpu(input, (0, *input.shape[1:])),
        None if output is None else _on_cpu(output, (0, *output.shape[1:])),
        *place,
    )
    if output is not None and output.shape[0] != input.shape[0]:
        message = (
            f"input_moments_: output must have {input.shape[0]} samples like input, "
            f"got {output.shape[0]}"
        )
        raise ValueError(message)
    from fitcompress import reference  # it imports this module

    reference.input_moments_(second, cross, input, output, *place)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into bits, in the order of the flat contiguous mask.

    Args:
        mask: Any shape; non-zero keeps.

    Returns:
        uint8 [⌈n/8⌉]: element i is bit i mod 8 of byte ⌊i/8⌋; unused bits are 0.

    Example:
        >>> pack_mask(torch.tensor([[1, 0, 1], [1, 0, 0]])).tolist()
        [13]
    """
    bits = (mask != 0).flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of `pack_mask`.

    Args:
        packed: uint8 [⌈n/8⌉].
        shape: Shape of the mask; n is the product of its elements.

    Returns:
        The mask, bool, of that shape.

    Raises:
        ValueError: If the number of bytes does not fit the shape.

    Example:
        >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), (2, 3)).int().tolist()
        [[1, 0, 1], [1, 0, 0]]
    """
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        message = (
            f"unpack_mask: a mask of shape {list(shape)} takes uint8 "
            f"[{(count + 7) // 8}], got {packed.dtype} {list(packed.shape)}"
        )
        raise ValueError(message)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return bits.flatten()[:count].bool().view(*shape)


def _on_cpu(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of that type and shape that takes no memory to speak of."""
    return torch.empty(1, dtype=like.dtype).as_strided(shape, [0] * len(shape))


def _load_library() -> ctypes.CDLL:
    """Load `_ops.so` and let it register its operators with the torch in use."""
    spec = importlib.util.find_spec("fitcompress._ops")
    if spec is None or spec.origin is None:
        message = (
            "fitcompress was installed without its native library _ops.so; "
            "install it with `pip install .` in the source folder"
        )
        raise ImportError(message)
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        message = f"fitcompress needs torch 2.10 or newer, found {version}"
        raise ImportError(message)
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        message = f"{spec.origin} does not load beside torch {version}: {error}"
        raise ImportError(message) from error
    library.fitcompress_register.restype = ctypes.c_char_p
    library.fitcompress_isa.restype = ctypes.c_char_p
    problem = library.fitcompress_register()
    if problem is not None:
        message = f"torch {version} rejects the operators: {problem.decode()}"
        raise ImportError(message)
    return library


def _fake_in_place(*arguments: Any) -> None:
    pass


def _fake_distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
) -> tuple[Tensor, ...]:
    cells = (len(bits) + len(steps), len(sparsities))
    real, count = torch.float64, torch.int64
    return tuple(
        weight.new_empty(cells, dtype=dtype)
        for dtype in (real, count, real, real, real, real)
    )


def _fake_fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None, max_code: int
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fake_fake_quantize_prune_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, mask: Tensor | None, max_code: int
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(scale, memory_format=torch.contiguous_format),
    )


def _fake_error_feedback_sweep(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    max_code: int,
    beam: int = 1,
    bits: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, mask, ctx.max_code = inputs
    ctx.save_for_backward(weight, scale, mask)


def _backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, scale, mask = ctx.saved_tensors
    grad_weight, grad_scale = torch.ops.fitcompress.fake_quantize_prune_backward(
        grad, weight, scale, mask, ctx.max_code
    )
    return grad_weight, grad_scale, None, None


def _register_python_side() -> None:
    """Add what torch needs to trace and differentiate the operators."""
    register_fake = torch.library.register_fake
    register_fake("fitcompress::distortion_table", _fake_distortion_table)
    register_fake("fitcompress::fake_quantize_prune", _fake_fake_quantize_prune)
    register_fake(
        "fitcompress::fake_quantize_prune_backward", _fake_fake_quantize_prune_backward
    )
    register_fake("fitcompress::error_feedback_sweep", _fake_error_feedback_sweep)
    for name in (
        "square_accumulate_",
        "ghost_norms_",
        "winograd_norms_",
        "input_moments_",
    ):
        register_fake(f"fitcompress::{name}", _fake_in_place)
    torch.library.register_autograd(
        "fitcompress::fake_quantize_prune", _backward, setup_context=_setup_context
    )


_library = _load_library()
_register_python_side()
