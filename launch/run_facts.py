"""What a run directory says of its run, read without torch, without the job, and while it is being written.

Nothing here raises for what is missing or damaged: it is left out, and `RunFacts.problems` says so.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import yaml

from gpt.checkpoint.format import MANIFEST_NAME, checkpoint_directory, list_checkpoints
from gpt.goodput import computing_seconds
from gpt.heartbeat import Beat, read_beats
from gpt.run_directory import claim_file, newest_generation, process_space
from launch.log_folder import OUTCOME_NAME, launcher_of
from launch.slurm_record import JobRecord, find_job

Event = dict[str, Any]
RECENT_STEPS = 100
"""Records of metrics.jsonl that loss, its trend and the speed are taken from."""


@dataclass(frozen=True)
class Trained:
    """Sums over all lines of metrics.jsonl: the steps that count."""

    first_step_began: float | None = None
    computing_seconds: float = 0.0
    phases_seconds: dict[str, float] = field(default_factory=dict)
    """Of `data_wait`, `evaluation`, `checkpoint_stall` and `logging`."""


@dataclass(frozen=True)
class RunFacts:
    """Everything that `status` and `why` judge by. Times are seconds since the epoch."""

    directory: Path
    now: float
    claim: Event
    """Who claimed the directory last: host, pid, launcher, job, time; empty where nobody has."""
    beats: list[Beat]
    """Of the newest start's ranks."""
    events: list[Event]
    outcomes: list[Event]
    """How launchers ended, oldest first: their events `stopped` and `failed`, and what stands beside their logs."""
    records: list[Event]
    """The last RECENT_STEPS lines of metrics.jsonl."""
    evaluation: Event | None
    """The newest line of metrics.jsonl with a validation loss."""
    trained: Trained
    checkpoint: tuple[int, float] | None
    """Step of the newest committed checkpoint, and when that was."""
    hang_seconds: float
    launching: str | None
    """The newest folder of logs, where its launcher is alive on this host."""
    job: JobRecord | None
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def generation(self) -> int:
        return int(self.claim.get("generation", 0))

    @property
    def is_here(self) -> bool:
        """Whether process numbers of the claim are this host's."""
        return self.claim.get("process_space") == process_space()

    def last(self, *kinds: str) -> Event | None:
        """The newest event of these kinds."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), None)

    @property
    def given_up(self) -> Event | None:
        """The job script's last word where it was that the run makes no progress, and nothing has started since."""
        last = self.last("job ended", "job started", "start", "continue")
        return last if last is not None and last.get("decision") == "no progress" else None

    @property
    def last_sign(self) -> float | None:
        """When anything of the newest start was last written."""
        times = [beat.time for beat in self.beats] + ([self.claim["time"]] if self.claim else [])
        mine = [event for event in self.events if event["generation"] == self.generation]
        times += [event["time"] for event in mine if not event["event"].startswith("job ")]  # by the job script
        times += [record["time"] for record in self.records[-1:] if "time" in record]
        return max(times, default=None)

    @property
    def step(self) -> int:
        """The newest step that is written."""
        return int(self.records[-1]["step"]) if self.records else 0


