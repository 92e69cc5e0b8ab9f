"""`trainyard status`: the state of a run, from its directory alone."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.goodput import account
from gpt.heartbeat import Beat
from launch.run_facts import Event, RunFacts, is_running, read_facts
from launch.submitted import is_sweep, read_sweep

TREND_STEPS = 20
WATCH_SECONDS = 5.0
"""Slurm's controller is asked each time, too."""
RUNNING_STATES = ("running", "starting", "hung", "ending")
UNFINISHED_STATES = (*RUNNING_STATES, "waiting")


@dataclass(frozen=True)
class State:
    """What a run is doing."""

    name: str
    """not started, waiting, starting, running, hung, ending, stopped, finished, failed or dead."""
    reason: str
    """In a sentence."""
    outcome: Event | None = None
    """How the launcher ended, where it said so."""


def judge(facts: RunFacts) -> State:
    """The state of a run: the newest sign counts."""
    end = facts.last("end", "start", "continue")
    if end is not None and end["event"] == "end" and end["generation"] == facts.generation:
        why = f": {end['reason']}" if "reason" in end else ""
        return State("finished", f"it came to its end at step {end.get('step')}{why}")
    alive = [beat for beat in facts.beats if is_alive(beat, facts)]
    if alive:
        return _judge_living(facts, alive)
    outcome = facts.given_up or newest_outcome(facts)
    if facts.job is not None and facts.job.is_waiting:
        last = f"; before, {outcome['reason']}" if outcome else ""
        return State("waiting", f"job {facts.job.job} is {facts.job.describe()}{last}", outcome)
    if _job_starts(facts, outcome):
        return State("starting", f"its job runs, no rank has claimed the run yet: {facts.job and facts.job.describe()}")
    if not facts.beats and facts.is_here and is_running(facts.claim["pid"], facts.claim["time"]):
        return State("starting", "its first rank has claimed the run")
    if facts.launching is not None and (outcome is None or facts.launching not in str(outcome.get("file"))):
        restart = facts.last("restart", "start", "continue")
        if facts.beats and (restart is None or restart["event"] != "restart"):
            return State("ending", f"its ranks are gone, its launcher is about to say why (logs/{facts.launching})")
        return State("starting", f"its launcher is alive, no rank has claimed the run yet (logs/{facts.launching})")
    if outcome is not None:
        return State("stopped" if outcome["event"] == "stopped" else "failed", outcome["reason"], outcome)
    if not facts.generation:
        job = facts.job
        if job is not None and job.has_ended:
            return State("failed", f"job {job.job} ended before a rank claimed the run: {job.describe()}")
        return State("not started", "no start has claimed the run directory")
    silent = facts.now - (facts.last_sign or facts.now)
    host = facts.claim["host"]
    how = "its processes are gone" if facts.is_here else f"no sign of life from {host}"
    return State("dead", f"{how}, nothing says why; the last sign was {duration(silent)} ago")


def _job_starts(facts: RunFacts, outcome: Event | None) -> bool:
    """Whether a Slurm job has begun after all that is known of the run's ranks."""
    if facts.job is None or facts.job.state not in ("RUNNING", "CONFIGURING"):
        return False
    begun = facts.last("job started", "job ended")
    if begun is None:
        return not facts.generation
    last = max(outcome["time"] if outcome else 0.0, facts.claim.get("time", 0.0))
    return begun["event"] == "job started" and begun["time"] > last


def _judge_living(facts: RunFacts, alive: list[Beat]) -> State:
    still = facts.now - max(beat.progress_time for beat in alive)
    phase = max(alive, key=lambda beat: beat.progress_time).phase
    if still > facts.hang_seconds:
        return State("hung", f"no rank has gone on for {duration(still)} (phase: {phase})")
    # heartbeats are some seconds apart, a step is written when it is done
    written = facts.records[-1].get("time", 0.0) if facts.records else 0.0
    if not any(beat.step for beat in alive) and written < facts.claim["time"]:
        return State("starting", f"phase: {phase}")
    request = facts.last("stop requested", "start", "continue")
    stopping = request is not None and request["event"] == "stop requested"
    return State("running", "asked to stop: saving" if stopping else f"phase: {phase}")


