"""Units of ``prepare`` on several processes: one that is killed is replaced, and its unit is made again.

A worker is a fresh Python (no fork of a process with threads, no import of the caller's script). It ends by itself when
its parent is gone, however that ended.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_pipeline.plan import Plan
from data_pipeline.unit_documents import Report, judge_unit
from data_pipeline.units import UnitMaker, no_room, sample_unit

DEATHS_IN_A_ROW = 4
REPORT_SECONDS = 0.2
# the workers share the cores between them; a pool of threads in each would make them fight. What the user set stays.
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

STEPS = {"judge": judge_unit, "sample": sample_unit}  # what comes before units are made

UnitProgress = Callable[[int, float], None]  # number of a unit, the share of it that is done


def run_units(plan: Plan, numbers: Sequence[int], workers: int, progress: UnitProgress, step: str = "make") -> str:
    """Do a step on units ("judge", "sample" or "make" them) and return the engine, with remarks for people.

    One worker is this process itself.

    Raises:
        ValueError, OSError: what a unit raised; the other workers are ended at once.
        ChildProcessError: a unit's worker was killed four times in a row.
    """
    workers = min(workers, len(numbers))
    if workers > 1:
        return _Pool(plan, numbers, progress, step).run(workers)
    make, remarks = _work(plan, step)
    for number in numbers:
        make(number, partial(progress, number))
        progress(number, 1.0)
    return remarks


def _work(plan: Plan, step: str) -> tuple[Callable[[int, Report], None], str]:
    """What is to be done with a unit, and remarks on it."""
    if step in STEPS:
        return partial(STEPS[step], plan), ""
    maker = UnitMaker(plan)
    return maker.make, maker.remarks


class _Worker:
    """A process, the line to it, and the unit that it works on."""

    def __init__(self, plan: Plan, step: str) -> None:
        self.connection, theirs = Pipe()
        self.unit: int | None = None
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "data_pipeline.workers", str(theirs.fileno())]
        environment = ONE_THREAD | os.environ | {"PYTHONPATH": path}
        # a Ctrl-C reaches all processes of the terminal; the parent alone answers it, and ends the others
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # the plan of many files is larger than a pipe holds, and a start should not wait for the one before it
            with tempfile.TemporaryFile() as start:
                pickle.dump((plan, step), start)
                start.seek(0)
                self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=start, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def end(self) -> int:
        """Kill it where it still runs, and return its exit code."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


class _Pool:
    """Deals units to workers until all are done."""

    def __init__(self, plan: Plan, numbers: Sequence[int], progress: UnitProgress, step: str) -> None:
        self._plan = plan
        self._step = step
        self._progress = progress
        self._waiting = deque(numbers)
        self._left = len(numbers)
        self._deaths: Counter[int | None] = Counter()  # in a row, by unit; None: before a worker had one
        self._workers: dict[Any, _Worker] = {}
        self._engine = ""

    def run(self, workers: int) -> str:
        try:
            for _ in range(workers):
                self._start()
            while self._left:
                for connection in wait(list(self._workers)):
                    self._answer(self._workers[connection])
        finally:
            for worker in self._workers.values():
                worker.end()
        return self._engine

    def _start(self) -> None:
        worker = _Worker(self._plan, self._step)
        self._workers[worker.connection] = worker

    def _answer(self, worker: _Worker) -> None:
        try:
            what, *values = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if what == "error":
            raise _raised(*values)
        if what == "progress":
            self._progress(values[0], values[1])
            return
        self._deaths.pop(None, None)  # workers do begin
        if what == "done":
            self._deaths.pop(worker.unit, None)
            self._left -= 1
            self._engine = values[0]
            self._progress(worker.unit, 1.0)  # type: ignore[arg-type]
        worker.unit = self._waiting.popleft() if self._waiting else None
        if worker.unit is not None:
            with contextlib.suppress(OSError):  # it was killed just now: the next answer is the end of its line
                worker.connection.send(worker.unit)

    def _replace(self, worker: _Worker) -> None:
        del self._workers[worker.connection]
        code = worker.end()
        self._deaths[worker.unit] += 1
        if self._deaths[worker.unit] >= DEATHS_IN_A_ROW:
            raise ChildProcessError(self._why(worker.unit, code))
        if worker.unit is not None:
            self._waiting.appendleft(worker.unit)
        if self._left > len(self._workers):
            self._start()

    def _why(self, unit: int | None, code: int) -> str:
        end = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        if unit is None:
            return f"{DEATHS_IN_A_ROW} workers in a row ended with {end} before they had begun"
        names = list(dict.fromkeys(self._plan.files[part.file].label for part in self._plan.units[unit].parts))
        files = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        hint = ": a kernel short of memory does that, so try fewer --workers" if code == -signal.SIGKILL else ""
        return f"the worker on unit {unit} ({files}) ended {DEATHS_IN_A_ROW} times in a row with {end}{hint}"


def _raised(kind: str, message: str, trace: str) -> BaseException:
    kinds: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}
    return kinds[kind](message) if kind in kinds else RuntimeError(f"a worker of prepare failed:\n{trace}")


def _reporter(connection: Connection, number: int) -> Report:
    """Sends the progress of a unit, seldom enough for one parent to listen to hundreds of workers."""
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            connection.send(("progress", number, share))

    return report


def _serve(connection: Connection) -> None:
    """The worker's side: units in, progress and results out, until the line closes."""
    plan, step = pickle.load(sys.stdin.buffer)
    units: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                units.put(connection.recv())
        except (EOFError, OSError):  # the parent is gone or needs no more
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        make, remarks = _work(plan, step)
        connection.send(("ready",))
        while True:
            number = units.get()
            make(number, _reporter(connection, number))
            connection.send(("done", remarks))
    except Exception as failure:
        error = no_room(failure, plan.output) if isinstance(failure, OSError) else failure
        kind = next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)), "")
        with contextlib.suppress(OSError):  # the parent is gone
            connection.send(("error", kind, str(error), traceback.format_exc()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