def read_facts(run: Path) -> RunFacts:
    """Read a run directory.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or it is none of a run.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"there is no folder {run}")
    if not any((run / name).exists() for name in ("recipe.yaml", "generations", "logs", "jobs")):
        raise ValueError(f"{run} is no run directory: it has neither a recipe.yaml nor generations/, logs/ or jobs/")
    problems: list[str] = []
    generation = newest_generation(run)
    claim = _claim(run, generation, problems)
    events = _lines(run / "events.jsonl", ("time", "event", "generation"), problems)
    metrics = _bytes(run / "metrics.jsonl", problems)
    newest = metrics.rsplit(b"\n", RECENT_STEPS + 1)[-RECENT_STEPS - 1 :]  # the last one is empty
    records = _parse(newest, ("step",), "metrics.jsonl", problems)
    outcomes = [event for event in events if event["event"] in ("stopped", "failed")]
    outcomes += [outcome for folder in (run / "logs").glob("*/") if (outcome := _outcome(folder, problems))]
    return RunFacts(
        directory=run,
        now=time.time(),
        claim=claim,
        beats=list(read_beats(run, generation).values()) if generation else [],
        events=events,
        outcomes=sorted(outcomes, key=lambda event: event["time"]),
        records=records,
        evaluation=_last_evaluation(metrics),
        trained=_trained(metrics),
        checkpoint=_newest_checkpoint(run),
        hang_seconds=_hang_seconds(run, problems),
        launching=_living_launcher(run),
        job=find_job(run, claim, events),
        problems=problems,
    )


def is_running(pid: int, before: float) -> bool:
    """Whether this process of this host exists and began before a time: process numbers are used again."""
    try:
        process = psutil.Process(pid)
        return process.create_time() < before + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _bytes(file: Path, problems: list[str]) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror}")
        return b""


def _lines(file: Path, keys: tuple[str, ...], problems: list[str]) -> list[Event]:
    return _parse(_bytes(file, problems).splitlines(), keys, file.name, problems)


def _parse(lines: Iterable[bytes], keys: tuple[str, ...], name: str, problems: list[str]) -> list[Event]:
    """The lines that are whole and have the keys."""
    found, damaged = [], 0
    for line in filter(None, lines):
        content: Any = None
        with contextlib.suppress(ValueError):
            content = orjson.loads(line)
        if isinstance(content, dict) and all(key in content for key in keys):
            found.append(content)
        else:
            damaged += 1
    if damaged:
        problems.append(f"{damaged} line{'s' * (damaged > 1)} of {name} cut short or damaged: left out here")
    return found


def _trained(metrics: bytes) -> Trained:
    began, computing = None, 0.0
    phases = dict.fromkeys(("data_wait", "evaluation", "checkpoint_stall", "logging"), 0.0)
    for line in metrics.splitlines():
        with contextlib.suppress(ValueError):
            record = orjson.loads(line)
            if not isinstance(record, dict) or "time" not in record:
                continue
            began = began or record["time"] - (record.get("performance/step_seconds") or 0.0)
            computing += computing_seconds(record)
            for name in phases:
                phases[name] += record.get(f"performance/{name}_seconds") or 0.0
    return Trained(began, computing, phases)


def _claim(run: Path, generation: int, problems: list[str]) -> Event:
    if not generation:
        return {}
    file = claim_file(run, generation)
    claim: Event = {"generation": generation, "time": 0.0, "stale_seconds": 60.0, "host": "an unknown host"}
    try:
        claim |= {"time": file.stat().st_mtime} | json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError):
        problems.append(f"generations/{file.name} cannot be read")
    return claim


def _outcome(folder: Path, problems: list[str]) -> Event | None:
    file = folder / OUTCOME_NAME
    if not file.exists():
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        content: Event = json.loads(file.read_bytes())
        if {"time", "event", "reason"} <= content.keys():
            return {"file": f"logs/{folder.name}", "generation": None} | content
    problems.append(f"logs/{folder.name}/{file.name} cannot be read")
    return None


def _last_evaluation(metrics: bytes) -> Event | None:
    end = metrics.rfind(b'"evaluate/loss"')
    while end >= 0:
        begin = metrics.rfind(b"\n", 0, end) + 1
        with contextlib.suppress(ValueError):
            record: Event = orjson.loads(metrics[begin:].partition(b"\n")[0])
            return record
        end = metrics.rfind(b'"evaluate/loss"', 0, begin)
    return None


def _newest_checkpoint(run: Path) -> tuple[int, float] | None:
    with contextlib.suppress(OSError):  # deleted at this moment
        for step in reversed(list_checkpoints(run)):
            return step, (checkpoint_directory(run, step) / MANIFEST_NAME).stat().st_mtime
    return None


def _hang_seconds(run: Path, problems: list[str]) -> float:
    try:
        return float(yaml.safe_load((run / "recipe.yaml").read_bytes())["faults"]["hang_seconds"])
    except FileNotFoundError:  # nothing has started yet
        return 600.0
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        problems.append("recipe.yaml cannot be read: faults.hang_seconds is taken for 600")
        return 600.0


def _living_launcher(run: Path) -> str | None:
    """The newest folder of logs if the launcher that made it is a living process of this host."""
    folders = sorted((run / "logs").glob("*Z_*/"), key=lambda folder: folder.name)
    with contextlib.suppress(ValueError):
        for folder in folders[-1:]:
            host, pid, began = launcher_of(folder)
            if (
                host.partition("@")[0] == socket.gethostname()
                and is_running(pid, began)
                and not (folder / OUTCOME_NAME).exists()
            ):
                return folder.name
    return None
