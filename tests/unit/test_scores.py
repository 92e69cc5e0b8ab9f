"""Tasks with scores: their files, likelihoods of options by hand, ties, merges at the border, exact match, refusals."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from small_checkpoint import make_model, make_tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from gpt import scores
from gpt.evaluate import evaluate_path, evaluate_task, load_task
from gpt.generate import Sampling, generate
from gpt.task import normalized

CHOICE = {"kind": "multiple_choice", "prompt": "{q}", "options": "options", "answer": "answer"}
MATCH = {"kind": "exact_match", "prompt": "{q}", "answer": "answer", "max_new_tokens": 6}
ROWS = [
    {"q": "The sky is", "options": ["blue", "a door", "green as grass"], "answer": "blue"},
    {"q": "Two and two:", "options": ["five", "four"], "answer": 1},
    {"q": "é 東", "options": ["京", "x"], "answer": "x"},
]


def write_task(folder: Path, task: dict[str, Any], rows: list[Any], name: str = "task") -> Path:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"data": str(data)} | task), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat folder."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def log_likelihood(model: PreTrainedModel, ids: list[int], begin: int) -> float:
    """Of the tokens from `begin` on, one at a time."""
    total = 0.0
    for place in range(begin, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(0)[ids[place]])
    return total


@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize("tokens_per_forward", [1, 1024])
@torch.no_grad()
def test_likelihoods_are_those_computed_by_hand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_chat: bool, tokens_per_forward: int
) -> None:
    """Token by token, whatever rows are beside a row."""
    monkeypatch.setattr(scores, "TOKENS_PER_FORWARD", tokens_per_forward)
    model, tokenizer = make_model(), PreTrainedTokenizerFast.from_pretrained(folder)
    system = {"system": "S{q}"} if as_chat else {}
    result = evaluate_task(
        folder, write_task(tmp_path, CHOICE | {"as_chat": as_chat} | system, ROWS), predictions=tmp_path / "p.jsonl"
    )
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()]
    plain, per_byte = [], []
    for row, prediction in zip(ROWS, predictions, strict=True):
        sums, sizes = [], []
        for option in row["options"]:
            prompt, rest = f"{row['q']}", f" {option}"
            if as_chat:
                prompt = f"<|im_start|>system\nS{row['q']}<|im_end|>\n<|im_start|>user\n{row['q']}<|im_end|>\n"
                prompt, rest = prompt + "<|im_start|>assistant\n", option
            begin = len(tokenizer(prompt)["input_ids"])
            sums.append(log_likelihood(model, tokenizer(prompt + rest)["input_ids"], begin))
            sizes.append(len(option.encode()))
        assert list(prediction["log_likelihoods"].values()) == pytest.approx(sums, rel=1e-5)
        right = row["options"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        plain.append(np.argmax(sums) == right)
        per_byte.append(np.argmax(np.divide(sums, sizes)) == right)
        assert prediction["answer"] == row["options"][right]
        assert prediction["prediction"] == row["options"][np.argmax(sums)]
    assert result["scores"]["accuracy"]["value"] == pytest.approx(np.mean(plain))
    assert result["scores"]["length_normalized_accuracy"]["value"] == pytest.approx(np.mean(per_byte))
    assert result["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert (result["examples"], result["ties"], result["as_chat"]) == (3, 0, as_chat)


def merging_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Bytes, in which "b" and "c" always merge."""
    tokenizer = make_tokenizer(folder, chat=False)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    replaced = next(text for text, number in content["model"]["vocab"].items() if number == 0)
    del content["model"]["vocab"][replaced]
    content["model"]["vocab"]["bc"] = 0
    content["model"]["merges"] = [["b", "c"]]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer("abc")["input_ids"]) == 2
    return tokenizer


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("mamba", {}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    ],
)
@torch.no_grad()
def test_what_rows_share_goes_through_the_model_once_and_changes_nothing(name: str, fields: dict[str, Any]) -> None:
    """Longer than a window, beside questions that share as much and others, and rows that are scored not at all. Rows
    go whole through a model that keeps other states than keys and values, or nothing."""
    model, dice = make_model(name, **fields), np.random.default_rng(0)
    shapes = [(9, [1, 4, 7]), (9, [2, 2]), (3, [6, 0]), (12, [1]), (1, [5, 3, 1])]
    questions = []
    for begin, lengths in shapes:
        shared = dice.integers(0, 256, begin).tolist()
        questions.append(([shared + dice.integers(0, 256, length).tolist() for length in lengths], begin))
    taken: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: taken.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = scores._log_likelihoods(model, questions, None)
    hook.remove()
    for (rows, begin), sums in zip(questions, found, strict=True):
        assert sums == pytest.approx([log_likelihood(model, row, begin) for row in rows], rel=1e-4)
    whole = sum(len(row) for rows, _ in questions for row in rows)
    assert (sum(taken) < whole) == (name not in ("mamba", "lfm2", "minimax", "openai-gpt")), (sum(taken), whole)


