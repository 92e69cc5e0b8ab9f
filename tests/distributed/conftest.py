"""Prepared data and the uninterrupted run that others are held against."""

import pytest
from live_runs import Runs, prepare_play


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A directory with one play prepared for training and a part of another for validation."""
    folder = tmp_path_factory.mktemp("runs")
    prepare_play(folder)
    return Runs(folder)


@pytest.fixture(scope="session")
def reference(runs: Runs) -> Runs:
    """The uninterrupted run `reference`: 2 ranks, 20 steps, accumulation, steps 4 and 5 traced."""
    runs.train("reference", profile={"steps": [4, 5]})
    return runs
