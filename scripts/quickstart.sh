#!/usr/bin/env bash
# From a fresh clone to two trained models and a linearized one, two tables and one picture, in minutes on two cores.
#
#   bash scripts/quickstart.sh      the first time it also sets up .venv
set -euo pipefail
case "${1:-}" in
  "") ;;
  -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  *) echo "quickstart: error: it takes no arguments, got $1" >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup
exec .venv/bin/python scripts/quickstart.py