@torch.no_grad()
def test_an_option_that_merges_with_the_prompts_end_has_the_same_condition_as_the_others(tmp_path: Path) -> None:
    """ "ab" + "c" are the tokens a, bc; "ab" + "d" are a, b, d: both are scored behind "a"."""
    make_model().save_pretrained(tmp_path)
    tokenizer, model = merging_tokenizer(tmp_path), make_model()
    rows = [{"q": "ab", "options": ["c", "d", "cc"], "answer": "c"}]
    evaluate_task(
        tmp_path, write_task(tmp_path, CHOICE | {"separator": ""}, rows), predictions=tmp_path / "predictions"
    )
    found = json.loads((tmp_path / "predictions").read_text("utf-8"))["log_likelihoods"]
    for option, value in found.items():
        assert value == pytest.approx(log_likelihood(model, tokenizer("ab" + option)["input_ids"], 1), rel=1e-5)
    whole_prompt = {"q": "b", "options": ["c", "d"], "answer": "c"}
    with pytest.raises(ValueError, match=r"task.jsonl:1: no token of the prompt stands before all options"):
        evaluate_task(tmp_path, write_task(tmp_path, CHOICE | {"separator": ""}, [whole_prompt]))


def test_options_that_share_the_first_place_share_the_credit(tmp_path: Path) -> None:
    """A model that finds all tokens equally likely scores chance, wherever the right option stands."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, chat=False)
    rows = [{"q": "x", "options": ["ab", "cd", "ef"], "answer": answer} for answer in (0, 1, 2)]
    rows.append({"q": "x", "options": ["abc", "de", "fg"], "answer": 0})  # longer, so less likely: no tie with it
    result = evaluate_task(tmp_path, write_task(tmp_path, CHOICE, rows))
    assert result["scores"]["accuracy"]["value"] == pytest.approx((1 / 3 * 3 + 0) / 4)
    assert result["ties"] == 4


def test_a_model_without_numbers_has_no_score(tmp_path: Path) -> None:
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, chat=False)
    with pytest.raises(ValueError, match=r"task.jsonl:1: the model's logits are not numbers \(NaN\)"):
        evaluate_task(tmp_path, write_task(tmp_path, CHOICE, [{"q": "x", "options": ["a", "b"], "answer": 0}]))
    with pytest.raises(ValueError, match=r"task.jsonl:1: the model's logits are not numbers \(NaN\)"):
        evaluate_task(tmp_path, write_task(tmp_path, MATCH, [{"q": "x", "answer": "a"}]))
    pytest.importorskip("sklearn", reason="the extra tasks is not installed")
    with pytest.raises(ValueError, match=r"task.jsonl:1: the model's logits are not numbers \(NaN\)"):
        evaluate_task(tmp_path, write_task(tmp_path, CLASSES | {"labels": ["a", "b"]}, [{"q": "x", "label": 0}]))


def test_options_as_templates(folder: Path, tmp_path: Path) -> None:
    task = CHOICE | {"options": ["no", "yes, {reason}"], "prompt": "{q}? {{}}"}
    _, [question] = load_task(write_task(tmp_path, task, [{"q": "So", "reason": 4, "answer": "yes, 4"}]))
    assert (question.prompt, question.options, question.answers) == ("So? {}", ["no", "yes, 4"], ["yes, 4"])


def test_exact_match_counts_greedy_answers(folder: Path, tmp_path: Path) -> None:
    said = [answer["text"] for answer in generate(folder, ["a", "to be", "c d e"], Sampling(6))]
    assert all(text.strip() for text in said)
    rows = [
        {"q": "a", "answer": [said[1] + "?", f" {said[0]}\n"]},
        {"q": "to be", "answer": said[1]},
        {"q": "c d e", "answer": said[2] + "!"},
    ]
    result = evaluate_task(folder, write_task(tmp_path, MATCH, rows), predictions=tmp_path / "p.jsonl")
    assert result["scores"]["exact_match"]["value"] == pytest.approx(2 / 3)
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()]
    assert [p["prediction"] for p in predictions] == said
    assert [p["right"] for p in predictions] == [True, True, False]
    settings = GenerationConfig.from_pretrained(folder)
    settings.repetition_penalty = 5.0
    shutil.copytree(folder, tmp_path / "penalized")
    settings.save_pretrained(tmp_path / "penalized")
    assert [a["text"] for a in generate(tmp_path / "penalized", ["a", "to be", "c d e"], Sampling(6))] != said
    evaluate_task(tmp_path / "penalized", write_task(tmp_path, MATCH, rows), predictions=tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text("utf-8") == (tmp_path / "p.jsonl").read_text("utf-8")
    stop = said[2][2]
    stopped = MATCH | {"stop": [stop, "never said"]}
    [row] = [{"q": "c d e", "answer": said[2].partition(stop)[0]}]
    assert evaluate_task(folder, write_task(tmp_path, stopped, [row]))["scores"]["exact_match"]["value"] == 1


def test_normalization() -> None:
    assert normalized(" The  Eiffel\nTower. ", "whitespace") == "The Eiffel Tower."
    assert normalized(" The  Eiffel\nTower's an a-theme. ", "squad") == "eiffel towers atheme"


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.array([1.0] * 120 + [0.0] * 280)
    found = scores._with_interval(scores._mean(values), len(values))
    error = 1.96 * values.std() / len(values) ** 0.5
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - error, abs=error / 8)
    assert found["high"] == pytest.approx(0.3 + error, abs=error / 8)
    assert scores._with_interval(scores._mean(np.ones(5)), 5) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert scores._with_interval(scores._mean(values), len(values)) == found


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"kind": "quiz"}, "kind is 'quiz'; it must be one of multiple_choice, exact_match"),
        ({"kind": ["x"]}, "kind is ['x']; it must be one of"),
        (CHOICE | {"seperator": ""}, "unknown key seperator: did you mean separator?"),
        (CHOICE | {"max_new_tokens": 3}, "unknown key max_new_tokens"),
        ({"kind": "multiple_choice", "prompt": "x"}, "options is missing; answer is missing"),
        (CHOICE | {"prompt": "{q.x}"}, "prompt: {…} must hold the name of a field and nothing else"),
        (CHOICE | {"prompt": "{"}, "prompt: Single '{' encountered in format string"),
        (CHOICE | {"prompt": "{}"}, "prompt: {…} must hold the name of a field"),
        (CHOICE | {"options": ["one"]}, "options"),
        (MATCH | {"max_new_tokens": 0}, "max_new_tokens: Input should be greater than 0"),
        (MATCH | {"normalize": "lower"}, "normalize: Input should be 'whitespace' or 'squad'"),
        (MATCH | {"stop": [""]}, "stop.0: String should have at least 1 character"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path: Path, task: dict[str, Any], problem: str) -> None:
    file = write_task(tmp_path, task, ROWS)
    with pytest.raises(ValueError) as refused:
        load_task(file)
    assert str(refused.value).startswith(f"task {file}: ") and problem in str(refused.value)


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        (CHOICE, "x", "the line holds a str, not an object with fields"),
        (CHOICE, {"question": "x"}, "the field q is missing; the row has question"),
        (CHOICE, {"q": None}, "the field q holds null, not a text"),
        (CHOICE, {"q": "  "}, "the prompt is empty"),
        (CHOICE, {"q": "x", "options": "ab"}, "the field options holds str, not a list of options"),
        (CHOICE, {"q": "x", "options": ["a"]}, "there are 1 options; a choice needs at least 2"),
        (CHOICE, {"q": "x", "options": ["a", " "]}, "option 1 is empty"),
        (CHOICE, {"q": "x", "options": ["a", "b", "a"]}, "the option 'a' is there twice"),
        (CHOICE, {"q": "x", "options": ["a", "b"]}, "the field answer is missing"),
        (CHOICE, {"q": "x", "options": ["a", "b"], "answer": "c"}, "answer is 'c', which is none of the options"),
        (CHOICE, {"q": "x", "options": ["a", "b"], "answer": 2}, "the options are numbered from 0 to 1"),
        (CHOICE, {"q": "x", "options": ["a", "b"], "answer": True}, "the field answer holds bool, not a text"),
        (MATCH, {"q": "x", "answer": ""}, "answer of which nothing is left to compare: ''"),
        (MATCH, {"q": "x", "answer": []}, "answer of which nothing is left to compare: []"),
        (MATCH | {"normalize": "squad"}, {"q": "x", "answer": "The!"}, "nothing is left to compare: 'The!'"),
        (
            MATCH | {"kind": "generation", "metrics": ["chrf", "rougeL"]},
            {"q": "x", "answer": ["мир", "“Bär”"]},
            "the field answer holds 'мир', but ROUGE keeps a-z and 0-9 only: use chrf",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, task: dict[str, Any], row: Any, problem: str) -> None:
    good = ROWS[0] | {"answer": "blue"}
    with pytest.raises(ValueError) as refused:
        load_task(write_task(tmp_path, task, [good, row, good]))
    assert str(refused.value).startswith(f"{tmp_path / 'task.jsonl'}:2: ") and problem in str(refused.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_any_table_gives_the_questions_of_jsonl(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [{"q": 'Say "é", 東\nor so', "label": 1}, {"q": "x", "label": 0}]
    file = write_task(tmp_path, CLASSES | {"labels": ["no", "yes"]}, rows)
    expected = [replace(question, place="") for question in load_task(file)[1]]
    table = tmp_path / f"table.{suffix}"
    write = {"csv": Dataset.to_csv, "parquet": Dataset.to_parquet, "json": partial(Dataset.to_json, lines=False)}
    write[suffix](Dataset.from_list(rows), table)
    _, questions = load_task(write_task(tmp_path, CLASSES | {"labels": ["no", "yes"], "data": str(table)}, rows))
    assert [question.answers for question in questions] == [["yes"], ["no"]]
    assert [replace(question, place="") for question in questions] == expected
    assert [question.place.startswith(str(table)) for question in questions] == [True, True]


def test_a_table_of_lists_and_a_column_that_only_the_task_reads(tmp_path: Path) -> None:
    Dataset.from_list([ROWS[0] | {"unused": 1.5}]).to_parquet(tmp_path / "table.parquet")
    _, [question] = load_task(write_task(tmp_path, CHOICE | {"data": str(tmp_path / "table.parquet")}, ROWS))
    assert (question.options, question.answers) == (ROWS[0]["options"], ["blue"])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.txt", "text", "rows.txt is no table: the extensions of those are .csv"),
        ("rows.csv", "q,label\n", "rows.csv has no rows: a score needs at least one"),
        ("rows.csv", "", "rows.csv is empty: remove it or fill it"),
        ("rows.csv", "q,label\nx,no\ny\nz,no\n", "rows.csv:3: the row has 1 fields, the header has 2"),
        ("rows.csv", "q,label\nx,no\ny,2\n", "rows.csv:3: label is 2, but the options are numbered from 0 to 1"),
        ("rows.csv", "q,kind\nx,no\n", "rows.csv:2: the field label is missing; the row has q, kind"),
        ("rows.parquet", "PAR1", "rows.parquet cannot be read as Parquet"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        load_task(write_task(tmp_path, CLASSES | {"labels": ["no", "yes"], "data": str(tmp_path / name)}, ROWS))
    assert problem in str(refused.value)


def test_what_a_task_and_a_model_do_not_share_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task absent.yaml does not exist"):
        load_task(Path("absent.yaml"))
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder 'absent.jsonl'"):
        load_task(write_task(tmp_path, CHOICE | {"data": "absent.jsonl"}, ROWS))
    with pytest.raises(ValueError, match="the task has a system message, but its prompts are texts"):
        evaluate_task(folder, write_task(tmp_path, CHOICE | {"system": "S", "as_chat": False}, ROWS))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a run directory or a model folder"):
        evaluate_task(tmp_path / "nowhere", write_task(tmp_path, CHOICE, ROWS))
    (tmp_path / "empty").mkdir()
    scored: list[int] = []
    with pytest.raises((OSError, ValueError)):  # the baseline is first, so no score is lost
        evaluate_task(
            folder,
            write_task(tmp_path, CHOICE, ROWS),
            baseline=tmp_path / "empty",
            progress=lambda done, of: scored.append(done),
        )
    assert not scored
    with pytest.raises(IsADirectoryError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.evaluate.load_model", None)
        evaluate_task(folder, write_task(tmp_path, CHOICE, ROWS), predictions=tmp_path)
    (tmp_path / "text.txt").write_text("So far. " * 40)
    with pytest.raises(ValueError, match="the sequence length is 129, but the model has 128 positions: give fewer"):
        evaluate_path(folder, tmp_path / "text.txt", sequence_length=129)
    assert evaluate_path(folder, tmp_path / "text.txt", sequence_length=128)["sequence_length"] == 128
    report = folder / "export_report.json"
    for content in ("{", "[]"):
        report.write_text(content)
        with pytest.raises(
            ValueError, match=r"export_report\.json is damaged: export the run again, or remove the file"
        ):
            evaluate_path(folder, tmp_path / "text.txt")
    report.unlink()
    long = [ROWS[0], ROWS[0] | {"q": "x" * 120, "answer": "blue"}]
    with pytest.raises(ValueError, match=r"task.jsonl:2: prompt and option have .* but the model has 128 positions"):
        evaluate_task(folder, write_task(tmp_path, CHOICE | {"as_chat": False}, long))
    with pytest.raises(ValueError, match=r"task.jsonl:2: The prompt has .* model has 128 positions"):
        evaluate_task(folder, write_task(tmp_path, MATCH, long))


LABELS = ["q1", "q2", "q12", "q"]
CLASSES = {"kind": "classification", "prompt": "{q}", "answer": "label", "labels": LABELS}
CLASS_ROWS = [{"q": f"Mail {n}", "label": label} for n, label in enumerate(["q1", "q2", "q12", "q", 0, "q1"])]


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "RESAMPLES", 20)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def check_classes(result: dict[str, Any], right: list[str], found: list[str | None]) -> None:
    """The scores are scikit-learn's, for the model and for the commonest label."""
    metrics = pytest.importorskip("sklearn.metrics", reason="the extra tasks is not installed")
    said = [label or "(none)" for label in found]
    names = sorted({*right, *said} - {"(none)"})
    assert result["scores"]["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(right, said), abs=1e-6)
    f1 = metrics.f1_score(right, said, average="macro", labels=names, zero_division=0)
    assert result["scores"]["macro_f1"]["value"] == pytest.approx(f1, abs=1e-6)
    assert result["scores"]["macro_f1"]["low"] <= f1 <= result["scores"]["macro_f1"]["high"]
    columns = [*LABELS, *(["(none)"] if None in found else [])]
    matrix = metrics.confusion_matrix(right, said, labels=columns)[: len(LABELS)]
    assert [[row[name] for name in columns] for row in result["confusion_matrix"].values()] == matrix.tolist()
    commonest = ["q1"] * len(right)
    assert result["majority_label"] == "q1"
    f1 = metrics.f1_score(right, commonest, average="macro")
    baseline = result["baselines"]["majority_label"]
    assert [baseline[name]["value"] for name in ("accuracy", "macro_f1")] == pytest.approx([0.5, f1], abs=1e-6)


@torch.no_grad()
def test_labels_that_share_their_first_token_are_told_apart(folder: Path, tmp_path: Path, few_resamples: None) -> None:
    """A label is the whole answer with the token that closes it, so "q12" may be likelier than its beginning "q1"."""
    pytest.importorskip("sklearn", reason="the extra tasks is not installed")
    model, tokenizer = make_model(), PreTrainedTokenizerFast.from_pretrained(folder)
    result = evaluate_task(
        folder, write_task(tmp_path, CLASSES, CLASS_ROWS), baseline=folder, predictions=tmp_path / "p.jsonl"
    )
    found = lines_of(tmp_path / "p.jsonl")
    for row, prediction in zip(CLASS_ROWS, found, strict=True):
        prompt = f"<|im_start|>user\n{row['q']}<|im_end|>\n<|im_start|>assistant\n"
        begin = len(tokenizer(prompt)["input_ids"])
        assert all(tokenizer(prompt + label)["input_ids"][begin] == tokenizer("q")["input_ids"][0] for label in LABELS)
        expected = [
            log_likelihood(model, tokenizer(prompt + label + "<|im_end|>")["input_ids"], begin) for label in LABELS
        ]
        assert list(prediction["log_likelihoods"].values()) == pytest.approx(expected, rel=1e-5)
        assert prediction["prediction"] == LABELS[int(np.argmax(expected))]
    right = [LABELS[row["label"]] if isinstance(row["label"], int) else row["label"] for row in CLASS_ROWS]
    assert [prediction["answer"] for prediction in found] == right
    check_classes(result, right, [prediction["prediction"] for prediction in found])
    assert result["baselines"][str(folder)] == {"as_chat": True, **result["scores"]}
    with pytest.raises(ValueError, match="the label 'q1' is the beginning of 'q12', and nothing closes an answer in a"):
        evaluate_task(folder, write_task(tmp_path, CLASSES | {"as_chat": False}, CLASS_ROWS))


@torch.no_grad()
def greedy(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """By transformers alone, one prompt at a time."""
    model, tokenizer = make_model(), PreTrainedTokenizerFast.from_pretrained(folder)
    said = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
        said.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd"))
    return said


def test_labels_that_are_said(folder: Path, tmp_path: Path, few_resamples: None) -> None:
    pytest.importorskip("sklearn", reason="the extra tasks is not installed")
    said = greedy(folder, [row["q"] for row in CLASS_ROWS], 4)
    labels = [text for text in dict.fromkeys(normalized(text, "whitespace") for text in said) if text][:3]
    assert len(labels) > 1
    labels = (labels + LABELS)[: len(LABELS)]
    rows = [row | {"label": label} for row, label in zip(CLASS_ROWS, [*labels, labels[0], labels[1]], strict=True)]
    task = CLASSES | {"by": "generation", "labels": labels, "max_new_tokens": 4}
    result = evaluate_task(folder, write_task(tmp_path, task, rows), predictions=tmp_path / "p.jsonl")
    found = lines_of(tmp_path / "p.jsonl")
    assert [prediction["said"] for prediction in found] == said
    expected = [text if (text := normalized(each, "whitespace")) in labels else None for each in said]
    assert [prediction["prediction"] for prediction in found] == expected
    right = [row["label"] for row in rows]
    hits = np.mean([a == b for a, b in zip(right, expected, strict=True)])
    assert result["scores"]["accuracy"]["value"] == pytest.approx(hits)


def test_an_answer_that_is_no_label_is_counted_as_none() -> None:
    pytest.importorskip("sklearn", reason="the extra tasks is not installed")
    right, found = [0, 0, 0, 1, 2, 3], [0, scores.NO_LABEL, 0, 1, 0, scores.NO_LABEL]
    statistics = scores._class_statistics(right, found)
    scored = scores.Scored(statistics, [{}] * 6, {}, {"majority_label": scores._class_statistics(right, [0] * 6)})
    result = {
        "scores": scored.scores(),
        "baselines": scored.baseline_scores(),
        "majority_label": "q1",
        "confusion_matrix": scores._confusion(LABELS, right, found),
    }
    named = [None if number == scores.NO_LABEL else LABELS[number] for number in found]
    check_classes(result, [LABELS[number] for number in right], named)


TRANSLATE = {"kind": "generation", "prompt": "{q}", "answer": "de", "max_new_tokens": 12}
METRICS = ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"]


def test_metrics_are_those_of_their_libraries(folder: Path, tmp_path: Path, few_resamples: None) -> None:
    """Of greedy answers as transformers gives them, with one or several right answers, and of the lead."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra tasks is not installed")
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra tasks is not installed")
    prompts = ["a", "to be", "c d e"]
    said = greedy(folder, prompts, 12)
    near = said[1].encode("ascii", "ignore").decode() + " x"  # ROUGE's right answers have no other letters
    answers = [[said[0]], ["to be or not", near, "three"], ["some of it is so"]]
    source = "One. Two is some! Is it so? Never said."
    rows = [{"q": q, "de": de, "text": source} for q, de in zip(prompts, answers, strict=True)]
    task = TRANSLATE | {"metrics": METRICS, "lead": "text"}
    result = evaluate_task(folder, write_task(tmp_path, task, rows), predictions=tmp_path / "p.jsonl")
    assert [prediction["prediction"] for prediction in lines_of(tmp_path / "p.jsonl")] == said
    streams = [[refs[i] if i < len(refs) else None for refs in answers] for i in range(3)]
    for found, texts in ((result["scores"], said), (result["baselines"]["lead"], [source.rpartition(" Never")[0]] * 3)):
        expected = {
            "bleu": sacrebleu.corpus_bleu(texts, streams).score,
            "chrf": sacrebleu.corpus_chrf(texts, streams).score,
            "exact_match": np.mean([text in refs for text, refs in zip(texts, answers, strict=True)]),
        }
        for name in ("rouge1", "rouge2", "rougeL"):
            scorer = rouge.RougeScorer([name])
            pairs = zip(texts, answers, strict=True)
            expected[name] = np.mean([max(scorer.score(r, text)[name].fmeasure for r in refs) for text, refs in pairs])
        assert {name: each["value"] for name, each in found.items()} == pytest.approx(expected, abs=1e-6)
    chosen = np.array([2, 0, 0])
    questions = load_task(write_task(tmp_path, task, rows))[1]
    resampled = scores._corpus_statistic("chrf", questions, said)(chosen)
    expected_again = sacrebleu.corpus_chrf(
        [said[i] for i in chosen], [[stream[i] for i in chosen] for stream in streams]
    )
    assert resampled == pytest.approx(expected_again.score, abs=1e-6)


def test_a_library_that_is_not_installed_is_named_before_the_model_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    for task, row, names in (
        (CLASSES, CLASS_ROWS[0], "sklearn"),
        (TRANSLATE | {"metrics": ["rouge1", "chrf"]}, {"q": "a", "de": "b"}, "rouge_score and sacrebleu"),
    ):
        with pytest.raises(ValueError, match=f"the task's metrics need {names}: install the extra tasks"):
            evaluate_task(tmp_path / "nowhere", write_task(tmp_path, task, [row]))


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (TRANSLATE | {"metrics": ["accuracy"]}, "metrics.0: Input should be 'bleu', 'chrf', 'rouge1', 'rouge2'"),
        (TRANSLATE | {"metrics": []}, "metrics: List should have at least 1 item"),
        (CLASSES | {"metrics": ["bleu"]}, "unknown key metrics"),
        (
            CLASSES | {"labels": ["a", " a"]},
            "labels must not be empty, nor equal after normalize; they are ['a', ' a']",
        ),
        (CLASSES | {"labels": ["a", " "]}, "labels must not be empty"),
        (CLASSES | {"labels": ["a"]}, "labels: List should have at least 2 items"),
        (
            CLASSES | {"labels": ["a", "(none)"]},
            "the label '(none)' is the name of answers that are none of the labels",
        ),
    ],
)
def test_a_metric_or_labels_that_do_not_fit_are_refused(tmp_path: Path, task: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_task(write_task(tmp_path, task, CLASS_ROWS))
    assert problem in str(refused.value)


def test_a_label_is_its_text_or_else_its_number(tmp_path: Path) -> None:
    labels = {"labels": ["1", "0"]}
    for answer, expected in ((1, "1"), ("0", "0")):
        _, [question] = load_task(write_task(tmp_path, CLASSES | labels, [{"q": "x", "label": answer}]))
        assert question.answers == [expected]
    for answer, problem in (("q3", "label is 'q3', which is none of the options"), (4, "from 0 to 3")):
        with pytest.raises(ValueError, match=problem):
            load_task(write_task(tmp_path, CLASSES, [{"q": "x", "label": answer}]))
    for labels, answer in ((["1", "2", "3"], 0), (["+1", "-1"], 1)):
        with pytest.raises(
            ValueError, match=f"label is {answer}, which is none of the labels '.1?', .*; labels that are"
        ):
            load_task(write_task(tmp_path, CLASSES | {"labels": labels}, [{"q": "x", "label": answer}]))
    with pytest.raises(ValueError, match="the field text is missing"):
        load_task(write_task(tmp_path, TRANSLATE | {"metrics": ["chrf"], "lead": "text"}, [{"q": "x", "de": "y"}]))
