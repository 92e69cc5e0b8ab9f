"""lm-evaluation-harness on local tasks: its numbers against ours, and refusals."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from small_checkpoint import make_model, make_tokenizer

from gpt.evaluate import evaluate_harness, evaluate_task
from launch.cli import main

QUESTIONS = Path(__file__).resolve().parents[1] / "integration" / "commonsense.jsonl"
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{options.index(answer)}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer(folder, chat=False)
    return folder


def test_its_accuracy_is_ours(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.chdir(tmp_path)  # datasets looks through the whole present folder for files
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]
    lines = [line for line in lines if max(map(len, [line["question"], *line["options"]])) < 60]
    assert len(lines) > 30
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    for name in ("first", "second"):
        task = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    ours = {"kind": "multiple_choice", "data": str(data), "options": "options", "answer": "answer"}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({**ours, "prompt": "{question}"}), encoding="utf-8")
    accuracy = evaluate_task(folder, tmp_path / "ours.yaml")["scores"]["accuracy"]["value"]
    command = ["trainyard", "evaluate", str(folder), "--lm-eval", str(tmp_path / "tasks" / "first.yaml"), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    one = json.loads(capfd.readouterr().out)
    assert list(one["results"]) == ["first"] and one["n-samples"]["first"]["effective"] == len(lines)
    assert one["results"]["first"]["acc,none"] == pytest.approx(accuracy)
    both = evaluate_harness(folder, tmp_path / "tasks")
    assert {name: found["acc,none"] for name, found in both["results"].items()} == {
        "first": pytest.approx(accuracy),
        "second": pytest.approx(accuracy),
    }
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ntest_split: test\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lm-evaluation-harness cannot load the tasks of .*bad.yaml \("):
        evaluate_harness(folder, tmp_path / "bad.yaml")
    data.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1] | {"answer": "none of them"}) + "\n")
    with pytest.raises(ValueError, match=r"lm-evaluation-harness cannot evaluate the tasks of .*first.yaml \("):
        evaluate_harness(folder, tmp_path / "tasks" / "first.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no task of lm-evaluation-harness"):
        evaluate_harness(folder, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"absent.yaml does not exist: give a task file"):
        evaluate_harness(folder, tmp_path / "absent.yaml")


def test_without_the_harness_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"--lm-eval needs lm-evaluation-harness, .* install the extra eval"):
        evaluate_harness(folder, Path("x.yaml"))
