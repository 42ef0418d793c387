#!/usr/bin/env bash
# For the owner of a GPU: installs blto's pinned environment, runs what only a GPU can test, and measures pretraining on
# it into benchmarks/results/gpu.json (and gpu-<count>.json on all GPUs together). About 15 minutes; needs no data set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! nvidia-smi --list-gpus 2>/dev/null | grep '^GPU' >/dev/null; then
  echo "gpu.sh: nvidia-smi lists no GPU; run this on a machine with an NVIDIA GPU and its driver." >&2
  exit 2
fi
make .venv/.installed
count="$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$count" == 0 ]]; then
  echo "gpu.sh: this torch finds no GPU; install into .venv the CUDA build of the torch that constraints.txt names." >&2
  exit 2
fi
# What torch itself warns of on a GPU differs by version: shown, where every other test run takes a warning as an error.
.venv/bin/python -m pytest -q -W default tests/runtime/test_cuda.py tests/test_api.py::test_a_gpu_finds_what_the_cpu_recorded
.venv/bin/python -m benchmarks.gpu "$@"
if ((count > 1)); then
  .venv/bin/torchrun --standalone --nproc-per-node "$count" -m benchmarks.gpu "$@" \
    --out "benchmarks/results/gpu-$count.json"
fi
