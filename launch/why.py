"""`trainyard why`: why a run died, or that it did not, with the evidence and what to do next."""

import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from gpt.checkpoint.format import SPARE_BYTES
from gpt.heartbeat import Sign, find_behind, heartbeat_file
from launch.run_facts import Event, RunFacts, read_facts
from launch.status import State, clock, duration, is_alive, judge
from launch.submitted import is_sweep, read_sweep

TRACEBACK_LINES = 4
LIMIT_SECONDS = 90.0
"""A last sign so shortly before the time limit, or later, means that the limit ended the job."""
GO_ON = "give the same command again: the run goes on from its newest checkpoint"
SLURM_ENDS = {
    "TIMEOUT": ("time limit", "its time limit", "raise the time, or let it requeue itself: `trainyard submit`"),
    "DEADLINE": ("time limit", "its deadline", "submit it again with a later one"),
    "PREEMPTED": ("preempted", "a job of higher priority took its nodes", "submit it again, or let it requeue itself"),
    "NODE_FAIL": ("node failure", "a node failed", "submit it again; leave that node out if it fails again"),
    "BOOT_FAIL": ("node failure", "a node did not start", "submit it again"),
    "OUT_OF_MEMORY": ("out of memory", "its memory limit", "ask for more memory, or see `memory/host_gib`"),
    "CANCELLED": ("cancelled", "someone or something cancelled it (scancel)", GO_ON),
}
MORE_MEMORY = "give it more memory, a smaller train.micro_batch_sequences, more ranks or gradient_checkpointing"


@dataclass(frozen=True)
class Explanation:
    """The answer."""

    cause: str
    headline: str
    todo: str
    evidence: list[dict[str, str]] = field(default_factory=list)
    """Each with `file`, below the run directory, and `says`."""


def explain(run: Path) -> dict[str, Any]:
    """Why a run died, as `--json` prints it.

    Raises:
        FileNotFoundError, ValueError: `run` is no run directory.
    """
    if is_sweep(run):
        names = ", ".join(str(place) for place, _ in read_sweep(run))
        raise ValueError(f"{run} is a sweep's folder: ask for one of its runs, {names}")
    facts = read_facts(run)
    state = judge(facts)
    judges: dict[str, Callable[[RunFacts, State], Explanation]] = {
        "failed": _failed,
        "dead": _dead,
        "stopped": _stopped,
        "hung": _hung,
    }
    found = judges.get(state.name, _alive)(facts, state)
    remarks = [{"file": "", "says": problem} for problem in facts.problems]
    history = [item for item in _history(facts) if item not in found.evidence]
    evidence = [*found.evidence, *history, *_job(facts), *remarks]
    answer = {"run": str(run), "state": state.name, **asdict(found), "evidence": evidence}
    return answer | {"headline": re.sub(r"([.?!])\.$", r"\1", found.headline)}  # of a reason that is a sentence


def describe(found: dict[str, Any]) -> list[str]:
    """An explanation as lines for people."""
    evidence = [f"  {item['file'] + ': ' if item['file'] else ''}{item['says']}" for item in found["evidence"]]
    return [found["headline"], *evidence, f"next: {found['todo']}"]


def _alive(facts: RunFacts, state: State) -> Explanation:
    watch = "`trainyard status --watch`"
    headlines = {
        "finished": (f"It did not die: {state.reason}.", "`trainyard evaluate` or `trainyard export` it"),
        "running": (f"It did not die: it runs, step {facts.step} is done ({state.reason}).", watch),
        "starting": (f"It did not die: it starts ({state.reason}).", watch),
        "ending": (f"It ends: {state.reason}.", "ask again in a minute"),
        "waiting": (f"It waits in the queue: {state.reason}.", watch),
        "not started": (f"It has not begun: {state.reason}.", "start it with `trainyard train` or `trainyard submit`"),
    }
    evidence = _heartbeats(facts) if state.name in ("running", "starting") else []
    evidence += _job_output(facts) if state.name == "not started" else []
    return Explanation(state.name, *headlines[state.name], evidence)


def _stopped(facts: RunFacts, state: State) -> Explanation:
    outcome = state.outcome or {}
    signals = ", ".join(outcome.get("signals") or [])
    asked = f"by {signals} to its launcher" if signals else "by a signal to a rank, or by its job"
    headline = f"It did not die: asked to stop {asked}, it saved and left ({state.reason})."
    decided = facts.last("job started", "job ended") or {}
    requeued = decided.get("decision") == "go on"
    todo = "nothing, where its job requeues itself or is one of a chain: see squeue; else submit the run again"
    return Explanation("stopped", headline, todo if requeued else GO_ON, [_said(outcome)])


