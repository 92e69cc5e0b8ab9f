"""The gap of validation and training loss as a curve, and the warning when it opens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gpt.validation_gap import ValidationGap


def warned_at(validation: list[float], training: list[float]) -> list[int]:
    """Numbers of the evaluations, from 1, at which there is a warning."""
    gap = ValidationGap()
    found = []
    for step, (lower, upper) in enumerate(zip(training, validation, strict=True), start=1):
        record = {"train/loss": lower, "train/target_tokens": 10, "evaluate/loss": upper}
        if gap.see(step, record):
            found.append(step)
        assert record["evaluate/gap"] == pytest.approx(upper - lower)
    return found


@pytest.mark.parametrize(
    ("validation", "training", "expected"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.0, 2.0, 1.8, 1.6, 1.4, 1.2], [5]),
        ([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.1, 2.2], [3.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.9], [8]),  # a new lowest
        ([3.0, 2.0, 2.1, 2.0, 2.1, 2.1], [3.0, 2.0, 1.8, 1.7, 1.6, 1.5], []),  # down at the lowest in between
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.0, 2.0, 2.1, 2.2, 2.3, 2.4], []),  # both rise: it diverges
        ([3.0, 2.0, 2.3, 2.4, 2.5, 2.6], [3.0, 2.0, 2.05, 2.05, 2.05, 2.05], []),  # training gets worse, too
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5], [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], []),  # wide, but validation gets better
        ([3.0, 2.0, 2.01, 2.01, 2.01, 2.01], [3.0, 2.0, 1.98, 1.98, 1.98, 1.98], []),  # by 0.03 of 2.0: noise
        ([3.0, 2.0, 2.01, 2.01, 2.01, 2.01], [3.0, 2.0, 1.96, 1.96, 1.96, 1.96], [5]),  # by 0.05
        ([2.0, 2.1, 2.2, 2.3, 1.0, 1.1, 1.2, 1.3], [2.0, 1.8, 1.6, 1.4, 1.0, 0.9, 0.8, 0.7], [4, 8]),  # again
    ],
)
def test_when_there_is_a_warning(validation: list[float], training: list[float], expected: list[int]) -> None:
    assert warned_at(validation, training) == expected


def test_the_training_loss_is_the_mean_over_the_target_tokens_since_the_last_evaluation() -> None:
    gap = ValidationGap()
    gap.see(1, {"train/loss": 9.0, "train/target_tokens": 10, "evaluate/loss": 9.0})
    gap.see(2, {"train/loss": 4.0, "train/target_tokens": 30})
    gap.see(3, {"train/loss": math.nan, "train/target_tokens": 1000})
    record = {"train/loss": 2.0, "train/target_tokens": 10, "evaluate/loss": 4.0}
    gap.see(4, record)
    assert record["evaluate/gap"] == 0.5


def test_what_is_not_finite_gives_no_gap_and_no_warning() -> None:
    gap = ValidationGap()
    for training, validation in ((math.nan, 2.0), (1.0, math.inf), (None, None)):
        record: dict[str, Any] = {"train/loss": training, "train/target_tokens": 5, "evaluate/loss": validation}
        assert gap.see(1, record) is None and record["evaluate/gap"] is None
    record = {"train/loss": 2.0, "train/target_tokens": 5, "evaluate/loss": 2.0}
    gap.see(2, record)
    assert record["evaluate/gap"] == 0.5  # the loss of 1.0 before still waits for an evaluation


def test_a_resume_at_any_step_gives_the_same_gaps_and_the_same_warning(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for step in range(1, 25):
        records.append({"step": step, "train/loss": 3.0 / step + 0.1 * (step % 3), "train/target_tokens": step})
        if step % 4 == 0:
            records[-1]["evaluate/loss"] = 2.0 + 0.1 * abs(step - 8)
    whole, told = ValidationGap(), {}
    for record in records:
        told[record["step"]] = whole.see(record["step"], record)
    assert [step for step, warning in told.items() if warning] == [20]
    path = tmp_path / "metrics.jsonl"
    for resumed in range(25):
        path.write_text("".join(json.dumps(record) + "\n" for record in records[:resumed]))
        gap = ValidationGap.restore(path)
        for record in records[resumed:]:
            again = {key: value for key, value in record.items() if key != "evaluate/gap"}
            assert gap.see(record["step"], again) == told[record["step"]]
            assert again == record
