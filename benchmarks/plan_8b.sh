#!/usr/bin/env bash
# What fits on 8, 12, 16 and 24 GB: LoRA on an 8B Llama's shape, rows of 512 tokens, from its configuration alone.
#     benchmarks/plan_8b.sh > benchmarks/results/plan_8b.txt
set -euo pipefail
cd "$(dirname "$0")/.."
for card in "RTX 4060 8GB" "RTX 3060 12GB" "RTX 5070 Ti 16GB" "RTX 4090 24GB"; do
  echo "+ featherweight plan --model benchmarks/shapes/llama-8b.json --gpu '$card' --length 512"
  featherweight plan --model benchmarks/shapes/llama-8b.json --gpu "$card" --length 512 || true
  echo
done
