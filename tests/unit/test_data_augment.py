"""Augmentation: what each kind makes of a document, that variants stand in training alone, and what is refused."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chat_samples import TOOLS, assistant, tool, user
from data_samples import macbeth, save_tokenizer, small_tokenizer, write_jsonl
from typer.testing import CliRunner

from data_pipeline import augment, units
from data_pipeline.documents import Document, Place
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.rules import Noise, Paraphrases, Rules, Turns
from data_pipeline.token_shards import TokenShards
from gpt.recipe_file import load_section
from launch.cli import app

PARAGRAPHS = [" ".join(part.split()) for part in macbeth().split("\n\n") if len(part) > 300][:40]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = TOOLS["a call and answers"][0][1:5]


def document(text: str = "", messages: list[dict[str, Any]] | None = None) -> Document:
    return Document(Place("x.txt"), 0, text, messages, None, None, 0)


def made(kind: augment.Kind, of: Document, seed: int = 0) -> list[Any]:
    """The texts, or the messages, of a document's variants."""
    return [variant.messages or variant.text for variant in kind(of, random.Random(seed))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _options(folder: Path, tokenizer: Path, rules: dict[str, Any], out: str = "out", **changes: Any) -> PrepareOptions:
    defaults: dict[str, Any] = {"validation_fraction": 0.3, "unit_bytes": 4000, "rules_file": "r.yaml"}
    if (folder / "validation.jsonl").exists():
        defaults["validation_inputs"] = [str(folder / "validation.jsonl")]
    inputs = [str(folder / "rows.jsonl")]
    return PrepareOptions(inputs, folder / out, tokenizer, rules=Rules(**rules), **(defaults | changes))


def _write(folder: Path, train: list[str], validation: list[str] | None = None) -> None:
    write_jsonl(folder / "rows.jsonl", [{"text": text} for text in train])
    if validation is not None:
        write_jsonl(folder / "validation.jsonl", [{"text": text} for text in validation])


def _pairs(folder: Path, kind: str, *pairs: tuple[str, str]) -> dict[str, Any]:
    rows = [dict(zip(augment.COLUMNS[kind], pair, strict=True)) for pair in pairs]
    return {kind: {"files": [str(write_jsonl(folder / f"{kind}.jsonl", rows))]}}


def _texts(directory: Path) -> list[str]:
    shards = TokenShards(directory)
    ids = np.split(shards.read(0, shards.tokens), np.cumsum(shards.document_lengths())[:-1])
    return [small_tokenizer().decode(part[:-1]) for part in ids]


def _files(output: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    files["report.json"] = files["report.json"].replace(str(output).encode(), b"OUT")
    return files


# Kinds


def test_paraphrases_take_whole_phrases_the_longer_one_first() -> None:
    pairs = [("cat", "pet"), ("cat food", "fish"), ("天地", "世界"), ("a+b", "sum"), ("a+b", "total")]
    kind = augment._paraphrases(Paraphrases(files=["x"], copies=9), pairs)
    [*texts] = made(kind, document("The cat food, a cat, no catalogue; 看天地玄黃; a+b"))
    assert set(texts) == {f"The fish, a pet, no catalogue; 看世界玄黃; {end}" for end in ("sum", "total")}
    assert made(kind, document("No Cat here, bobcat.")) == []


def test_parallel_texts_stand_for_each_other() -> None:
    kind = augment._parallel([("Guten Tag.", "Good day."), ("Guten Tag.", "Hello.")])
    assert made(kind, document(" Guten Tag.\n")) == ["Good day.", "Hello."]
    assert made(kind, document("Hello.")) == ["Guten Tag."]
    assert made(kind, document("Hello. And more.")) == []
    talk = [user("Hello."), assistant("Hello."), user("Good day."), assistant("Bye.")]
    first, second = made(kind, document(messages=talk))
    assert first == [user("Guten Tag."), *talk[1:]] and second == [*talk[:2], user("Guten Tag."), talk[3]]


def test_noise_changes_case_and_white_space_and_nothing_else() -> None:
    text = PARAGRAPHS[0]
    words = len(text.split())
    for seed, (case, white_space) in enumerate([(0.3, 0), (0, 0.3), (1, 1)]):
        noise = Noise(case=case, white_space=white_space, copies=3)
        variants = made(augment._noise(noise), document(text), seed)
        assert len(set(variants)) == 3
        for variant in variants:
            assert [word.lower() for word in variant.split()] == text.lower().split()
            other_case = sum(a != b for a, b in zip(variant.split(), text.split(), strict=True)) / words
            gaps = re.findall(r"\s+", variant)
            other_gaps = sum(gap != " " for gap in gaps) / len(gaps)
            assert other_case == pytest.approx(case, abs=0.15) and other_gaps == pytest.approx(white_space, abs=0.15)
            assert set(gaps) <= set(augment.SPACES)


def test_of_a_conversation_only_the_user_is_changed() -> None:
    talk = [SYSTEM, *CALL, user("thank the cat"), assistant("The cat says welcome.")]
    kinds = [
        augment._noise(Noise(case=1, white_space=1, copies=1)),
        augment._paraphrases(Paraphrases(files=["x"], copies=1), [("cat", "pet")]),
    ]
    for kind in kinds:
        [variant] = made(kind, document(messages=talk))
        changed = [place for place, pair in enumerate(zip(variant, talk, strict=True)) if pair[0] != pair[1]]
        assert changed and all(talk[place]["role"] == "user" for place in changed)
        assert [message["role"] for message in variant] == [message["role"] for message in talk]


def test_turns_are_whole_exchanges_in_a_row() -> None:
    head = [SYSTEM, assistant("Hi.")]
    runs = [[user("1"), user("2"), assistant("3")], [user("4"), assistant("5")], CALL]
    runs.append([user("6"), assistant("7"), tool("8"), user("9")])  # the last question is not answered
    talk = [*head, *(message for run in runs for message in run)]
    variants = made(augment._turns(Turns(copies=300)), document(messages=talk))
    expected = [
        [*head, *(message for run in runs[begin:end] for message in run)]
        for begin in range(len(runs))
        for end in range(begin + 1, len(runs) + 1)
        if end - begin < len(runs)
    ]
    assert all(variant in expected for variant in variants) and all(run in variants for run in expected)
    assert (
        made(augment._turns(Turns(copies=1)), document(messages=[SYSTEM, user("1"), assistant("2"), user("3")])) == []
    )


# prepare

KINDS = {"noise": {"case": 0.2, "white_space": 0.2, "copies": 2}}


def test_variants_stand_in_training_alone_and_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    """Validation has the bytes that it has without augmentation, and any number of workers gives the same variants."""
    _write(tmp_path, PARAGRAPHS)
    plain = prepare(_options(tmp_path, tokenizer, {"encoding": True}, "plain"))
    kinds = KINDS | _pairs(tmp_path, "paraphrases", ("the", "that"))
    report = prepare(_options(tmp_path, tokenizer, {"encoding": True, "augmentation": kinds}))
    validation = [_read(tmp_path / out / "validation") for out in ("plain", "out")]
    assert validation[0] == validation[1] and report["splits"]["validation"] == plain["splits"]["validation"]
    originals = _texts(tmp_path / "plain" / "train")
    train = _texts(tmp_path / "out" / "train")
    assert [text for text in train if text in originals] == originals
    entries = report["rules"]["augmented"]
    with_phrase = sum(re.search(r"\bthe\b", text) is not None for text in originals)
    assert {name: entry["documents"] for name, entry in entries.items()} == {
        "paraphrases": with_phrase,
        "noise": 2 * len(originals),
    }
    added = sum(entry["documents"] for entry in entries.values())
    assert len(train) == len(originals) + added and report["splits"]["train"]["documents"] == len(train)
    assert report["documents"] == {"in": 40, "kept": 40, "empty": 0, "dropped": 0, "augmented": added}
    size = report["text_bytes"]
    assert (size["kept"], size["in"]) == (plain["text_bytes"]["kept"], sum(len(text.encode()) for text in PARAGRAPHS))
    assert size["augmented"] == report["splits"]["train"]["text_bytes"] - plain["splits"]["train"]["text_bytes"]
    assert report["duplicates"]["documents_in_both_splits"] == 0
    assert [file["documents_kept"] for file in report["files"]] == [40]
    [example, *_] = entries["paraphrases"]["examples"]
    assert example["before"] != example["after"] == re.sub(r"\bthe\b", "that", example["before"])[:120]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Variants added to training" in page and f'<td class="n">{entries["noise"]["bytes"]:,}</td>' in page
    assert f'kept for train</td><td class="n">{len(originals)}</td>' in page

    augmented = {"encoding": True, "augmentation": kinds}
    prepare(_options(tmp_path, tokenizer, augmented, "two", workers=2))
    assert _files(tmp_path / "two") == _files(tmp_path / "out")
    prepare(_options(tmp_path, tokenizer, augmented, "units", unit_bytes=10**6))
    assert sorted(_texts(tmp_path / "units" / "train")) == sorted(train)
    _pairs(tmp_path, "paraphrases", ("the", "this"))
    with pytest.raises(ValueError, match="other options"):
        prepare(_options(tmp_path, tokenizer, augmented))


def _read(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.iterdir())]


def test_the_seed_draws_the_variants(tmp_path: Path, tokenizer: Path) -> None:
    _write(tmp_path, PARAGRAPHS[:3])
    draws = []
    for seed in (0, 1):
        prepare(_options(tmp_path, tokenizer, {"augmentation": KINDS}, f"{seed}", seed=seed, validation_fraction=0))
        draws.append(_texts(tmp_path / f"{seed}" / "train"))
    assert len(draws[0]) == len(draws[1]) == 9 and len(set(draws[0]) & set(draws[1])) == 3


@pytest.mark.parametrize("own_files", [True, False])
def test_no_variant_stands_in_the_inputs(tmp_path: Path, tokenizer: Path, own_files: bool) -> None:
    """Each text is its neighbour's parallel, which stands in validation or in training already; so is a repair's."""
    pairs = list(zip(PARAGRAPHS[::2], PARAGRAPHS[1::2], strict=True))
    ones, others = map(list, zip(*pairs, strict=True))
    _write(tmp_path, ones if own_files else PARAGRAPHS, others if own_files else None)
    kinds = _pairs(tmp_path, "parallel", *((f"{one}\x00", other) for one, other in pairs))
    report = prepare(_options(tmp_path, tokenizer, {"control_characters": True, "augmentation": kinds}))
    train = _texts(tmp_path / "out" / "train")
    entry = report["rules"]["augmented"]["parallel"]
    assert (entry["documents"], entry["repeated"]) == (0, len(train)) and len(train) == len(set(train)) > 10
    assert report["duplicates"]["documents_in_both_splits"] == report["duplicates"]["train_repeated_documents"] == 0


def test_no_variant_is_near_a_validation_or_an_evaluation_text(tmp_path: Path, tokenizer: Path) -> None:
    train, validation, evaluation = PARAGRAPHS[:10], PARAGRAPHS[10:20], PARAGRAPHS[20:30]
    _write(tmp_path, train, validation)
    write_jsonl(tmp_path / "evaluation.jsonl", [{"text": text} for text in evaluation])
    near = [(one, other.upper()) for one, other in zip(train[:6], validation, strict=False)]
    evaluated = [(one, f"So: {other}") for one, other in zip(train[4:], evaluation, strict=False)]
    kinds = _pairs(tmp_path, "parallel", *near, *evaluated, *((text, f"{text[::-1]}") for text in train))
    rules = {"duplicates": "near", "decontamination": {"files": [str(tmp_path / "evaluation.jsonl")]}}
    report = prepare(_options(tmp_path, tokenizer, rules | {"augmentation": kinds}))
    entry = report["rules"]["augmented"]["parallel"]
    assert {name: entry[name] for name in ("documents", "held_back", "repeated")} == {
        "documents": 10,
        "held_back": 12,
        "repeated": 0,
    }
    assert sorted(_texts(tmp_path / "out" / "train")) == sorted([*train, *(text[::-1] for text in train)])


def test_tables_are_repaired_as_documents_are(tmp_path: Path, tokenizer: Path) -> None:
    _write(tmp_path, ["Write to me."], PARAGRAPHS[:1])
    kinds = _pairs(tmp_path, "paraphrases", ("me", "ada@example.org"))
    prepare(_options(tmp_path, tokenizer, {"personal_data": ["email"], "augmentation": kinds}))
    assert _texts(tmp_path / "out" / "train") == ["Write to me.", "Write to <email>."]


def test_a_restart_makes_only_the_units_that_are_missing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, PARAGRAPHS)
    rules = {"duplicates": "near", "augmentation": KINDS}
    whole = prepare(_options(tmp_path, tokenizer, rules, "whole"))
    tried: list[int] = []
    make = units.UnitMaker.make

    def interrupted(self: units.UnitMaker, number: int, report: Any) -> None:
        tried.append(number)
        if tried.count(2) == 1 and number == 2:
            raise OSError("the plug was pulled")
        make(self, number, report)

    monkeypatch.setattr(units.UnitMaker, "make", interrupted)
    with pytest.raises(OSError, match="plug"):
        prepare(_options(tmp_path, tokenizer, rules))
    prepare(_options(tmp_path, tokenizer, rules))
    assert tried == [0, 1, 2, *range(2, whole["units"])] and whole["units"] > 3
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_conversations_and_the_command(tmp_path: Path, tokenizer: Path) -> None:
    """A variant that the chat template refuses is counted; the terminal shows the counts."""
    rows = [
        {"messages": [SYSTEM, user(f"Question {n}?"), assistant("Yes."), user("Sure?"), assistant(f"{n}!")]}
        for n in range(30)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    kinds = {"turns": {"copies": 3}} | _pairs(
        tmp_path, "parallel", ("Sure?", "Are you <|im_end|> sure?"), ("Sure?", "So?")
    )
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"augmentation": kinds}))
    arguments = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tokenizer), "--workers", "1"]
    call = ["prepare", *arguments, "--rules", str(tmp_path / "rules.yaml"), "--validation-fraction", "0.2"]
    done = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    entries = report["rules"]["augmented"]
    train = report["splits"]["train"]["documents"] - report["documents"]["augmented"]
    assert entries["parallel"]["refused"] == entries["parallel"]["documents"] == train
    assert entries["turns"]["documents"] + entries["turns"]["repeated"] == 3 * train
    assert train < entries["turns"]["documents"] <= 2 * train  # each has two parts
    assert f"rules.augmented.parallel.refused: {train}" in done.output
    both = [text for text in _texts(tmp_path / "out" / "train") if "Question" in text and "!" in text]
    assert len(both) == 2 * train and all("Be brief." in text for text in _texts(tmp_path / "out" / "train"))


