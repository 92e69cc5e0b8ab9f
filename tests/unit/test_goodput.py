"""The account of a run's life: every second in one place."""

from typing import Any

import pytest

from gpt.goodput import account, computing_seconds


def events(*lines: tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"time": time, "event": kind, **details} for time, kind, details in lines]


def test_kills_and_a_rollback() -> None:
    life = events(
        (100.0, "start", {}),  # trains from 110
        (150.0, "checkpoint begun", {"step": 10}),
        (200.0, "continue", {"last_seen": 170.0}),
        (220.0, "resume", {"step": 10, "steps_lost": 4, "seconds_lost": 20.0}),
        (250.0, "checkpoint begun", {"step": 20}),
        (280.0, "rollback", {"step": 20}),
        (300.0, "continue", {"last_seen": 290.0}),  # ends before it is ready
        (330.0, "continue", {"last_seen": 310.0}),
        (335.0, "resume", {"step": 20, "steps_lost": 2, "seconds_lost": 10.0}),
        (400.0, "end", {}),
    )
    told = account(life, first_step_began=110.0, until=400.0)
    assert told == {"starting": 10 + 20 + 10 + 5, "training": 60 - 20 + 70 - 30 + 65 - 10, "lost": 60.0, "down": 60.0}
    assert sum(told.values()) == 300.0


@pytest.mark.parametrize(("steps_lost", "starting"), [(0, 30.0 + 5.0), (3, 5.0)])
def test_a_first_start_of_which_no_step_is_left(steps_lost: int, starting: float) -> None:
    lost = 30.0 if steps_lost else 0.0
    life = events(
        (0.0, "start", {}),
        (40.0, "continue", {"last_seen": 30.0}),
        (45.0, "resume", {"step": 0, "steps_lost": steps_lost, "seconds_lost": lost}),
    )
    told = account(life, first_step_began=46.0, until=65.0)
    assert told == {"starting": starting, "training": 20.0, "lost": lost, "down": 10.0}


def test_a_run_that_has_not_trained_yet() -> None:
    assert account(events((5.0, "start", {})), None, 9.0)["starting"] == 4.0


def test_waits_do_not_compute() -> None:
    phases = {"data_wait": 1.0, "forward": 2.0, "backward": 4.0, "communication": 0.5, "optimizer": 0.25}
    record: dict[str, Any] = {f"performance/{name}_seconds": value for name, value in phases.items()}
    assert computing_seconds(record | {"performance/step_seconds": 9.0}) == 6.75
    assert computing_seconds({"performance/step_seconds": 9.0}) == 9.0, "a line of an earlier version"
