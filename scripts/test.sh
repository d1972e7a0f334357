#!/usr/bin/env bash
# Installs what the tests need, then lint and tests.
#
#   bash scripts/test.sh                    everything but the slow tests
#   bash scripts/test.sh --all              the slow tests too
#   bash scripts/test.sh tests/eval -k ppl  other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

selection="not slow"
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then selection=""; else arguments+=("$argument"); fi
done

setup test
python=.venv/bin/python

# One thread per worker: the tests are many small products, and workers that each take every core only wait for others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=$("$python" -c 'import os; print(min(os.cpu_count() or 1, 8))')

failed=0
"$python" -m ruff check --quiet . || failed=1
"$python" -m ruff format --quiet --check . || failed=1
"$python" -m pytest -n "$workers" --dist loadgroup -m "$selection" ${arguments[@]+"${arguments[@]}"} || failed=1
exit "$failed"
