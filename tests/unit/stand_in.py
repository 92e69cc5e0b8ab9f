"""A recipe and a worker module for tests of the launcher: scripts that stand in for ranks."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.recipe import Recipe
from gpt.recipe_file import parse_recipe
from launch import local

PROJECT = Path(__file__).resolve().parents[2]


def stand_in_recipe(folder: Path, name: str) -> Recipe:
    """Of a run below `folder / "runs"` that no rank will really train."""
    content: dict[str, Any] = {
        "name": name,
        "runs_directory": str(folder / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": "none",
        "data": {"train": [{"path": "none"}], "sequence_length": 8},
        "train": {"global_batch_tokens": 16, "micro_batch_sequences": 1, "steps": 1},
        "optimizer": {"learning_rate": 1e-3},
        "faults": {"restarts": 0},
    }
    return parse_recipe(content, "test")


def stand_in_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, beginning: str) -> Callable[[str], None]:
    """The function that sets what every worker runs behind `beginning`, instead of `gpt.train`."""
    monkeypatch.setattr(local, "WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(PROJECT)]))
    monkeypatch.setenv("TRAINYARD_CACHE", str(folder / "cache"))
    for name in ("TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS", "TRAINYARD_RECIPE"):
        monkeypatch.delenv(name, raising=False)

    def write(code: str) -> None:
        (folder / "stand_in_worker.py").write_text(beginning + textwrap.dedent(code))

    return write
