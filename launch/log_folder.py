"""A launcher's folder of logs, and how the launcher ended where events.jsonl is not its own to write."""

import calendar
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.run_directory import InUseError, NotMetError, host_label

OUTCOME_NAME = "outcome.json"


def log_directory(run_directory: Path, restart: int = 0) -> Path:
    """A new folder for this start's logs; its name tells time (UTC), host, launcher and which restart of it this is."""
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}_{host_label()}_{os.getpid()}"
    name += f"_restart{restart}" if restart else ""
    directory = run_directory / "logs" / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def launcher_of(folder: Path) -> tuple[str, int, float]:
    """Host and process of the launcher that made a folder with `log_directory`, and when, in seconds since the epoch.

    Raises ValueError for another folder.
    """
    began, _, rest = folder.name.partition("_")
    host, _, pid = re.sub(r"_restart\d+$", "", rest).rpartition("_")
    return host, int(pid), calendar.timegm(time.strptime(began, "%Y%m%dT%H%M%SZ"))


def record_outcome(logs: Path, event: str, **details: Any) -> None:
    """How a launcher ended, beside its logs: for one that does not own the run directory, and writes no events."""
    content = {"time": time.time(), "event": event, **details}
    (logs / OUTCOME_NAME).write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def refusals_recorded(run_directory: Path) -> Iterator[None]:
    """While inside, keep why a start is refused in a run directory that is there already, and pass the error on."""
    try:
        yield
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            if run_directory.is_dir():
                failure = "not met" if isinstance(error, NotMetError) else "refused"
                failure = "another start" if isinstance(error, InUseError) else failure
                details = {"failure": failure, "reason": " ".join(str(error).split()), "host": host_label()}
                record_outcome(log_directory(run_directory), "failed", exit_code=1, **details)
        raise
