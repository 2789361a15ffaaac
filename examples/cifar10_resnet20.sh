#!/usr/bin/env bash
# ResNet-20 on CIFAR-10 to 5 % of its float32 bytes, stage by stage.
#
#   examples/cifar10_resnet20.sh DIR WEIGHTS [OUT]
#
# DIR      the folder cifar-10-batches-bin (the binary version), or the one around it
# WEIGHTS  a checkpoint of the ResNet-20 for CIFAR-10: .safetensors, or a torch file of tensors
# OUT      where files go (default: out); a killed stage, started again, goes on where it was
#
# SIZE and EPOCHS in the environment change the budget (5%) and the training (3).
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=${3:-out}
size=${SIZE:-5%}
epochs=${EPOCHS:-3}
network=(--model resnet20 --weights "$2")
data=(--dataset cifar10 --data "$1")
mkdir -p "$out"

# Does the checkpoint score as it should? About 91.7 % for the usual one.
fitcompress evaluate "${network[@]}" "${data[@]}"

# Once per network: how much every level of every layer hurts. Any budget can use it.
if [ ! -e "$out/sensitivity.safetensors" ]; then
  fitcompress measure "${network[@]}" "${data[@]}" --out "$out/sensitivity.safetensors"
fi
fitcompress pareto "$out/sensitivity.safetensors" --points 12

# One level per layer within the budget, then weights at those levels: no training.
fitcompress search "$out/sensitivity.safetensors" --size "$size" --out "$out/plan.json"
fitcompress apply "$out/plan.json" "${network[@]}" "${data[@]}" --out "$out/small.safetensors"
fitcompress evaluate --model resnet20 --packed "$out/small.safetensors" "${data[@]}"

# A few epochs on the grids, the size of the file held.
fitcompress finetune "$out/small.safetensors" "${network[@]}" "${data[@]}" \
  --epochs "$epochs" --out "$out/tuned.safetensors"
fitcompress evaluate --model resnet20 --packed "$out/tuned.safetensors" "${data[@]}"

# Before ⇒ after, layer by layer.
fitcompress report "$out/tuned.safetensors" "${network[@]}" "${data[@]}" \
  --sensitivity "$out/sensitivity.safetensors" --html "$out/report.html"
