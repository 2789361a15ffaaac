"""What calibration without training is compared with: peers, one function each.

Each takes the trained network, calibration inputs and what it may spend, a size in
bytes or a number of bits, and returns a plain network with the bytes of its file:

| function | stores | spends |
|---|---|---|
| `rounded_to_size` | every weight rounded to one global step | bytes |
| `rounded_to_bits` | fixed point per channel, rounded | bits per weight |
| `gptq` | fixed point per channel, error feedback as published | bits per weight |
| `nncodec` | NNCodec 2.x (ISO/IEC 15938-17), whole bitstream | bytes |

The first three are stored in the file that `fitcompress.save` writes, so that bytes can
be compared: entropy-coded codes, two numbers per channel of a batch norm. They share no
arithmetic with the package: codes are found here, in plain torch.

`inputs` are batches without labels, drawn as in training; `norms=True` re-estimates
the means and variances of the batch norms on them, after rounding.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fitcompress as fc
from fitcompress.model import compressible_layers
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    round_leftovers_,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Compressed",
    "bits_with_edges",
    "error_feedback",
    "gptq",
    "import_nncodec",
    "nncodec",
    "reestimate_norms_",
    "rounded_to_bits",
    "rounded_to_size",
]

DAMPING = 0.01  # over the mean diagonal of H
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Compressed(NamedTuple):
    """What a peer made.

    Attributes:
        model: A plain network, in eval mode, as read back from the file.
        bytes: Size of the whole file.
    """

    model: nn.Module
    bytes: int


def rounded_to_size(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    size: int,
    *,
    norms: bool = False,
) -> Compressed:
    """Round all weights to multiples of the one step whose file is just within `size`.

    Args:
        model: The trained network; unchanged.
        inputs: Calibration batches; only used with `norms`.
        size: Bytes that the file may take.
        norms: Re-estimate the batch norms.

    Raises:
        ValueError: Not even a network of zeros fits.
    """

    def stored(step: float, norms: bool) -> Compressed:
        return _store(model, _on_step(model, step), inputs if norms else None)

    step = _smallest_step(model, size, lambda step: stored(step, False).bytes)
    found = stored(step, norms)
    while found.bytes > size:  # other statistics, some bytes more
        step *= 1.002
        found = stored(step, norms)
    return found


def rounded_to_bits(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    bits: int | Mapping[str, int],
    *,
    clip: bool = False,
    norms: bool = False,
) -> Compressed:
    """Round to fixed point: a scale per channel, codes ±q with q = 2^(b−1) − 1.

    Args:
        model: The trained network; unchanged.
        inputs: Calibration batches; only used with `norms`.
        bits: b, for all layers or by the layer's name.
        clip: Take the scale of least squared error instead of max|w| / q.
        norms: Re-estimate the batch norms.
    """
    layers = {}
    for layer in compressible_layers(model):
        matrix, b = layer.matrix().double(), _bits_of(bits, layer.name)
        scale = _scales(matrix, b, clip)
        layers[layer.name] = _Coded(_nearest(matrix, scale, b), scale, b)
    return _store(model, layers, inputs if norms else None)


def gptq(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    bits: int | Mapping[str, int],
    *,
    clip: bool = True,
    norms: bool = False,
    sequential: bool = True,
) -> Compressed:
    """Quantize layer after layer by error feedback (Frantar et al. 2022, 2210.17323).

    Fixed point as in :func:`rounded_to_bits`; :func:`error_feedback` has the method.
    The target of every layer is its dense weight: drift of its inputs is not corrected.

    Args:
        model: The trained network of Linear and Conv2d layers; unchanged.
        inputs: Calibration batches.
        bits: b, for all layers or by the layer's name.
        clip: Take the scale of least squared error instead of max|w| / q.
        norms: Re-estimate the batch norms afterwards, which is not in the publication.
        sequential: H from the inputs of the network quantized so far, as published;
            otherwise from those of the dense network.
    """
    small, layers = copy.deepcopy(model).eval(), {}
    dense = {layer.name: layer for layer in compressible_layers(model)}
    source = small if sequential else copy.deepcopy(model).eval()
    for name in _order_of_use(small, list(dense), inputs[0]):
        matrix, b = dense[name].matrix().double(), _bits_of(bits, name)
        scale = _scales(matrix, b, clip)
        moments = _second_moments(source, name, inputs)
        groups = len(moments)
        parts = zip(matrix.chunk(groups), moments, scale.chunk(groups), strict=True)
        codes = torch.cat(
            [error_feedback(w, h, s, max_code=_max_code(b)) for w, h, s in parts]
        )
        layers[name] = _Coded(codes, scale, b)
        _set_weight(small, name, layers[name])
    return _store(model, layers, inputs if norms else None)


def error_feedback(
    matrix: torch.Tensor,
    h: torch.Tensor,
    scale: torch.Tensor,
    *,
    max_code: int,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Return the codes of one layer, each column's error fed into the later columns.

    With U the upper Cholesky factor of (H + δI)⁻¹, columns in falling order of H_jj:
    k_j = clip(round(w_j / Δ), ±q);  w_j' −= (w_j − Δ k_j) U_jj' / U_jj  for j' > j.

    Args:
        matrix: The weight, float64 [rows, columns].
        h: E[x xᵀ] of the layer's inputs, float64 [columns, columns].
        scale: Δ, [rows].
        max_code: q.
        damping: δ over the mean diagonal of H.

    Returns:
        Integers, float64 [rows, columns].
    """
    w, h = matrix.clone(), h.clone()
    dead = h.diagonal() == 0  # inputs that are always zero
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True, stable=True)
    h.diagonal().add_(damping * h.diagonal().mean())
    w, h = w[:, order], h[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    step = torch.where(scale > 0, scale, 1.0).double()
    codes = torch.empty_like(w)
    for j in range(w.shape[1]):
        code = (w[:, j] / step).round().clamp(-max_code, max_code)
        error = (w[:, j] - code * step) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        codes[:, order[j]] = code
    return codes


def bits_with_edges(model: nn.Module, inner: int, edges: int) -> dict[str, int]:
    """Return bits by layer: `edges` for the first and the last one, else `inner`."""
    names = [layer.name for layer in compressible_layers(model)]
    return dict.fromkeys(names, inner) | {names[0]: edges, names[-1]: edges}


@torch.no_grad()
def reestimate_norms_(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Replace the batch norms' means and variances by those of `inputs`, in place.

    Batch statistics, averaged over the batches; each norm sees what the norms before it
    make of the same batch. Everything else stays in eval mode.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    norms = [m for m in norms if m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    for x in inputs if norms else ():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def nncodec(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    size: int,
    *,
    folded: bool = True,
) -> Compressed:
    """Code the network by NNCodec at the finest step whose bitstream is within `size`.

    Dependent quantization and DeepCABAC at the package's own settings; no data is used.
    Its steps are about 19 % apart (`qp`, four to an octave), so that some of `size`
    may stay unused.

    Args:
        model: The trained network; unchanged.
        inputs: Not used.
        size: Bytes that the bitstream may take.
        folded: Code two numbers per channel of a batch norm instead of four, as in the
            other files here.

    Raises:
        ImportError: The package is not installed.
        ValueError: Nothing fits.
    """
    del inputs
    codec = import_nncodec()
    small = copy.deepcopy(model).eval()
    if folded:
        fold_norms_(small)
    arrays = {
        key: value.detach().numpy()
        for key, value in small.state_dict().items()
        if value.dtype == torch.float32
        and not (folded and key.endswith(("running_mean", "running_var")))
    }

    def code(qp: int) -> bytearray:
        return codec.compress(
            {key: value.copy() for key, value in arrays.items()},
            bitstream_path=None,
            return_bitstream=True,
            qp=qp,
        )

    fine, coarse = -60, 12  # steps of 2^(qp / 4)
    if len(code(coarse)) > size:
        message = f"nothing fits into {size} bytes; the least is {len(code(coarse))}"
        raise ValueError(message)
    while coarse - fine > 1:
        middle = (fine + coarse) // 2
        fine, coarse = (fine, middle) if len(code(middle)) <= size else (middle, coarse)
    stream = code(coarse)
    decoded = codec.decompress(bytearray(stream))
    state = small.state_dict()
    for key in arrays:
        state[key] = torch.from_numpy(decoded[key]).reshape(state[key].shape)
    small.load_state_dict(state)
    return Compressed(small, len(stream))


def import_nncodec() -> Any:
    """Return the module that codes; the frameworks around it are not needed.

    `nncodec.framework` holds data sets and training loops and imports torchvision,
    pandas and OpenCV for them. Coding arrays uses none of it, so that
    ``pip install --no-deps nncodec`` is enough.
    """
    name = "nncodec.framework"
    if "nncodec.nnc" not in sys.modules and name not in sys.modules:
        stand_in = types.ModuleType(name)
        for part in ("pytorch_model", "tensorflow_model", "use_case_init"):
            setattr(stand_in, part, None)
        sys.modules[name] = stand_in
        try:
            from nncodec import nnc
        except ImportError as error:
            message = f"{error} (pip install --no-deps nncodec)"
            raise ImportError(message) from error
        finally:
            del sys.modules[name]
        return nnc
    from nncodec import nnc

    return nnc


@dataclass(frozen=True)
class _Coded:
    """A layer's integers [rows, columns], its scales [rows] or [1], bits or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int | None

    def weight(self) -> torch.Tensor:
        return self.codes.float() * self.scale.float().reshape(-1, 1)


def _store(
    model: nn.Module,
    layers: Mapping[str, _Coded],
    norm_inputs: Sequence[torch.Tensor] | None,
) -> Compressed:
    """Write the network with these weights to a file and read it back."""
    small = copy.deepcopy(model).eval()
    for name, coded in layers.items():
        _set_weight(small, name, coded)
    if norm_inputs is not None:
        reestimate_norms_(small, norm_inputs)
    fold_norms_(small)
    round_leftovers_(small)
    levels = {}
    for name, coded in layers.items():
        module = small.get_submodule(name)
        q = 0 if coded.bits is None else _max_code(coded.bits)
        grid = (
            fc.Grid(step=float(coded.scale))
            if coded.bits is None
            else fc.Grid(bits=coded.bits)
        )
        levels[name] = fc.Level(grid, 0.0, tuple(module.weight.shape))
        attach_grid(module, WeightGrid(coded.scale, q), coded.weight())
    attach_plan(small, fc.Plan(levels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.safetensors"
        size = fc.save(small, path)
        return Compressed(fc.load(path, copy.deepcopy(model)), size)


def _set_weight(model: nn.Module, name: str, coded: _Coded) -> None:
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(coded.weight().reshape(weight.shape))


def _on_step(model: nn.Module, step: float) -> dict[str, _Coded]:
    scale = torch.tensor([step], dtype=torch.float32)
    return {
        layer.name: _Coded((layer.matrix() / scale).round(), scale, None)
        for layer in compressible_layers(model)
    }


def _smallest_step(
    model: nn.Module, size: int, bytes_of: Callable[[float], int]
) -> float:
    """Return the step, to 0.1 %, at which the file just fits."""
    largest = max(float(x.matrix().abs().max()) for x in compressible_layers(model))
    fine, coarse = largest / 2**12, 4 * largest
    if bytes_of(coarse) > size:
        message = f"nothing fits into {size} bytes; the least is {bytes_of(coarse)}"
        raise ValueError(message)
    while coarse / fine > 1.001:
        middle = math.sqrt(fine * coarse)
        fine, coarse = (fine, middle) if bytes_of(middle) <= size else (middle, coarse)
    return coarse


def _bits_of(bits: int | Mapping[str, int], name: str) -> int:
    return bits if isinstance(bits, int) else bits[name]


def _max_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _nearest(matrix: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    q = _max_code(bits)
    step = torch.where(scale > 0, scale, 1.0).double().reshape(-1, 1)
    return (matrix / step).round().clamp(-q, q)


def _scales(matrix: torch.Tensor, bits: int, clip: bool) -> torch.Tensor:
    """Return a scale per row, of float16 values as they are stored."""
    widest = matrix.abs().amax(1) / _max_code(bits)
    if not clip:
        return widest.half().float()
    best = widest.half().float()
    least = torch.full_like(widest, torch.inf)
    for percent in range(100, 20, -1):  # the published search: down to a fifth
        scale = (widest * percent / 100).half().float()
        rounded = _nearest(matrix, scale, bits) * scale.double().reshape(-1, 1)
        error = (rounded - matrix).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


@torch.no_grad()
def _second_moments(
    model: nn.Module, name: str, inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return E[x xᵀ] of a layer's inputs, float64 [groups, columns, columns]."""
    module, caught = model.get_submodule(name), []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        caught.append(args[0])
        raise _ReachedError

    handle, total, rows = module.register_forward_pre_hook(catch), None, 0
    try:
        for x in inputs:
            try:
                model(x)
            except _ReachedError:
                columns = _columns(module, caught.pop().double())
                product = columns.transpose(1, 2) @ columns
                total = product if total is None else total + product
                rows += columns.shape[1]
    finally:
        handle.remove()
    assert total is not None
    return total / rows


def _columns(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return inputs as the rows that the weight multiplies, [groups, rows, columns]."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        message = f"wanted Linear or zero-padded Conv2d layers; got {module}"
        raise TypeError(message)
    assert not isinstance(module.padding, str)
    unfolded = F.unfold(
        x, module.kernel_size, module.dilation, module.padding, module.stride
    )
    groups = unfolded.unflatten(1, (module.groups, -1))
    return groups.permute(1, 0, 3, 2).flatten(1, 2)


@torch.no_grad()
def _order_of_use(model: nn.Module, names: list[str], x: torch.Tensor) -> list[str]:
    """Return the layers in the order in which a forward pass calls them first."""
    used: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, __, name=name: used.append(name)
        )
        for name in names
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(used))
