"""Task templates: tables of every kind become the same conversations; bad templates, rows and classes are refused."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from data_samples import save_tokenizer, write_jsonl

from data_pipeline.chat import ChatRenderer
from data_pipeline.documents import TaskTemplate
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.sources import ReadOptions, find_files, read_documents
from data_pipeline.templates import parse_template
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load_tokenizer
from gpt.recipe_file import read_mapping
from launch.cli import _load_template, app

TRANSLATION = {"system": "Be exact.", "prompt": "Into German ({{en}}, {n}): {en}", "response": "{de}"}
ROWS: list[dict[str, Any]] = [
    {"n": 1, "en": "The king", "de": "Der König"},
    {"n": 2, "en": "My lord,\nI come", "de": "Mein Herr, ich komme"},
    {"n": 3, "en": "", "de": "Nichts"},
]
MAILS = {"prompt": "{mail}", "label": "kind"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def template_file(folder: Path, content: Any) -> Path:
    file = folder / "template.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def load_template(file: Path) -> TaskTemplate:
    return parse_template(str(file), read_mapping(file, "template"))


def table(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, rows)
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def options(folder: Path, tokenizer: Path, source: Path, template: Any, **changes: Any) -> PrepareOptions:
    read = ReadOptions(
        template=load_template(template_file(folder, template)), skip_bad_rows=changes.pop("skip_bad_rows", False)
    )
    return PrepareOptions([str(source)], folder / "out", tokenizer=tokenizer, read=read, **changes)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_tables_become_conversations(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    source = table(tmp_path, kind, ROWS)
    report = prepare(options(tmp_path, tokenizer, source, TRANSLATION, validation_fraction=0.0))
    renderer = ChatRenderer(load_tokenizer(tokenizer))
    expected = [
        renderer.render(
            [
                {"role": "system", "content": "Be exact."},
                {"role": "user", "content": f"Into German ({{en}}, {row['n']}): {row['en']}"},
                {"role": "assistant", "content": row["de"]},
            ]
        )
        for row in ROWS
    ]
    shards = TokenShards(tmp_path / "out" / "train")
    assert shards.read(0, shards.tokens).tolist() == [token for ids, _ in expected for token in ids]
    assert shards.read_mask(0, shards.tokens).tolist() == [learnt for _, mask in expected for learnt in mask]
    lengths, learnt = sorted(len(ids) for ids, _ in expected), sorted(sum(mask) for _, mask in expected)
    for name, values in (("document_tokens", lengths), ("response_tokens", learnt)):
        assert report["splits"]["train"][name] == {
            "shortest": values[0],
            "median": values[1],
            "percentile_95": values[2],
            "longest": values[2],
        }
    assert report["options"]["template"]["response"] == "{de}"


def test_another_template_is_other_data_and_a_moved_one_is_not(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path, "jsonl", ROWS)
    made = options(tmp_path, tokenizer, source, TRANSLATION, validation_fraction=0.0)
    assert not prepare(made)["reused"]
    app([*shlex.split(made.command())[1:], "--json"], standalone_mode=False)  # what the report says makes the same
    assert json.loads(capsys.readouterr().out)["reused"]
    moved = tmp_path / "moved.yaml"
    (tmp_path / "template.yaml").rename(moved)
    made.read = ReadOptions(template=load_template(moved))
    assert prepare(made)["reused"]
    other = options(tmp_path, tokenizer, source, TRANSLATION | {"system": "Be free."}, validation_fraction=0.0)
    with pytest.raises(ValueError, match="out"):
        prepare(other)


def test_classes_are_counted_in_each_split_over_all_units(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"mail": f"mail {number}", "kind": ("spam", " q1", "q2")[number % 3]} for number in range(60)]
    source = table(tmp_path, "jsonl", rows)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:4])
    chosen = options(tmp_path, tokenizer, source, MAILS, validation_inputs=[str(held_out)], unit_bytes=500)
    report = prepare(chosen)
    assert report["units"] > 3
    assert report["splits"]["train"]["classes"] == {"q1": 20, "q2": 20, "spam": 20}
    assert report["splits"]["validation"]["classes"] == {"q1": 1, "q2": 1, "spam": 2}
    assert report["labels_with_the_same_first_token"] == [["q1", "q2"]]
    files, _ = find_files([str(source)], chosen.read)
    second = list(read_documents(files[0], chosen.read))[1]
    assert second.messages == [{"role": "user", "content": "mail 1"}, {"role": "assistant", "content": "q1"}]


@pytest.mark.parametrize(
    ("labels", "held_out", "problem"),
    [
        (["a", "a"], ["a"], "all examples to train on have the label 'a': two classes are the least"),
        (["a", "a", "b", "b", "c"], ["a"], "there is one example only of 'c': give more of each class"),
        (["a", "a", "b", "b"], ["a", "d", "c"], "the validation split has labels that are never seen in training: 'c'"),
        ([str(number // 2) for number in range(2002)], ["1"], "'kind' has more than 1,000 different values, so it is"),
    ],
)
def test_classes_that_cannot_be_learnt_are_refused(
    tmp_path: Path, tokenizer: Path, labels: list[str], held_out: list[str], problem: str
) -> None:
    source, other = (
        write_jsonl(tmp_path / name, [{"mail": f"m{number}", "kind": label} for number, label in enumerate(of)])
        for name, of in (("train.jsonl", labels), ("other.jsonl", held_out))
    )
    with pytest.raises(ValueError) as refused:
        prepare(options(tmp_path, tokenizer, source, MAILS, validation_inputs=[str(other)]))
    assert problem in str(refused.value)


def test_labels_that_the_tokenizer_does_not_tell_apart_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    own = tmp_path / "lower"
    own.mkdir()
    for file in tokenizer.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    content = json.loads((own / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (own / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    rows = [{"mail": f"m{number}", "kind": ("Spam", "spam")[number % 2]} for number in range(4)]
    chosen = options(tmp_path, own, write_jsonl(tmp_path / "a.jsonl", rows), MAILS, validation_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"the tokenizer makes 'spam.*' of the answer 'Spam.*': it does not keep the text"
    ):
        prepare(chosen)
    content["normalizer"] = {"type": "NFC"}
    (own / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    rows = [{"mail": f"m{number}", "kind": ("caf\u00e9", "cafe\u0301")[number % 2]} for number in range(4)]
    chosen = options(tmp_path, own, write_jsonl(tmp_path / "b.jsonl", rows), MAILS, validation_fraction=0.0)
    with pytest.raises(ValueError, match=re.escape(r"of the labels 'cafe\u0301' and 'caf\xe9': write them alike")):
        prepare(chosen)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"n": 1, "en": "x", "de": " \n"}, "the response is empty: 'de' holds no text"),
        ({"n": 1, "en": "x", "de": None}, "the field 'de' is null, not a text"),
        ({"n": 1, "en": "x", "de": float("nan")}, "the field 'de' is NaN, not a text"),
        ({"n": 1, "en": ["x"], "de": "y"}, "the field 'en' is a list, not a text"),
        ({"n": True, "en": "x", "de": "y"}, "the field 'n' is a bool, not a text"),
        ({"n": 1, "de": "y"}, "there is no field 'en'; the fields are 'n', 'de'"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, tokenizer: Path, row: dict[str, Any], problem: str) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in [ROWS[0], row, ROWS[1]]), encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        prepare(options(tmp_path, tokenizer, source, TRANSLATION, validation_fraction=0.0))
    assert str(refused.value).startswith(f"{source}:2: ") and problem in str(refused.value)
    report = prepare(options(tmp_path, tokenizer, source, TRANSLATION, validation_fraction=0.0, skip_bad_rows=True))
    assert report["splits"]["train"]["documents"] == 2
    [skipped] = report["skipped_rows"].values()
    assert skipped["locations"] == [f"{source}:2"]


def test_empty_prompts_and_labels_are_refused(tmp_path: Path) -> None:
    for row, problem in (({"mail": " ", "kind": "a"}, "prompt"), ({"mail": "x", "kind": ""}, "response")):
        read = ReadOptions(template=load_template(template_file(tmp_path, MAILS)))
        files, _ = find_files([str(write_jsonl(tmp_path / "a.jsonl", [row]))], read)
        with pytest.raises(ValueError, match=f"a.jsonl:1: the {problem} is empty"):
            list(read_documents(files[0], read))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_a_column_that_is_missing_is_named(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    source = table(tmp_path, kind, ROWS)
    with pytest.raises(ValueError) as refused:
        prepare(options(tmp_path, tokenizer, source, {"prompt": "{fr}", "response": "{de}"}))
    named = f"which the template {tmp_path / 'template.yaml'} names; its columns are 'n', 'en', 'de'"
    assert f"table.{kind} has no column 'fr', {named}" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"prompt": "{a}"}, "needs prompt, and either response (a text with {columns}) or label"),
        ({"prompt": "{a}", "response": "{b}", "label": "c"}, "needs prompt, and either response"),
        ({"response": "{b}"}, "needs prompt"),
        ({"prompt": "{a}", "answer": "{b}"}, "holds answer, prompt; its keys are prompt, response, label, system"),
        ("[1]", "holds list, not a mapping of keys to values"),
        ('prompt: "{a}"\nprompt: "{b}"\nresponse: "{c}"', "prompt"),
        ("{", "is not YAML"),
        ({"prompt": "Translate", "response": "{b}"}, "prompt names no column, so all rows would give the same text"),
        ({"prompt": "{a}", "response": 1}, "response must be a text, not 1"),
        ({"prompt": "{a!r}", "response": "{b}"}, "prompt: {…} must hold the name of a column and nothing else"),
        ({"prompt": "{}", "response": "{b}"}, "prompt: {…} must hold the name of a column and nothing else"),
        ({"prompt": "{a", "response": "{b}"}, "prompt: expected '}' before end of string"),
    ],
)
def test_a_bad_template_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    file = template_file(tmp_path, content)
    with pytest.raises(ValueError) as refused:
        load_template(file)
    assert f"template {file}" in str(refused.value) and problem in str(refused.value)


def test_a_template_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the template absent.yaml does not exist"):
        _load_template(Path("absent.yaml"))
    template = load_template(template_file(tmp_path, TRANSLATION))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"the extension '.txt' is unknown"):
        find_files([str(tmp_path / "a.txt")], ReadOptions(template=template))
    with pytest.raises(ValueError, match="the format text has none"):
        ReadOptions(format="text", template=template)
