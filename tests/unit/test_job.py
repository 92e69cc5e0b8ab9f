"""What a Slurm job decides at its end, and when it stops by itself; a real Slurm is in tests/slurm."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from gpt.heartbeat import Heartbeat
from gpt.run_directory import RunDirectory
from gpt.stop_requests import ends_at_once
from launch import job as jobs
from launch.job import Job, Start, _earlier_end, _note_lost_start, decide, seconds_needed

REFUSED = {"event": "failed", "time": 1.0, "failure": "refused", "reason": "data.train: no folder"}
NOT_MET = {"event": "failed", "time": 1.0, "failure": "not met", "reason": "the 2 hosts of the run did not meet"}
CRASHED = {"event": "failed", "time": 1.0, "failure": "exception", "reason": "rank 0 failed: ZeroDivisionError"}
KILLED = {"event": "failed", "time": 2.0, "failure": "killed", "reason": "rank 1 was killed by SIGKILL"}
FAILED_AT_12 = {"decision": "failed", "began": 0, "checkpoint": 10, "step": 12}
STOPPED_AT_10 = {"decision": "go on", "asked": True, "began": 0, "checkpoint": 10, "step": 10}
STOPPED_IDLE = {"decision": "go on", "asked": True, "began": 10, "checkpoint": 10, "step": 10}
PREEMPTED = {"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"}


def start(code: int, *outcomes: dict[str, Any], asked: bool = False, **changes: Any) -> Start:
    values = {"fields": {"JobState": "RUNNING", "PreemptTime": "None"}, "began": 10, "checkpoint": 10, "step": 12}
    return Start(code=code, outcomes=outcomes, asked=asked, **(values | changes))


@pytest.mark.parametrize(
    ("ended", "before", "name"),
    [
        (start(0, checkpoint=20, step=20), [], "finished"),
        (start(0, asked=True, checkpoint=20, step=20), [], "finished"),
        (start(85, asked=True, checkpoint=11), [], "go on"),
        (start(85), [], "go on"),
        (start(137, asked=True, checkpoint=11), [], "go on"),
        (start(137, fields=PREEMPTED), [FAILED_AT_12], "go on"),
        (start(137, KILLED, requeued=True), [FAILED_AT_12], "go on"),
        (start(1, REFUSED, requeued=True), [], "refused"),
        (start(85, fields={"JobState": "TIMEOUT"}), [FAILED_AT_12], "go on"),
        (start(85, asked=True, fields={"JobState": "CANCELLED"}), [], "cancelled"),
        (start(1, REFUSED), [], "refused"),
        (start(137, CRASHED, REFUSED), [], "refused"),
        (start(1, REFUSED, asked=True), [], "refused"),
        (start(2), [], "refused"),
        (start(1, CRASHED), [], "failed"),
        (start(1, NOT_MET, NOT_MET), [], "failed"),
        (start(1, NOT_MET, REFUSED), [], "refused"),
        (start(86, KILLED), [STOPPED_AT_10], "failed"),
        (start(1), [], "failed"),
        (start(86, KILLED), [FAILED_AT_12], "no progress"),
        (start(86, KILLED, step=11), [FAILED_AT_12], "no progress"),
        (start(86, KILLED, step=13), [FAILED_AT_12], "failed"),
        (start(86, KILLED, checkpoint=11), [FAILED_AT_12], "failed"),
        (start(86, KILLED), [FAILED_AT_12, STOPPED_AT_10], "failed"),
        (start(85, step=10), [STOPPED_AT_10], "go on"),
        (start(85, step=10), [STOPPED_IDLE], "no progress"),
        (start(85, step=10, fields=PREEMPTED), [STOPPED_IDLE], "go on"),
        (start(85, step=10), [STOPPED_IDLE | {"asked": False}], "go on"),
    ],
)
def test_what_comes_after_a_start(ended: Start, before: list[dict[str, Any]], name: str) -> None:
    decision = decide(ended, before)
    assert decision.name == name
    assert decision.goes_on == (name in ("go on", "failed"))


def test_a_preemption_or_a_lost_node_is_no_request_to_stop() -> None:
    assert decide(start(85, asked=True), []).asked and decide(start(85), []).asked
    assert not decide(start(85, asked=True, fields=PREEMPTED), []).asked
    assert not decide(start(137, KILLED, requeued=True), []).asked


def test_the_reason_is_that_of_the_first_to_fail_and_of_every_refusal_once() -> None:
    assert decide(start(86, CRASHED, KILLED), []).reason == CRASHED["reason"]
    assert decide(start(1, CRASHED, REFUSED, REFUSED), []).reason == REFUSED["reason"]
    reason = decide(start(86, KILLED), [FAILED_AT_12]).reason
    assert "after step 12 and after step 12" in reason and KILLED["reason"] in reason


def test_time_for_two_saves_and_a_step() -> None:
    saves = [{"event": "checkpoint committed", "seconds": s} for s in (900.0, 20.0, 30.0, 25.0, 25.0, 25.0)]
    steps = [{"performance/step_seconds": 700.0}] + [{"performance/step_seconds": 4.0 + n / 100} for n in range(50)]
    assert seconds_needed(saves, steps) == pytest.approx(2 * 30 + 4.49 + 5)
    assert seconds_needed([], steps) is None and seconds_needed(saves, []) is None


def test_a_chain_ends_with_the_run_but_a_new_submission_begins_again(tmp_path: Path) -> None:
    first = Job("7", 0, tmp_path, tmp_path / "jobs" / "0001" / "recipe.yaml")
    later, resubmitted = Job("8", 0, tmp_path, first.recipe), Job("9", 0, tmp_path, tmp_path / "other.yaml")
    first.note("job ended", decision="failed", reason="a crash")
    assert _earlier_end(later) is None
    first.note("job ended", decision="refused", reason="no data")
    assert (_earlier_end(later) or {})["reason"] == "no data"
    assert _earlier_end(resubmitted) is None
    assert _earlier_end(first) is None, "its user requeued it by hand"


def test_a_start_that_could_not_say_how_it_ended_is_noted_by_the_next(tmp_path: Path) -> None:
    first, second = (Job("7", restart, tmp_path, tmp_path / "recipe.yaml") for restart in (0, 1))
    _note_lost_start(first)
    first.note("job started")
    _note_lost_start(second)
    second.note("job started")
    second.note("job ended", decision="failed", reason="a crash")
    _note_lost_start(Job("7", 2, tmp_path, tmp_path / "recipe.yaml"))
    assert [(e["decision"], e["restart"]) for e in first.events("job ended")] == [("lost", 0), ("failed", 1)]


def test_an_event_while_another_start_comes_is_written_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDirectory(tmp_path).claim()
    found = iter([0, 1])
    monkeypatch.setattr(jobs, "newest_generation", lambda run: next(found))
    job = Job("7", 0, tmp_path, tmp_path / "recipe.yaml")
    job.note("job started")
    assert [event["generation"] for event in job.events("job started")] == [1]


def test_a_start_waits_until_the_one_that_a_lost_node_has_ended_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    job = Job("7", 1, tmp_path, tmp_path / "recipe.yaml")
    jobs._wait_for_last_start(job)
    owner = RunDirectory(tmp_path)
    owner.claim(stale_seconds=40)
    [file] = tmp_path.glob("generations/*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process_space": "elsewhere"}))
    jobs._wait_for_last_start(job)
    assert slept == [pytest.approx(40 + jobs.POLL_SECONDS, abs=10)]
    Heartbeat(tmp_path, owner.generation, 0, 60.0).end()
    jobs._wait_for_last_start(job)
    assert len(slept) == 1, "that one has ended"


@pytest.mark.parametrize(("failures", "words"), [(2, ""), (99, "Unable to contact slurm controller; submit the run")])
def test_a_controller_that_is_away_for_a_while_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failures: int, words: str
) -> None:
    calls = tmp_path / "calls"
    script = f"""#!/bin/sh
echo "$*" >>{calls}
[ $(wc -l <{calls}) -gt {failures} ] || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}
"""
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0.0)
    jobs._requeue(Job("7", 0, tmp_path, tmp_path / "recipe.yaml"))
    assert calls.read_text().splitlines() == ["requeue 7"] * min(failures + 1, jobs.TRIES)
    said = capsys.readouterr().out
    assert words in said and bool(said) == bool(words)


def test_in_a_job_only_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert ends_at_once(signal.SIGTERM) and ends_at_once(signal.SIGINT)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not ends_at_once(signal.SIGTERM) and not ends_at_once(signal.SIGUSR1) and ends_at_once(signal.SIGINT)
