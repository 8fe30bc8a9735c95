#!/bin/bash
# Everything that needs a card, in one go: builds the CUDA modules, runs the GPU tests, then the benchmarks.
#
#   benchmarks/gpu.sh [OUT]        JSON and tables go to OUT (benchmarks/results by default)
#
# Needs a card, its driver, nvcc, and a Python with torch and pytest; $PYTHON names another one. Nothing is installed.
set -eu
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
export PYTHONPATH="kernels/hstu-kernels/src:kernels/mamba-scan/src${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'END'
import torch

if not torch.cuda.is_available():
    raise SystemExit("no CUDA device is visible to torch: nothing here can run")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
END

FOOTFALL_BUILD=cuda "$python" kernels/native.py

# hstu-kernels
"$python" -m pytest --import-mode=importlib -q -m gpu tests/hstu_kernels
"$python" benchmarks/bench_hstu_gpu.py --out "$out/hstu_gpu"

# mamba-scan
"$python" -m pytest --import-mode=importlib -q -m gpu tests/mamba_scan
"$python" benchmarks/bench_scan_gpu.py --out "$out/scan_gpu"

# One more look at every byte, on few configurations: the checker slows kernels down a hundredfold.
if command -v compute-sanitizer > /dev/null; then
  compute-sanitizer --error-exitcode 1 "$python" benchmarks/bench_hstu_gpu.py --check-memory
  compute-sanitizer --error-exitcode 1 "$python" benchmarks/bench_scan_gpu.py --check-memory
fi
