"""Starting the gate of an export: what it holds the folder against, in a fresh process, within the memory there is."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt.checkpoint.format import Precision
from gpt.checkpoint.read import TORCH_DTYPES
from gpt.export_source import ExportSource

LIBRARIES_BYTES = 512 * 2**20
"""Of a process with torch and transformers; 0.26 GiB were measured on a CPU."""
LOGIT_BYTES = 20
"""Of each logit: in the training dtype and in fp32, its logarithm of the softmax, and those of another model."""
CGROUPS = Path("/sys/fs/cgroup")
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


def expected_of(source: ExportSource, precision: Precision) -> dict[str, Any]:
    """What the gate holds the folder against: the live engine's probe, samples of the run's own tokenizer, and, where
    more than the training dtype is exported, the checkpoint's fp32 masters.

    Raises ValueError for a chat template that refuses a question with its answer."""
    tokenizer = source.tokenizer
    wider = precision == "fp32" and source.weights.precision != "fp32"
    chat = None
    if tokenizer.chat_template is not None:
        try:
            prompt = tokenizer.apply_chat_template(SAMPLE_CHAT[:-1], add_generation_prompt=True, return_dict=False)
            ids = tokenizer.apply_chat_template(SAMPLE_CHAT, return_dict=False)
        except TemplateError as error:
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path} refuses a question with its answer: {error}"
            ) from error
        chat = {"messages": SAMPLE_CHAT, "prompt_ids": prompt, "ids": ids}
    return {
        "training_dtype": source.weights.precision,
        "exported_dtype": precision,
        "merged": source.merged,
        "probe": source.probe.model_dump() if source.probe is not None else None,
        "masters": str(source.masters) if source.masters is not None and wider else None,
        "memory_bytes": None,
        "tokenizer": {
            "text": SAMPLE_TEXT,
            "ids": tokenizer(SAMPLE_TEXT)["input_ids"],
            "chat": chat,
            "end_tokens": end_tokens(tokenizer),
        },
    }


@dataclass(frozen=True)
class GateMemory:
    """What the gate needs of memory, in bytes: `weights` of the whole model in the widest dtype that it computes in,
    its `largest` part that has to be there at once, and the `rest`: libraries and logits."""

    weights: int
    largest: int
    rest: int

    def limit(self, available: int) -> int | None:
        """What may be held of the weights where `available` bytes are free; None: all of them.

        Raises ValueError where even a single layer is too much.
        """
        if available >= self.rest + self.weights:
            return None
        if available < self.least:
            raise ValueError(
                f"The export's check needs {gib(self.least)} of memory even where it reads the model layer by layer, "
                f"but {gib(available)} are available. Run it on a larger machine."
            )
        return available - self.rest

    @property
    def least(self) -> int:
        return self.rest + 2 * self.largest  # it is read, and put into its dtype


def gate_memory(model: PreTrainedModel, expected: Mapping[str, Any]) -> GateMemory:
    """What the gate needs for `model` (on the meta device)."""
    size = TORCH_DTYPES[expected["training_dtype"] if expected["masters"] is None else "fp32"].itemsize
    whole_layers = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in whole_layers]
    parts = [sum(p.numel() for p in layer.parameters()) for layer in layers] + [p.numel() for p in model.parameters()]
    probe = expected["probe"]
    tokens = len(probe["input_ids"] if probe is not None else expected["tokenizer"]["ids"])
    logits = tokens * model.config.get_text_config().vocab_size * LOGIT_BYTES
    return GateMemory(
        weights=sum(p.numel() for p in model.parameters()) * size,
        largest=max(parts) * size,
        rest=LIBRARIES_BYTES + logits,
    )


def available_memory_bytes() -> int:
    """Memory that this process can still get: what the host has free, and what its control groups leave (a Slurm job's
    or a container's limit, of which the page cache that can be given back does not count as used)."""
    available = int(psutil.virtual_memory().available)
    try:
        [place] = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return available
    group = CGROUPS / place.strip().lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no limit: no such file, or the word "max"
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = int((folder / "memory.max").read_text()) - used + int(statistics["inactive_file"])
            available = min(available, max(0, free))
        if folder == CGROUPS:
            break
    return available


def gib(size_bytes: int) -> str:
    """For messages."""
    return f"{size_bytes / 2**30:.2f} GiB"


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
