"""Saves behind a run's back: killed in the middle, on slow and on full disks, and what is kept of them."""

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_runs import Live, Runs, comparable, trainyard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run
from test_stop import worker_pids

from gpt.checkpoint.format import checkpoint_directory, list_checkpoints, read_manifest

SLOW_DISK = """
import os, threading, time
fsync, run = os.fsync, threading.Thread.run
def slow(descriptor):
    if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(1.5)
    fsync(descriptor)
def late(thread):
    if thread.name == "checkpoint":
        time.sleep(0.8)  # before the copy: the next update must wait for it
    run(thread)
os.fsync, threading.Thread.run = slow, late
"""
LONG: dict[str, Any] = {
    "train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 150, "seed": 3},
    "checkpoint": {"every_steps": 5, "keep_last": 2, "max_failed_saves": 1000},
}


def events(live: Live, kind: str) -> list[dict[str, Any]]:
    file = live.directory / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == f"checkpoint {kind}"]


@pytest.mark.full
def test_a_kill_in_the_middle_of_a_save(reference: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk: steps go on while a checkpoint is written, and the one before it is used after the kill."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK, encoding="utf-8")
    often = {"checkpoint": {"every_steps": 6}}
    with monkeypatch.context() as patch:
        patch.setenv("SITECUSTOMIZE", str(tmp_path))
        live = reference.start("killed-saving", **often)
        folder = live.directory / "checkpoints"
        live.wait_until(lambda: any(folder.glob(".tmp-step_00000012-*/rank_00001.safetensors")))
        live.kill()
    assert list_checkpoints(live.directory) == [6] and any(folder.glob(".tmp-*"))
    metrics = reference.metrics("killed-saving")
    [begun, committed] = [events(live, kind)[0]["time"] for kind in ("begun", "committed")]
    assert committed - begun > 1.4, "the disk was not slow, so that nothing was tested"
    stall = metrics[7]["performance/checkpoint_stall_seconds"]
    assert 0.3 < stall < 1.4, "step 7 waits for the copy, which begins late, but not for the disk"
    assert metrics[8]["checkpoint/seconds_since_commit"] > metrics[2]["checkpoint/seconds_since_commit"]
    done = reference.train("killed-saving", **often)
    assert "resumed at step 6" in done.stdout and "PASS" in done.stdout
    assert_same_run(reference, "killed-saving", "reference")  # which saves at other steps: saving changes nothing
    assert not any(folder.glob(".tmp-*"))


@pytest.mark.full
def test_a_file_that_may_not_grow_costs_one_save(runs: Runs) -> None:
    live = runs.start("limited", **LONG)
    live.wait_until(lambda: bool(events(live, "committed")))
    rank = worker_pids(live.process.pid)[1]
    limits = resource.prlimit(rank, resource.RLIMIT_FSIZE)
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (200_000, limits[1]))
    live.wait_until(lambda: bool(events(live, "failed")))
    resource.prlimit(rank, resource.RLIMIT_FSIZE, limits)
    failed = events(live, "failed")[0]
    assert len(failed["errors"]) == 1 and failed["errors"][0].endswith(": File too large")
    live.wait_until(lambda: events(live, "committed")[-1]["step"] > failed["step"])
    assert live.process.wait(timeout=120) == 0, live.log.read_text()
    assert f"the checkpoint of step {failed['step']} could not be written" in live.log.read_text()
    records = runs.metrics("limited")
    assert len(records) == 150
    assert records[150]["checkpoint/failed_saves"] == len(events(live, "failed"))
    trainyard("verify", str(live.directory), cwd=runs.folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.full
def test_a_full_disk_stops_neither_training_nor_its_records(runs: Runs, small_disk: Path) -> None:
    """The whole run directory on a disk without a free byte for a while."""
    live = runs.start("full", runs_directory=str(small_disk), **LONG)
    live = Live(live.process, small_disk / "full", live.log)
    live.wait_until(lambda: bool(events(live, "committed")))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    reached = events(live, "committed")[-1]["step"]
    live.wait_until(lambda: "could not be written: rank" in live.log.read_text() or live.process.poll() is not None)
    ballast.unlink()
    live.wait_until(lambda: events(live, "committed")[-1]["step"] > reached + 5)
    assert live.process.wait(timeout=120) == 0, live.log.read_text()
    lines = (live.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 151))
    board = EventAccumulator(str(live.directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {scalar.step: scalar.value for scalar in board.Scalars("train/loss")}
    assert [scalar.step for scalar in board.Scalars("train/loss")] == list(range(1, 151))
    assert shown == pytest.approx({record["step"]: record["train/loss"] for record in records}, rel=1e-6)


@pytest.mark.full
def test_the_best_stay_without_their_moments_and_no_run_resumes_there(reference: Runs) -> None:
    settings = {"every_steps": 5, "keep_last": 1, "keep_best": 2, "weights_only_after": 1}
    reference.train("best", checkpoint=settings)
    assert comparable(reference.metrics("best")) == comparable(reference.metrics("reference"))
    run = reference.directory("best")
    losses = {step: r["evaluate/loss"] for step, r in reference.metrics("best").items() if "evaluate/loss" in r}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    steps = list_checkpoints(run)
    assert steps == sorted({*best, 20})
    for step in steps:
        manifest = read_manifest(checkpoint_directory(run, step))
        assert manifest.evaluate_loss == losses[step] and manifest.weights_only == (step != 20)
    trainyard("verify", str(run), cwd=reference.folder)
    trainyard("export", str(run), "--step", str(steps[0]), "--out", "best-exported", cwd=reference.folder)
    checkpoint_directory(run, 20).rename(run / "set-aside")
    refused = reference.train("best", checkpoint=settings, check=False)
    assert refused.returncode == 1 and "can be loaded (steps" in refused.stderr and "Traceback" not in refused.stderr
    assert "it holds weights only" in refused.stdout
