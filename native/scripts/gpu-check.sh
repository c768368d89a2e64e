#!/usr/bin/env bash
# Everything about the CUDA backend in one command, on a machine with an NVIDIA GPU and nvcc:
#
#   native/scripts/gpu-check.sh [FOLDER]      builds in build/gpu; the three 4.5 GB models go to FOLDER (default build/gpu/models)
#
# 1. builds   2. compares the CUDA ops with the CPU's   3. memcheck and racecheck (compute-sanitizer) on the op tests
# 4. timings of the kernels beside the copy bandwidth   5. prefill and decode of a random-weight 8B shape, one table
# Without a GPU: says so and ends with 0. TCA_SDIST and CMAKE_ARGS as in the Makefile. About 6 minutes on an H100.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! nvidia-smi -L > /dev/null 2>&1; then
    echo "skip   gpu-check: no NVIDIA GPU"
    exit 0
fi
if ! command -v nvcc > /dev/null; then
    echo "error: nvcc is missing; install the CUDA toolkit and put its bin folder on the PATH" >&2
    exit 1
fi
build=build/gpu
models=${1:-$build/models}
python=${PYTHON:-python3}
mkdir -p $build

# shellcheck disable=SC2086
cmake -S . -B $build -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DTCA_BUILD_TESTS=ON -DTCA_BUILD_BINDING=OFF -DTCA_BUILD_PROGRAMS=OFF ${CMAKE_ARGS:-} > $build.log 2>&1 || { tail -20 $build.log; exit 1; }
cmake --build $build --parallel --target tca-test-cuda tca-bench-gpu
find_program() { find $build -type f -name "$1" -perm -u+x | head -1; }
test=$(find_program tca-test-cuda)
bench=$(find_program tca-bench-gpu)

"$test"
if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --tool memcheck  --error-exitcode 1 "$test" cuda_types_and_head_sizes cuda_error_against_upstream
    compute-sanitizer --tool racecheck --error-exitcode 1 "$test" cuda_types_and_head_sizes
else
    echo "skip   memcheck, racecheck: no compute-sanitizer"
fi
"$test" bench 2> /dev/null

[ -e "$models/keep-0.25.gguf" ] || "$python" native/scripts/random-gguf.py "$models"
{
    for kv in f16 q8_0; do
        for model in dense keep-0.39 keep-0.25; do
            "$bench" "$models/$model.gguf" $kv 8192,32768,131072 2> /dev/null
        done
        "$bench" "$models/dense.gguf" $kv 8192 512 2> /dev/null
    done
} | tee $build/bench.jsonl | "$python" native/scripts/gpu-table.py
