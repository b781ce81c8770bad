#!/bin/sh
# Checks, sanitises and measures the kernels on a GPU machine with torch and triton alone; each part takes under 9 minutes.
#   bench/gpu/run.sh [check|sanitize|rowwise|attention|all] [results directory]
set -u
cd "$(dirname "$0")/../.."
part="${1:-all}"
out="${2:-bench/gpu/results}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
mkdir -p "$out"

"$python" -c 'import torch, triton' || { echo "error: $python has no torch and triton; name one that has: PYTHON=/path/to/python3"; exit 1; }
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$gpu" = 0 ]; then
    echo "No GPU here: nothing is checked or sanitised, and every measured row stays empty."
fi

failed=0
run() {
    echo "== $*"
    "$@" || failed=1
}
wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }

if wanted check && [ "$gpu" = 1 ]; then
    run timeout 500 "$python" -m bench.gpu.check | tee "$out/check.txt"
    grep -q '^0 wrong$' "$out/check.txt" || failed=1
fi
if wanted sanitize && [ "$gpu" = 1 ]; then
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -n "$sanitizer" ]; then
        # torch's caching allocator would hide an access outside a tensor
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        for tool in memcheck racecheck; do
            run timeout 250 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m bench.gpu.check --dtype bfloat16 >"$out/sanitize-$tool.txt" 2>&1
            tail -n 3 "$out/sanitize-$tool.txt"
        done
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
    else
        echo "compute-sanitizer is not installed here: not run" | tee "$out/sanitize.txt"
    fi
fi
for measured in rowwise attention; do
    if wanted "$measured"; then
        run timeout 500 "$python" -m bench.gpu.kernels --part "$measured" --out "$out"
    fi
done
exit "$failed"
