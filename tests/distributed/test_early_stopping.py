"""A run that over-fits is ended at the same step whether or not it was killed, and its best checkpoint is exported."""

import json
from typing import Any

import pytest
from live_runs import PLAYS, Runs, comparable, trainyard

SETTINGS: dict[str, Any] = {
    "data": {"train": [{"path": "tiny/train"}], "validation": "data/validation", "sequence_length": 64},
    "train": {"global_batch_tokens": 512, "micro_batch_sequences": 4, "steps": 200, "seed": 3},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "checkpoint": {"every_steps": 5, "keep_last": 1, "keep_best": 1},
    "evaluate": {"every_steps": 5, "batches": 1, "sample_tokens": 4, "early_stopping": {"patience_evaluations": 6}},
}


@pytest.mark.full
def test_an_over_fitting_run_ends_at_the_same_step_after_a_kill(runs: Runs) -> None:
    (runs.folder / "tiny.txt").write_text((PLAYS / "train" / "hamlet.txt").read_text("utf-8")[:4000], encoding="utf-8")
    trainyard(
        *("prepare", "--input", "tiny.txt", "--tokenizer", "data/tokenizer", "--validation-fraction", "0"),
        *("--out", "tiny"),
        cwd=runs.folder,
    )
    runs.train("overfit", **SETTINGS)
    metrics = runs.metrics("overfit")
    losses = {step: record["evaluate/loss"] for step, record in metrics.items() if "evaluate/loss" in record}
    best, end = min(losses, key=lambda step: losses[step]), max(metrics)
    assert end == best + 30 < 200 and losses[end] > losses[best]
    assert metrics[end]["train/loss"] < metrics[best]["train/loss"], "it does not over-fit, so that nothing was tested"
    (told,) = [event for event in runs.events("overfit") if event["event"] == "early stopping"]
    (opened,) = [event["step"] for event in runs.events("overfit") if event["event"] == "over-fitting"]
    assert best < opened < end and metrics[opened]["evaluate/gap"] > metrics[best]["evaluate/gap"]
    (ended,) = [event for event in runs.events("overfit") if event["event"] == "end"]
    assert (told["step"], ended["step"], ended["reason"]) == (end, end, told["reason"])

    live = runs.start("overfit-killed", **SETTINGS)
    live.wait_until(lambda: live.last_step() > best + 5)  # the waiting has begun
    live.kill()
    assert live.last_step() < end, "the run had ended by itself, so that nothing was tested"
    done = runs.train("overfit-killed", **SETTINGS)
    assert "resumed at step" in done.stdout
    assert comparable(runs.metrics("overfit-killed")) == comparable(metrics)

    again = runs.train("overfit", **SETTINGS)
    assert f"early stopping after step {end}" in again.stdout and runs.metrics("overfit") == metrics
    exported = trainyard("export", "runs/overfit-killed", "--best", "--out", "best", "--json", cwd=runs.folder)
    assert json.loads(exported.stdout)["step"] == best
