"""A start that was thought dead goes on after another one has taken its run directory over: it writes nothing."""

import json
import time
from pathlib import Path

import psutil
import pytest
import xxhash
from live_runs import Live, Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import why

STALE_SECONDS = 30.0


def content(run: Path) -> dict[str, str]:
    """The checksum of every file, except the launchers' own logs."""
    files = [p for p in run.rglob("*") if p.is_file() and "logs" not in p.relative_to(run).parts]
    return {str(p.relative_to(run)): xxhash.xxh3_64_hexdigest(p.read_bytes()) for p in files}


def processes(live: Live) -> list[psutil.Process]:
    return [psutil.Process(live.process.pid), *live.ranks().values()]


@pytest.mark.full
def test_a_stopped_start_that_goes_on_writes_nothing(runs: Runs) -> None:
    faults = {"stale_seconds": STALE_SECONDS, "hang_seconds": 20, "restarts": 1}
    steps = {"train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 100_000, "seed": 3}}
    old = runs.start("shared", faults=faults, log="-old", **steps)
    old.wait_until(lambda: old.last_step() > 12)
    for process in processes(old):
        process.suspend()
    stopped_at = time.monotonic()
    refused = runs.train("shared", faults=faults, check=False, **steps)
    assert time.monotonic() - stopped_at < STALE_SECONDS
    assert refused.returncode == 1 and "is in use" in refused.stderr
    time.sleep(max(0.0, stopped_at + STALE_SECONDS - time.monotonic()))
    reached = old.last_step()
    new = runs.start("shared", faults=faults, log="-new", **steps)
    new.wait_until(lambda: "resumed at step" in new.log.read_text() and new.last_step() > reached + 12)
    psutil.Process(new.process.pid).terminate()
    assert new.process.wait(timeout=60) == 85
    assert why.explain(new.directory)["cause"] == "stopped"
    before = content(new.directory)
    for process in reversed(processes(old)):
        process.resume()
    continued_at = time.monotonic()
    assert old.process.wait(timeout=60) == 1
    print(f"the old start ended {time.monotonic() - continued_at:.1f} s after it went on")
    assert content(new.directory) == before
    found = why.explain(new.directory)
    assert found["state"] == "stopped" and "was taken over by start 2" in json.dumps(found["evidence"])
    assert "was taken over by start 2; this is start 1: stopping without writing" in old.log.read_text()
    last = len(runs.metrics("shared"))
    board = EventAccumulator(str(new.directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, last + 1))
