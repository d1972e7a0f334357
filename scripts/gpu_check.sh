#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU and measures them, in 8 minutes: precision at the sizes of models, speed
# and memory, then the other tests of the kernels, as many as there is time for.
#
#   bash scripts/gpu_check.sh            writes docs/gpu/<device>.json, and a plot where matplotlib is installed
#   bash scripts/gpu_check.sh --tests    the tests alone, all of them
#
# Needs torch, triton, pytest and setuptools in the Python that it runs, $PYTHON or python3, and no network. With
# flash-linear-attention installed it is measured beside, which takes longer. What fails is named at the end; nothing is
# skipped for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
limit=460 # seconds

if [ "${1:-}" != "" ] && [ "$1" != --tests ]; then
  echo "error: unknown option $1; the only one is --tests" >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no GPU; without one, scripts/test.sh runs the kernels in Triton's interpreter" >&2
  exit 2
fi

"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
tests=("$python" -m pytest -q -p no:cacheprovider -p no:benchmark -m "not slow")
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("xdist") is None)'; then
  tests+=(-n 8) # most of the time is compiling, one process at a time
fi
failed=()
"${tests[@]}" tests/kernels/test_gpu.py || failed+=("precision")

if [ "${1:-}" != --tests ]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
  mkdir -p docs/gpu
  "$python" -m lm_zoo.eval.bench_gpu --json "docs/gpu/$name.json" || failed+=("speed")
  if [ ! -f "docs/gpu/$name.json" ]; then
    echo "nothing to draw"
  elif "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("matplotlib") is None)'; then
    "$python" scripts/plot_gpu.py "docs/gpu/$name.json" || failed+=("plot")
  else
    echo "no matplotlib here: draw the plot elsewhere with python scripts/plot_gpu.py docs/gpu/$name.json"
  fi
  left=$((limit - SECONDS > 30 ? limit - SECONDS : 30))
  tests=(timeout --signal=INT --kill-after=10 "$left" "${tests[@]}")
fi
"${tests[@]}" tests/kernels --ignore tests/kernels/test_gpu.py || failed+=("tests of the kernels, or their time was over")

echo "$SECONDS s in all"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
