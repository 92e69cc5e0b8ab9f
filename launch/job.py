"""The life of a Slurm job. `python -m launch.job` is what a job script ends with; it runs on the job's first node.

It starts a launcher on each node with `srun`, passes a request to stop on to them, stops the run itself while there is
still time to save, and decides at the end from what the launchers recorded whether the job goes back into the queue.
Every decision is an event in the run's events.jsonl.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gpt.checkpoint.format import list_checkpoints
from gpt.recipe_file import load_recipe
from gpt.run_directory import InUseError, RunDirectory, SupersededError, json_lines, newest_generation
from gpt.stop_requests import REQUEST_NAME, STOPPED_EXIT_CODE
from launch.log_folder import OUTCOME_NAME
from launch.slurm_record import parse_job

FIRST_PORT, PORTS = 20_000, 20_000
LAST_TASK_SECONDS = 120
"""How long the other nodes' launchers may take once the first one has ended: they notice a lost node by themselves, and
the last save of a run must not be cut short because another node has nothing left to do."""
LONGEST_INTERVAL_SECONDS = 60.0
"""Between two looks at the job's end, which its user may have moved, and at what saves and steps take."""
POLL_SECONDS = 1.0
SLACK_SECONDS = 5.0
"""For a request to reach the ranks, and for the processes to end."""
RECENT_STEPS = 50
COMMAND_TIMEOUT_SECONDS = 60
TRIES, RETRY_SECONDS = 10, 10.0
"""Of what a run cannot go on without: a controller that is busy, or being started again, must not end it."""
ENDS = ("finished", "refused", "no progress")
"""Decisions behind which no further job of the same submission has anything to do."""


@dataclass(frozen=True)
class Decision:
    """What comes after the end of the launchers."""

    name: str
    """finished, go on, failed (and go on), refused, no progress or cancelled. Of a start that could not say, the job's
    next one writes: lost."""
    reason: str
    asked: bool = False
    """Whether it was asked to stop, by its time limit or its user: not by preemption, which says nothing of the run."""

    @property
    def goes_on(self) -> bool:
        return self.name in ("go on", "failed")


