"""The FITCompress search of pquant-ml on ResNet-20: seconds, evaluations, its plan.

    python -m venv pquant && pquant/bin/pip install pquant-ml==0.1.0 .
    pquant/bin/python benchmarks/pquant_search.py --data DIR --weights resnet20.th
        [--goal 0.03] [--json FILE] [--plan plan.safetensors]

pquant-ml's own path search with its default configuration, on batches of four augmented
training images. The goal is the share of active bytes: bits of the weights that are not
zero over 32 bits of all. Weights that round to zero count as pruned there. ``--plan``
writes the weights of the plan, so that its FIT distance Σ F (θ − θ̂)² can be computed
under any Fisher diagonal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["KERAS_BACKEND"] = "torch"

import pquant
import torch
from pquant.core.torch import fit_compress
from pquant.core.torch.layers import PQ_MODULES
from safetensors.torch import save_file

from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset

if TYPE_CHECKING:
    from torch import nn

BATCH = 4
INPUT = (3, 32, 32)


class Counting(fit_compress.FITcompress):
    """The search, counting what it spends.

    Attributes:
        evaluations: Fisher estimates, of 100 batches each.
        estimating: Processor seconds spent in them.
        nodes: Nodes created.
        steps: Nodes expanded.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.evaluations = self.nodes = self.steps = 0
        self.estimating = 0.0
        estimate = fit_compress.FIT.get_EF

        def counted(*arguments: Any, **options: Any) -> Any:
            first = time.process_time()
            found = estimate(*arguments, **options)
            self.estimating += time.process_time() - first
            self.evaluations += 1
            print(f"estimate {self.evaluations}", file=sys.stderr, flush=True)
            return found

        fit_compress.FIT.get_EF = counted
        super().__init__(*arguments, **options)

    def create_new_node(self, *arguments: Any, **options: Any) -> Any:
        """Count a node."""
        self.nodes += 1
        return super().create_new_node(*arguments, **options)

    def create_neighbours(self, current_node: Any) -> None:
        """Count a step."""
        self.steps += 1
        super().create_neighbours(current_node)
        best = min(self.potential_nodes, key=lambda node: node.full_dist)
        print(
            f"step {self.steps}: {best.curr_compression_rate:.4f}",
            file=sys.stderr,
            flush=True,
        )


def prepared(model: nn.Module, goal: float) -> tuple[nn.Module, Any]:
    """Return the model in pquant's layers, ready to be searched, and the options."""
    config = pquant.fitcompress_config()
    config.fitcompress_parameters.compression_goal = goal
    model = pquant.add_compression_layers(model, config, (1, *INPUT)).eval()
    for module in model.modules():
        if isinstance(module, PQ_MODULES):
            module.post_pre_train_function()
    return model, config


def described(search: Counting, node: Any) -> dict[str, dict[str, float]]:
    """Return bits, mask and zeros of every layer of the plan."""
    layers = zip(
        search.layer_names,
        node.quant_config,
        node.int_bits,
        node.frac_bits,
        node.unquantized_weights,
        node.parameters,
        strict=True,
    )
    return {
        name: {
            "bits_without_sign": float(bits),
            "integer_bits": int(whole),
            "fractional_bits": float(fraction),
            "masked": float((kept == 0).double().mean()),
            "zeros": float((weights == 0).double().mean()),
        }
        for name, bits, whole, fraction, kept, weights in layers
    }


def main() -> None:
    """Search once and print what it took and found."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", required=True, type=Path, help="CIFAR-10, binary")
    options.add_argument("--weights", required=True, type=Path, help="of a ResNet-20")
    options.add_argument("--goal", type=float, default=0.03, help="active bytes, share")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument(
        "--plan", type=Path, metavar="FILE", help="weights of the plan"
    )
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model = trained_model("resnet20", arguments.weights)
    batches = load_dataset("cifar10", arguments.data).training(BATCH, arguments.seed)
    model, config = prepared(model, arguments.goal)
    cpu, wall = time.process_time(), time.perf_counter()
    search = Counting(
        model=model,
        device="cpu",
        dataloader=batches,
        criterion=torch.nn.CrossEntropyLoss(),
        config=config,
        input_shape=INPUT,
    )
    node = search.astar(config)[0]
    found = {
        "goal": arguments.goal,
        "reached": float(node.curr_compression_rate),
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "estimating_cpu_s": search.estimating,
        "evaluations": search.evaluations,
        "steps": search.steps,
        "nodes": search.nodes,
        "path_length": float(node.gscore),
        "sparsity": float(node.pruning_metrics["percentage"]),
        "layers": described(search, node),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if arguments.plan:
        plan = zip(search.layer_names, node.parameters, strict=True)
        save_file({name: w.detach().contiguous() for name, w in plan}, arguments.plan)


if __name__ == "__main__":
    main()
