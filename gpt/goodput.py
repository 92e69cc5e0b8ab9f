"""What became of the time of a run's whole life, over all its starts: by events.jsonl and metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

COMPUTING_KEYS = (
    "performance/forward_seconds",
    "performance/backward_seconds",
    "performance/communication_seconds",
    "performance/optimizer_seconds",
)


def computing_seconds(record: dict[str, Any]) -> float:
    """Seconds that a step computed: without the waits for data and saves, as far as its line of metrics.jsonl tells."""
    if COMPUTING_KEYS[0] in record:
        return sum(record.get(key) or 0.0 for key in COMPUTING_KEYS)
    return float(record.get("performance/step_seconds") or 0.0)


def account(events: Sequence[dict[str, Any]], first_step_began: float | None, until: float) -> dict[str, float]:
    """Seconds of a run's life since its first start: `starting`, `training` that counts, `lost` (what was trained
    again, by another start or after a rollback) and `down` (nobody was there). Together they make the whole.

    Args:
        events: all of events.jsonl, in order, the first `start` among them.
        first_step_began: of the oldest step in metrics.jsonl; None where there is none.
        until: when the account ends, in seconds since the epoch.
    """
    seconds = dict.fromkeys(("starting", "training", "lost", "down"), 0.0)
    begun = next(event["time"] for event in events if event["event"] == "start")
    ready = _first_ready(events, begun, first_step_began, until)
    seconds["starting"] += (ready or begun) - begun
    saves: dict[int, float] = {}

    def leave(when: float) -> None:
        seconds["starting" if ready is None else "training"] += when - (begun if ready is None else ready)

    def lose(lost: float) -> None:
        seconds["training"] -= lost
        seconds["lost"] += lost

    for event in events:
        kind, now = event["event"], event["time"]
        if kind == "continue":
            seen = event.get("last_seen") or now
            leave(seen)
            seconds["down"] += now - seen
            begun, ready, saves = now, None, {}
        elif kind == "resume":
            lose(event.get("seconds_lost", 0.0))
            seconds["starting"] += now - begun
            ready = now
        elif kind == "checkpoint begun":
            saves[event.get("step", 0)] = now
        elif kind == "rollback" and ready is not None:
            lose(now - saves.get(event.get("step", 0), ready))
    leave(until)
    return seconds


def _first_ready(
    events: Sequence[dict[str, Any]], begun: float, first_step_began: float | None, until: float
) -> float | None:
    """When the first start began to train, which no event says; None where it never did."""
    ended = next((event["time"] for event in events if event["event"] == "continue"), until)
    if first_step_began is not None and first_step_began < ended:
        return max(begun, first_step_began)
    # of a start whose steps are all lost, the next one's account begins with its start
    lost = next((event.get("steps_lost") for event in events if event["event"] == "resume"), 0)
    return begun if lost else None
