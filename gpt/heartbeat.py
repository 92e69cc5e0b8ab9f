"""What each rank is doing: its heartbeat, the stacks that it gives when asked, which rank is behind, which is slow."""

import contextlib
import faulthandler
import json
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gpt.run_directory import heartbeat_file, host_label, is_newest

LONGEST_INTERVAL_SECONDS = 5.0
STACKS_SIGNAL = signal.SIGUSR2
"""Asks a rank for its stacks."""
DEAD_STATES = ("stopped", "tracing-stop", "disk-sleep", "zombie", "dead", "gone")
"""psutil's names of the states in which a process cannot answer, and ours for one that is not there."""
STRAGGLER_RATIO = 1.5
STRAGGLER_STEPS = 50

# frames in which a rank waits for others: torch's collectives, DeepSpeed's, handles of its asynchronous ones, and ours
_COLLECTIVE = re.compile(
    r"torch/distributed/|deepspeed/comm/|deepspeed/.* in wait$|gpt/distributed\.py.* in (gather|broadcast)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Beat:
    """The content of a heartbeat file. Times are seconds since the epoch, by the rank's own clock."""

    generation: int
    rank: int
    host: str
    pid: int
    launcher: int
    """Process number of the launcher."""
    step: int
    phase: str
    progress: int
    """How often step or phase has changed: all ranks go through the same phases, so the lowest one is behind."""
    progress_time: float
    time: float
    """When this was written: it says that the process lives, `progress_time` that it goes on."""
    ended: bool


class Heartbeat:
    """Writes this rank's heartbeat from a thread, until `end` or until a later start owns the run directory.

    Args:
        run: the run directory.
        generation: number of the start.
        interval_seconds: between two writes. Nothing is fsynced, and no progress is written before its time.
    """

    def __init__(self, run: Path, generation: int, rank: int, interval_seconds: float) -> None:
        self._run, self._interval_seconds = run, interval_seconds
        now, host, pid, launcher = time.time(), host_label(), os.getpid(), os.getppid()
        self._beat = Beat(generation, rank, host, pid, launcher, 0, "starting", 0, now, now, ended=False)
        self._file = heartbeat_file(run, generation, rank)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_for_ever, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """Number of the start."""
        return self._beat.generation

    def progress(self, phase: str | None = None, step: int | None = None) -> None:
        """Say that the rank goes on: in another phase or step, or (neither given) within a long phase."""
        old = self._beat
        self._beat = replace(
            old,
            phase=old.phase if phase is None else phase,
            step=old.step if step is None else step,
            progress=old.progress + 1,
            progress_time=time.time(),
        )

    def end(self) -> None:
        """Stop, and say that the end was meant, so that the next start need not wait until this one is stale."""
        self._stop.set()
        self._thread.join()
        self._beat = replace(self._beat, ended=True)
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
            self._write()

    def _write(self) -> None:
        if not is_newest(self._run, self._beat.generation):
            return
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(replace(self._beat, time=time.time()))), encoding="utf-8")
        temporary.replace(self._file)

    def _write_for_ever(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            try:
                self._write()
            except OSError:
                continue  # a full or absent disk must not kill the thread; the next one may succeed


def heartbeat_interval(hang_seconds: float, stale_seconds: float) -> float:
    """Seconds between two heartbeats: several of them before anyone takes the rank for hung or dead."""
    return min(LONGEST_INTERVAL_SECONDS, hang_seconds / 4, stale_seconds / 4)


def read_beat(run: Path, generation: int, rank: int) -> Beat | None:
    """A rank's heartbeat; None where there is none (yet), where it cannot be read, or its host's end cut it short."""
    try:
        return Beat(**json.loads(heartbeat_file(run, generation, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(run: Path, generation: int) -> dict[int, Beat]:
    """The heartbeats of all ranks of a start."""
    files = heartbeat_file(run, generation, 0).parent.glob("rank_*.json")
    beats = (read_beat(run, generation, int(file.stem.removeprefix("rank_"))) for file in sorted(files))
    return {beat.rank: beat for beat in beats if beat is not None}


def last_seen(run: Path, generation: int) -> float | None:
    """When the start `generation`, the last that wrote events, last gave a sign of life, in seconds since the epoch: by
    its heartbeats, its metrics or its events. None where there is none."""
    beats = [beat.time for beat in read_beats(run, generation).values()]
    files = [run / "metrics.jsonl", run / "events.jsonl"]
    return max(beats + [file.stat().st_mtime for file in files if file.exists()], default=None)


def answer_with_stacks(file: Path) -> None:
    """Write the stacks of all threads to `file` at each STACKS_SIGNAL, also while Python waits in native code.

    faulthandler's handler is in C: it needs neither the interpreter lock nor a turn of the main thread.
    """
    faulthandler.register(STACKS_SIGNAL, file.open("w", encoding="utf-8"), all_threads=True)


@dataclass(frozen=True)
class Sign:
    """What is known of a rank when nothing goes on any more."""

    rank: int
    host: str
    step: int
    phase: str
    progress: int
    silent_seconds: float
    """Since its last heartbeat."""
    state: str | None
    """psutil's name of the process's state; None for a rank of another host."""
    stacks: str | None
    """None where it gave none."""

    def describe(self) -> str:
        """One line."""
        state = f"; its process is {self.state}" if self.state else ""
        answer = "" if self.state is None else ", gave no stacks" if self.stacks is None else ", gave its stacks"
        return (
            f"rank {self.rank} on {self.host}: {self.silent_seconds:.0f} s ago in step {self.step}, phase {self.phase}"
            f"{state}{answer}"
        )


def find_behind(signs: Sequence[Sign], silent_seconds: float) -> tuple[list[Sign], str]:
    """The ranks for which the others wait, and how one knows; no rank where nothing tells them apart.

    Args:
        silent_seconds: a rank whose last heartbeat is older than this is lost.
    """
    lost = [s for s in signs if s.state in DEAD_STATES or s.silent_seconds > silent_seconds]
    if lost:
        return lost, "it no longer runs: " + "; ".join(dict.fromkeys(_why_lost(sign) for sign in lost))
    least = min((sign.progress for sign in signs), default=0)
    early = [sign for sign in signs if sign.progress == least]
    if len(early) < len(signs):
        return early, "the others are further and wait for it"
    answered = [sign for sign in signs if sign.stacks is not None]
    outside = [sign for sign in answered if not _COLLECTIVE.search(sign.stacks or "")]
    if outside and len(outside) < len(answered):
        return outside, "the others wait in a collective, it is not in one"
    return [], "nothing tells the ranks apart"


def _why_lost(sign: Sign) -> str:
    if sign.state in DEAD_STATES:
        return f"its process is {sign.state}"
    return f"it gave no sign of life for {sign.silent_seconds:.0f} s"


def busy_seconds() -> float:
    """Processor time of this process so far, and (Linux) the time for which its main thread waited for a processor.

    A rank that waits for others sleeps, so this grows with its own work and with what takes its processor away.
    """
    try:
        waited_nanoseconds = int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        waited_nanoseconds = 0
    return time.process_time() + waited_nanoseconds / 1e9


class Stragglers:
    """Finds ranks that are slower than the others by STRAGGLER_RATIO over STRAGGLER_STEPS steps together."""

    def __init__(self) -> None:
        self._busy: list[np.ndarray] = []

    def observe(self, busy: np.ndarray) -> list[tuple[int, float]]:
        """Take every rank's busy seconds of a step [world_size]. At the end of a window: each slow rank and its time
        as a multiple of the others' median; else nothing."""
        self._busy.append(busy)
        if len(self._busy) < STRAGGLER_STEPS:
            return []
        total, self._busy = np.sum(self._busy, axis=0), []
        if len(total) < 2 or not total.all():
            return []
        ratios = [float(mine / np.median(np.delete(total, rank))) for rank, mine in enumerate(total)]
        return [(rank, ratio) for rank, ratio in enumerate(ratios) if ratio >= STRAGGLER_RATIO]
