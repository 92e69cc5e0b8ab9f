"""A run that is asked to stop saves, says so with its exit code, and goes on as if nothing had been."""

import os
import signal
import subprocess

import pytest
from live_runs import Runs, comparable


def worker_pids(launcher: int) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True).stdout.split()]


@pytest.mark.parametrize(
    "requests",
    [
        [("launcher", signal.SIGUSR1)],
        pytest.param(
            [("launcher", signal.SIGTERM), ("rank", signal.SIGTERM), ("group", signal.SIGINT)], marks=pytest.mark.full
        ),
    ],
)
def test_stopped_run_goes_on_as_the_uninterrupted_one(
    reference: Runs, requests: list[tuple[str, signal.Signals]]
) -> None:
    """Once, and three times in one run."""
    name, stopped = f"stopped-{len(requests)}", 0
    for target, number in requests:
        live = reference.start(name)
        live.wait_until(lambda live=live, enough=stopped + 2: live.last_step() > enough)
        workers = worker_pids(live.process.pid)
        assert len(workers) == 2
        # workers lead sessions of their own, so a terminal's or a scheduler's signal to all is one to each
        everyone = {"launcher": [live.process.pid], "rank": workers[1:], "group": [live.process.pid, *workers]}
        for pid in everyone[target]:
            os.kill(pid, number)
        assert live.process.wait(timeout=120) == 85, live.log.read_text()
        before, stopped = stopped, live.last_step()
        assert before + 2 < stopped < 20, "the run had ended by itself, so that nothing was tested"
        assert f"stopped on request after step {stopped}" in live.log.read_text()
        assert f"resumed at step {before}" in live.log.read_text() or not before
    kinds = [event["event"] for event in reference.events(name)]
    assert kinds.count("stop requested") == len(requests) and "end" not in kinds
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
