"""Prepared data and the uninterrupted run that others are held against."""

import pytest
from live_runs import PLAYS, Runs, trainyard


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A directory with one play prepared for training and a part of another for validation."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (PLAYS / "train" / "hamlet.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(lines[:60_000], encoding="utf-8")
    (folder / "validation.txt").write_text(lines[60_000:70_000], encoding="utf-8")
    trainyard(
        *("prepare", "--input", "train.txt", "--validation-input", "validation.txt"),
        *("--train-tokenizer", "600", "--out", "data"),
        cwd=folder,
    )
    return Runs(folder)


@pytest.fixture(scope="session")
def reference(runs: Runs) -> Runs:
    """The uninterrupted run `reference`: 2 ranks, 20 steps, bf16, accumulation."""
    runs.train("reference")
    return runs
