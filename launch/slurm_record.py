"""What Slurm knows of a run's job: its own answer now, and what the job script kept in `logs/` at its start and end."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.submitted import submitted_jobs

ASKING_SECONDS = 10
"""How long Slurm may take to answer: its controller may be down."""
_FIELD = re.compile(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)")


@dataclass(frozen=True)
class JobRecord:
    """A run's newest job. The dictionaries are of `scontrol show job`'s fields, empty where there are none."""

    job: str
    now: dict[str, str]
    started: dict[str, str]
    ended: dict[str, str]
    source: str
    """The file below the run directory that the state is from; empty where Slurm itself has answered."""

    @property
    def state(self) -> str | None:
        """PENDING, RUNNING, TIMEOUT, PREEMPTED, NODE_FAIL, OUT_OF_MEMORY, CANCELLED, COMPLETED, FAILED, …"""
        if self.now:
            return self.now.get("JobState")
        kept = self.ended.get("JobState")  # written by the job itself, which mostly still ran then
        return None if kept in ("RUNNING", "COMPLETING") else kept

    @property
    def is_waiting(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")

    @property
    def has_ended(self) -> bool:
        return self.state is not None and not self.is_waiting and self.state not in ("RUNNING", "COMPLETING")

    @property
    def limit_time(self) -> float | None:
        """When its time limit ends or ended, in seconds since the epoch."""
        with contextlib.suppress(ValueError):  # "Unknown"
            text = (self.now if self.state == "RUNNING" else self.started).get("EndTime", "")
            return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
        return None

    def describe(self) -> str:
        """One line."""
        reason = self.now.get("Reason", "None")
        fields = self.now or self.ended or self.started
        parts = [self.state or "Slurm does not know it any more, or is not here"]
        parts += [f"reason {reason}"] if reason not in ("None", "") else []
        if self.is_waiting and fields.get("StartTime", "Unknown") != "Unknown":
            parts.append(f"expected to start {fields['StartTime']}")
        shown = {"Restarts": "restarts", "NodeList": "on", "RunTime": "run time", "TimeLimit": "time limit"}
        known = {word: fields[key] for key, word in shown.items() if fields.get(key) not in (None, "(null)", "")}
        parts += [f"{word} {value}" for word, value in known.items()]
        return ", ".join(parts)


def find_job(run: Path, claim: dict[str, Any], events: Sequence[dict[str, Any]]) -> JobRecord | None:
    """The job that a run runs in, waits for or had last: by its job script's events, its newest start, and what was
    submitted. None where there was none."""
    started = [event["job"] for event in events if event["event"] == "job started" and "job" in event]
    jobs = [str(started[-1] if started else claim.get("job") or "")]
    jobs += [job for submitted in submitted_jobs(run)[-1:] for job in submitted.job_ids]
    records = [_record(run, job) for job in dict.fromkeys(jobs) if re.fullmatch(r"\d+(_\d+)?", job)]
    to_come = [record for record in records if record.is_waiting or record.state == "RUNNING"]
    return next(iter(to_come + [record for record in records if record.state] + records), None)


def _record(run: Path, job: str) -> JobRecord:
    started, ended = (_newest_kept(run, job, when) for when in ("start", "end"))
    for command in (
        ["scontrol", "show", "job", "--oneliner", job],
        ["sacct", "--allocations", "--parsable2", "--job", job, "--format=State,Start,End,Timelimit,Restarts,NodeList"],
    ):
        text = _ask(command)
        now = parse_job(text) if command[0] == "scontrol" else _parse_accounting(text)
        if "JobState" in now:
            return JobRecord(job, now, started[1], ended[1], "")
    return JobRecord(job, {}, started[1], ended[1], ended[0] or started[0])


def _newest_kept(run: Path, job: str, when: str) -> tuple[str, dict[str, str]]:
    """The file that the newest run of the job kept, below the run directory, and its fields."""
    with contextlib.suppress(OSError):
        files = sorted((run / "logs").glob(f"job_{job}_*_{when}.txt"), key=lambda file: file.stat().st_mtime)
        if files:
            return f"logs/{files[-1].name}", parse_job(files[-1].read_text(encoding="utf-8", errors="replace"))
    return "", {}


def parse_job(text: str) -> dict[str, str]:
    """The fields of `scontrol show job`; of several tasks of an array, the first one's."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        fields.setdefault(name, value)
    return fields


def _parse_accounting(text: str) -> dict[str, str]:
    lines = [line.split("|") for line in text.splitlines()]
    if len(lines) < 2:
        return {}
    names = {"State": "JobState", "Start": "StartTime", "End": "EndTime", "Timelimit": "TimeLimit"}
    fields = {names.get(name, name): value for name, value in zip(lines[0], lines[-1], strict=False)}
    return fields | {"JobState": fields.get("JobState", "").partition(" ")[0]}  # "CANCELLED by 1000"


def _ask(command: list[str]) -> str:
    """What a command of Slurm prints; nothing where it is not there, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASKING_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
