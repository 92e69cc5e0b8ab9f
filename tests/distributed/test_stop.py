"""A run that is asked to stop saves, says so with its exit code, and goes on as if nothing had been."""

import os
import signal
import subprocess

import pytest
from live_runs import Runs, comparable


def worker_pids(launcher: int) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True).stdout.split()]


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("launcher", signal.SIGUSR1),
        pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("rank", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("group", signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_stopped_run_goes_on_as_the_uninterrupted_one(reference: Runs, target: str, number: signal.Signals) -> None:
    name = f"stopped-{target}-{number.name}"
    live = reference.start(name)
    live.wait_until(lambda: live.last_step() > 2)
    workers = worker_pids(live.process.pid)
    assert len(workers) == 2
    # workers lead sessions of their own, so a terminal's or a scheduler's signal to all is one to each
    everyone = {"launcher": [live.process.pid], "rank": workers[1:], "group": [live.process.pid, *workers]}
    for pid in everyone[target]:
        os.kill(pid, number)
    assert live.process.wait(timeout=120) == 85, live.log.read_text()
    stopped = live.last_step()
    assert 2 < stopped < 20, "the run had ended by itself, so that nothing was tested"
    assert f"stopped on request after step {stopped}" in live.log.read_text()
    kinds = [event["event"] for event in reference.events(name)]
    assert "stop requested" in kinds and "end" not in kinds
    done = reference.train(name)
    assert f"resumed at step {stopped}" in done.stdout and "PASS" in done.stdout
    assert comparable(reference.metrics(name)) == comparable(reference.metrics("reference"))


@pytest.mark.full
def test_a_signal_before_the_first_step_loses_nothing(reference: Runs) -> None:
    """While the workers load: they come to the first step, find the request and leave without a step."""
    live = reference.start("stopped-early")
    live.wait_until(lambda: len(worker_pids(live.process.pid)) == 2)
    os.kill(live.process.pid, signal.SIGTERM)
    assert live.process.wait(timeout=120) == 85, live.log.read_text()
    assert live.last_step() == 0
    reference.train("stopped-early")
    assert comparable(reference.metrics("stopped-early")) == comparable(reference.metrics("reference"))
