#!/usr/bin/env bash
# Trains three models of 124 to 138 million parameters on this machine's GPU for some steps each: tokens/s, utilisation and
# memory of GLA, Gated DeltaNet and a softmax transformer, on texts of 2,048, 8,192 and 32,768 tokens.
#
#   bash scripts/gpu_train_check.sh      writes docs/gpu/<device>-training.json
#
# Needs torch, triton, transformers and setuptools in the Python that it runs, $PYTHON or python3, and no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [ $# -gt 0 ]; then
  echo "error: this script takes no options; python -m lm_zoo.eval.bench_training does" >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no GPU; python -m lm_zoo.eval.bench_training measures small models on a CPU" >&2
  exit 2
fi

"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
mkdir -p docs/gpu
"$python" -m lm_zoo.eval.bench_training --json "docs/gpu/$name-training.json"
