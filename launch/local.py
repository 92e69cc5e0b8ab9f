"""N worker processes on this host, or this host's share of a run on many; owns signals and exit codes.

torchrun's agent starts the workers and ends them all when one fails. What the user sees, which signals end a run and
with which exit code is decided here: the first signal asks the workers to save and end, however long that takes, a
second one ends them at once.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt.heartbeat import read_beats
from gpt.run_directory import NotMetError, SupersededError, claimed_from, host_label, newest_generation
from gpt.stop_requests import REQUEST_NAME, SAME_REQUEST_SECONDS, SIGNALS, STOPPED_EXIT_CODE, ends_at_once
from launch import environment
from launch.hosts import HostSigns, Route, find_route
from launch.log_folder import log_directory, record_outcome
from launch.out_of_memory import explain_sigkill, oom_kills
from launch.watch import HANG_EXIT_CODE, HangWatch
from launch.worker_output import RankLogs, shown_on_terminal

if TYPE_CHECKING:
    from gpt.recipe import Recipe

WORKER_MODULE = "gpt.train"
MEETING_TIMEOUT_SECONDS = 600
SHUTDOWN_TIMEOUT_SECONDS = 30
"""How long workers may take to end after SIGTERM before they get SIGKILL."""


def default_processes() -> tuple[int, str]:
    """(worker processes for this host, why): one per GPU, else two where there are two cores, else one."""
    if devices := environment.cuda_devices():
        return devices, f"one for each of {devices} GPUs"
    cores = environment.usable_cores()
    return min(2, cores), f"no GPU, {cores} core{'s' if cores > 1 else ''}"


def run_workers(
    recipe: "Recipe", *, processes: int, nodes: int = 1, node_rank: int = 0, rendezvous: str | None = None
) -> int:
    """Run this host's workers of a run to their end.

    After a crash or a hang they are started again, `recipe.faults.restarts` times at most, from the newest good
    checkpoint. Not after a refusal, which would come again, nor when the run was asked to stop, nor with several nodes:
    their hosts must start together, which is the scheduler's task.

    Args:
        recipe: resolved; the workers get it in TRAINYARD_RECIPE.
        processes: workers on this host; the same number on every host.
        nodes: hosts of the run.
        node_rank: this host's number, 0 to nodes - 1. Ranks are numbered by it, and host 0 holds the meeting point.
        rendezvous: HOST:PORT of host 0, under which all hosts reach it. Required for several hosts.

    Returns:
        The exit code: 0 done, 1 a worker refused or failed (said on stderr), 85 stopped on request and saved, 86 a hang
        or a worker that a signal ended, 128 + signal when a second signal ended the run.

    Raises:
        ValueError: numbers that do not fit together.
        OSError: the hosts did not meet in MEETING_TIMEOUT_SECONDS, or the run directory is not writable.
    """
    route = _find_route(processes, nodes, node_rank, rendezvous)
    ranks = range(node_rank * processes, (node_rank + 1) * processes)
    restarts = recipe.faults.restarts if nodes == 1 else 0
    is_new = nodes == 1 and not recipe.run_directory().exists()
    with _stop_signals() as stop, _host_environment(route), contextlib.ExitStack() as stack:
        signs = None
        if route is not None and nodes > 1:
            signs = HostSigns(route, node_rank, nodes, os.environ["TRAINYARD_HOST"])
            stack.enter_context(signs.exchanged())
        try:
            for restart in range(restarts + 1):
                stop.directory = _make_log_directory(recipe.run_directory(), restart, nodes)
                if stop.received:  # while no worker was there to hear of it
                    return _stop_without_workers(recipe, stop.directory)
                config = _launch_config(recipe, processes, nodes, node_rank, route)
                outcome = _run_group(recipe, config, ranks, stop.directory, signs)
                if outcome.exit_code:
                    _record_end(recipe, stop, outcome)
                if is_new and outcome.details.get("failure") == "refused":
                    _remove_new_run(recipe.run_directory(), stop.directory)
                if not outcome.may_start_again or restart == restarts or stop.requested():
                    return outcome.exit_code
                reason = outcome.details["reason"]
                print(f"trainyard: restart {restart + 1} of at most {restarts}, since {reason}", file=sys.stderr)
                _record(recipe, stop.directory, "restart", number=restart + 1, reason=reason)
        except SignalException:
            number = stop.received[-1]
            reason = f"ended by {number.name} without saving"
            print(f"trainyard: {reason}; all workers of this host have ended", file=sys.stderr, flush=True)
            if stop.directory is not None:
                details = {"failure": "second signal", "signal": number.name, "reason": reason}
                _record(recipe, stop.directory, "failed", exit_code=128 + number, **details)
            return 128 + number
    raise AssertionError("the last start returns")


def _stop_without_workers(recipe: "Recipe", logs: Path) -> int:
    print("trainyard: stopped on request; the same command goes on from there", file=sys.stderr)
    reason = "stopped on request while no rank ran"
    _record(recipe, logs, "stopped", exit_code=STOPPED_EXIT_CODE, reason=reason)
    return STOPPED_EXIT_CODE


def _remove_new_run(run: Path, logs: Path) -> None:
    """Take away what a refused start of a new run made, where nothing else is there: a mistake in a recipe leaves no
    run behind."""
    with contextlib.suppress(OSError):
        if [*run.iterdir()] == [logs.parent] and [*logs.parent.iterdir()] == [logs]:
            shutil.rmtree(logs)
            logs.parent.rmdir()  # not if another start has come meanwhile
            run.rmdir()


def _make_log_directory(run: Path, restart: int, nodes: int) -> Path:
    try:
        return log_directory(run, restart)
    except OSError:
        if nodes == 1:
            raise
        # the ranks find the same, and tell those of the other hosts, which would wait for this one
        return Path(tempfile.mkdtemp(prefix="trainyard-"))


@dataclass(frozen=True)
class _Outcome:
    """How a group of workers ended."""

    exit_code: int
    details: dict[str, Any] = field(default_factory=dict)
    """For events.jsonl: `reason` in one line; where it failed, `failure` (refused, another start, not met, exception,
    killed, exit, hang, second signal) and as far as known `rank`, `signal` or `rank_exit_code`, `out_of_memory`, `file`
    of a traceback."""
    may_start_again: bool = False
    """Whether another start may help."""

    def event(self) -> str:
        return "stopped" if self.exit_code == STOPPED_EXIT_CODE else "failed"


def run_preflight(
    recipe: "Recipe", directory: Path, *, processes: int, nodes: int, node_rank: int, rendezvous: str | None
) -> int:
    """Start this host's workers for a look at whether the run will work; arguments and exit code as `run_workers`.

    `directory` takes their logs and the report `preflight.json`; nothing is written into the run directory.
    """
    route = _find_route(processes, nodes, node_rank, rendezvous)
    ranks = range(node_rank * processes, (node_rank + 1) * processes)
    with _host_environment(route):
        config = _launch_config(recipe, processes, nodes, node_rank, route)
        return _run_group(recipe, config, ranks, directory, None, "preflight").exit_code


def _run_group(
    recipe: "Recipe", config: LaunchConfig, ranks: range, directory: Path, signs: HostSigns | None, *arguments: str
) -> _Outcome:
    """Start the workers once and wait for their end; what went wrong is said on stderr."""
    logs = RankLogs(directory)
    config.logs_specs = logs
    watch = HangWatch(recipe.run_directory(), directory, ranks, recipe.faults, signs)
    oom_kills_before = oom_kills()
    with _environment_for(recipe, len(ranks), directory):
        try:
            with shown_on_terminal(logs), watch.watching(), _blocked_in_this_thread():
                elastic_launch(config, sys.executable)("-P", "-m", WORKER_MODULE, *arguments)
        except ChildFailedError as error:
            outcome, lines = _explain(error.failures, directory, watch.hang, oom_kills_before)
            print("\n".join(lines), file=sys.stderr, flush=True)
            return outcome
        except (RendezvousError, torch.distributed.DistError) as error:
            raise NotMetError(
                f"the {config.max_nodes} hosts of the run did not meet at {config.rdzv_endpoint}: "
                f"{' '.join(str(error).split())}; start all within {MEETING_TIMEOUT_SECONDS} s, with a port free on "
                "host 0 and open to the others"
            ) from error
        finally:
            for file in directory.glob("rank_*.stacks.txt"):
                if not file.stat().st_size:
                    file.unlink()
    stopped = sorted(directory.glob("rank_*.stopped"))
    if stopped:
        step = stopped[0].read_text(encoding="utf-8")
        print(f"trainyard: stopped on request after step {step}; the same command goes on from there", file=sys.stderr)
        details = {"reason": f"stopped on request after step {step}", "checkpoint_step": int(step)}
        return _Outcome(STOPPED_EXIT_CODE, details)
    return _Outcome(0)


def _record(recipe: "Recipe", logs: Path, event: str, **details: Any) -> None:
    """Keep how a start ended: as an event where one of its ranks came to own the run directory, which has one writer,
    else as `outcome.json` beside its logs."""
    run = recipe.run_directory()
    steps = [beat.step for beat in read_beats(run, newest_generation(run)).values() if beat.launcher == os.getpid()]
    details = {"host": host_label(), "file": f"logs/{logs.name}", **details, "step": max(steps, default=None)}
    with contextlib.suppress(OSError):  # the file system may be what failed
        with contextlib.suppress(SupersededError, ValueError):  # a damaged claim is nobody's
            if owner := claimed_from(run, os.getpid()):
                owner.write_event(event, **details)
                return
        record_outcome(logs, event, **details)


def _record_end(recipe: "Recipe", stop: "_Stop", outcome: _Outcome) -> None:
    """Keep why a start did not come to its end."""
    assert stop.directory is not None
    signals = [number.name for number in stop.received]
    details = {"exit_code": outcome.exit_code, "signals": signals, **outcome.details}
    _record(recipe, stop.directory, outcome.event(), **details)


def _find_route(processes: int, nodes: int, node_rank: int, rendezvous: str | None) -> Route | None:
    """The way to the meeting point; None where all workers are on this host and it is found without one."""
    if processes < 1 or nodes < 1:
        raise ValueError(f"--processes and --nodes are at least 1; given: {processes} and {nodes}")
    if not 0 <= node_rank < nodes:
        raise ValueError(f"--node-rank is {node_rank}, but {nodes} node(s) have ranks 0 to {nodes - 1}")
    if nodes > 1 and rendezvous is None:
        raise ValueError(f"{nodes} nodes need --rendezvous HOST:PORT, an address of node 0 that all nodes reach")
    return None if rendezvous is None else find_route(rendezvous, node_rank)


def _launch_config(recipe: "Recipe", processes: int, nodes: int, node_rank: int, route: Route | None) -> LaunchConfig:
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=recipe.name,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the others are ours, see _ending_signals
        shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS,
        # replaced by each start's own; torch's default would make a temporary folder, which a kill leaves behind
        logs_specs=RankLogs(recipe.run_directory() / "logs"),
    )
    config.rdzv_configs["timeout"] = MEETING_TIMEOUT_SECONDS
    if route is None:
        # port 0: the agent takes a free one and keeps it; nothing is guessed between choosing and using
        config.rdzv_backend, config.rdzv_endpoint, config.local_addr = "c10d", "127.0.0.1:0", "127.0.0.1"
        config.rdzv_configs["is_host"] = True
    else:
        # static: ranks follow node_rank and only host 0 listens; c10d sorts hosts by name and guesses which one listens
        config.rdzv_backend, config.rdzv_endpoint, config.local_addr = "static", route.endpoint, route.own_address
        config.rdzv_configs["rank"] = node_rank
    return config


@contextlib.contextmanager
def _host_environment(route: Route | None) -> Iterator[None]:
    """What is the same for all starts of this host's workers; undone afterwards."""
    before = dict(os.environ)
    if route is not None:
        os.environ.update(environment.network_environment(route.interface, route.own_address))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _environment_for(recipe: "Recipe", processes: int, errors: Path) -> Iterator[None]:
    """The workers' environment, which they inherit from this process; undone afterwards.

    `errors` is where a worker leaves why it refused (`rank_N.txt`) or failed (`rank_N.traceback.txt`).
    """
    before = dict(os.environ)
    own = environment.own_settings(processes)
    if own and os.environ.get("SLURM_NODEID", "0") == "0":  # a job's nodes have one environment and one output
        print(f"environment: your own settings stay: {', '.join(own)}", flush=True)
    chosen = environment.worker_environment(processes)
    os.environ.update(chosen)
    os.environ["TRAINYARD_RECIPE"] = json.dumps(recipe.model_dump(mode="json"))
    os.environ["TRAINYARD_ERROR_DIRECTORY"] = str(errors)
    for lock in environment.clear_stale_build_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
        print(f"removed the build lock {lock}, which a killed run left behind", file=sys.stderr, flush=True)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the agent's own words; this file says what happened
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.ExitStack() as stack:
            if "SLURM_JOB_ID" in os.environ and (shared := chosen.get("TORCH_EXTENSIONS_DIR")):
                folder = stack.enter_context(environment.own_extensions(Path(shared)))
                os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Stop:
    """Signals that this process got, and the present workers' folder, by which they hear of the first one."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.directory: Path | None = None

    def requested(self) -> bool:
        """Whether this process or one of the workers was asked to stop."""
        return bool(self.received) or (self.directory is not None and (self.directory / REQUEST_NAME).exists())


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first signal into a request that the workers read, a later one into their end.

    The agent's own handlers would pass SIGINT on, which prints a traceback in every worker, end the workers within a
    time-out, saved or not, and die of SIGUSR1.
    """
    stop = _Stop()
    received = stop.received
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        received.append(signal.Signals(number))
        if len(received) == 1:
            first = time.monotonic()
            if stop.directory is not None:
                (stop.directory / REQUEST_NAME).touch()
            text = (
                f"\ntrainyard: {received[0].name}: stopping after the present step, with a checkpoint; a second "
                f"{'signal' if ends_at_once(signal.SIGTERM) else 'Ctrl-C'} ends at once\n"
            )
            os.write(2, text.encode())  # not print, which refuses to run inside another print
        elif time.monotonic() - first > SAME_REQUEST_SECONDS and ends_at_once(number):
            for other in SIGNALS:
                signal.signal(other, signal.SIG_IGN)  # a third one must not interrupt the end and leave workers behind
            raise SignalException(f"received {received[-1].name}", signal.SIGTERM)

    previous: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in SIGNALS}
    previous[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)  # the agent takes it
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _blocked_in_this_thread() -> Iterator[None]:
    """Let workers start with the signals blocked, which they inherit from the thread that starts them.

    This process still gets them: the thread that shows the workers' output takes them, and Python runs the handlers in
    the main thread all the same.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _explain(
    failures: dict[int, ProcessFailure], logs: Path, hang: str | None, oom_kills_before: dict[str, int]
) -> tuple[_Outcome, list[str]]:
    """Why the workers of this host failed: a hang, else refusals once each, else the killing signal, else the first
    traceback."""
    place = f"trainyard: what every rank printed: {logs}"
    if hang is not None:
        found = {"failure": "hang", "reason": hang}
        return _Outcome(HANG_EXIT_CODE, found, may_start_again=True), [place, f"trainyard: error: {hang}"]
    files = sorted(logs.glob("rank_*[0-9].txt"))
    if refusals := list(dict.fromkeys(file.read_text(encoding="utf-8").strip() for file in files)):
        failure = "not met" if len(list(logs.glob("rank_*.not_met"))) == len(files) else "refused"
        failure = "another start" if any(logs.glob("rank_*.another_start")) else failure
        found = {"failure": failure, "reason": "; ".join(refusals)}
        return _Outcome(1, found), [f"trainyard: error: {sentence}" for sentence in refusals]
    tracebacks = {_rank_of(file): file for file in logs.glob("rank_*.traceback.txt")}
    sigkill, out_of_memory = explain_sigkill(oom_kills_before, oom_kills())
    killed = _killed(failures, sigkill)
    causes = [sentence for sentences in killed.values() for sentence in sentences.values()]
    silent = {
        rank: failure for rank, failure in sorted(failures.items()) if failure.exitcode > 0 and rank not in tracebacks
    }
    causes += [
        f"{_worker(rank, failure)} ended with exit code {failure.exitcode} and left no traceback"
        for rank, failure in silent.items()
    ]
    details: dict[str, Any] = {"failure": "exit", "reason": "; ".join(causes)}
    if killed:
        number, sentences = next(iter(killed.items()))
        details |= {"failure": "killed", "rank": min(sentences), "signal": number.name}
        details |= {"out_of_memory": out_of_memory} if number is signal.SIGKILL else {}
    elif silent:
        details |= {"rank": min(silent), "rank_exit_code": silent[min(silent)].exitcode}
    # native code also aborts because its peer has failed, so an abort does not hide a traceback
    if tracebacks and killed.keys() <= {signal.SIGABRT}:
        # the other ranks' later tracebacks only say that this one went away; they are in the logs
        first = min(tracebacks, key=lambda rank: tracebacks[rank].stat().st_mtime_ns)
        text = tracebacks[first].read_text(encoding="utf-8").rstrip()
        causes.append(f"rank {first} on {host_label()} failed:\n{text}")
        reason = f"rank {first} on {host_label()} failed: {text.splitlines()[-1]}"
        file = f"logs/{logs.name}/{tracebacks[first].name}"
        details = {"failure": "exception", "reason": reason, "rank": first, "file": file}
        outcome = _Outcome(1, details, may_start_again=True)
    elif ended := {f.exitcode for f in silent.values()} & {128 + number for number in SIGNALS}:
        outcome = _Outcome(min(ended), details | {"failure": "second signal"})  # to a rank
    else:
        outcome = _Outcome(HANG_EXIT_CODE if killed else 1, details, may_start_again=True)
    return outcome, [place, *(f"trainyard: error: {cause}" for cause in causes)]


def _rank_of(file: Path) -> int:
    return int(file.name.removeprefix("rank_").partition(".")[0])


def _killed(failures: dict[int, ProcessFailure], sigkill: str) -> dict[signal.Signals, dict[int, str]]:
    """Sentences on the ranks that a signal ended, by rank; `sigkill` is what is known of a SIGKILL. The agent ends the
    others with SIGTERM, so that one counts only when nothing else happened."""
    killed: dict[signal.Signals, dict[int, str]] = {}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode >= 0 or (failure.exitcode == -signal.SIGTERM and _others_failed(failures)):
            continue
        number = signal.Signals(-failure.exitcode)
        hint = sigkill if number is signal.SIGKILL else ""
        killed.setdefault(number, {})[rank] = f"{_worker(rank, failure)} was killed by {number.name}{hint}"
    return killed


def _others_failed(failures: dict[int, ProcessFailure]) -> bool:
    return any(failure.exitcode != -signal.SIGTERM for failure in failures.values())


def _worker(rank: int, failure: ProcessFailure) -> str:
    return f"rank {rank} (process {failure.pid} on {host_label()})"
