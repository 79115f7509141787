#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked `gpu`, every operator's benchmark, the cost of models.
#
#   bench/gpu.sh [OPTIONS OF copedit bench kernels]     PYTHON=...   the interpreter (by default that of .venv)
#
# Leaves bench/results/GPU-NAME/: machine.txt (GPU, driver, clocks, versions, commit), tests.txt, kernels.json,
# kernels.md, kernels.png; cost.json, cost.md, cost.png; and writes the measured tables into docs/kernels.md. Fails if a
# test, an operator or the cost does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "bench/gpu.sh: no $python: run make first, or set PYTHON" >&2; exit 1; }
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || {
    echo "bench/gpu.sh: torch sees no CUDA GPU" >&2
    exit 1
}
folder=bench/results/$(tr -cs 'A-Za-z0-9\n' '-' <<<"$gpu" | tr 'A-Z' 'a-z')
mkdir -p "$folder"
status=0

{
    echo "$gpu"
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    git status --short -- kernels copedit_rt bench 2>/dev/null
    "$python" --version
    nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,TEMPERATURE || true
    nvidia-smi || true
} >"$folder/machine.txt"

echo "==> tests marked gpu"
"$python" -m pytest -m gpu -rfE tests 2>&1 | tee "$folder/tests.txt" || status=1

echo "==> copedit bench kernels"
"$python" -m copedit_rt.cli bench kernels -o "$folder" --device cuda "$@" || status=1

echo "==> copedit bench cost"
"$python" -m copedit_rt.cli bench cost -o "$folder" --device cuda \
    --measure brain-brats --measure brain-ixi --measure cardiac || status=1

"$python" -m bench.tables || status=1
echo "==> results in $folder"
exit $status
