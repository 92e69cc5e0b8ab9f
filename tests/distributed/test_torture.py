"""A run that is killed again and again, at any moment, and whose disk fills up ends as the run that was left alone."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_runs import Live, Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run

from gpt.checkpoint.format import list_checkpoints
from gpt.goodput import account

STEPS_A_KILL = 6
DISK_BYTES = 48 * 2**20
MODES = ("starting", "step", "step", "saving", "saving", "rank", "disk")


@pytest.fixture
def small_disk(runs: Runs) -> Iterator[Path]:
    """The run directory `tortured`, a file system of its own."""
    folder = runs.directory("tortured")
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Torturer:
    """Starts the run and kills it, and keeps what must be accounted for."""

    def __init__(self, runs: Runs, settings: dict[str, Any], seed: int) -> None:
        self.runs, self.settings, self.random = runs, settings, random.Random(seed)
        self.folder = runs.directory("tortured")
        self.kills: list[tuple[float, int]] = []
        """Of each kill of everything: when, and the last step that metrics.jsonl then had."""
        self.starting_seconds = 0.0
        """About as long as the present start takes to its first step."""

    def torture(self, mode: str) -> None:
        """One start and its end by SIGKILL; the ranks of every fifth are new interpreters, as a user's are."""
        number = len(self.kills)
        interpreters = number % 5 == 0
        self.starting_seconds = 10.0 if interpreters else 4.0
        live = self.runs.start("tortured", log=f"-{number}", interpreters=interpreters, **self.settings)
        committed = list_checkpoints(self.folder)
        try:
            getattr(self, mode)(live)
        finally:
            newest = max([0, *committed, *list_checkpoints(self.folder)])
            live.kill()
            self.kills.append((time.time(), live.last_step()))
            (self.folder / "ballast").unlink(missing_ok=True)
        assert not list_checkpoints(self.folder) or max(list_checkpoints(self.folder)) >= newest, "a commit is gone"

    def starting(self, live: Live) -> None:
        time.sleep(self.random.uniform(0, self.starting_seconds))

    def step(self, live: Live) -> None:
        target = live.last_step() + self.random.randint(1, STEPS_A_KILL)
        live.wait_until(lambda: self._resumed(live) and live.last_step() >= target)
        time.sleep(self.random.uniform(0, 0.1))

    def saving(self, live: Live) -> None:
        before = set(self._temporary())
        live.wait_until(lambda: bool(set(self._temporary()) - before))
        time.sleep(self.random.uniform(0, 0.03))

    def rank(self, live: Live) -> None:
        """One rank only: the others end, and the launcher starts them all again."""
        restarts = self._count("restart")
        live.wait_until(lambda: self._resumed(live))
        time.sleep(self.random.uniform(0, 0.3))
        self.random.choice(live.ranks()).kill()
        live.wait_until(lambda: self._count("restart") > restarts)
        time.sleep(self.random.uniform(0, self.starting_seconds))

    def disk(self, live: Live) -> None:
        """No room for a checkpoint: saves fail, training goes on."""
        failed = self._count("checkpoint failed")
        live.wait_until(lambda: self._resumed(live))
        status = os.statvfs(self.folder)
        with (self.folder / "ballast").open("wb") as file:
            file.write(bytes(max(0, status.f_bavail * status.f_frsize - 2**20)))
        live.wait_until(lambda: self._count("checkpoint failed") > failed)
        reached = live.last_step()
        live.wait_until(lambda: live.last_step() > reached)

    def _temporary(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return [p.name for p in folder.iterdir() if p.name.startswith(".tmp-step")] if folder.exists() else []

    def _resumed(self, live: Live) -> bool:
        """Whether this start has made a step."""
        return "\nstep" in live.log.read_text()

    def _count(self, kind: str) -> int:
        return sum(event["event"] == kind for event in self.runs.events("tortured"))


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.few), pytest.param(50, marks=pytest.mark.full)])
def test_tortured_run_equals_the_one_left_alone(runs: Runs, small_disk: Path, kills: int) -> None:
    settings: dict[str, Any] = {
        "train": {
            "global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 40 + STEPS_A_KILL * kills, "seed": 3
        },
        "checkpoint": {"every_steps": 4, "keep_last": 2},
        "evaluate": {"every_steps": 20, "batches": 1, "sample_tokens": 4},
    }  # fmt: skip
    runs.train(f"left-alone-{kills}", **settings)
    torturer = Torturer(runs, settings, seed=kills)
    modes = ["saving"] if kills == 1 else [torturer.random.choice(MODES) for _ in range(kills)]
    for mode in modes:
        torturer.torture(mode)
    runs.train("tortured", **settings)
    assert_same_run(runs, "tortured", f"left-alone-{kills}")
    board = EventAccumulator(str(small_disk / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    steps = list(range(1, settings["train"]["steps"] + 1))
    assert [event.step for event in board.Scalars("train/loss")] == steps
    check_accounts(runs.events("tortured"), torturer.kills)


def check_accounts(events: list[dict[str, Any]], kills: list[tuple[float, int]]) -> None:
    """events.jsonl alone says what became of every second and of every step: starting, training that counts, training
    that was lost, and nobody there make the whole time, and the lost steps are those that the kills cost."""
    starting = lost = down = counted = 0.0
    steps_lost, begun, ready = 0, events[0]["time"], events[0]["time"]
    for event in events[1:]:
        if event["event"] == "continue":
            seen = event["last_seen"]
            # the newest sign of life is at most a heartbeat older than the first kill that came in between, if one did;
            # a start gives none before its ranks have met, nor do ranks that the launcher has started again
            again = any(e["event"] == "restart" and begun < e["time"] < event["time"] for e in events)
            first = next((killed for killed, _ in kills if begun < killed < event["time"]), None)
            if first is not None and not again:
                assert seen < first + 0.5 and (ready is None or seen > first - 6), (seen, first, ready)
            if ready is None:
                starting += seen - begun
            else:
                counted += seen - ready
            down += event["time"] - seen
            begun, ready = event["time"], None
        elif event["event"] == "resume":
            assert ready is None and event["seconds_lost"] >= 0
            starting += event["time"] - begun
            lost += event["seconds_lost"]
            steps_lost += event["steps_lost"]
            check_steps(event, events, kills)
            ready = event["time"]
    assert events[-1]["event"] == "end" and ready is not None
    counted += events[-1]["time"] - ready - lost
    whole = events[-1]["time"] - events[0]["time"]
    assert starting + counted + lost + down == pytest.approx(whole, abs=1e-3)
    told = account(events, None, events[-1]["time"])
    assert sum(told.values()) == pytest.approx(whole, abs=1e-3)
    assert (told["lost"], told["down"]) == (pytest.approx(lost), pytest.approx(down))
    assert min(starting, counted, down) > 0
    assert (lost > 0) == (steps_lost > 0)
    assert steps_lost > 0 or len(kills) == 1, "of many kills some cost steps"


def check_steps(resume: dict[str, Any], events: list[dict[str, Any]], kills: list[tuple[float, int]]) -> None:
    """The steps lost are those that metrics.jsonl had beyond the checkpoint when everything was killed."""
    since = max(e["time"] for e in events if e["event"] in ("start", "resume") and e["time"] < resume["time"])
    reached = [last for killed, last in kills if since < killed < resume["time"]]
    restarted = any(e["event"] == "restart" and since < e["time"] < resume["time"] for e in events)
    if reached and not restarted:
        assert resume["steps_lost"] in (0, reached[0] - resume["step"]), (resume, reached)
