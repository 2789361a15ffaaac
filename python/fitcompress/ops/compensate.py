"""Second moments of a layer's inputs, and the sweep that spreads errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.ops.library import fake_in_place, register_fake

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["error_feedback_sweep", "input_moments_"]


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


def _on_cpu(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of that type and shape that takes no memory to speak of."""
    return torch.empty(1, dtype=like.dtype).as_strided(shape, [0] * len(shape))


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


register_fake("error_feedback_sweep", _fake_error_feedback_sweep)
register_fake("input_moments_", fake_in_place)
