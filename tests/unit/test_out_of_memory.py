"""The kernel's counters of processes that it ended for want of memory; a real one where a control group can be made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.out_of_memory import explain_sigkill, oom_kills

V1 = "9:name=systemd:/\n4:cpu,memory:/job/12\n0::/\n"
V2 = "0::/job/12\n"


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        (V1, "memory/job/12/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        (V1, "memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        (V2, "job/12/memory.events", "low 0\nmax 7\noom 4\noom_kill 3\noom_group_kill 0\n"),
        (V2, "memory.events", "oom_kill 3\n"),
    ],
)
def test_counters_of_both_hierarchies(tmp_path: Path, groups: str, file: str, text: str) -> None:
    place = tmp_path / "sys/fs/cgroup" / file
    place.parent.mkdir(parents=True)
    place.write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    assert oom_kills(tmp_path) == {"control group": 3}
    (tmp_path / "proc/vmstat").write_text("pgfault 12\noom_kill 8\n")
    assert oom_kills(tmp_path) == {"control group": 3, "host": 8}


def test_no_counter_is_no_answer(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == {}
    assert explain_sigkill({}, {}) == (
        "; the cause is unknown (oom_kill of its control group or of the host cannot be read)",
        None,
    )


@pytest.mark.parametrize(
    ("before", "after", "words", "out_of_memory"),
    [
        ({"control group": 1, "host": 4}, {"control group": 3, "host": 6}, "its control group had run out", True),
        (
            {"control group": 1, "host": 4},
            {"control group": 1, "host": 6},
            "probably since the memory of the host",
            True,
        ),
        ({"host": 4}, {"host": 5}, "probably since the memory of the host", True),
        ({"control group": 1, "host": 4}, {"control group": 1, "host": 4}, "memory had not run out", False),
        ({"host": 4}, {"host": 4}, "the cause is unknown", None),
    ],
)
def test_what_the_counters_say(
    before: dict[str, int], after: dict[str, int], words: str, out_of_memory: bool | None
) -> None:
    sentence, found = explain_sigkill(before, after)
    assert words in sentence and found is out_of_memory


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MiB."""
    v1 = Path("/sys/fs/cgroup/memory")
    root = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"trainyard_test_{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if root == v1 else "memory.max")
        limit.write_text(str(64 * 2**20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"a control group with a limit of memory cannot be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_process_that_the_kernel_ends(small_group: Path) -> None:
    """A parent in the group counts before and after its child takes more memory than there is."""
    code = """
import os, pathlib, subprocess, sys
from launch.out_of_memory import explain_sigkill, oom_kills
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = oom_kills()
child = subprocess.run([sys.executable, "-c", "bytearray(200 * 2**20)"])
print(child.returncode, *explain_sigkill(before, oom_kills()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(small_group)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("-9 , since the memory of its control group had run out"), done
    assert done.stdout.endswith("True\n")
