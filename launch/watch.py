"""Watches this host's ranks: when none of them goes on, says which one is behind, keeps their stacks, ends them."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from gpt.heartbeat import (
    DEAD_STATES,
    STACKS_SIGNAL,
    Beat,
    Sign,
    find_behind,
    heartbeat_interval,
    read_beat,
    read_beats,
)
from gpt.recipe import Faults
from gpt.run_directory import heartbeat_file, host_label, newest_generation
from launch.hosts import HostSigns
from launch.log_folder import record_outcome

MEETING_SECONDS = 600.0
"""Ranks have no heartbeat until they have met: imports, building extensions and waiting for hosts take time."""
STACKS_SECONDS = 3.0
"""How long ranks may take to write their stacks."""
KILL_SECONDS = 30.0
"""How long killed ranks may take to end: one that waits for a dead disk never does."""
HANG_EXIT_CODE = 86
"""A hang or a lost rank."""


class HangWatch:
    """Watches the ranks that this process has started, from a thread.

    Each host ends its own ranks; what the ranks of other hosts do is in their heartbeats, and whether the hosts reach
    one another in `signs` (None: this one is alone).
    """

    def __init__(self, run: Path, logs: Path, ranks: range, faults: Faults, signs: HostSigns | None = None) -> None:
        self._run, self._logs, self._ranks, self._faults = run, logs, ranks, faults
        self._hosts = signs
        self._interval_seconds = heartbeat_interval(faults.hang_seconds, faults.stale_seconds)
        self._before = self._generation = newest_generation(run)
        self._ours = False
        self._changed_at = time.monotonic()
        self._limit_seconds = max(faults.hang_seconds, MEETING_SECONDS)
        self._ending = threading.Lock()
        self._stop = threading.Event()
        self.hang: str | None = None
        """What was behind when the ranks were ended, in a sentence."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While inside."""
        thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        thread.start()
        if self._hosts is not None:
            threading.Thread(target=self._watch_hosts, name="host watch", daemon=True).start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.hang = self.hang or self._said_elsewhere()

    @property
    def _report(self) -> Path:
        return heartbeat_file(self._run, self._generation, 0).with_name("hang.txt")

    def _said_elsewhere(self) -> str | None:
        """What the first host that ended its ranks found; from then on they look lost to the others."""
        try:
            return self._report.read_text(encoding="utf-8").splitlines()[-1] if self._ours else None
        except (OSError, IndexError):
            return None

    def _watch(self) -> None:
        before: object = None
        polled_at = time.monotonic()
        while not self._stop.wait(self._interval_seconds):
            now = time.monotonic()
            beats = self._own_beats()
            progress = {beat.rank: beat.progress for beat in beats}
            if progress != before or self._was_stopped(now - polled_at):
                before, self._changed_at = progress, now
            polled_at = now
            hang = self._faults.hang_seconds
            self._limit_seconds = hang if beats else max(hang, MEETING_SECONDS)
            if now - self._changed_at <= self._limit_seconds:
                continue
            if self._end_where_hosts_are_silent(hang / 2):
                return
            processes = self._processes()  # none: the agent still waits for other hosts, or all have just ended
            if processes and self._can_write() and not self._goes_on_elsewhere():
                if self._ending.acquire(blocking=False):
                    self._end(processes, now - self._changed_at)
                return
            self._changed_at = now

    def _was_stopped(self, seconds: float) -> bool:
        """Whether this process itself did not run, as so long a time between two looks tells."""
        return seconds > 3 * self._interval_seconds + 5

    def _watch_hosts(self) -> None:
        """The same without the run directory: where the network is lost its file system may be, and every access to it
        waits without end. That nothing goes on is then what the other thread last saw."""
        polled_at = time.monotonic()
        while not self._stop.wait(self._interval_seconds):
            before, polled_at = polled_at, time.monotonic()
            if self._was_stopped(polled_at - before) or polled_at - self._changed_at <= self._limit_seconds:
                continue
            if self._end_where_hosts_are_silent(self._limit_seconds):
                return

    def _end_where_hosts_are_silent(self, seconds: float) -> bool:
        """End this host's ranks, without their stacks, where other hosts cannot be reached; False where they can."""
        lost = self._hosts.silent(seconds) if self._hosts is not None else None
        processes = self._processes() if lost is not None else {}
        if self._hosts is None or not processes:
            return False
        if not self._ending.acquire(blocking=False):
            return True
        self.hang = f"no progress for {time.monotonic() - self._changed_at:.0f} s: {lost}"
        self._hosts.end_process_after(2 * KILL_SECONDS, HANG_EXIT_CODE, self.hang)
        self._kill(processes)
        with contextlib.suppress(OSError):
            self._leave_report([])
        return True

    def _can_write(self) -> bool:
        """Whether ranks could say that they go on: on a full disk they cannot."""
        file = self._logs / ".watch"
        try:
            file.write_bytes(bytes(4096))
            file.unlink()
        except OSError:
            return False
        return True

    def _own_beats(self) -> list[Beat]:
        """Of this host's ranks, once they have claimed the run directory."""
        if not self._ours:
            self._generation = newest_generation(self._run)
            if self._generation == self._before:
                return []
        beats = [beat for rank in self._ranks if (beat := read_beat(self._run, self._generation, rank))]
        beats = [beat for beat in beats if (beat.host, beat.launcher) == (host_label(), os.getpid())]
        self._ours = self._ours or bool(beats)
        return beats

    def _goes_on_elsewhere(self) -> bool:
        """Whether a rank of any host has gone on lately. Half of the time allows for clocks that differ."""
        latest = max((beat.progress_time for beat in self._beats().values()), default=0.0)
        return time.time() - latest < self._faults.hang_seconds / 2

    def _beats(self) -> dict[int, Beat]:
        return read_beats(self._run, self._generation) if self._ours else {}

    def _processes(self) -> dict[int, psutil.Process]:
        """The ranks' processes that still exist, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error, KeyError):
                variables = process.environ()
                if variables["TRAINYARD_ERROR_DIRECTORY"] == str(self._logs):
                    found[int(variables["RANK"])] = process
        return found

    def _end(self, processes: dict[int, psutil.Process], seconds: float) -> None:
        self.hang = f"no progress for {seconds:.0f} s: "
        try:
            lines, found = self._examine(processes)
        except OSError as error:  # the file system may be what hangs
            lines, found = [], f"which rank is behind is not known ({error})"
        self.hang = self._said_elsewhere() or self.hang + found
        with contextlib.suppress(OSError):
            self._leave_report(lines)
        lines.append(f"stacks of all threads: {self._logs}/rank_*.stacks.txt")
        print(*(f"trainyard: {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)
        self._kill(processes)

    def _leave_report(self, lines: list[str]) -> None:
        """For the other hosts, see `_said_elsewhere`."""
        if self._ours and not self._report.exists():
            temporary = self._report.with_suffix(f".{host_label()}-{os.getpid()}")
            temporary.write_text("\n".join([*lines, self.hang or ""]) + "\n", encoding="utf-8")
            temporary.replace(self._report)

    def _kill(self, processes: dict[int, psutil.Process]) -> None:
        for process in processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while any(_state(process) not in ("zombie", "gone") for process in processes.values()):
            if time.monotonic() > deadline:
                print(f"trainyard: error: {self.hang}; it cannot be killed", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    record_outcome(self._logs, "failed", failure="hang", exit_code=HANG_EXIT_CODE, reason=self.hang)
                os._exit(HANG_EXIT_CODE)
            time.sleep(0.1)

    def _examine(self, processes: dict[int, psutil.Process]) -> tuple[list[str], str]:
        """A line on each rank, and which is behind."""
        states = {rank: _state(process) for rank, process in processes.items()}
        stacks = self._collect_stacks(processes)
        # a state that has passed is none: waiting for a disk is "disk-sleep" for a moment too
        states = {rank: _state(p) if _state(p) == states[rank] else "running" for rank, p in processes.items()}
        signs = self._signs(states, stacks)
        behind, reason = find_behind(signs, self._faults.hang_seconds / 2)
        names = ", ".join(f"rank {sign.rank} on {sign.host}" for sign in behind) or "no rank can be named"
        return [sign.describe() for sign in signs], f"{names} ({reason})"

    def _collect_stacks(self, processes: dict[int, psutil.Process]) -> dict[int, str]:
        """What the ranks of this host write when they are asked, until all have or STACKS_SECONDS are over."""
        files = {rank: self._logs / f"rank_{rank}.stacks.txt" for rank in processes}
        files = {
            rank: file
            for rank, file in files.items()
            if file.exists() and _state(processes[rank]) not in DEAD_STATES  # before the file is there, it would die
        }
        for rank in files:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[rank].send_signal(STACKS_SIGNAL)
        deadline, sizes = time.monotonic() + STACKS_SECONDS, [-1]
        while time.monotonic() < deadline and (
            0 in sizes or sizes != (sizes := [f.stat().st_size for f in files.values()])
        ):
            time.sleep(0.2)
        texts = {rank: file.read_text(encoding="utf-8", errors="replace") for rank, file in files.items()}
        return {rank: text for rank, text in texts.items() if text}

    def _signs(self, states: dict[int, str], stacks: dict[int, str]) -> list[Sign]:
        beats, here, now = self._beats(), host_label(), time.time()
        signs = [
            Sign(r, b.host, b.step, b.phase, b.progress, now - b.time, states.get(r), stacks.get(r))
            for r, b in beats.items()
            if r in states or (b.host, b.launcher) != (here, os.getpid())
        ]
        return signs + [
            Sign(rank, here, 0, "starting", 0, 0.0, state, stacks.get(rank))
            for rank, state in states.items()
            if rank not in beats
        ]


def _state(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return "gone"
