#!/usr/bin/env bash
# From a fresh clone to two trained models and a linearized one, two tables and one picture, in minutes on two cores.
#
#   bash scripts/quickstart.sh      the first time it also sets up .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup
exec .venv/bin/python scripts/quickstart.py