def is_alive(beat: Beat, facts: RunFacts) -> bool:
    """Whether a rank lives: by its process where that is on this host, else by the age of its heartbeat."""
    if beat.ended or facts.now - beat.time > facts.claim.get("stale_seconds", 60.0):
        return False
    return not (facts.is_here and beat.host == facts.claim["host"]) or is_running(beat.pid, beat.time)


def newest_outcome(facts: RunFacts) -> Event | None:
    """How the newest start ended: by the words of its launcher, on several hosts of the one that saw the cause. None
    where a later start has not ended yet, or ended without a word."""
    since = facts.claim.get("time", 0.0)
    restart = facts.last("restart")
    since = max(since, restart["time"]) if restart is not None else since
    found = [o for o in facts.outcomes if o["time"] >= since and o.get("failure") != "another start"]
    unclaimed = [o for o in found if o["generation"] is None and o.get("failure") in ("refused", "not met")]
    refused = [outcome for outcome in unclaimed if outcome["time"] > (facts.last_sign or 0.0)]
    # a rank whose peer on another host has died fails, too, in other words
    order = {"killed": 0, "exit": 1, "exception": 2}
    first = sorted(
        (outcome for outcome in found if outcome not in unclaimed),
        key=lambda o: (order.get(o.get("failure", ""), 3), o["generation"] is None, o["time"]),
    )
    return refused[-1] if refused else first[0] if first else None


def report(run: Path) -> dict[str, Any]:
    """What `trainyard status` says, with `--json` as it is. Times are seconds; None is what is not known.

    Raises:
        FileNotFoundError, ValueError: `run` is no run directory.
    """
    facts = read_facts(run)
    state = judge(facts)
    begun = facts.last("start", "continue") or {}
    newest = facts.records[-1] if facts.records else {}
    total = begun.get("total_steps")
    step_seconds = _step_seconds(facts)
    runs = state.name == "running"
    return {
        "run": str(run),
        "state": state.name,
        "reason": state.reason,
        "step": facts.step,
        "total_steps": total,
        "loss": newest.get("train/loss"),
        "trend": loss_trend([record.get("train/loss") for record in facts.records]),
        "validation": _validation(facts),
        "tokens_per_second": _mean(facts.records[-TREND_STEPS:], "performance/tokens_per_second"),
        "step_seconds": step_seconds,
        "eta_seconds": (total - facts.step) * step_seconds if runs and total and step_seconds else None,
        "checkpoint": _checkpoint(facts),
        "starts": len([event for event in facts.events if event["event"] in ("start", "continue")]),
        "restarts": [
            {"time": event["time"], "reason": event.get("reason")}
            for event in facts.events
            if event["event"] == "restart"
        ],
        "skipped_steps": newest.get("train/skipped_steps"),
        "rollbacks": len([event for event in facts.events if event["event"] == "rollback"]),
        "goodput": _goodput(facts, state),
        "job": facts.job and {"id": facts.job.job, "state": facts.job.state, "says": facts.job.describe()},
        "ranks": [_rank(beat, facts) for beat in facts.beats],
        "remarks": _remarks(facts, state) + facts.problems,
    }


