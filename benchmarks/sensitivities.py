"""Every published metric of what a level of a layer costs, and ours, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fitcompress as fc
from fitcompress import ops
from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.levels import level_weights, swapped
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.compensate.outlets import find_outlets
from fitcompress.data.batches import take
from fitcompress.model import compressible_layers
from fitcompress.model.copies import copy_of
from fitcompress.quantize import fold_norms_, round_leftovers_

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.data.dataset import Dataset

    Reals = NDArray[np.float64]

__all__ = ["DEFAULT", "OUTPUT_RULES", "from_outputs", "from_weights", "ours"]

SAMPLES = 512
PLANS = 40
DEFAULT = "plans (default)"
OUTPUT_RULES = ("gradient² · output error²", "full Fisher", "full Fisher, interacting")


def from_weights(
    model: nn.Module,
    source: Dataset,
    table: fc.Sensitivity,
    sparsities: Sequence[float],
    held_out: torch.Tensor,
) -> dict[str, Reals]:
    """Return tables that need weights and Fisher information only, [L, G, S] each.

    Args:
        model: The network.
        source: Its data.
        table: Fisher diagonal on augmented training images; sets the grids.
        sparsities: Those of the table, of the whole network.
        held_out: Images that the network has not seen.
    """
    settings: dict[str, Any] = {"grids": table.grids, "progress": False}
    settings |= {"sparsities": sparsities, "samples": SAMPLES}
    plain = fc.measure(model, source.calibration(augment=False), **settings)
    held = fc.measure(model, held_out.split(128), **settings)
    bits = [g.bits for g in table.grids if g.bits is not None]
    layers = compressible_layers(model)
    squared = np.stack(
        [
            ops.distortion_table(
                layer.matrix(), None, bits, [], own.tolist()
            ).distortion.numpy()
            for layer, own in zip(layers, table.sparsity, strict=True)
        ]
    )
    mean = (table.fisher_trace / table.sizes)[:, None, None]
    noise = np.stack([_noise(layer.matrix(), bits) for layer in layers])
    average = np.array(bits)[None, :, None] * (1 - table.sparsity[:, None, :])
    share = table.sizes / table.sizes.sum()
    return {
        "average bits": -share[:, None, None] * average + 17.0,
        "squared error": squared,
        "FIT (trace · noise model)": np.broadcast_to(
            mean * noise[:, :, None], squared.shape
        ),
        "Fisher trace · squared error": mean * squared,
        "Fisher diagonal, plain images": plain.distortion,
        "Fisher diagonal, augmented": table.distortion,
        "Fisher diagonal, held out": held.distortion,
    }


def _noise(matrix: torch.Tensor, bits: Sequence[int]) -> Reals:
    """Return ½ n Δ²/12 of every grid, the noise that FIT assumes, [G]."""
    range_ = matrix.detach().double().abs().amax(1)
    levels = [2 ** (b - 1) - 1 for b in bits]
    columns = matrix.shape[1]
    return np.array([float((range_ / q).square().sum()) * columns / 24 for q in levels])


def from_outputs(
    model: nn.Module, source: Dataset, table: fc.Sensitivity, *, compensated: bool
) -> tuple[dict[str, Reals], NDArray[np.float32], NDArray[np.float32]]:
    """Return tables from the errors of layers' outputs, and how they move the logits.

    With δy the error of a layer's outputs, g_c = ∂z_c/∂y and p the outputs'
    distribution, a level moves logit c of a sample by d_c = ⟨g_c, δy⟩ to first order.
    The full Fisher information along the perturbation is then, with the exact
    distribution instead of sampled labels (Gauss–Newton),

        ½ mean_i (Σ_c p_c d_c² − (Σ_c p_c d_c)²),

    for one layer; with interactions, d is summed over the layers first. Only diagonal
    terms, ½ mean_i Σ_positions (∂ℓ/∂y)² δy² with a sampled label, are the score of
    Model-Optimizer. All levels of a layer come from the same passes.

    Returns:
        Tables without interactions; d [L, G · S, N, C]; p [N, C].
    """
    layers = {layer.name: layer for layer in compressible_layers(model)}
    levels = {
        name: [
            fc.Level(grid, float(s), tuple(table.shapes[i]))
            for grid in table.grids
            for s in table.sparsity[i]
        ]
        for i, name in enumerate(table.names)
    }
    options = fc.Compensation() if compensated else None
    modules = {name: layer.module for name, layer in layers.items()}
    inputs = [x for x, _ in take(source.calibration(), 2 * SAMPLES)]
    with torch.no_grad():
        batches = prepare(model, modules, inputs, 2 * SAMPLES).batches
        folded = copy_of(model)
        fold_norms_(folded)
        round_leftovers_(folded, [layer.weight for layer in layers.values()])
        outlets = find_outlets(folded, list(layers.values()), batches[0][:16])
        made = {}
        with Lockstep(model, modules, batches) as passes:
            for _ in layers:
                reached = passes.advance()
                assert reached is not None
                name = reached[0]
                made[name] = level_weights(
                    layers[name], levels[name], reached[1], outlets[name], options
                )
    generator = torch.Generator().manual_seed(0)
    moved: list[list[torch.Tensor]] = [[] for _ in table.names]
    diagonal = np.zeros((len(table.names), len(levels[table.names[0]])))
    probabilities, count = [], 0
    for x in (x for x, _ in take(source.calibration(99), SAMPLES)):
        seen, z = _outputs(folded, outlets, layers, x)
        p = z.detach().softmax(-1)
        probabilities.append(p)
        count += len(x)
        wanted = [seen[name][1] for name in table.names]
        slopes = [
            torch.autograd.grad(z[:, c].sum(), wanted, retain_graph=True)
            for c in range(z.shape[1])
        ]
        label = torch.multinomial(p, 1, generator=generator).squeeze(1)
        hot = torch.nn.functional.one_hot(label, z.shape[1])
        for i, name in enumerate(table.names):
            given, dense = seen[name]
            slope = torch.stack([g[i] for g in slopes]).flatten(2)  # [C, B, …]
            own = torch.einsum("cbn,bc->bn", slope, p - hot)
            per_level = []
            for k, weights in enumerate(made[name]):
                with (
                    torch.no_grad(),
                    swapped(folded, layers[name], weights, outlets[name]),
                ):
                    error = (
                        _through(folded, outlets[name], name, given) - dense
                    ).flatten(1)
                per_level.append(torch.einsum("cbn,bn->bc", slope, error))
                diagonal[i, k] += float((own * error).square().sum()) / 2
            moved[i].append(torch.stack(per_level))
    d = torch.stack([torch.cat(parts, 1) for parts in moved])
    p = torch.cat(probabilities)
    full = (0.5 * ((p * d * d).sum(-1) - (p * d).sum(-1) ** 2).mean(-1)).numpy()
    shape = table.distortion.shape
    tables = {
        OUTPUT_RULES[0]: (diagonal / count).reshape(shape),
        OUTPUT_RULES[1]: full.astype(np.float64).reshape(shape),
    }
    return tables, d.numpy(), p.numpy()


def _outputs(
    model: nn.Module, outlets: Any, layers: dict[str, Any], x: torch.Tensor
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Return every layer's input and its outlet's output, in the graph, and logits."""
    given, taken, handles = {}, {}, []
    for name in layers:
        place = outlets[name].module or name
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: given.update({name: args[0].detach()})
            )
        )

        def keep(_: Any, __: Any, out: torch.Tensor, name: str = name) -> torch.Tensor:
            out = out if out.requires_grad else out.requires_grad_()
            taken[name] = out
            return out * 1  # what follows may work in place

        handles.append(model.get_submodule(place).register_forward_hook(keep))
    try:
        z = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (given[name], taken[name]) for name in layers}, z


def _through(model: nn.Module, outlet: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    out = model.get_submodule(name)(x)
    if outlet.module not in (None, name):
        out = model.get_submodule(outlet.module)(out)
    return out


def ours(
    model: nn.Module,
    loader: Iterable[Any],
    table: fc.Sensitivity,
    *,
    compensated: bool,
    plans: int = PLANS,
) -> dict[str, fc.Sensitivity]:
    """Return our tables: single layers at two temperatures, plans, and both."""
    options = fc.Compensation() if compensated else None
    inputs = [x for x, _ in take(loader, 2 * SAMPLES)]
    found = {}
    for temperature in (1.0, 4.0):
        refinement = fc.Refinement(
            grids=3, plans=0, temperature=temperature, compensation=options
        )
        found[f"single layers, τ = {temperature:g}"] = fc.refine(
            table, model, inputs, refinement=refinement, progress=False
        )
    bases = {
        DEFAULT: table,
        "single layers and plans": found["single layers, τ = 4"],
    }
    for name, base in bases.items():
        found[name] = fc.calibrate(
            base, model, inputs, plans=plans, compensation=options, progress=False
        )
    return found
