#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked `gpu`, then the benchmarks of every operator, of whole
# models and of a training step.
#
#   bench/gpu.sh [OPTIONS OF copedit bench kernels]     PYTHON=...   the interpreter (by default that of .venv)
#
# Leaves bench/results/GPU-NAME/: machine.txt (GPU, driver, clocks, versions, commit), tests.txt, kernels.json,
# kernels.md, kernels.png, sampler.json, sampler.md, train-step.json, train-step.md, cost.json, cost.md, cost.png; and
# writes the measured tables into docs/kernels.md. Fails if a test or an answer does. SKIP="tests kernels sampler
# train-step cost" leaves parts out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "bench/gpu.sh: no $python: run make test first, or set PYTHON" >&2; exit 1; }
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
    git status --short -- kernels copedit_rt training bench 2>/dev/null
    "$python" --version
    nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,TEMPERATURE || true
    nvidia-smi || true
} >"$folder/machine.txt"

wanted() { [[ " ${SKIP:-} " != *" $1 "* ]] && echo "==> $1"; }

if wanted tests; then
    "$python" -m pytest -m gpu -rfE tests 2>&1 | tee "$folder/tests.txt" || status=1
fi
if wanted kernels; then
    "$python" -m copedit_rt bench kernels -o "$folder" --device cuda "$@" || status=1
    "$python" -m copedit_bench.operators.tables || status=1
fi
for part in sampler train-step; do
    if wanted $part; then
        "$python" -m copedit_rt bench $part -o "$folder" --device cuda || status=1
    fi
done
if wanted cost; then
    "$python" -m copedit_rt bench cost -o "$folder" --device cuda \
        --measure brain-brats --measure brain-ixi --measure cardiac || status=1
fi
echo "==> results in $folder"
exit $status
