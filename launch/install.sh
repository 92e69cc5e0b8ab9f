# Makes or reuses the virtual environment of this checkout; sourced by quickstart.sh and tests/run.sh.
# Nothing is installed when pyproject.toml and constraints.txt are those of the last installation.
# TRAINYARD_PYTHON chooses the Python (default: python3.11 or newer from PATH).

fail() {
  echo "trainyard: error: $1" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${TRAINYARD_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

check_prerequisites() {
  local compiler headers
  python="$(find_python)"
  [ -n "$python" ] || fail "no Python 3.11 or newer with venv found (tried ${TRAINYARD_PYTHON:-python3.11 to python3}): install it (Debian and Ubuntu: apt install python3.11-venv), or name one with TRAINYARD_PYTHON=/path/to/python"
  headers="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
  [ -f "$headers" ] || fail "$python has no header files ($headers is missing), which DeepSpeed's extension is built with: install them (Debian and Ubuntu: apt install python3-dev)"
  compiler="${CXX:-$(command -v g++ || command -v clang++ || command -v c++ || true)}"
  { [ -n "$compiler" ] && command -v "$compiler" >/dev/null; } \
    || fail "no C++ compiler found${CXX:+ (CXX is $CXX)}, which DeepSpeed's extension is built with: install g++ (Debian and Ubuntu: apt install g++)"
  if [ -x .venv/bin/python ] && ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    fail "$PWD/.venv holds no working Python 3.11 or newer: remove that folder"
  fi
}

install_trainyard() {
  local python stamp=.venv/trainyard-installed wanted install
  check_prerequisites
  # Where PYTHONDONTWRITEBYTECODE is set, as in many images, each process would compile the checkout's modules anew.
  "$python" -m compileall -q gpt launch data_pipeline >/dev/null || true
  wanted="$(cat pyproject.toml constraints.txt | cksum)"
  if [ -x .venv/bin/trainyard ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Installing into $PWD/.venv (once; a CPU build of torch is about 200 MB, a CUDA build some GB) ..."
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # The constraints name torch without a build tag: which build comes is decided by the indexes that pip is set up with.
  # Not every platform has wheels of the fast tokenizer engines (30 MB installed), and nothing needs them: there,
  # everything else is installed.
  install=(.venv/bin/python -m pip install --quiet --constraint constraints.txt)
  "${install[@]}" --only-binary gigatoken,tiktoken,awkward-cpp --editable ".[test,lint,serve,language,remote,fast]" || {
    echo "trainyard: the fast tokenizer engines cannot be installed here; going on without them ..." >&2
    "${install[@]}" --editable ".[test,lint,serve,language,remote]"
  }
  # DeepSpeed compiles an extension at its first start, which takes half a minute: the first run need not wait for it.
  echo "Compiling DeepSpeed's extension ..."
  .venv/bin/python -m launch.prebuild || fail "DeepSpeed's extension cannot be compiled: the compiler's words are above"
  echo "$wanted" >"$stamp"
}