def sweep_report(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep with their values, the best by validation loss first; those without one last."""
    found = []
    for run, entry in read_sweep(folder):
        try:
            shown = report(run)
        except (FileNotFoundError, ValueError):
            shown = {"run": str(run), "state": "not started", "step": 0, "loss": None, "validation": None}
        found.append({"name": entry.name, "values": entry.values, **shown})
    return sorted(found, key=_validation_order)


def _validation_order(row: dict[str, Any]) -> float:
    loss = row["validation"]["loss"] if row["validation"] else None
    return math.inf if loss is None else float(loss)


def loss_trend(losses: list[float | None]) -> dict[str, Any] | None:
    """Means of the newest TREND_STEPS finite losses and of those before: falling or rising where they differ by more
    than twice the standard error of the difference, else flat. None where there are too few."""
    finite = [loss for loss in losses if loss is not None]
    recent, before = finite[-TREND_STEPS:], finite[-2 * TREND_STEPS : -TREND_STEPS]
    if len(before) < 2:
        return None
    change = statistics.fmean(recent) - statistics.fmean(before)
    error = math.sqrt(statistics.variance(recent) / len(recent) + statistics.variance(before) / len(before))
    word = "flat" if abs(change) <= 2 * error else "falling" if change < 0 else "rising"
    return {"word": word, "mean": statistics.fmean(recent), "before": statistics.fmean(before), "steps": len(recent)}


def _step_seconds(facts: RunFacts) -> float | None:
    """Seconds from one step to the next lately, evaluations and saves included; within the newest start."""
    times = [record["time"] for record in facts.records if record.get("time", 0.0) > facts.claim.get("time", 0.0)]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _mean(records: list[Event], key: str) -> float | None:
    values = [record[key] for record in records if isinstance(record.get(key), int | float)]
    return statistics.fmean(values) if values else None


def _validation(facts: RunFacts) -> dict[str, Any] | None:
    found = facts.evaluation
    return found and {"loss": found["evaluate/loss"], "step": found["step"]}


def _checkpoint(facts: RunFacts) -> dict[str, Any] | None:
    if facts.checkpoint is None:
        return None
    step, written = facts.checkpoint
    return {"step": step, "age_seconds": facts.now - written}


def _goodput(facts: RunFacts, state: State) -> dict[str, float] | None:
    """The share of the time since the first start in which steps were computed that count, up to now or to the last
    sign, and the seconds of everything else; `other` is what no phase tells of."""
    first = next((event for event in facts.events if event["event"] == "start"), None)
    if first is None:
        return None
    until = facts.now if state.name in UNFINISHED_STATES else facts.last_sign or facts.now
    seconds = until - first["time"]
    if seconds <= 0:
        return None
    parts = {"computing": facts.trained.computing_seconds, **facts.trained.phases_seconds}
    life = account(facts.events, facts.trained.first_step_began, until)
    parts |= {name: life[name] for name in ("starting", "lost", "down")}
    parts["other"] = seconds - sum(parts.values())
    return {"share": parts["computing"] / seconds, "seconds": seconds, **{f"{k}_seconds": v for k, v in parts.items()}}


def _rank(beat: Beat, facts: RunFacts) -> dict[str, Any]:
    return {
        "rank": beat.rank,
        "host": beat.host,
        "step": beat.step,
        "phase": beat.phase,
        "silent_seconds": facts.now - beat.time,
        "still_seconds": facts.now - beat.progress_time,
        "alive": is_alive(beat, facts),
        "behind": beat.progress < max(other.progress for other in facts.beats) - 1,
    }


def _remarks(facts: RunFacts, state: State) -> list[str]:
    """Ranks that are slow, silent or behind, clocks that differ, a start that was refused while the run lives."""
    remarks = []
    if any(is_alive(beat, facts) for beat in facts.beats):
        for rank in (_rank(beat, facts) for beat in facts.beats):
            name = f"rank {rank['rank']} on {rank['host']}"
            if rank["silent_seconds"] > facts.claim.get("stale_seconds", 60.0) / 2 or not rank["alive"]:
                remarks.append(f"{name} is silent for {duration(rank['silent_seconds'])}, in step {rank['step']}")
            elif rank["behind"]:
                remarks.append(f"{name} is behind the others: step {rank['step']}, {rank['phase']}")
            if rank["silent_seconds"] < -1:
                remarks.append(
                    f"the clock of {rank['host']} is {duration(-rank['silent_seconds'])} ahead of this host's"
                )
    slow = facts.last("straggler")
    if slow is not None and slow["generation"] == facts.generation:
        remarks.append(
            f"rank {slow.get('rank')} on {slow.get('host')} was slow up to step {slow.get('step')}: "
            f"{slow.get('ratio', 0):.1f} times the others' median"
        )
    failed = facts.last("checkpoint failed", "checkpoint committed")
    if failed is not None and failed["event"] == "checkpoint failed":
        remarks.append(f"the checkpoint of step {failed.get('step')} failed: {'; '.join(failed.get('errors', []))}")
    if state.name in (*RUNNING_STATES, "finished"):
        remarks += [
            f"another start was refused at {clock(outcome['time'])}: {outcome['reason']}"
            for outcome in facts.outcomes[-1:]
            if outcome["generation"] is None and outcome.get("failure") in ("refused", "not met", "another start")
        ]
    return remarks


def describe(found: dict[str, Any]) -> list[str]:
    """A report as lines for people."""
    of = f" of {found['total_steps']:,}" if found["total_steps"] else ""
    lines = [f"{found['run']}: {found['state']}, step {found['step']:,}{of}", f"state: {found['reason']}"]
    if found["loss"] is not None:
        lines.append(f"loss: {found['loss']:.4f}" + _describe_trend(found["trend"]))
    if found["validation"]:
        loss = found["validation"]["loss"]  # None: metrics.jsonl has no other word for a number that is not finite
        text = "not finite" if loss is None else f"{loss:.4f}"
        lines.append(f"validation: {text} at step {found['validation']['step']:,}")
    if found["tokens_per_second"]:
        speed = f"speed: {found['tokens_per_second']:,.0f} tokens/s"
        speed += f", {found['step_seconds']:.3g} s a step" if found["step_seconds"] else ""
        lines.append(speed + (f", ETA {duration(found['eta_seconds'])}" if found["eta_seconds"] is not None else ""))
    saved = found["checkpoint"]
    age = f"step {saved['step']:,}, {duration(saved['age_seconds'])} old" if saved else "none yet"
    lines += [f"checkpoint: {age}", f"starts: {found['starts']}"]
    lines += [f"restart at {clock(restart['time'])}: {restart['reason']}" for restart in found["restarts"]]
    if found["skipped_steps"] or found["rollbacks"]:
        lines.append(f"skipped steps: {found['skipped_steps'] or 0:.0f}, rollbacks: {found['rollbacks']}")
    if found["goodput"]:
        share, seconds = found["goodput"]["share"], found["goodput"]["seconds"]
        lines.append(f"goodput: {share:.0%} of the {duration(seconds)} since the first start computed what counts")
        rest = {k.removesuffix("_seconds"): v for k, v in found["goodput"].items() if k not in ("share", "seconds")}
        del rest["computing"]
        lines.append("the rest: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g} s" for k, v in rest.items()))
    if found["job"]:
        lines.append(f"job {found['job']['id']}: {found['job']['says']}")
    if ranks := found["ranks"]:
        alive, hosts = sum(rank["alive"] for rank in ranks), len({rank["host"] for rank in ranks})
        silent = _span([rank["silent_seconds"] for rank in ranks])
        where = f"on {hosts} host{'s' * (hosts > 1)}"
        lines.append(f"ranks: {alive} of {len(ranks)} alive {where}, last heartbeats {silent} ago")
    return lines + [f"note: {remark}" for remark in found["remarks"]]


def describe_sweep(rows: list[dict[str, Any]]) -> list[str]:
    """A sweep as a table for people."""
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    table = [["run", *keys, "state", "step", "loss", "validation"]]
    for row in rows:
        losses = [row["loss"], row["validation"]["loss"] if row["validation"] else None]
        numbers = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        values = [row["values"].get(key, "-") for key in keys]
        table.append([row["name"], *values, row["state"], f"{row['step']:,}", *numbers])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _describe_trend(trend: dict[str, Any] | None) -> str:
    if trend is None:
        return ""
    mean, before, steps = (trend[key] for key in ("mean", "before", "steps"))
    return f"; {trend['word']}: mean {mean:.4f} of the last {steps} steps, {before:.4f} of those before"


def _span(seconds: list[float]) -> str:
    first, last = duration(min(seconds)), duration(max(seconds))
    return first if first == last else f"{first} to {last}"


def clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def duration(seconds: float) -> str:
    """Such as 7 s, 0:03:25 or 2 days 1:00:00."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    days, rest = divmod(whole, 86_400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' * (days > 1)} {text}" if days else text


def read(place: Path) -> tuple[Any, list[str], bool]:
    """Of a run directory or a sweep's folder: the answer for `--json`, its lines for people, whether more is to come.

    Raises:
        FileNotFoundError, ValueError: it is neither.
    """
    if is_sweep(place):
        rows = sweep_report(place)
        return rows, describe_sweep(rows), any(row["state"] in UNFINISHED_STATES for row in rows)
    found = report(place)
    return found, describe(found), found["state"] in UNFINISHED_STATES


def watch(place: Path) -> Iterator[list[str]]:
    """The lines of `read`, anew each WATCH_SECONDS, until nothing more is to come."""
    while True:
        _, lines, goes_on = read(place)
        yield lines
        if not goes_on:
            return
        time.sleep(WATCH_SECONDS)
