#!/usr/bin/env bash
# Builds llama.cpp and its Python package from the source package llama-cpp-python (77 MB, two minutes on two cores, once)
# in build/llama_cpp and prints that folder: TRAINYARD_LLAMA_CPP="$(bash tests/llama_cpp.sh)" bash tests/run.sh -k llama_cpp
# Only the library is built, not the common code and programs, which take several times as long. Needs pip, cmake, a C++
# compiler and make.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing: .venv may be shared with other checkouts.
[ -x .venv/bin/python ] || { echo "there is no .venv here: run tests/run.sh once" >&2; exit 1; }
command -v cmake >/dev/null || { echo "cmake is missing: install it (Debian and Ubuntu: apt install cmake)" >&2; exit 1; }

folder="${1:-$PWD/build/llama_cpp}"
if [ ! -d "$folder" ]; then
  mkdir -p "$(dirname "$folder")"
  part="$(mktemp -d "$folder.XXXXXX")"
  trap 'rm -rf "$part"' EXIT
  pip=(.venv/bin/python -m pip --quiet)
  "${pip[@]}" download --no-deps --no-binary :all: --dest "$part" llama-cpp-python==0.3.36 >&2
  "${pip[@]}" install --no-deps --target "$part/package" diskcache==5.6.3 >&2
  tar xzf "$part"/*.tar.gz -C "$part"
  source=("$part"/llama_cpp_python-*/)
  # -O1: half the compile time of -O3, and the tests' models are small. No OpenMP, no code for this processor alone.
  cmake -S "${source[0]}/vendor/llama.cpp" -B "$part/built" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
    -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_MTMD=OFF \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH="\$ORIGIN" >&2
  cmake --build "$part/built" --target llama --parallel "$(nproc)" >&2
  mv "${source[0]}/llama_cpp" "$part/package/"
  mkdir -p "$part/package/llama_cpp/lib"
  cp -P "$part"/built/bin/*.so* "$part/package/llama_cpp/lib/"
  mv -T "$part/package" "$folder"
fi
echo "$folder"
