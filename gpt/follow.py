"""Scores of a run's checkpoints on a task while it trains, in a process of its own: training does not wait for them.

They go into `<run>/scores/<task>.jsonl` and, for TensorBoard, into `tensorboard/scores/<task>` of the run.
"""

import gc
import html
import importlib.util
import json
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gpt.checkpoint.format import list_checkpoints
from gpt.evaluate import load_task, load_with_tokenizer
from gpt.generate import Loading
from gpt.model import is_run_directory
from gpt.run_directory import json_lines
from gpt.scores import Scored, require_libraries, score
from gpt.task import Classification

POLL_SECONDS = 5.0
EXAMPLES = 8
LONGEST_CELL, CELL_CHARACTERS = 400, 80
MARKDOWN = re.compile(r"[\\|*_`\[\]]")  # what TensorBoard would take for its signs; "<" is escaped as HTML
TAGS = {
    "accuracy": "task/accuracy",
    "length_normalized_accuracy": "task/length_normalized_accuracy",
    "macro_f1": "task/macro_f1",
    "exact_match": "task/exact_match",
    "bleu": "task/bleu",
    "chrf": "task/chrf",
    "rouge1": "task/rouge1",
    "rouge2": "task/rouge2",
    "rougeL": "task/rougeL",
}
"""TensorBoard's names of the scores."""


def follow(
    run: Path,
    task_file: Path,
    *,
    loading: Loading | None = None,
    say: Callable[[str], None] = print,
    poll_seconds: float = POLL_SECONDS,
) -> dict[str, Any]:
    """Score each checkpoint of a run, and each new one, until the run has ended. A step is scored once: a later call
    goes on behind the last one's steps.

    Returns the scores by step. Raises as `gpt.evaluate.evaluate_task`, and ValueError where `run` is no run directory.
    """
    if not is_run_directory(str(run)):
        raise ValueError(f"{run} is no run directory, whose checkpoints could be followed")
    task, questions = load_task(task_file)
    require_libraries(task)
    if isinstance(task, Classification) and importlib.util.find_spec("matplotlib") is None:
        say("the confusion matrix is not drawn: matplotlib (the extra plot) is not installed")
    file = run / "scores" / f"{task_file.stem}.jsonl"
    file.parent.mkdir(exist_ok=True)
    scores = {record["step"]: record["scores"] for record in json_lines(file)}
    with SummaryWriter(str(run / "tensorboard" / "scores" / task_file.stem)) as board:
        while True:
            ended = _has_ended(run)  # before looking, so that the last checkpoint is not missed
            waiting = [step for step in list_checkpoints(run) if step not in scores]
            if not waiting and ended:
                return {"task": str(task_file), "examples": len(questions), "steps": scores}
            if not waiting:
                time.sleep(poll_seconds)
                continue
            step = waiting[0]
            try:
                model, tokenizer = load_with_tokenizer(run, loading, step)
            except (FileNotFoundError, ValueError):
                if step in list_checkpoints(run):
                    raise
                say(f"step {step}: deleted by the run's retention before it was scored")
                continue
            found = score(model, tokenizer, task, questions)
            del model
            gc.collect()  # else two models are there while the next is loaded
            scores[step] = found.scores()
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"step": step, "scores": scores[step], **found.facts}, ensure_ascii=False) + "\n")
            _show(board, step, scores[step], found)
            values = ", ".join(f"{name} {value['value']:.4g}" for name, value in scores[step].items())
            say(f"step {step}: {values}")


def _has_ended(run: Path) -> bool:
    lives = [e["event"] for e in json_lines(run / "events.jsonl") if e["event"] in ("start", "continue", "end")]
    return bool(lives) and lives[-1] == "end"


def _show(board: SummaryWriter, step: int, scores: dict[str, dict[str, float]], found: Scored) -> None:
    """Scores, a table of examples and, of a classification, the confusion matrix."""
    for name, value in scores.items():
        board.add_scalar(TAGS[name], value["value"], step)
    board.add_text("task/examples", _table(found.predictions[:EXAMPLES]), step)
    if "confusion_matrix" in found.facts and importlib.util.find_spec("matplotlib") is not None:
        board.add_figure("task/confusion_matrix", _confusion_picture(found.facts["confusion_matrix"]), step)
    board.flush()


def _table(predictions: list[dict[str, Any]]) -> str:
    """Markdown, as TensorBoard shows it."""
    rows = ["| prompt | target | prediction |", "| --- | --- | --- |"]
    for row in predictions:
        target = row["answer"] if "answer" in row else " / ".join(row["answers"])
        said = row["said"] if row["prediction"] is None and "said" in row else row["prediction"]
        rows.append(f"| {' | '.join(_cell(str(text)) for text in (row['prompt'], target, said))} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """In lines of some width: of a long one TensorBoard would make a column that squeezes its neighbours."""
    short = text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} …"
    lines = [part for line in short.splitlines() for part in textwrap.wrap(line, CELL_CHARACTERS)]
    return "<br>".join(MARKDOWN.sub(r"\\\g<0>", html.escape(line, quote=False)) for line in lines)


def _confusion_picture(matrix: dict[str, dict[str, int]]) -> Any:
    from matplotlib.figure import Figure

    columns = list(next(iter(matrix.values())))
    counts = [[row[column] for column in columns] for row in matrix.values()]
    figure = Figure(figsize=(1.5 + 0.9 * len(columns), 1.5 + 0.7 * len(matrix)), layout="constrained")
    axes = figure.add_subplot(xlabel="prediction", ylabel="target")
    axes.imshow(counts, cmap="Blues")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(matrix)), list(matrix))
    half = max(map(max, counts)) / 2
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", color="white" if count > half else "black")
    return figure
