"""A rank that stops, dies or is slow: it is named, the others do not wait for ever, and the run goes on by itself."""

import os
import re
import socket
import sys
import time

import psutil
import pytest
from live_runs import Live, Runs

from gpt.heartbeat import _COLLECTIVE, STRAGGLER_RATIO, STRAGGLER_STEPS
from launch import status, why

HANG_SECONDS = 8.0
LONG = {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 100_000, "seed": 3}


def faults(restarts: int) -> dict[str, float]:
    return {"hang_seconds": HANG_SECONDS, "restarts": restarts}


def end_of(live: Live, seconds: float) -> float:
    """Wait for the launcher's end; returns how long that took."""
    started = time.monotonic()
    live.process.wait(timeout=seconds)
    return time.monotonic() - started


@pytest.mark.full
def test_a_stopped_rank_is_named_and_all_are_ended(runs: Runs) -> None:
    live = runs.start("hangs", interpreters=True, train=LONG, faults=faults(restarts=0))
    live.wait_until(lambda: live.last_step() > 2)
    ranks = live.ranks()
    ranks[1].suspend()
    seconds = end_of(live, 60)
    output = live.log.read_text()
    print(f"noticed and ended after {seconds:.1f} s of {HANG_SECONDS:.0f}")
    assert live.process.returncode == 86, output
    assert HANG_SECONDS <= seconds < HANG_SECONDS + 10
    assert re.search(r"rank 1 on \S+: \d+ s ago in step \d+, phase .*; its process is stopped, gave no stacks", output)
    assert re.search(r"rank 0 on \S+: \d+ s ago in step \d+, phase .*; its process is \w+, gave its stacks", output)
    last = output.strip().splitlines()[-1]
    assert re.search(r"error: no progress for \d+ s: rank 1 on \S+ \(it no longer runs: its process is stopped\)", last)
    assert "rank 0" not in last
    (logs,) = (live.directory / "logs").iterdir()
    stacks = (logs / "rank_0.stacks.txt").read_text()
    assert "gpt/trainer.py" in stacks and _COLLECTIVE.search(stacks), "rank 0 waited for rank 1 in a collective"
    assert not any(process.is_running() for process in ranks.values())
    failed = [event for event in runs.events("hangs") if event["event"] == "failed"]
    assert [event["reason"] for event in failed] == [last.partition("error: ")[2]]
    found = why.explain(live.directory)
    assert (found["state"], found["cause"]) == ("failed", "hang") and "rank 1 on" in found["headline"]
    assert any("its process is stopped" in item["says"] for item in found["evidence"])


@pytest.mark.full
def test_hosts_end_their_ranks_and_name_the_rank_of_another(runs: Runs) -> None:
    """Two launchers, as on two hosts: the one whose rank waits knows of the other's only from its heartbeat."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    hosts = [
        runs.start("two-hosts", "--nodes", "2", "--node-rank", str(node), "--rendezvous", place, processes=1,
                   log=f"-{node}", interpreters=True, train=LONG, faults=faults(restarts=2))
        for node in (0, 1)
    ]  # fmt: skip
    hosts[0].wait_until(lambda: hosts[0].last_step() > 2)
    hosts[1].ranks()[1].suspend()
    for node, host in enumerate(hosts):
        seconds, output = end_of(host, 60), host.log.read_text()
        print(f"host {node} after {seconds:.1f} s: {output.strip().splitlines()[-1]}")
        assert host.process.returncode == 86, output
        assert re.search(r"error: no progress for \d+ s: rank 1 on \S+ \(it no longer runs: ", output)
        assert "restart" not in output


@pytest.mark.full
def test_a_slow_rank_is_named(runs: Runs) -> None:
    """Rank 1 shares its core with eight other programs."""
    live = runs.start("slow", train=LONG)
    spin = [sys.executable, "-c", "while True: pass"]
    first, second = sorted(os.sched_getaffinity(0))[:2]
    burners: list[psutil.Popen] = []
    try:
        live.wait_until(lambda: live.last_step() > 2)
        burners += [psutil.Popen(spin) for _ in range(8)]
        for process, core in [(live.ranks()[0], first), (live.ranks()[1], second), *((b, second) for b in burners)]:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [core])
        begun = live.last_step()
        live.wait_until(lambda: "warning: rank 1 on" in live.log.read_text(), seconds=240)
    finally:
        for burner in burners:
            burner.kill()
        live.kill()
    [event, *_] = [event for event in runs.events("slow") if event["event"] == "straggler"]
    steps = event["step"] - begun
    print(f"noticed after {steps} steps: {event}")
    assert event["rank"] == 1 and event["host"] == socket.gethostname() and event["ratio"] >= STRAGGLER_RATIO
    assert steps <= 2 * STRAGGLER_STEPS + 1
    assert any("rank 1 on" in remark and "was slow" in remark for remark in status.report(live.directory)["remarks"])
