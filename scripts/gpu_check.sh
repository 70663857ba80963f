#!/usr/bin/env bash
# What only a GPU can show, in about 8 minutes of one card. Usage: bash scripts/gpu_check.sh [--tiny] [SECTION...]
#
#   tests       the tests on the GPU: the same noise and verdicts as on the CPU
#   precision   noise and p in float16 against float32
#   shapes      gradient-free against gradient at the shapes of SD 2.1, InstaFlow and LaVie: memory and time an iteration
#   networks    autoencoder and network of SD 2.1, SDXL, FLUX.1 and LaVie, with random weights
#   batches     pocket by batch size, in each way of computing
#   accuracy    accuracy against time and memory of each decoder inversion on pocket
#
# Results are written to docs/measurements/results/gpu. A section with a result there is not run again, so the same
# command resumes a run. --tiny runs every section in minutes on a CPU, small and into build/gpu-tiny: it checks the
# script, not a GPU. Environment: PYTHON (default .venv/bin/python), OUTPUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
tiny=""
if [ "${1:-}" = --tiny ]; then
    tiny=1
    shift
fi
output=${OUTPUT:-$([ "$tiny" ] && echo build/gpu-tiny || echo docs/measurements/results/gpu)}
work=build/gpu-check${tiny:+-tiny}
if [ ! "$tiny" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no CUDA device; use --tiny to try the script on a CPU" >&2
    exit 2
fi
mkdir -p "$output" "$work"

# within SECONDS COMMAND...: with this limit on a GPU, without one if --tiny
within() {
    if [ "$tiny" ]; then "${@:2}"; else timeout "$@"; fi
}

# experiment SECTION SECONDS NAME OPTIONS...: run an experiment, and keep its JSON as the section's result
experiment() {
    local section=$1 limit=$2 name=$3
    within "$limit" "$python" -m scripts.experiments "$name" -o "$work/$section" "${@:4}" &&
        cp "$work/$section/$name.json" "$output/$section.json"
}

# either LARGE... -- SMALL...: the arguments for a GPU, or those of --tiny
either() {
    local small=""
    arguments=()
    for word in "$@"; do
        if [ "$word" = -- ]; then small=1; elif [ "$small" = "$tiny" ]; then arguments+=("$word"); fi
    done
}

run() {
    case $1 in
    tests)
        within 120 "$python" -m pytest -q -m "" tests/test_cuda.py --junitxml "$work/tests.xml" &&
            "$python" scripts/junit_json.py "$work/tests.xml" "$output/tests.json"
        ;;
    precision)
        either --half float16 -- --half bfloat16 -n 20 --keys 3 --steps 4
        experiment precision 60 half_precision "${arguments[@]}"
        ;;
    shapes)
        either --limit 70 -- --width 0.0625 --scale 0.125
        experiment shapes 120 shapes "${arguments[@]}"
        ;;
    networks)
        either --shape "SD 2.1" --shape SDXL --shape FLUX.1 --shape LaVie --way bfloat16 --batch 1 --batch 4 --rounds 3 \
            -- --way eager --batch 1 --rounds 1
        experiment networks 150 speed "${arguments[@]}"
        ;;
    batches)
        either --way eager --way channels-last --way compile --way bfloat16 --way float16 --batch 1 --batch 2 --batch 4 \
            --batch 8 --batch 16 --batch 32 --batch 64 --rounds 5 -- --way eager --way channels-last --batch 1 --rounds 1
        experiment batches 120 speed "${arguments[@]}"
        ;;
    accuracy)
        either -n 16 -- -n 2 --shortest 4
        experiment accuracy 120 pareto "${arguments[@]}"
        ;;
    *)
        echo "gpu_check: unknown section $1" >&2
        exit 2
        ;;
    esac
}

failed=()
for section in "${@:-}"; do
    [ "$section" ] || set -- tests precision shapes networks batches accuracy
done
for section in "$@"; do
    if [ -e "$output/$section.json" ]; then
        echo "$section: has a result already"
    elif (run "$section"); then
        echo "$section: done"
    else
        failed+=("$section")
        echo "$section: failed" >&2
    fi
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu_check: failed: ${failed[*]}" >&2; exit 1; }
