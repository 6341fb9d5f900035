#!/usr/bin/env bash
# What a GPU does with this package, in at most twelve minutes: tests, sampling and training at full size, kernels.
#
#   bash benchmarks/gpu.sh
#
# Results are written as they come: OUT/rows.jsonl, log.txt, and after every part README.md and results.json. A part that
# fails, or whose time is over, is named there, and the later ones run. Variables:
#
#   PYTHON        an interpreter that has JAX with CUDA and pytest; without it an environment is made in outputs/gpu-venv
#   TORCH_PYTHON  one that has PyTorch with CUDA, diffusers and this package's dependencies; the same where it has them
#   OUT           folder of the results; default benchmarks/results/gpu
#   GPU_SECONDS   for all of it; default 720
#   GPU_PARTS     names of parts, to run these alone and keep the other parts' results (benchmarks/gpu/parts.py)
#   GPU_TINY      if not empty: tiny shapes on a CPU, which tries everything and measures nothing
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu run
