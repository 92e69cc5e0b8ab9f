#!/usr/bin/env bash
# Checks and tests. `tests/run.sh` takes about 10 minutes on 2 cores; `--full` runs the full tests in the
# place of those with fewer cases; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
install_trainyard

tier=(-m "not full")
if [ "${1:-}" = "--full" ]; then
  tier=(-m "not few")
  shift
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
pytest=(.venv/bin/python -m pytest --durations 25 --durations-min 10 "${tier[@]}")
if [ $# -gt 0 ]; then
  exec "${pytest[@]}" "$@"
fi
# Unit tests are one process each and share the cores; what starts ranks itself has the machine for itself.
failed=0
"${pytest[@]}" --numprocesses 2 --dist loadfile tests/unit || failed=1
"${pytest[@]}" tests/numerics tests/distributed tests/integration tests/slurm || failed=1
exit $failed
