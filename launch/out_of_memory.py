"""Whether the kernel ended a process because memory had run out: its own counters, before and after."""

from pathlib import Path

COUNTER = "oom_kill"
CONTROL_GROUP, HOST = "control group", "host"


def oom_kills(root: Path = Path("/")) -> dict[str, int]:
    """How many processes the kernel has ended so far for want of memory, in this process's control group (which its
    children share) and on the whole host; without those that cannot be read.

    Args:
        root: of the file system that holds /proc and /sys.
    """
    counters = {CONTROL_GROUP: _read_first(_control_group_files(root)), HOST: _read_first([root / "proc/vmstat"])}
    return {place: count for place, count in counters.items() if count is not None}


def explain_sigkill(before: dict[str, int], after: dict[str, int]) -> tuple[str, bool | None]:
    """What `oom_kills` before and after a SIGKILL says of its cause, to go on a sentence with; and whether memory had
    run out, None where that is not known."""
    rose = {place: after[place] - count for place, count in before.items() if place in after}
    if rose.get(CONTROL_GROUP):
        return (
            f", since the memory of its control group had run out ({COUNTER} there rose by {rose[CONTROL_GROUP]})",
            True,
        )
    if rose.get(HOST):
        return f", probably since the memory of the host had run out ({COUNTER} there rose by {rose[HOST]})", True
    if len(rose) == 2:
        return f"; memory had not run out ({COUNTER} of its control group and of the host did not rise)", False
    return f"; the cause is unknown ({COUNTER} of its control group or of the host cannot be read)", None


def _control_group_files(root: Path) -> list[Path]:
    """Where a version 2 and a version 1 hierarchy count, most exact first. In a container the path that
    /proc/self/cgroup gives may be another one's, and what is mounted is the group itself."""
    mount, files = root / "sys/fs/cgroup", []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            files += [mount / path.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            folder = mount / "memory"
            files += [folder / path.lstrip("/") / "memory.oom_control", folder / "memory.oom_control"]
    return files


def _read_first(files: list[Path]) -> int | None:
    """The counter in the first of the files that has it."""
    for file in files:
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            if line.startswith(f"{COUNTER} "):
                return int(line.split()[1])
    return None