@dataclass(frozen=True)
class Job:
    """One start of a Slurm job for a run."""

    id: str
    """As squeue shows it: that of a task of an array is ARRAY_INDEX."""
    restart: int
    """How often it was requeued before."""
    run: Path
    recipe: Path

    @staticmethod
    def of_this_process(recipe: Path) -> "Job":
        """Raises ValueError outside a Slurm job, or what reading the recipe raises."""
        variables = os.environ
        if "SLURM_JOB_ID" not in variables:
            raise ValueError("this is no Slurm job: use `trainyard submit`, or `trainyard train` without Slurm")
        job = variables["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in variables:
            job = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
        run = load_recipe(str(recipe), []).run_directory()
        return Job(job, int(variables.get("SLURM_RESTART_COUNT", 0)), run, recipe)

    def record(self, when: str) -> dict[str, str]:
        """Keep Slurm's own record of the job in `logs/` ("start" or "end"); its fields."""
        text = ""
        try:
            # at the end much depends on it: a job that was cancelled must not go back into the queue
            text = _scontrol("show", "job", self.id, tries=1 if when == "start" else TRIES)
            (self.run / "logs").mkdir(parents=True, exist_ok=True)
            (self.run / "logs" / f"job_{self.id}_{self.restart}_{when}.txt").write_text(text, encoding="utf-8")
        except (ValueError, OSError) as error:  # its absence changes no decision for the worse
            print(f"trainyard: warning: Slurm's record of the job is not kept: {error}", flush=True)
        return parse_job(text)

    def note(self, event: str, **details: Any) -> None:
        """Add an event of this job to events.jsonl, in the name of the newest start."""
        what = {"job": self.id, "restart": self.restart, "recipe": str(self.recipe), **details}
        while True:
            with contextlib.suppress(SupersededError):  # another start came at this moment: in its name, then
                return RunDirectory(self.run, newest_generation(self.run)).note_event(event, **what)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return RunDirectory(self.run).events(*kinds)

    def checkpoint(self) -> int:
        """Step of the newest committed checkpoint; 0 where there is none."""
        return max(list_checkpoints(self.run), default=0)

    def step(self) -> int:
        """The last step that is written."""
        return max((record["step"] for record in json_lines(self.run / "metrics.jsonl")), default=0)


@dataclass(frozen=True)
class Start:
    """How the launchers of one start of a job ended."""

    code: int
    """srun's exit code: the highest of the launchers'."""
    outcomes: Sequence[dict[str, Any]]
    """What they recorded of their ends, oldest first: `failed` and `stopped`."""
    asked: bool
    """Whether the job script or a launcher was asked to stop."""
    fields: dict[str, str]
    """Slurm's record of the job."""
    began: int
    """Step of the newest checkpoint when it began."""
    checkpoint: int
    """And when it ended."""
    step: int
    """The last step that is written."""
    requeued: bool = False
    """Whether Slurm has put the job back into the queue by itself."""


def run_job(
    job: Job, srun: Sequence[str], trainyard: Sequence[str], nodes: int, processes: int, *, requeue: bool
) -> int:
    """Run a job of a run from its start to the decision on its end.

    Args:
        nodes: as many as the run was submitted for.
        srun: further options of srun.
        trainyard: the command as the nodes call it.
        processes: workers of each node.
        requeue: whether the job may go back into the queue; else another job of a chain goes on.

    Returns:
        The job's exit code: 0 the run is finished.
    """
    if (earlier := _earlier_end(job)) is not None:
        print(f"trainyard: nothing to do: job {earlier['job']} ended with: {earlier['reason']}", flush=True)
        return 0 if earlier["decision"] == "finished" else 1
    job.record("start")
    _note_lost_start(job)
    job.note("job started", nodes=os.environ["SLURM_JOB_NODELIST"])
    if int(os.environ["SLURM_NNODES"]) != nodes:
        return _refuse_nodes(job, nodes, processes)
    _wait_for_last_start(job)
    began, events, folders = job.checkpoint(), len(job.events("failed", "stopped")), set(_log_folders(job.run))
    code, asked = _Launchers(job).run(_srun_command(job, srun, trainyard, processes))
    new = [folder for folder in _log_folders(job.run) if folder not in folders]
    outcomes = job.events("failed", "stopped")[events:] + [o for folder in new for o in _outcome(folder)]
    fields = job.record("end")
    asked = asked or any((folder / REQUEST_NAME).exists() for folder in new)
    outcomes.sort(key=lambda outcome: outcome["time"])
    requeued = int(fields.get("Restarts", job.restart)) > job.restart
    start = Start(code, outcomes, asked, fields, began, job.checkpoint(), job.step(), requeued)
    decision = decide(start, job.events("job ended"))
    what = {"decision": decision.name, "reason": decision.reason, "asked": decision.asked, "exit_code": code}
    job.note("job ended", **what, began=began, checkpoint=start.checkpoint, step=start.step)
    print(f"trainyard: job {job.id}, start {job.restart + 1}: {decision.name}: {decision.reason}", flush=True)
    if decision.goes_on and requeue and not requeued:
        _requeue(job)
    elif decision.goes_on and not requeue:
        print("trainyard: the next job of the chain goes on; without one, submit the run again", flush=True)
    return code


def decide(start: Start, ended: Sequence[dict[str, Any]]) -> Decision:
    """What comes after a start.

    Args:
        ended: the run's events `job ended` so far, oldest first.
    """
    if start.code == 0:
        return Decision("finished", f"the run is finished, at step {start.step}")
    if start.fields.get("JobState") == "CANCELLED":
        return Decision("cancelled", "the job was cancelled; submit it again to go on")
    failures = [outcome for outcome in start.outcomes if outcome["event"] == "failed"]
    refusals = [outcome["reason"] for outcome in failures if outcome.get("failure") == "refused"]
    last = ended[-1] if ended else {}
    preempted = start.fields.get("PreemptTime", "None") != "None"
    asked = start.asked or preempted or start.fields.get("JobState") == "TIMEOUT"
    if start.requeued and not refusals:
        return Decision("go on", "Slurm put the job back into the queue by itself: a node failed, or it was preempted")
    if start.code == STOPPED_EXIT_CODE or (asked and not refusals):
        gained = start.checkpoint > start.began
        if not gained and not preempted and last.get("asked") and last["checkpoint"] <= last["began"]:
            why = "it was asked to stop before it had trained a step, twice in a row: is the time limit too short?"
            return Decision("no progress", why)
        reason = f"asked to stop; its newest checkpoint is of step {start.checkpoint}"
        return Decision("go on", reason, asked=not preempted)
    if refusals or start.code == 2:
        return Decision("refused", "; ".join(dict.fromkeys(refusals)) or "the command line was refused")
    # the first to fail knows why; the others only say that it went away
    reason = failures[0]["reason"] if failures else f"a launcher ended with exit code {start.code} and left no reason"
    if last.get("decision") == "failed" and start.checkpoint <= last["checkpoint"] and start.step <= last["step"]:
        where = f"after step {last['step']} and after step {start.step}, with no checkpoint between"
        return Decision("no progress", f"it failed twice without progress, {where}: {reason}")
    return Decision("failed", reason)


def seconds_needed(events: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> float | None:
    """How long before its end a run has to be asked to stop: two saves and a step, as long as the longest of the newest
    ones, and some slack. None where no save or step was measured yet."""
    saves = [event["seconds"] for event in events if event["event"] == "checkpoint committed"][-5:]
    steps = [r["performance/step_seconds"] for r in records[-RECENT_STEPS:] if "performance/step_seconds" in r]
    return 2 * max(saves) + max(steps) + SLACK_SECONDS if saves and steps else None


class _Launchers:
    """One srun, and what asks it to stop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._srun: subprocess.Popen[bytes] | None = None
        self._asked = False
        self._end: float | None = None
        self._needed: float | None = None
        self._look_at = 0.0

    def run(self, command: Sequence[str]) -> tuple[int, bool]:
        """(exit code, whether this process asked for a stop), when all launchers have ended."""
        self._listen()
        self._srun = subprocess.Popen(command)
        if self._asked:  # before there was an srun to ask
            self._srun.send_signal(signal.SIGUSR1)
        while True:
            try:
                code = self._srun.wait(POLL_SECONDS)
                return (128 - code if code < 0 else code), self._asked
            except subprocess.TimeoutExpired:
                if not self._asked:
                    self._look_at_the_time()

    def _ask(self, why: str) -> None:
        """Pass a request on, once. srun takes SIGTERM as an order to kill; SIGUSR1 it passes on to all tasks."""
        if self._asked:
            return
        self._asked = True
        os.write(1, f"trainyard: {why}: asking the launchers to stop\n".encode())  # a signal may have cut a print short
        if self._srun is not None:
            self._srun.send_signal(signal.SIGUSR1)  # nothing where it has ended

    def _listen(self) -> None:
        """To requests that reach this process: `scancel --batch --signal`, a `--signal=B:`, a job that is being ended.
        For good, since what is decided and recorded at the end must not be cut short either."""

        def note(number: int, frame: FrameType | None) -> None:
            self._ask(f"the job script got {signal.Signals(number).name}")

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)

    def _look_at_the_time(self) -> None:
        now = time.time()
        if now >= self._look_at:
            # "Unknown", the controller does not answer, the file system is away: then it stays as it was
            with contextlib.suppress(ValueError, OSError):
                text = parse_job(_scontrol("show", "job", self._job.id)).get("EndTime", "")
                self._end = time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
            with contextlib.suppress(ValueError, OSError):
                records = list(json_lines(self._job.run / "metrics.jsonl"))
                self._needed = seconds_needed(self._job.events("checkpoint committed"), records)
            left = LONGEST_INTERVAL_SECONDS if self._end is None else (self._end - now) / 10
            self._look_at = now + min(max(left, POLL_SECONDS), LONGEST_INTERVAL_SECONDS)
        if self._end is not None and self._needed is not None and self._end - now < self._needed:
            left = self._end - now
            self._ask(f"the time limit is in {left:.0f} s, and two saves and a step take {self._needed:.0f} s")


def _srun_command(job: Job, srun: Sequence[str], trainyard: Sequence[str], processes: int) -> list[str]:
    """One launcher a node. SLURM_NODEID differs from task to task, so it is read inside the task. The workers use all
    processors of the task: it is not bound to one of them."""
    first = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    node = parse_job(_scontrol("show", "node", first, tries=TRIES))
    address = node.get("NodeAddr", first)  # names need not resolve
    # by the job's number, so that two jobs on one node do not meet at the same port
    port = FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS
    rendezvous = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    meeting = ["--nodes", os.environ["SLURM_NNODES"], "--rendezvous", rendezvous]
    train = [*trainyard, "train", str(job.recipe), "--processes", str(processes), *meeting]
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--wait={LAST_TASK_SECONDS}", "--cpu-bind=none", *srun]
    return ["srun", *options, "bash", "-c", 'exec "$@" --node-rank "$SLURM_NODEID"', "task", *train]


def _refuse_nodes(job: Job, nodes: int, processes: int) -> int:
    reason = (
        f"job {job.id} has {os.environ['SLURM_NNODES']} nodes, but the run was submitted for {nodes} nodes with "
        f"{processes} processes each: take options that change the number of nodes away, and submit it again"
    )
    job.note("failed", failure="refused", exit_code=1, reason=reason)
    job.record("end")
    job.note("job ended", decision="refused", reason=reason, exit_code=1)
    print(f"trainyard: error: {reason}", file=sys.stderr)
    return 1


def _earlier_end(job: Job) -> dict[str, Any] | None:
    """How an earlier job of the same submission ended the run, for the later ones of a chain. A job that its user
    requeues by hand is to run."""
    ended = [event for event in job.events("job ended") if event["recipe"] == str(job.recipe)]
    return ended[-1] if ended and ended[-1]["decision"] in ENDS and ended[-1]["job"] != job.id else None


def _note_lost_start(job: Job) -> None:
    """Where this job's last start did not get to its end, say so: Slurm itself put it back into the queue."""
    mine = [event for event in job.events("job started", "job ended") if event["job"] == job.id]
    if mine and mine[-1]["event"] == "job started":
        reason = "it was ended from outside before it could say why: a node failed, or its time was up"
        lost = Job(job.id, mine[-1]["restart"], job.run, job.recipe)
        lost.note("job ended", exit_code=None, decision="lost", reason=reason)


def _wait_for_last_start(job: Job) -> None:
    """A start that a lost node, or a kill on another one, has ended looks alive until its heartbeat is stale. To begin
    before that would be refused: a failure without progress, for which the next job of a chain would not even wait."""
    try:
        RunDirectory(job.run).refuse_if_in_use()
    except InUseError as error:
        print(f"trainyard: {error}; this start waits {error.stale_in_seconds:.0f} s for that", flush=True)
        time.sleep(max(0.0, error.stale_in_seconds) + POLL_SECONDS)  # one that lives is refused afterwards
    except (ValueError, OSError):
        return  # the launcher finds the same, and records it


def _log_folders(run: Path) -> list[Path]:
    return sorted(folder for folder in (run / "logs").glob("*Z_*") if folder.is_dir())


def _outcome(folder: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        yield json.loads((folder / OUTCOME_NAME).read_bytes())


def _requeue(job: Job) -> None:
    """Put the job back into the queue, by which Slurm ends this process."""
    try:
        _scontrol("requeue", job.id, tries=TRIES)
    except ValueError as error:
        print(f"trainyard: error: {error}; submit the run again to go on", flush=True)


def _scontrol(*arguments: str, tries: int = 1) -> str:
    """What it prints. Raises ValueError when it fails or does not answer, `tries` times."""
    command = ["scontrol", *arguments]
    for left in reversed(range(tries)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS)
            if done.returncode == 0:
                return done.stdout
            problem = " ".join(done.stderr.split())
        except subprocess.TimeoutExpired:
            problem = f"no answer in {COMMAND_TIMEOUT_SECONDS} s"
        if left:
            time.sleep(RETRY_SECONDS)
    raise ValueError(f"{' '.join(command)}: {problem}")


def main() -> None:
    """Entry point of the job script."""
    parser = argparse.ArgumentParser(prog="launch.job", description="Runs inside a Slurm job, on its first node.")
    parser.add_argument("recipe", type=Path, help="the frozen recipe")
    parser.add_argument("--nodes", type=int, required=True, help="nodes that the run was submitted for")
    parser.add_argument("--processes", type=int, required=True, help="worker processes of each node")
    parser.add_argument("--requeue", action="store_true", help="the job may go back into the queue")
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="option of srun")
    parser.add_argument("trainyard", nargs="+", help="behind --: the command as the nodes call it")
    chosen = parser.parse_args()
    try:
        job = Job.of_this_process(chosen.recipe)
        code = run_job(job, chosen.srun, chosen.trainyard, chosen.nodes, chosen.processes, requeue=chosen.requeue)
    except (ValueError, OSError) as error:
        print(f"trainyard: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
