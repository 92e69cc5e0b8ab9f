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
# Unit tests are one process each and share the cores; what starts ranks itself has the machine for itself. Jobs of
# Slurm mostly wait, as do the commands of the whole way for their one process: these two go on side by side.
failed=0
"${pytest[@]}" --numprocesses 2 --dist loadfile tests/unit || failed=1
"${pytest[@]}" tests/numerics tests/distributed || failed=1
mkdir -p build
set -m # else it would not hear of an interrupt, and leave its cluster behind
"${pytest[@]}" tests/slurm >build/tests_slurm.log 2>&1 &
set +m
slurm=$!
trap 'kill -INT "$slurm" 2>/dev/null || true' EXIT
"${pytest[@]}" tests/integration || failed=1
wait "$slurm" || failed=1
cat build/tests_slurm.log
exit $failed
