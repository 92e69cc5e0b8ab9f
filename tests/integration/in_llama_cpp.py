"""Asks llama.cpp, in a process of its own, for tokens, logits and an answer of a GGUF file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = os.environ.get("TRAINYARD_LLAMA_CPP")
needs_llama_cpp = pytest.mark.skipif(
    FOLDER is None, reason="TRAINYARD_LLAMA_CPP names no build of llama-cpp-python (tests/llama_cpp.sh makes one)"
)
# The cache in fp32 (type 0), not fp16, so that logits can be compared closely.
SCRIPT = """
import json, sys
from llama_cpp import Llama
answers = []
for asked in json.load(sys.stdin):
    model = Llama(asked["file"], n_ctx=256, n_threads=2, logits_all=True, type_k=0, type_v=0, seed=0, verbose=False)
    tokens = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    model.eval(asked["ids"])
    logits = model.scores[: len(asked["ids"])].tolist()
    model.reset()
    chat = asked["chat"] and model.create_chat_completion(asked["chat"], temperature=0, max_tokens=32)["choices"][0]
    answers.append({"tokens": tokens, "logits": logits, "chat": chat})
print(json.dumps(answers))
"""


def ask_llama_cpp(*asked: dict[str, Any]) -> list[dict[str, Any]]:
    """For each of `asked` ("file", "texts", "ids", "chat": messages or None): its tokens, logits and answer."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([{**one, "file": str(one["file"])} for one in asked]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(FOLDER or "").absolute())},
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers
