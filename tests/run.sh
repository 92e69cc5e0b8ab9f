#!/usr/bin/env bash
# Checks and tests. `tests/run.sh` takes about 11 minutes on 2 cores; `--full` runs everything; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
install_trainyard

tier=(-m "not full")
if [ "${1:-}" = "--full" ]; then
  tier=()
  shift
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "${tier[@]}" "$@"