def _hung(facts: RunFacts, state: State) -> Explanation:
    behind, reason = find_behind(_signs(facts), facts.hang_seconds / 2)
    names = ", ".join(f"rank {sign.rank} on {sign.host}" for sign in behind) or "no rank can be named"
    todo = "wait for its launcher, which ends it with the stacks of all ranks; if that is gone too, end the processes"
    return Explanation("hang", f"It hangs: {state.reason}; {names} ({reason}).", todo, _heartbeats(facts))


def _failed(facts: RunFacts, state: State) -> Explanation:
    outcome = state.outcome
    if outcome is None:
        todo = "do what its output says, then submit it again"
        return Explanation("job ended", f"It never began: {state.reason}.", todo, _job_output(facts))
    if outcome is facts.given_up:
        todo = "find what is behind the two failures (`logs/`), change it, and submit the run again"
        last = [_said(event) for event in facts.outcomes[-2:]]
        return Explanation("no progress", f"Its job gave up: {outcome['reason']}.", todo, [_said(outcome), *last])
    if outcome.get("signal") and not outcome.get("out_of_memory") and (by_slurm := _ended_by_slurm(facts)) is not None:
        headline = f"{by_slurm.headline} Its launcher saw: {outcome['reason']}."
        return replace(by_slurm, headline=headline, evidence=[_said(outcome)])
    kinds: dict[str, Callable[[RunFacts, Event], Explanation]] = {
        "refused": _refused,
        "not met": _not_met,
        "exception": _exception,
        "killed": _killed,
        "hang": _ended_hang,
        "second signal": _second_signal,
    }
    found = kinds.get(outcome.get("failure", ""), _ended)(facts, outcome)
    before = _same_failure_before(facts, outcome)
    if before is None:
        return found
    headline = f"{found.headline} It failed at the same step, {outcome['step']}, before, without a checkpoint between."
    evidence = [*found.evidence, {"file": "events.jsonl", "says": f"{clock(before['time'])} {before['reason']}"}]
    todo = f"{found.todo}; starting it again alone will not help"
    return Explanation(found.cause, headline, todo, evidence)


def _same_failure_before(facts: RunFacts, outcome: Event) -> Event | None:
    """The failure before this one, where it came after the same step and nothing was committed in between."""
    earlier = [other for other in facts.outcomes if other["time"] < outcome["time"] and other["event"] == "failed"]
    if not earlier or outcome.get("step") is None or earlier[-1].get("step") != outcome["step"]:
        return None
    saved = facts.last("checkpoint committed")
    return earlier[-1] if saved is None or saved["time"] < earlier[-1]["time"] else None


def _refused(facts: RunFacts, outcome: Event) -> Explanation:
    """What the run said itself, in one sentence: before it began, or when it gave up."""
    reason, evidence = outcome["reason"], [_said(outcome)]
    newest = facts.last("start", "continue", "diverged", "checkpoint failed", "checkpoint committed")
    what = newest["event"] if newest is not None and newest["generation"] == outcome["generation"] else ""
    if what == "diverged":
        rollbacks = [event for event in facts.events if event["event"] == "rollback"]
        evidence += [_said(event) for event in [*rollbacks, newest or {}]]
        todo = "lower optimizer.learning_rate, lengthen warmup_steps, look at the samples that the rollbacks left out"
        return Explanation("diverged", f"It diverged and stopped itself: {reason}.", todo, evidence)
    if what == "checkpoint failed" or "could not be written" in reason:
        evidence += [_said(event) for event in facts.events if event["event"] == "checkpoint failed"][-3:]
        return Explanation(
            "disk", f"Its checkpoints could not be written: {reason}.", f"make room, then {GO_ON}", evidence
        )
    if reason.startswith("no checkpoint in"):
        todo = f"`trainyard verify {facts.directory}` names the damaged files; bring back a copy of one checkpoint"
        return Explanation("damaged checkpoints", f"No checkpoint can be loaded: {reason}.", todo, evidence)
    if outcome.get("step"):
        return Explanation("stopped itself", f"It stopped itself in step {outcome['step']}: {reason}.", GO_ON, evidence)
    todo = "do what the sentence says, then give the same command again"
    return Explanation("refused", f"Its start was refused: {reason}.", todo, evidence)


