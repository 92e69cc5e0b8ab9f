"""When a run ends early, after a resume as without one, and which checkpoint is the best."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_samples import make_recipe
from small_checkpoint import change_manifest, make_model, write_checkpoint

from gpt.checkpoint.format import list_checkpoints
from gpt.checkpoint.retention import apply_retention
from gpt.early_stopping import Patience, best_step, better_than, cost, evaluations
from gpt.recipe import Checkpoint, EarlyStopping


def ends_at(costs: list[float], **settings: Any) -> int | None:
    """Number of the evaluation, from 1, after which the run ends."""
    patience = Patience(EarlyStopping(**settings), "loss")
    return next((step for step, value in enumerate(costs, start=1) if patience.see(step, value)), None)


@pytest.mark.parametrize(
    ("costs", "settings", "expected"),
    [
        ([3, 2, 1, 2, 3, 4, 5], {"patience_evaluations": 2}, 5),
        ([3, 2, 1, 2, 0.9, 4, 5], {"patience_evaluations": 2}, 7),
        ([3, 2, 2, 2], {"patience_evaluations": 1}, 3),
        ([3, 2.9, 2.8, 2.7], {"patience_evaluations": 2, "minimum_improvement": 0.15}, None),
        ([3, 2.9, 2.8, 2.7], {"patience_evaluations": 2, "minimum_improvement": 0.25}, 3),
        ([3, 2.9, 2.8, 2.7], {"patience_evaluations": 2, "minimum_improvement": 0.3}, 3),
        ([-0.5, -0.6, -0.6], {"patience_evaluations": 1}, 3),
        ([math.inf, math.inf, 3], {"patience_evaluations": 2}, 2),
        ([math.inf, 3, 2, 1], {"patience_evaluations": 2, "minimum_improvement": 9}, 4),
    ],
)
def test_when_a_run_ends(costs: list[float], settings: dict[str, Any], expected: int | None) -> None:
    assert ends_at(costs, **settings) == expected


def test_a_resume_anywhere_ends_at_the_same_evaluation(tmp_path: Path) -> None:
    """Through metrics.jsonl, with steps that were not evaluated and a value that JSON has as null."""
    values = [None, 0.30, 0.41, 0.4100000000000001, 0.2, 0.4, 0.1]
    settings = EarlyStopping(patience_evaluations=3)
    reasons = {}
    for resumed in range(len(values) + 1):
        records: list[dict[str, Any]] = []
        for number, value in enumerate(values[:resumed], start=1):
            records += [{"step": 10 * number - 5}]
            records += [{"step": 10 * number, "evaluate/loss": 1.0, "evaluate/accuracy": value}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        patience = Patience(settings, "accuracy")
        reason = patience.restore(evaluations(tmp_path, "accuracy"))
        step = 10 * resumed
        while not reason:
            step += 10
            reason = patience.see(step, cost("accuracy", values[step // 10 - 1]))
        reasons[resumed] = step, reason
    assert set(reasons.values()) == {
        (70, "the validation accuracy did not get better by more than 0 in 3 evaluations; the best was 0.41 at step 40")
    }


def make_run(run: Path, losses: dict[int, float | None], accuracies: dict[int, float], **evaluate: Any) -> None:
    for step, loss in losses.items():
        directory = write_checkpoint(run, make_model(seed=step), step=step, probe=False, tokenizer=False)
        change_manifest(directory, evaluate_loss=loss)
    lines = [{"step": step, "evaluate/loss": 1.0, "evaluate/accuracy": value} for step, value in accuracies.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = make_recipe({"name": run.name, "runs_directory": str(run.parent), "evaluate": evaluate})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()), encoding="utf-8")


def test_the_best_is_the_best_by_the_metric(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 1.0, 40: None, 50: 2.0}
    accuracies = {10: 0.1, 20: 0.2, 30: 0.4, 35: 0.9, 50: 0.3}
    for metric, expected in (("loss", 20), ("perplexity", 20), ("bits_per_byte", 20), ("accuracy", 30)):
        run = tmp_path / metric
        make_run(run, losses, accuracies, metric=metric)
        assert best_step(run) == expected
        list(apply_retention(run, Checkpoint(keep_last=1, keep_best=1), 50, 1, lambda: None, metric))
        assert list_checkpoints(run) == [expected, 50]
        assert best_step(run) == expected


@pytest.mark.parametrize("losses", [{10: 2.0, 20: math.nan, 30: 1.0}, {10: math.nan, 20: 2.0, 30: 1.0}])
def test_an_evaluation_that_is_no_number_is_the_worst(tmp_path: Path, losses: dict[int, float]) -> None:
    make_run(tmp_path / "run", losses, {}, metric="loss")
    assert best_step(tmp_path / "run") == 30
    list(apply_retention(tmp_path / "run", Checkpoint(keep_last=1, keep_best=1), 40, 1, lambda: None, "loss"))
    assert list_checkpoints(tmp_path / "run") == [30]


def test_a_better_step_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {20: 1.0, 30: 2.0}, {10: 0.9, 20: 0.4, 30: 0.5}, metric="accuracy")
    assert best_step(run) == 30
    assert better_than(run, 30) == 10
    assert better_than(run, 10) is None


def test_a_run_without_a_best_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {10: None}, {5: 0.5}, metric="accuracy")
    with pytest.raises(
        ValueError, match=r"no checkpoint of .* was evaluated at its step, so none is known to be the best"
    ):
        best_step(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no recipe.yaml"):
        best_step(tmp_path)


@pytest.mark.parametrize(
    ("changes", "without"), [({}, ("data.validation",)), ({"evaluate": {"early_stopping": {}}}, ())]
)
def test_a_metric_that_is_never_computed_is_refused(changes: dict[str, Any], without: tuple[str, ...]) -> None:
    good = {"evaluate": {"every_steps": 5, "early_stopping": {}, "metric": "accuracy"}}
    make_recipe(good)
    with pytest.raises(ValueError, match=r"waits for evaluate.metric \w+, which is never computed while training"):
        make_recipe(good | changes, without)


def test_a_metric_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluate.metric: Input should be 'loss', 'perplexity', 'accuracy' or"):
        make_recipe({"evaluate": {"metric": "bleu"}})