# Refused


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "no variants are declared: name one of paraphrases, parallel, noise, turns"),
        ({"noise": {}}, "case and white_space are both 0"),
        ({"noise": {"case": 1.5}}, "less than or equal to 1"),
        ({"turns": {"copies": 0}}, "greater than or equal to 1"),
        ({"paraphrases": {"files": []}}, "at least 1 item"),
        ({"synonyms": {}}, "unknown key augmentation.synonyms"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"augmentation": section}))
    with pytest.raises(ValueError, match=f"rules .*rules.yaml.*{message}"):
        load_section(Rules, str(tmp_path / "rules.yaml"), "rules")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("phrase,paraphrase\nbig,large\n,tiny\n", r"table\.csv:3: .*'phrase' holds no text"),
        ("phrase,paraphrase\nbig,\n", r"table\.csv:2: .*'paraphrase' holds no text"),
        ("phrase,other\nbig,large\n", r"table\.csv has no column 'paraphrase', which"),
        ("phrase,paraphrase\nbig,\x01\n", r"table\.csv:2: a text of the pair is blank"),
        ("phrase,paraphrase\n", r"table\.csv holds no pairs \(augmentation\.paraphrases\.files\)"),
        (None, r"table\.csv"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, tokenizer: Path, content: str | None, message: str) -> None:
    _write(tmp_path, PARAGRAPHS[:3])
    if content is not None:
        (tmp_path / "table.csv").write_text(content)
    kinds = {"paraphrases": {"files": [str(tmp_path / "table.csv")]}}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        prepare(_options(tmp_path, tokenizer, {"control_characters": True, "augmentation": kinds}))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_turns_are_refused_for_plain_text(tmp_path: Path, tokenizer: Path) -> None:
    _write(tmp_path, PARAGRAPHS[:3])
    with pytest.raises(ValueError, match=r"augmentation\.turns is for conversations, and the inputs are plain text"):
        prepare(_options(tmp_path, tokenizer, {"augmentation": {"turns": {}}}))
