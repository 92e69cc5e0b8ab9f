"""Scores of checkpoints as they come: each once, those of a model that has just these weights, in TensorBoard too."""

import html
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_samples import make_recipe
from small_checkpoint import make_model, write_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from gpt.checkpoint.format import checkpoint_directory
from gpt.evaluate import evaluate_task
from gpt.follow import _table, follow

ROWS = [
    {"q": f"Is {n} even?", "kind": ["odd", "even"][n % 2], "options": [str(n * 7919), str(n * 104729)], "right": n % 2}
    for n in range(1, 17)
]


def write_task(folder: Path, name: str, task: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"data": str(folder / "rows.jsonl"), "prompt": "{q}"} | task), encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints that has not ended."""
    run = tmp_path / "run"
    for step in (10, 20):
        write_checkpoint(run, make_model(seed=step), step=step)
    (run / "recipe.yaml").write_text(yaml.safe_dump(make_recipe().model_dump()), encoding="utf-8")
    note(run, "start")
    return run


def note(run: Path, event: str) -> None:
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event}) + "\n")


def test_each_checkpoint_is_scored_once_until_the_run_has_ended(run: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path, "parity", {"kind": "multiple_choice", "options": "options", "answer": "right"})
    lines: list[str] = []

    def said(line: str) -> None:
        lines.append(line)
        if line.startswith("step 20"):  # another comes, and then the end of the run
            write_checkpoint(run, make_model(seed=30), step=30)
            note(run, "end")

    result = follow(run, task, say=said, poll_seconds=0.05)
    assert list(result["steps"]) == [10, 20, 30] and [line.partition(":")[0] for line in lines] == [
        f"step {step}" for step in (10, 20, 30)
    ]
    assert len({scores["accuracy"]["value"] for scores in result["steps"].values()}) > 1
    for step in (30, 20, 10):  # the newest is what `evaluate RUN --task` scores
        assert evaluate_task(run, task)["scores"] == result["steps"][step]
        shutil.rmtree(checkpoint_directory(run, step))
    board = EventAccumulator(str(run / "tensorboard" / "scores" / "parity")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("task/length_normalized_accuracy")] == [
        (step, pytest.approx(scores["length_normalized_accuracy"]["value"])) for step, scores in result["steps"].items()
    ]
    assert [e.step for e in board.Tensors("task/examples/text_summary")] == [10, 20, 30]
    table = board.Tensors("task/examples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| prompt | target | prediction |" and "| Is 2 even? | 15838 |" in table
    again = follow(run, task, say=lambda line: pytest.fail(f"scored again: {line}"), poll_seconds=0.05)
    assert again["steps"] == result["steps"]


def test_a_classification_shows_its_confusion_matrix(run: Path, tmp_path: Path) -> None:
    for package, extra in (("sklearn", "tasks"), ("matplotlib", "plot")):
        pytest.importorskip(package, reason=f"needs the extra {extra}")
    note(run, "end")
    task = write_task(tmp_path, "parity", {"kind": "classification", "labels": ["odd", "even"], "answer": "kind"})
    follow(run, task, say=lambda line: None)
    board = EventAccumulator(str(run / "tensorboard" / "scores" / "parity")).Reload()
    assert [e.step for e in board.Images("task/confusion_matrix")] == [10, 20]
    assert [e.step for e in board.Scalars("task/macro_f1")] == [10, 20]


def test_it_waits_while_the_run_goes_on(run: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path, "asked", {"kind": "exact_match", "answer": "kind", "max_new_tokens": 2})
    note(run, "end")
    note(run, "continue")  # a run that was extended
    thread = threading.Thread(target=follow, args=(run, task), kwargs={"say": lambda line: None, "poll_seconds": 0.05})
    thread.start()
    thread.join(3)
    assert thread.is_alive()
    note(run, "end")
    thread.join(10)
    assert not thread.is_alive()


def test_a_checkpoint_that_is_gone_is_said_and_a_damaged_one_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "asked", {"kind": "exact_match", "answer": "kind", "max_new_tokens": 2})
    note(run, "end")
    from gpt import follow as module

    load = module.load_with_tokenizer

    def deleted_meanwhile(source: Path, loading: Any, step: int) -> Any:
        if step == 10:
            shutil.rmtree(checkpoint_directory(run, 10))
        return load(source, loading, step)

    monkeypatch.setattr(module, "load_with_tokenizer", deleted_meanwhile)
    lines: list[str] = []
    assert list(follow(run, task, say=lines.append)["steps"]) == [20]
    assert lines[0] == "step 10: deleted by the run's retention before it was scored"
    damaged = write_checkpoint(run, make_model(seed=40), step=40)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes, but the manifest says"):
        follow(run, task, say=lines.append)
    with pytest.raises(ValueError, match="is no run directory"):
        follow(tmp_path, task)


@pytest.mark.filterwarnings("ignore:html5lib")
def test_examples_are_shown_as_they_are_in_columns_that_do_not_squeeze_each_other() -> None:
    hostile = "The *brave* <b>knight</b> | rode_to_town_ `now` & \\ then ![x](y) [z](w)\n# Heading\n1. list"
    long = "word " * 200
    texts = [(hostile, hostile), (long, "ham")]
    table = _table([{"prompt": prompt, "answers": [target], "prediction": None} for prompt, target in texts])
    shown = markdown_to_safe_html(table)
    cells = [html.unescape(cell).split("<br>") for cell in re.findall("<td>(.*?)</td>", shown, re.DOTALL)]
    assert len(cells) == 6 and cells[0] == cells[1] == hostile.splitlines()
    assert cells[3][-1].endswith("…") and max(map(len, cells[3])) <= 80 and cells[4] == ["ham"]
