"""Starting the gate of an export: what it holds the folder against, in a fresh process, within the memory there is."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gpt.checkpoint.format import Precision
from gpt.export_source import ExportSource

SAMPLE_TEXT = "The year 2026: “naïve” café, 東京 and 🙂 — x_1 = 3.14;\n\tEnd."
SAMPLE_CHAT = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend."}]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text and, with a chat template, the first special token after an assistant's answer."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        rendered = str(tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False))
        tail = rendered.rpartition(SAMPLE_CHAT[-1]["content"])[2]
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        closing = [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special]
        ends += closing[:1]
    return list(dict.fromkeys(ends))


def expected_of(source: ExportSource, precision: Precision, memory_bytes: int | None = None) -> dict[str, Any]:
    """What the gate holds the folder against: the live engine's probe, samples of the run's own tokenizer, and, where
    more than the training dtype is exported, the checkpoint's fp32 masters.

    `memory_bytes` is what the gate may hold of the weights in memory; None: all.
    """
    tokenizer = source.tokenizer
    wider = precision == "fp32" and source.weights.precision != "fp32"
    chat = None
    if tokenizer.chat_template is not None:
        chat = {"messages": SAMPLE_CHAT, "ids": tokenizer.apply_chat_template(SAMPLE_CHAT, return_dict=False)}
    return {
        "training_dtype": source.weights.precision,
        "exported_dtype": precision,
        "probe": source.probe.model_dump() if source.probe is not None else None,
        "masters": str(source.masters) if source.masters is not None and wider else None,
        "memory_bytes": memory_bytes,
        "tokenizer": {
            "text": SAMPLE_TEXT,
            "ids": tokenizer(SAMPLE_TEXT)["input_ids"],
            "chat": chat,
            "end_tokens": end_tokens(tokenizer),
        },
    }


def run_gate(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Check `folder` in a fresh isolated Python that imports torch and transformers only; returns its report.

    A folder that cannot be loaded at all gives a report that did not pass.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "expected.json"
        file.write_text(json.dumps(expected), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("export_gate.py")), str(folder), str(file)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        check = {"check": "load", "passed": False, "sentence": f"the folder could not be loaded and run: {last}"}
        return {"gated": expected["probe"] is not None, "passed": False, "checks": [check]}
    return report