def _not_met(facts: RunFacts, outcome: Event) -> Explanation:
    todo = "see in the other hosts' folders of `logs/` how far they came; then start all of them together"
    return Explanation("hosts did not meet", f"It did not begin: {outcome['reason']}.", todo, [_said(outcome)])


def _exception(facts: RunFacts, outcome: Event) -> Explanation:
    evidence = [_said(outcome), *_tail(facts, outcome.get("file", ""))]
    if re.search(r"OutOfMemoryError|can't allocate memory|MemoryError", outcome["reason"]):
        return Explanation("out of memory", f"Memory ran out: {outcome['reason']}.", MORE_MEMORY, evidence)
    if re.search(r"No space left on device|Disk quota exceeded", outcome["reason"]):
        return Explanation("disk", f"Its disk is full: {outcome['reason']}.", f"make room, then {GO_ON}", evidence)
    if "the system failed the run" in outcome["reason"]:
        todo = f"see whether its file systems and its network are well; then {GO_ON}"
        return Explanation("file system or network", f"The system failed it: {outcome['reason']}.", todo, evidence)
    todo = f"read the whole traceback in {outcome.get('file')}; when its cause is gone, {GO_ON}"
    return Explanation("exception", f"A rank failed with an error of Python: {outcome['reason']}.", todo, evidence)


def _killed(facts: RunFacts, outcome: Event) -> Explanation:
    reason, evidence = outcome["reason"], [_said(outcome)]
    if outcome.get("signal") != "SIGKILL":
        todo = f"see what the rank printed last in {outcome.get('file')}; then {GO_ON}"
        return Explanation("killed", f"A signal ended a rank: {reason}.", todo, evidence)
    if outcome.get("out_of_memory"):
        return Explanation("out of memory", f"Memory ran out: {reason}.", MORE_MEMORY, evidence)
    if outcome.get("out_of_memory") is None:
        todo = f"look for 'Out of memory' in the kernel's log of {outcome.get('host')} (dmesg); {GO_ON}"
        return Explanation(
            "killed, cause unknown", f"A rank was killed, the cause is unknown: {reason}.", todo, evidence
        )
    todo = f"find who sent SIGKILL on {outcome.get('host')}: a user, a scheduler, a watchdog; then {GO_ON}"
    return Explanation("killed", f"A rank was killed, not for want of memory: {reason}.", todo, evidence)


def _ended_hang(facts: RunFacts, outcome: Event) -> Explanation:
    evidence = [_said(outcome)]
    generation = outcome["generation"]
    if generation is not None:
        report = heartbeat_file(facts.directory, generation, 0).with_name("hang.txt")
        evidence += _tail(facts, str(report.relative_to(facts.directory)))
    todo = f"see where the ranks were in {outcome.get('file')}/rank_*.stacks.txt; then {GO_ON}"
    return Explanation("hang", f"It hung and was ended: {outcome['reason']}.", todo, evidence)


def _second_signal(facts: RunFacts, outcome: Event) -> Explanation:
    headline = f"Asked to stop twice, it ended at once, without saving: {outcome['reason']}."
    return Explanation("ended by a second signal", headline, GO_ON, [_said(outcome)])


def _ended(facts: RunFacts, outcome: Event) -> Explanation:
    todo = f"see what the ranks printed last in {outcome.get('file')}; then {GO_ON}"
    return Explanation("failed", f"It failed: {outcome['reason']}.", todo, [_said(outcome)])


