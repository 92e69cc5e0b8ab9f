"""What a rank says of itself, and what is made of it: who is behind, who is slow."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.heartbeat import (
    STACKS_SIGNAL,
    STRAGGLER_STEPS,
    Heartbeat,
    Sign,
    Stragglers,
    busy_seconds,
    find_behind,
    heartbeat_interval,
    read_beat,
    read_beats,
)
from gpt.run_directory import heartbeat_file

WAITING = """Current thread 0x00007f4ce9691b80 (most recent call first):
  File "/x/deepspeed/runtime/zero/partition_parameters.py", line 720 in wait
  File "/x/gpt/trainer.py", line 186 in train_step
"""
GATHERING = """  File "/x/torch/distributed/distributed_c10d.py", line 4123 in all_gather_into_tensor
  File "/x/gpt/distributed.py", line 83 in gather_floats
"""
READING = """Thread 0x00007f4cc12fb6c0 (most recent call first):
  File "/x/threading.py", line 331 in wait
Current thread 0x00007f4ce9691b80 (most recent call first):
  File "/x/data_pipeline/stream.py", line 10 in rows
  File "/x/gpt/trainer.py", line 155 in take
"""


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_heartbeat_says_what_the_rank_does(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3, 1, interval_seconds=0.01)
    first = read_beat(tmp_path, 3, 1)
    assert first is not None
    assert (first.generation, first.rank, first.host, first.pid) == (3, 1, socket.gethostname(), os.getpid())
    assert (first.phase, first.progress, first.ended) == ("starting", 0, False)
    heartbeat.progress("waiting for data", 7)
    heartbeat.progress()
    until(lambda: read_beat(tmp_path, 3, 1).progress == 2)  # type: ignore[union-attr]
    later = read_beat(tmp_path, 3, 1)
    assert later is not None
    assert (later.phase, later.step) == ("waiting for data", 7)
    assert later.progress_time > first.progress_time
    until(lambda: read_beat(tmp_path, 3, 1).time > later.time)  # type: ignore[union-attr]
    same = read_beat(tmp_path, 3, 1)
    assert same is not None and same.progress_time == later.progress_time, "living is not going on"
    heartbeat.end()
    assert read_beat(tmp_path, 3, 1).ended  # type: ignore[union-attr]


def test_what_is_absent_or_cut_short_is_no_heartbeat(tmp_path: Path) -> None:
    assert read_beats(tmp_path, 1) == {}
    Heartbeat(tmp_path, 1, 0, 60.0).end()
    heartbeat_file(tmp_path, 1, 1).write_text('{"rank": 1', encoding="utf-8")
    heartbeat_file(tmp_path, 1, 2).write_text('{"rank": 2}', encoding="utf-8")
    assert list(read_beats(tmp_path, 1)) == [0]


def test_a_full_disk_ends_no_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(tmp_path, 1, 0, interval_seconds=0.01)
    replace = Path.replace
    failed: list[Path] = []

    def full(self: Path, target: Path) -> Path:
        failed.append(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    until(lambda: len(failed) > 2)
    monkeypatch.setattr(Path, "replace", replace)
    heartbeat.progress("step", 1)
    until(lambda: read_beat(tmp_path, 1, 0).step == 1)  # type: ignore[union-attr]
    monkeypatch.setattr(Path, "replace", full)
    before = len(failed)
    heartbeat.end()  # raises nothing: it would hide why the run ended
    assert len(failed) > before and not read_beat(tmp_path, 1, 0).ended  # type: ignore[union-attr]


@pytest.mark.parametrize(("hang", "stale", "interval"), [(600, 60, 5.0), (4, 60, 1.0), (600, 2, 0.5)])
def test_several_heartbeats_come_before_anyone_is_taken_for_dead(hang: float, stale: float, interval: float) -> None:
    assert heartbeat_interval(hang, stale) == interval


def sign(rank: int, progress: int = 10, silent: float = 1.0, state: str | None = "sleeping",
         stacks: str | None = WAITING) -> Sign:  # fmt: skip
    return Sign(rank, f"node{rank}", 5, "step", progress, silent, state, stacks)


@pytest.mark.parametrize(
    ("signs", "behind", "reason"),
    [
        ([sign(0), sign(1, 9, state="stopped", stacks=None)], [1], "its process is stopped"),
        # a stopped rank's last heartbeat is older than what it had reached: it may look further than the others
        ([sign(0, 9), sign(1, 10, state="disk-sleep", stacks=None)], [1], "its process is disk-sleep"),
        ([sign(0), sign(1), sign(2, silent=301.0, state=None, stacks=None)], [2], "no sign of life for 301 s"),
        ([sign(0, 10), sign(1, 9), sign(2, 10)], [1], "the others are further"),
        ([sign(0, 9), sign(1, 10), sign(2, 9)], [0, 2], "the others are further"),
        ([sign(0, stacks=GATHERING), sign(1, stacks=READING)], [1], "not in one"),
        ([sign(0, stacks=READING), sign(1), sign(2, state=None, stacks=None)], [0], "not in one"),
        ([sign(0), sign(1, stacks=GATHERING)], [], "nothing tells the ranks apart"),
        ([sign(0, stacks=READING), sign(1, stacks=READING)], [], "nothing tells the ranks apart"),
        ([sign(0)], [], "nothing tells the ranks apart"),
    ],
)
def test_who_is_behind(signs: list[Sign], behind: list[int], reason: str) -> None:
    found, why = find_behind(signs, silent_seconds=300)
    assert [one.rank for one in found] == behind
    assert reason in why


def test_stacks_come_from_a_process_whose_python_is_stuck(tmp_path: Path) -> None:
    """The main thread holds the interpreter lock in native code, so that no Python code of it can run."""
    code = f"""
        import ctypes, pathlib
        from gpt.heartbeat import answer_with_stacks
        answer_with_stacks(pathlib.Path({str(tmp_path)!r}) / "stacks.txt")
        def stuck_in_native_code():
            ctypes.PyDLL(None).pause()
        print("ready", flush=True)
        while True:
            stuck_in_native_code()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(STACKS_SIGNAL)
        until(lambda: "stuck_in_native_code" in (tmp_path / "stacks.txt").read_text())
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_straggler_is_found_once_a_window() -> None:
    stragglers = Stragglers()
    for window in range(2):
        for step in range(STRAGGLER_STEPS):
            found = stragglers.observe(np.array([1.0, 1.1, 1.0, 1.6]))
            assert (found != []) == (step == STRAGGLER_STEPS - 1), (window, step)
        [(rank, ratio)] = found
        assert rank == 3 and ratio == pytest.approx(1.6)


@pytest.mark.parametrize(
    "busy",
    [[1.0, 1.4, 1.0], [0.0, 0.0], [5.0]],
    ids=["within the margin", "nothing measured, as on GPUs", "one rank"],
)
def test_no_straggler(busy: list[float]) -> None:
    stragglers = Stragglers()
    assert not any(stragglers.observe(np.array(busy)) for _ in range(3 * STRAGGLER_STEPS))


def test_one_slow_step_makes_no_straggler() -> None:
    stragglers = Stragglers()
    slow = [20.0 if step == 10 else 1.0 for step in range(STRAGGLER_STEPS)]
    assert not any(stragglers.observe(np.array([1.0, mine])) for mine in slow)


def test_waiting_is_not_being_busy() -> None:
    before = busy_seconds()
    time.sleep(0.3)
    idle = busy_seconds() - before
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    assert busy_seconds() - before - idle >= 0.3 > idle + 0.1
