#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU and measures them: their tests for real, then speed and memory.
#
#   bash scripts/gpu_check.sh            writes docs/gpu/<device>.json, and a plot where matplotlib is installed
#   bash scripts/gpu_check.sh --tests    the tests alone
#
# Needs torch, triton, pytest and setuptools in the Python that it runs, $PYTHON or python3, and no network. With
# flash-linear-attention installed it is measured beside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [ "${1:-}" != "" ] && [ "$1" != --tests ]; then
  echo "error: unknown option $1; the only one is --tests" >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no GPU; without one, scripts/test.sh runs the kernels in Triton's interpreter" >&2
  exit 2
fi

"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
workers=()
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("xdist") is None)'; then
  workers=(-n 8) # most of the time is compiling, one process at a time
fi
"$python" -m pytest -q -p no:cacheprovider -p no:benchmark "${workers[@]}" tests/kernels -m "not slow"
[ "${1:-}" = --tests ] && exit

name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
mkdir -p docs/gpu
"$python" -m lm_zoo.eval.bench_gpu --json "docs/gpu/$name.json"
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("matplotlib") is None)'; then
  "$python" scripts/plot_gpu.py "docs/gpu/$name.json"
else
  echo "no matplotlib here: draw the plot elsewhere with python scripts/plot_gpu.py docs/gpu/$name.json"
fi
