"""The task recipes fit their data and tasks, and no text stands in two parts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_pipeline.templates import parse_template, template_messages
from gpt.evaluate import load_task
from gpt.recipe_file import PROJECT_ROOT, load_recipe
from gpt.task import Classification, Generation

sys.path.insert(0, str(PROJECT_ROOT))
from benchmarks import task_data, tasks

RECIPES = PROJECT_ROOT / "launch" / "recipes" / "tasks"
NAMES = sorted(task_data.SOURCES)
ROWS = {
    "spam": {"mail": "Buy now", "kind": "spam"},
    "genre": {"text": "He said nothing.", "genre": "fiction"},
    "chat": {"question": "Who are you?", "answer": "A bot."},
}


def test_every_recipe_has_data_and_a_score() -> None:
    folders = sorted(path.name for path in RECIPES.iterdir())
    assert folders == NAMES == sorted(tasks.SCORES) == sorted(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_at_the_end_is_what_was_trained(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"launch/recipes/tasks/{name}/recipe.yaml")
    assert recipe.data.train[0].path.endswith(f"data/tasks/{name}/tokens/train")
    template = parse_template("template", yaml.safe_load((RECIPES / name / "template.yaml").read_text("utf-8")))
    content = yaml.safe_load((RECIPES / name / "task.yaml").read_text("utf-8"))
    assert content["data"] == f"data/tasks/{name}/test.jsonl"
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[name]), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(content | {"data": str(tmp_path / "test.jsonl")}), "utf-8")
    task, [question] = load_task(tmp_path / "task.yaml")
    prompt, response = template_messages(template, ROWS[name])
    assert (prompt["content"], [response["content"]]) == (question.prompt, question.answers)
    score, _ = tasks.SCORES[name]
    assert isinstance(task, Classification | Generation)
    assert score in (task.metrics if isinstance(task, Generation) else ["accuracy", "macro_f1"])


def test_no_text_nor_a_near_duplicate_of_it_is_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

    def source() -> Iterator[tuple[str, task_data.Group]]:
        for number in range(40):
            text = " ".join(f"{word}{number}" for word in words * 4)
            for variant in (text, text.upper() + "!", f"{text} indeed", ""):
                yield variant, [{"text": variant}, {"text": f"another piece of {number}"}]

    monkeypatch.setitem(task_data.SOURCES, "spam", (source, (20, 5, 15)))
    assert task_data.write_parts("spam", tmp_path) == {"train": 40, "validation": 5, "test": 15}
    parts = [(tmp_path / f"{part}.jsonl").read_text("utf-8").splitlines() for part in task_data.PARTS]
    firsts = [json.loads(line)["text"] for line in (*parts[0][::2], *parts[1], *parts[2])]
    assert len({text.split()[0].lower() for text in firsts}) == 40
    assert parts[0][1::2] == [json.dumps({"text": f"another piece of {t.split()[0][3:]}"}) for t in firsts[:20]]
    monkeypatch.setitem(task_data.SOURCES, "spam", (source, (20, 5, 16)))
    with pytest.raises(ValueError, match="the package of spam has 40 different texts, 41 are needed"):
        task_data.write_parts("spam", tmp_path)


def test_a_score_below_its_bar_or_among_the_baselines_is_missed() -> None:
    def answer(low: float, value: float) -> dict[str, object]:
        return {
            "scores": {"accuracy": {"value": value, "low": low, "high": 1.0}},
            "baselines": {"majority_label": {"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}}},
        }

    for low, value, met in ((0.92, 0.96, [True, True]), (0.92, 0.94, [False, True]), (0.88, 0.96, [True, False])):
        assert [target["met"] for target in tasks.judge(tasks.targets("spam", answer(low, value)))] == met
