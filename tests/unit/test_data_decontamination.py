"""Decontamination: planted evaluation text and nothing else is kept out of training; the training data is refused."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from data_samples import macbeth, save_tokenizer, small_tokenizer, write_jsonl

from data_pipeline import decontamination
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.rules import Rules
from data_pipeline.token_shards import TokenShards

WORDS = macbeth().split()
PROSE = [" ".join(WORDS[begin : begin + 60]) for begin in range(0, 60 * 60, 60)]
EVALUATION = [" ".join(f"{word}{place}" for word in ("sum", "of", "nine", "and")) for place in range(40)]
QUESTIONS = [" ".join(EVALUATION[begin : begin + 5]) for begin in range(0, 40, 5)]  # of 20 words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _options(folder: Path, rows: list[str], tokenizer: Path, files: list[str], **changes: Any) -> PrepareOptions:
    write_jsonl(folder / "rows.jsonl", [{"text": row} for row in rows])
    rules = changes.pop("rules", {})
    options: dict[str, Any] = {"rules_file": "r.yaml", "unit_bytes": 5000, "validation_fraction": 0.3}
    options["rules"] = Rules(decontamination={"files": [str(folder / name) for name in files]}, **rules)
    return PrepareOptions([str(folder / "rows.jsonl")], folder / "out", tokenizer, **(options | changes))


def _planted(question: str) -> list[str]:
    """Prose with the question in it, with 13 words of it, in other case and punctuation; and the question alone."""
    before, after = PROSE[0][:100], PROSE[1][:100]
    thirteen = " ".join(question.split()[4:17])
    return [f"{before} {question} {after}", f"{thirteen} {after}", f"{before}: {thirteen.upper()}!", f"({question})"]


def _others(question: str) -> list[str]:
    """Twelve words of it, or all in another order."""
    words = question.split()
    return [" ".join([*PROSE[2].split()[:9], *words[:12], "that", *words[13:]]), " ".join(reversed(words))]


def test_planted_evaluation_text_and_no_other_is_dropped(tmp_path: Path, tokenizer: Path) -> None:
    """Precision and recall are 1; evaluation files of any columns; a changed one is noticed."""
    short = "Who wrote this?"
    write_jsonl(
        tmp_path / "test.jsonl",
        [{"question": {"stem": text, "n": 1}, "choices": [short, None]} for text in QUESTIONS[:4]],
    )
    (tmp_path / "more.txt").write_text("\n".join(QUESTIONS[4:]))
    planted = [text for question in QUESTIONS for text in _planted(question)] + [short, "who wrote: THIS"]
    others = [text for question in QUESTIONS for text in _others(question)] + [f"{short} He said.", "Who wrote"]
    rows = PROSE + planted + others
    random.Random(0).shuffle(rows)
    report = prepare(_options(tmp_path, rows, tokenizer, ["test.jsonl", "more.txt"]))
    entry = report["rules"]["dropped"]["decontamination"]
    assert entry["documents"] == len(planted) == 34
    assert report["documents"]["kept"] == len(PROSE + others)
    kept = "".join(_texts(tmp_path / "out"))
    assert not any(text in kept for text in planted[:-2]) and all(text in kept for text in others)
    assert re.fullmatch(r"\d+ of \d+ runs of words stand in the evaluation files", entry["examples"][0]["why"])
    # of the rows: 4 questions of 8 runs and one short text four times; the text is one of 80 words
    counts = {"files": 2, "texts": 9, "texts_of_one_run": 4, "runs": 4 * 8 + 1 + 68}
    assert report["rules"]["evaluation"] == counts
    assert "looked for 101 runs of 13 words, of 9 texts" in report["rules"]["remarks"][0]
    (tmp_path / "more.txt").write_text("quite another text of more than thirteen words that stands nowhere else at all")
    with pytest.raises(ValueError, match="made with other options or from other files"):
        prepare(_options(tmp_path, rows, tokenizer, ["test.jsonl", "more.txt"]))


def _texts(output: Path) -> list[str]:
    shards = [TokenShards(output / split) for split in ("train", "validation")]
    return [small_tokenizer().decode(shard.read(0, shard.tokens)) for shard in shards]


def test_validation_inputs_are_left_as_they_are_and_chinese_is_told_by_characters(
    tmp_path: Path, tokenizer: Path
) -> None:
    verse = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜"
    (tmp_path / "test.txt").write_text(verse)
    write_jsonl(tmp_path / "validation.jsonl", [{"text": verse}])
    rows = [f"他說。{verse[3:29]}。", f"他說。{verse[3:28]}。", *PROSE[:2]]
    options = _options(tmp_path, rows, tokenizer, ["test.txt"], validation_inputs=[str(tmp_path / "validation.jsonl")])
    report = prepare(options)
    assert report["rules"]["dropped"]["decontamination"]["documents"] == 1
    assert {name: split["documents"] for name, split in report["splits"].items()} == {"train": 3, "validation": 1}


def test_evaluation_files_that_are_the_training_data_are_refused_with_the_counts(
    tmp_path: Path, tokenizer: Path
) -> None:
    rows = [*PROSE[:20], *(f"Short text {n}." for n in range(6))]
    write_jsonl(tmp_path / "copy.jsonl", [{"text": row} for row in rows])
    counts = "26 of the 26 documents that the other rules keep hold text of the evaluation files"
    with pytest.raises(ValueError, match=counts):
        prepare(_options(tmp_path, rows, tokenizer, ["copy.jsonl"]))
    assert not any((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="20 of the 20 documents"):
        prepare(_options(tmp_path, rows, tokenizer, ["copy.jsonl"], rules={"length": {"min_characters": 50}}))
    half = prepare(_options(tmp_path, rows + PROSE[20:46], tokenizer, ["copy.jsonl"]))  # half is not most
    assert half["rules"]["dropped"]["decontamination"]["documents"] == 26
    with pytest.raises(ValueError, match=r"rows\.jsonl is both an input and an evaluation file"):
        prepare(_options(tmp_path, rows, tokenizer, ["rows.jsonl"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no file or folder"),
        ("marks.txt", " ... !\n", r"no words in the evaluation files .*marks\.txt"),
        ("bad.jsonl", '{"a": "b"}\n{"a": \n', r"bad\.jsonl:2"),
        ("ids.bin", "MMIDIDX", "holds token ids: give the texts"),
    ],
)
def test_unusable_evaluation_files_are_refused(
    tmp_path: Path, tokenizer: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
        (tmp_path / "ids.idx").write_text("MMIDIDX")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(_options(tmp_path, PROSE[:3], tokenizer, [name]))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="at least 1 item"):
        Rules(decontamination={"files": []})


def test_a_restart_takes_the_hashes_that_are_there(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test.txt").write_text(QUESTIONS[0])
    options = _options(tmp_path, [*PROSE[:9], *_planted(QUESTIONS[0])], tokenizer, ["test.txt"])
    read, reads = decontamination.read_texts, []
    monkeypatch.setattr(decontamination, "read_texts", lambda file: reads.append(file) or read(file))
    monkeypatch.setattr(decontamination.Contamination, "find", lambda self, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(options)
    monkeypatch.undo()
    monkeypatch.setattr(decontamination, "read_texts", lambda file: reads.append(file) or read(file))
    report = prepare(options)
    assert len(reads) == 1 and report["rules"]["dropped"]["decontamination"]["documents"] == 4
