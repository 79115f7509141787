#!/usr/bin/env bash
# Everything that needs a GPU, in three lanes. Each is one command that keeps its time limit, most valuable first, and
# writes every result as soon as it is there.
#
#   bench/gpu.sh first      at most 9 minutes: chosen tests, operators, the loop, a study, a training step; beside eager
#                           PyTorch and its attention alone
#   bench/gpu.sh compare    at most 10 minutes: the same beside torch.compile, cuDNN, flash-attn, xformers
#   bench/gpu.sh deep       as long as it takes: all tests marked gpu, all presets, batches and steps, what they cost
#
#   PYTHON=...              the interpreter (by default that of .venv, else python3)
#   DEVICE=cpu              a rehearsal without a GPU: tiny models, and no test runs
#   OUT=FOLDER              where results go (by default bench/results/GPU-NAME), of the first two in a folder of theirs
#
# Leaves machine.txt (GPU, driver, clocks, versions, commit), LANE.txt (what ran, how it ended, seconds), tests.txt, and
# JSON and Markdown of each benchmark; predictions.md: what was measured of ours beside what was expected. Fails if a test or an answer does; what runs out of time is a line in LANE.txt.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lane=${1:-}
case $lane in
first) limit=540 ;;
compare) limit=600 ;;
deep) limit=86400 ;;
*)
    echo "bench/gpu.sh: name a lane: first, compare or deep" >&2
    exit 2
    ;;
esac
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONPATH=.:kernels:training:bench${PYTHONPATH:+:$PYTHONPATH}
device=${DEVICE:-cuda}
if [[ $device == cuda ]]; then
    gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
        echo "bench/gpu.sh: torch sees no CUDA GPU; DEVICE=cpu rehearses without one" >&2
        exit 1
    }
else
    gpu=rehearsal
fi
folder=${OUT:-bench/results/$(tr -cs 'A-Za-z0-9\n' '-' <<<"$gpu" | tr 'A-Z' 'a-z')}
[[ $lane == deep ]] || folder+=/$lane
mkdir -p "$folder"
status=0
SECONDS=0

{
    echo "$gpu"
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    git status --short -- kernels copedit_rt training bench 2>/dev/null
    "$python" --version
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,TEMPERATURE
        nvidia-smi
    fi
} >"$folder/machine.txt" 2>&1
: >"$folder/$lane.txt"

# run NAME SECONDS COMMAND...: within its own limit and what the lane has left.
run() {
    local name=$1 most=$2 left=$((limit - SECONDS)) begin=$SECONDS ended
    shift 2
    ((most > left)) && most=$left
    if ((most < 5)); then
        echo "$name: no time left" | tee -a "$folder/$lane.txt"
        return
    fi
    echo "==> $name, at most $most s"
    timeout --kill-after=5 "$most" "$@"
    ended=$?
    case $ended in
    0) ended=done ;;
    124 | 137) ended="out of time" ;;
    *) ended="failed ($ended)" status=1 ;;
    esac
    echo "$name: $ended, $((SECONDS - begin)) s" | tee -a "$folder/$lane.txt"
}
bench() {
    local name=$1 most=$2 what=$3
    shift 3
    run "$name" "$most" "$python" -m copedit_rt bench "$what" -o "$folder" --device "$device" "$@"
}
tests() {
    local most=$1
    shift
    # Only files with such tests, so that those of other parts need nothing that is not installed here.
    local files
    mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)
    local collect=()
    [[ $device == cuda ]] || collect=(--collect-only -q)
    run tests "$most" "$python" -m pytest -p no:cacheprovider -m gpu -rfE "${collect[@]}" "$@" "${files[@]}" \
        > >(tee "$folder/tests.txt") 2>&1
}

# On a CPU a tiny model takes the place of presets.
brain=(--preset brain-brats)
[[ $device == cuda ]] || brain=()
expected() {
    run predictions 30 "$python" -m copedit_bench.predict "$folder"
}

case $lane in
first)
    chosen="test_every_preset and bfloat16 and (brain-brats or cardiac)"
    chosen+=" or test_attention_at_every_head_dimension and bfloat16 and 577"
    chosen+=" or test_nearest_code or test_a_captured_loop or test_a_gpu_gives or test_sampler or test_float16_learns"
    tests 120 -n 8 -k "$chosen"
    bench operators 150 kernels --seconds 115 --against eager --against sdpa --against cdist --against product
    bench loop 150 sampler "${brain[@]}" --batch 1 --steps 1 --steps 20 --no-compile
    bench step 90 train-step "${brain[@]}" --stage denoiser --no-compile
    expected
    ;;
compare)
    bench operators-all 270 kernels --seconds 250
    bench loop-compiled 220 sampler "${brain[@]}" --batch 1 --steps 20
    bench step-compiled 110 train-step "${brain[@]}" --stage denoiser
    ;;
deep)
    tests 3600
    bench kernels 900 kernels
    run tables 60 "$python" -m copedit_bench.operators.tables
    bench sampler 3600 sampler
    bench train-step 3600 train-step
    measured=()
    [[ $device == cuda ]] && measured=(--measure brain-brats --measure brain-ixi --measure cardiac)
    bench cost 1800 cost "${measured[@]}"
    expected
    ;;
esac
echo "==> $lane: $SECONDS s, results in $folder"
exit $status
