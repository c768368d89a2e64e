#!/usr/bin/env bash
# Everything about the CUDA backend in one command, on a machine with an NVIDIA GPU and nvcc:
#
#   native/scripts/gpu-check.sh [FOLDER]                    builds in build/gpu
#   native/scripts/gpu-check.sh --pack ARCHIVE              builds (no GPU needed) and packs the programs and libraries, no more
#   native/scripts/gpu-check.sh --unpack ARCHIVE [FOLDER]   takes those in place of a build
#
# 1. builds or unpacks   2. compares the CUDA ops with the CPU's   3. memcheck and racecheck (compute-sanitizer) on the op tests
# 4. timings of the kernels beside stock's, and the GPU's limits and cuDNN where PyTorch is there (gpu-peers.py)
# 5. prefill and decode of a random-weight 8B shape, one table
# FOLDER takes the three 4.5 GB models (default build/gpu/models). Without a GPU: says so and ends with 0. TCA_SDIST and
# CMAKE_ARGS as in the Makefile. About 6 minutes on an H100 once built.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/gpu
archive=
mode=build
case "${1:-}" in
    --pack | --unpack)
        mode=${1#--}
        archive=${2:?error: $1 needs the name of an archive}
        shift 2 ;;
esac
models=${1:-$build/models}
python=${PYTHON:-python3}
mkdir -p $build

if [ $mode != pack ] && ! nvidia-smi -L > /dev/null 2>&1; then
    echo "skip   gpu-check: no NVIDIA GPU"
    exit 0
fi
if [ $mode = unpack ]; then
    tar -xf "$archive" -C $build
    export LD_LIBRARY_PATH=$PWD/$build/packed:/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}
else
    rm -rf $build/packed  # of an earlier --pack
    if ! command -v nvcc > /dev/null; then
        echo "error: nvcc is missing; install the CUDA toolkit and put its bin folder on the PATH" >&2
        exit 1
    fi
    # shellcheck disable=SC2086
    cmake -S . -B $build -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DTCA_BUILD_TESTS=ON -DTCA_BUILD_BINDING=OFF -DTCA_BUILD_PROGRAMS=OFF ${CMAKE_ARGS:-} > $build.log 2>&1 || { tail -20 $build.log; exit 1; }
    cmake --build $build --parallel --target tca-test-cuda tca-bench-gpu
fi
find_program() { find $build -type f -name "$1" -perm -u+x | head -1; }
test=$(find_program tca-test-cuda)
bench=$(find_program tca-bench-gpu)
if [ $mode = pack ]; then
    mkdir $build/packed
    cp "$test" "$bench" $build/packed
    find $build -name 'lib*.so*' -not -path '*/packed/*' -exec cp -P {} $build/packed \;
    XZ_OPT=-T0 tar -cJf "$archive" -C $build packed
    exit 0
fi

"$test"
if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --tool memcheck  --error-exitcode 1 "$test" cuda_types_and_head_sizes cuda_error_against_upstream
    compute-sanitizer --tool racecheck --error-exitcode 1 "$test" cuda_types_and_head_sizes
else
    echo "skip   memcheck, racecheck: no compute-sanitizer"
fi
"$test" bench 2> /dev/null
"$python" native/scripts/gpu-peers.py

[ -e "$models/keep-0.25.gguf" ] || "$python" native/scripts/random-gguf.py "$models"
{
    for kv in f16 q8_0; do
        for model in dense keep-0.39 keep-0.25; do
            "$bench" "$models/$model.gguf" $kv 8192,32768,131072 2> /dev/null
        done
        "$bench" "$models/dense.gguf" $kv 8192 512 2> /dev/null
        for model in dense keep-0.25; do
            "$bench" "$models/$model.gguf" $kv 128,512,1024,2048,4096 2> /dev/null  # for decode: a prompt in such pieces is slow
        done
    done
} | tee $build/bench.jsonl | "$python" native/scripts/gpu-table.py