def _dead(facts: RunFacts, state: State) -> Explanation:
    """Neither launcher nor ranks said why: what is around them may."""
    evidence, last = _heartbeats(facts), facts.last_sign or 0.0
    if (by_slurm := _ended_by_slurm(facts)) is not None:
        return replace(by_slurm, evidence=evidence)
    if facts.claim["host"].partition("@")[0] == socket.gethostname() and psutil.boot_time() > last:
        headline = f"Its host was started anew at {clock(psutil.boot_time())}, after the run's last sign."
        return Explanation("host restarted", headline, GO_ON, evidence)
    ago = duration(facts.now - last)
    if (free := shutil.disk_usage(facts.directory).free) < SPARE_BYTES:
        evidence.append({"file": "", "says": f"the file system of the run has {free:,} bytes left"})
        headline = f"It died without a word {ago} ago, and its disk is full: there was no room to say why."
        return Explanation("disk", headline, f"make room, then {GO_ON}", evidence)
    if facts.is_here:
        headline = (
            f"It died without a word {ago} ago: launcher and ranks are gone and none wrote why, as after a SIGKILL of "
            f"the launcher, or of everything"
        )
        todo = f"look for who did: the kernel's log (dmesg: out of memory), a user, a scheduler; then {GO_ON}"
        return Explanation("died without a word", f"{headline}.", todo, evidence)
    headline = f"There is no sign of life from {facts.claim['host']} for {ago}, and nothing says why."
    todo = f"see whether {facts.claim['host']} is up and its clock right; if the run is dead, {GO_ON}"
    return Explanation("died without a word", headline, todo, evidence)


def _ended_by_slurm(facts: RunFacts) -> Explanation | None:
    """What Slurm says of its end of the run's job, or its record of the time limit; None where neither explains it."""
    job, last = facts.job, facts.last_sign or 0.0
    if job is None or facts.claim.get("job", job.job) is None:  # none, or the newest start was no longer in it
        return None
    if job.state in SLURM_ENDS:
        cause, what, todo = SLURM_ENDS[job.state]
        return Explanation(cause, f"Slurm ended job {job.job}: {what} ({job.state}).", todo)
    if job.limit_time is not None and last > job.limit_time - LIMIT_SECONDS:
        says = f"its last sign was at {clock(last)}, its time limit ended at {clock(job.limit_time)}"
        todo = SLURM_ENDS["TIMEOUT"][2]
        return Explanation("time limit", f"The time limit of job {job.job} ended it: {says}.", todo)
    return None


def _said(event: Event) -> dict[str, str]:
    """An event, or what a launcher left beside its logs, as evidence."""
    file = "events.jsonl" if event.get("generation") is not None else f"{event.get('file', 'logs')}/outcome.json"
    skipped = ("time", "event", "generation", "reason", "failure", "file", "recipe", "began", "checkpoint_step")
    details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in skipped and v not in (None, []))
    parts = [event.get("event", ""), str(event.get("reason") or ""), details]
    return {"file": file, "says": f"{clock(event.get('time', 0.0))} " + "; ".join(part for part in parts if part)}


def _tail(facts: RunFacts, file: str) -> list[dict[str, str]]:
    """The last lines of a file of the run."""
    try:
        lines = (facts.directory / file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [{"file": file, "says": line.strip()} for line in lines[-TRACEBACK_LINES:]]


def _job_output(facts: RunFacts) -> list[dict[str, str]]:
    """The last lines that the newest job printed."""
    files = sorted(facts.directory.glob("logs/slurm-*.out"), key=lambda file: file.stat().st_mtime)
    return [line for file in files[-1:] for line in _tail(facts, f"logs/{file.name}")]


def _signs(facts: RunFacts) -> list[Sign]:
    states = [None if is_alive(beat, facts) else "gone" for beat in facts.beats]
    return [
        Sign(b.rank, b.host, b.step, b.phase, b.progress, facts.now - b.time, state, None)
        for b, state in zip(facts.beats, states, strict=True)
    ]


def _heartbeats(facts: RunFacts) -> list[dict[str, str]]:
    """The ranks that are behind the others or silent, or just the first."""
    signs = _signs(facts)
    least = min((sign.progress for sign in signs), default=0)
    shown = [sign for sign in signs if sign.progress == least][:4]
    folder = heartbeat_file(facts.directory, facts.generation, 0).parent.relative_to(facts.directory)
    says = {sign.rank: sign.describe().partition(", gave")[0] for sign in shown}
    return [{"file": f"{folder}/rank_{rank:05d}.json", "says": text} for rank, text in says.items()]


def _history(facts: RunFacts) -> list[dict[str, str]]:
    """Restarts, what the job script decided, and a start that found the run to be another one's."""
    found = [event for event in facts.events if event["event"] in ("restart", "job ended")]
    others = [outcome for outcome in facts.outcomes if outcome.get("failure") == "another start"]
    return [_said(event) for event in [*found[-3:], *others[-1:]]]


def _job(facts: RunFacts) -> list[dict[str, str]]:
    job = facts.job
    return [{"file": job.source, "says": f"job {job.job}: {job.describe()}"}] if job is not None else []
