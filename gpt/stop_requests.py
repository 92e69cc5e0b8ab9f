"""Requests to stop a run: signals to this rank, and the file by which the launcher passes on its own.

A request never ends a rank by itself: the ranks agree on it at the start of a step, save, and end together.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0
"""A signal to the process group, or one that a scheduler sends to every process, reaches the launcher and each rank:
what comes this soon after the first one is the same request."""
REQUEST_NAME = "stop_requested"
STOPPED_EXIT_CODE = 85
"""Of a launcher: stopped on request, to be continued."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def ends_at_once(number: int) -> bool:
    """Whether a later signal ends a process without saving. In a Slurm job only Ctrl-C does: the warning, a preemption
    and the time limit may follow each other, and what Slurm does not wait for, it kills."""
    return number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ


class StopRequests:
    """Listens for this process.

    The launcher starts ranks with `SIGNALS` blocked, so that none is lost, and none kills, before this listens;
    compiler processes inherit that. A thread waits for them, since the main one may be inside a collective for long.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / REQUEST_NAME
        self._requested_at: float | None = None
        self._launcher = os.getppid()
        # a launcher that is killed takes its ranks along, which would hold the run directory, or wait for ever
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._requested_at is not None or self._file.exists()

    def _listen(self) -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_pid == self._launcher:
                # torchrun's agent ends the group, since another rank failed: die of it, as the agent expects
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [received.si_signo])
                os.kill(os.getpid(), received.si_signo)
            now = time.monotonic()
            later = self._requested_at is not None and now - self._requested_at > SAME_REQUEST_SECONDS
            if later and ends_at_once(received.si_signo):
                os._exit(128 + received.si_signo)
            if self._requested_at is None:
                self._requested_at = now
                with contextlib.suppress(OSError):
                    self._file.touch()  # for the launcher, which starts no run again that was asked to stop
