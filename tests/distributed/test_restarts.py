"""A crashed or hung group of ranks is started again and ends as the uninterrupted run; nothing of it is left behind."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from live_runs import Runs, comparable

from launch import status, why


def test_a_killed_group_goes_on_by_itself(reference: Runs) -> None:
    before = set(os.listdir("/dev/shm"))
    live = reference.start("restarted")
    live.wait_until(lambda: live.last_step() > 10 and live.has_checkpoint(10))
    first = live.ranks()
    first[1].suspend()  # twenty steps are soon over: it must not end while it is looked at
    report = status.report(live.directory)
    assert (report["state"], report["total_steps"], report["checkpoint"]["step"]) == ("running", 20, 10)
    assert report["tokens_per_second"] > 0 and report["eta_seconds"] > 0 and report["loss"] > 0
    first[1].kill()
    killed_at = time.monotonic()
    live.wait_until(lambda: "restart 1 of at most 2" in live.log.read_text())
    seconds = time.monotonic() - killed_at
    print(f"the killed rank's group was gone after {seconds:.1f} s")
    assert seconds < 5
    assert not first[0].is_running()
    assert status.report(live.directory)["state"] == "starting"
    assert set(os.listdir("/dev/shm")) == before
    assert live.process.wait(timeout=180) == 0, live.log.read_text()
    assert comparable(reference.metrics("restarted")) == comparable(reference.metrics("reference"))
    events = reference.events("restarted")
    [reason] = [event["reason"] for event in events if event["event"] == "restart"]
    assert re.fullmatch(r"rank 1 \(process \d+ on \S+\) was killed by SIGKILL.*", reason)
    assert events[-1]["event"] == "end" and [event["event"] for event in events].count("failed") == 1
    restarts = [reference.metrics("restarted")[step]["run/restarts"] for step in (1, 10, 20)]
    assert restarts == [0, 0, 1]
    report = status.report(live.directory)
    assert (report["state"], report["step"], report["starts"], report["checkpoint"]["step"]) == ("finished", 20, 2, 20)
    assert [restart["reason"] for restart in report["restarts"]] == [reason]
    assert why.explain(live.directory)["cause"] == "finished"


@pytest.mark.full
def test_a_stopped_group_goes_on_by_itself(reference: Runs) -> None:
    live = reference.start("hung", interpreters=True, faults={"hang_seconds": 10, "restarts": 2})
    live.wait_until(lambda: live.last_step() > 10 and live.has_checkpoint(10))
    live.ranks()[1].suspend()
    assert live.process.wait(timeout=180) == 0, live.log.read_text()
    assert comparable(reference.metrics("hung")) == comparable(reference.metrics("reference"))
    [reason] = [event["reason"] for event in reference.events("hung") if event["event"] == "restart"]
    assert re.fullmatch(r"no progress for \d+ s: rank 1 on \S+ \(.*its process is stopped\)", reason)


@pytest.mark.full
def test_a_crash_that_comes_again_is_given_up(runs: Runs) -> None:
    live = runs.start("crashing", faults={"restarts": 1})
    for generation in (1, 2):
        live.wait_until((live.directory / "heartbeats" / f"generation_{generation:06d}" / "rank_00000.json").exists)
        live.ranks()[0].kill()
        if generation == 1:
            live.wait_until(lambda: "restart 1 of at most 1" in live.log.read_text())
    assert live.process.wait(timeout=60) == 86
    assert re.search(r"rank 0 \(process \d+ on \S+\) was killed by SIGKILL[^\n]*\n\Z", live.log.read_text())
    assert [event["event"] for event in runs.events("crashing") if event["event"] != "start"][-1] == "failed"
    found = why.explain(live.directory)
    assert (found["state"], found["cause"]) == ("failed", "killed"), "memory had not run out"
    assert "rank 0 (process" in found["headline"]


@pytest.mark.full
def test_a_stop_request_after_a_restart(reference: Runs) -> None:
    live = reference.start("restarted-stopped", faults={"restarts": 1})
    live.wait_until(lambda: live.last_step() > 2)
    live.ranks()[1].kill()
    live.wait_until(lambda: "restart 1 of at most 1" in live.log.read_text())
    os.kill(live.process.pid, signal.SIGTERM)
    assert live.process.wait(timeout=120) == 85, live.log.read_text()
    reference.train("restarted-stopped")
    assert comparable(reference.metrics("restarted-stopped")) == comparable(reference.metrics("reference"))


@pytest.mark.full
def test_nothing_is_left_of_a_run_that_is_killed_whole(runs: Runs) -> None:
    before = set(os.listdir("/dev/shm"))
    folders = set(Path("/tmp").glob("torchelastic*"))
    live = runs.start("killed-whole")
    live.wait_until(lambda: live.last_step() > 2)
    ranks = live.ranks()
    live.process.kill()  # the launcher alone: its ranks go with it
    live.process.wait()
    deadline = time.monotonic() + 10
    while any(process.is_running() for process in ranks.values()):
        assert time.monotonic() < deadline, "ranks live on without their launcher"
        time.sleep(0.05)
    found = why.explain(live.directory)
    assert (found["state"], found["cause"]) == ("dead", "died without a word")
    assert set(os.listdir("/dev/shm")) == before
    assert set(Path("/tmp").glob("torchelastic*")) == folders
