"""Cleaning rules: each on planted texts, through prepare with any number of workers, and what is refused."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_samples import EMBEDDED, macbeth, save_tokenizer, small_tokenizer, write_jsonl
from test_data_personal_data import PLANTED
from typer.testing import CliRunner

from data_pipeline import clean, duplicates, unit_documents, units, workers
from data_pipeline.clean import Cleaner, no_tally
from data_pipeline.documents import Document, Place
from data_pipeline.n_grams import has_spaces
from data_pipeline.plan import PrepareOptions, make_plan
from data_pipeline.prepare import prepare
from data_pipeline.rules import Rules
from data_pipeline.sources import ReadOptions
from data_pipeline.token_shards import TokenShards
from gpt.recipe_file import load_section
from launch.cli import app

ROOT = EMBEDDED.parents[1]
DEFAULT = "data_pipeline/default_rules.yaml"
PARAGRAPHS = [" ".join(part.split()) for part in macbeth().split("\n\n") if len(part) > 300]


def document(text: str, messages: list[dict[str, Any]] | None = None) -> Document:
    return Document(Place("x.txt"), 0, text, messages, None, None, 0)


def repaired(text: str, **rules: Any) -> str:
    return Cleaner(Rules(**rules)).repair(document(text)).text


def broken(text: str, **rules: Any) -> str:
    found = Rules(**rules)
    reason = Cleaner(found).broken_bound(document(text), no_tally(found))
    return reason[0] if reason else ""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _texts(directory: Path) -> list[str]:
    shards = TokenShards(directory)
    ids = np.split(shards.read(0, shards.tokens), np.cumsum(shards.document_lengths())[:-1])
    return [small_tokenizer().decode(part[:-1]) for part in ids]


# Repairs


@pytest.mark.parametrize(
    ("rules", "before", "after"),
    [
        ({"encoding": True}, "schÃ¶n und grün\nvoilÃ\xa0", "schön und grün\nvoilà"),
        ({"encoding": True}, "The Mona Lisa doesnâ€™t have eyebrows.", "The Mona Lisa doesn't have eyebrows."),
        ({"encoding": True}, "å\x85±\r\nÃ¼ber", "\u5171\r\nüber"),
        ({"encoding": True}, "Ärger, naïve, 漢字, x² ≥ 1", "Ärger, naïve, 漢字, x² ≥ 1"),
        ({"unicode": "NFC"}, "e\u0301te\u0301", "\u00e9t\u00e9"),
        ({"unicode": "NFKC"}, "ﬁn", "fin"),
        ({"control_characters": True}, "\ufeffa\x00b\tc\r\nd\x0ce\x1b[0m\x9f\u2028f", "ab\tc\nd\ne[0m\nf"),
        ({"personal_data": ["email"]}, "ada@example.org or +1 (212) 555-0123", "<email> or +1 (212) 555-0123"),
    ],
)
def test_repairs(rules: dict[str, Any], before: str, after: str) -> None:
    found = repaired(before, **rules)
    assert found.replace("\u2019", "'") == after
    assert repaired(found, **rules) == found


@pytest.mark.parametrize("character", [*"\x00\x0b\x0c\r\x1b\x7f\x80\x85\x9f\u2028\u2029\ufeff\ufffe\uffff"])
def test_each_control_character_is_found_alone(character: str) -> None:
    line_end = "\n" if character in "\x0b\x0c\r\x85\u2028\u2029" else ""
    assert repaired(f"\u00e9\u2027a{character}b\ufffd", control_characters=True) == f"\u00e9\u2027a{line_end}b\ufffd"


def test_conversations_are_repaired_message_by_message() -> None:
    messages = [{"role": "user", "content": "I am ada@example.org"}, {"role": "assistant", "content": None, "x": 1}]
    rules = Rules(
        personal_data=["email"], gopher_quality={"min_words": 50}, length={"min_characters": 20, "max_characters": 30}
    )
    cleaner = Cleaner(rules)
    after = cleaner.repair(document("", messages))
    assert after.messages == [{"role": "user", "content": "I am <email>"}, messages[1]]
    assert messages[0]["content"] == "I am ada@example.org"
    assert cleaner.broken_bound(after, no_tally(rules)) is None  # words are not counted, and it may be short
    assert cleaner.broken_bound(document("I am <email>"), no_tally(rules)) == ("length.min_characters", "12, bound 20")
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": ["ada@example.org"], "n": 1}}}
    tool = {"type": "function", "function": {"name": "mail", "description": "As to ada@example.org"}}
    calling = document("", [{"role": "assistant", "content": None, "tool_calls": [call]}])._replace(tools=[tool])
    tally = no_tally(rules)
    after = cleaner.repair(calling, tally)
    assert json.loads(json.dumps(calling[3:5]).replace("ada@example.org", "<email>")) == [after.messages, after.tools]
    assert tally["changed"]["personal_data.email"] | {"examples": []} == {"documents": 1, "replaced": 2, "examples": []}
    long = document("", [{"role": "user", "content": "x" * 40}])
    assert cleaner.broken_bound(long, no_tally(rules)) == ("length.max_characters", "40, bound 30")


# Bounds

PROSE = PARAGRAPHS[0]
WORDS = [f"w{number}x" for number in range(400)]


@pytest.mark.parametrize(
    ("section", "text", "bound"),
    [
        ("gopher_quality", "the cat and a dog", "min_words"),
        ("gopher_quality", " ".join(["the", "and", *"abcdefgh" * 10]), "min_mean_word_length"),
        ("gopher_quality", " ".join(["the and", *["incomprehensibilities"] * 60]), "max_mean_word_length"),
        ("gopher_quality", "the and " + "good # sign " * 40, "max_symbols_per_word"),
        ("gopher_quality", "\n".join(["- the item and more"] * 20), "max_bullet_lines"),
        (
            "gopher_quality",
            "\n".join(["the story and so many other things here to see for all..."] * 9),
            "max_ellipsis_lines",
        ),
        ("gopher_quality", "the and " + "12345 67890 " * 40, "min_alphabetic_words"),
        ("gopher_quality", "Katze Hund Vogel Fisch " * 20, "min_stop_words"),
        ("fineweb_quality", "\n".join(["a line that ends without any mark at all"] * 10), "min_punctuated_lines"),
        ("fineweb_quality", "\n".join(f"Line {n}." for n in range(30)), "max_short_lines"),
        (
            "fineweb_quality",
            "\n".join(["A sentence that stands here again and again."] * 3),
            "max_repeated_line_characters",
        ),
        (
            "gopher_repetition",
            "\n".join([*["ab"] * 4, *(" ".join(WORDS[n : n + 9]) for n in range(0, 54, 9))]),
            "max_repeated_lines",
        ),
        ("gopher_repetition", "\n".join([*[" ".join(WORDS[:30])] * 2, *WORDS[30:50]]), "max_repeated_line_characters"),
        ("gopher_repetition", " ".join(f"{a} big cat" for a in WORDS[:20]), "max_top_2_gram"),
        (
            "gopher_repetition",
            " ".join(f"{a} {b} {c} the big red" for a, b, c in zip(*[iter(WORDS)] * 3, strict=False)),
            "max_top_2_gram",
        ),
        ("gopher_repetition", " ".join([*WORDS[:60], *WORDS[:20]]), "max_repeated_5_grams"),
        ("gopher_repetition", PROSE, ""),
        ("gopher_quality", PROSE, ""),
        ("fineweb_quality", "\n".join(f"यह {n} हिन्दी का एक साधारण वाक्य है।" for n in range(9)), ""),
        ("fineweb_quality", "\n".join(f"یہ {n} اردو کا ایک عام سا جملہ ہے\u06d4" for n in range(9)), ""),
        ("fineweb_quality", PROSE, ""),
    ],
)
def test_bounds(section: str, text: str, bound: str) -> None:
    """Each text breaks the one bound that it was made for, with the papers' values, and prose breaks none."""
    assert broken(text, **{section: {}}) == (f"{section}.{bound}" if bound else "")


def test_a_value_at_a_bound_is_kept_and_null_is_no_bound() -> None:
    assert broken("abcde", length={"min_characters": 5, "max_characters": 5}) == ""
    assert broken("abcd", length={"min_characters": 5}) == "length.min_characters"
    assert broken("abcdef", length={"max_characters": 5}) == "length.max_characters"
    assert broken("the cat and a dog", gopher_quality={"min_words": None}) == "gopher_quality.min_mean_word_length"


def test_repeated_paragraphs() -> None:
    """Where lines may be repeated: what is repeated in paragraphs is in lines, too."""
    lines = {"max_repeated_lines": None, "max_repeated_line_characters": None}
    many = "\n\n".join(["x", "x", "x", *(" ".join(WORDS[n : n + 9]) for n in range(0, 36, 9))])
    long = "\n\n".join([" ".join(WORDS[:9]), " \n" + " ".join(WORDS[:9]), *WORDS[9:30]])
    assert broken(many, gopher_repetition=lines | {"max_repeated_paragraphs": 0.28}).endswith("max_repeated_paragraphs")
    assert broken(long, gopher_repetition=lines).endswith("max_repeated_paragraph_characters")


def _slow_shares(words: list[str]) -> dict[str, float]:
    """The definition of the n-gram measures, word by word."""
    total = sum(map(len, words))
    shares = {}
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n <= 4:
            counts = {gram: grams.count(gram) for gram in grams}
            most = max(counts.values())
            size = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
            shares[f"top_{n}_gram"] = most * size / total if most > 1 else 0.0
            continue
        covered, seen = set(), set()
        for place, gram in enumerate(grams):
            covered |= set(range(place, place + n)) if gram in seen else set()
            seen.add(gram)
        shares[f"repeated_{n}_grams"] = sum(len(words[place]) for place in covered) / total
    return shares


def test_n_grams_are_those_of_their_definition() -> None:
    dice = random.Random(1)
    for _ in range(60):
        pool = ["a", "bb", "ccc", "dddd", "x1", "y22"][: dice.randint(1, 6)]
        words = dice.choices(pool, k=dice.randint(11, 60))
        words += words[: dice.randint(0, 40)]
        slow = _slow_shares(words)
        fast = dict(clean._n_grams(clean._Text(" ".join(words)), 0.0))
        assert fast == pytest.approx({name: slow[name] for name in fast})
        assert all(slow[name] == 0 for name in slow if name not in fast)


def test_scripts_without_spaces_pass_the_bounds_on_words() -> None:
    rules = {section: {} for section in ("gopher_quality", "fineweb_quality", "gopher_repetition")}
    for text in ("天地玄黃。宇宙洪荒。" * 30, "これは日本語の文章です。" * 20, "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ" * 10):
        assert broken(text, **rules) == ""
        assert broken(text, length={"max_characters": 10}) == "length.max_characters"
    assert broken("Ein ganzer Satz über das Zeichen 天.", **rules) == "gopher_quality.min_words"
    assert broken("printf(1); " * 10 + "天地玄黃宇宙洪荒", **rules) == ""  # a page of code, described in Chinese
    table = "\n".join(f"space {n} 0x{n:04x}" for n in range(32, 400))
    chinese = "可以識別的符號。注意並不是所有的符號在每種平臺下都可用。\n"
    assert has_spaces(chinese + table) and broken(chinese + table, **rules) == ""
    assert broken("All symbols. Note these.\n" + table, **rules) == "gopher_quality.min_alphabetic_words"
    assert broken("All symbols. Note these. A quotation: " + chinese + table, **rules).startswith("gopher_quality.")


# prepare


def _corpus(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Prose with planted documents of each kind among it, and how many a rule must find."""
    planted = {
        "length.min_characters": ["Too short."] + [f"Short {n}." for n in range(4)],
        "gopher_quality.min_alphabetic_words": [" ".join(str(n * 10_000 + i) for i in range(80)) for n in (1, 2, 3)],
        "fineweb_quality.min_punctuated_lines": ["\n".join(p.replace(".", "").rstrip("?!") for p in PARAGRAPHS[:6])],
        "gopher_repetition.max_repeated_5_grams": [" ".join([*PARAGRAPHS[9].split()] * 3)],
        "duplicates.exact": [*PARAGRAPHS[:7], PARAGRAPHS[0] + "\x00", PARAGRAPHS[3]],
    }
    rows = PARAGRAPHS + [text for texts in planted.values() for text in texts]
    random.Random(0).shuffle(rows)
    write_jsonl(folder / "rows.jsonl", [{"text": text} for text in rows])
    return rows, {name: len(texts) for name, texts in planted.items()}


@pytest.fixture(scope="module")
def rules() -> Rules:
    return load_section(Rules, DEFAULT, "rules")


def _options(folder: Path, output: Path, tokenizer: Path | None, rules: Rules | None, **changes: Any) -> PrepareOptions:
    defaults: dict[str, Any] = {"rules_file": DEFAULT, "validation_fraction": 0.1, "unit_bytes": 4000}
    inputs = [str(folder / "rows.jsonl")]
    return PrepareOptions(inputs, output, tokenizer=tokenizer, rules=rules, **(defaults | changes))


def _files(output: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    files["report.json"] = files["report.json"].replace(str(output).encode(), b"OUT")
    return files


def test_every_planted_document_is_dropped_by_its_rule_and_no_other(
    tmp_path: Path, tokenizer_folder: Path, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision and recall are 1, and the bytes are the same for other workers, buckets of hashes and a restart."""
    rows, planted = _corpus(tmp_path)
    report = prepare(_options(tmp_path, tmp_path / "one", tokenizer_folder, rules))
    found = report["rules"]
    assert {name: entry["documents"] for name, entry in found["dropped"].items() if entry["documents"]} == planted
    kept = sorted(_texts(tmp_path / "one" / "train") + _texts(tmp_path / "one" / "validation"))
    assert kept == sorted(PARAGRAPHS)
    assert report["duplicates"]["train_repeated_documents"] == 0
    assert found["documents_in"] == len(rows) == len(kept) + sum(planted.values())
    sizes = sum(split["text_bytes"] for split in report["splits"].values())
    dropped_bytes = sum(entry["bytes"] for entry in found["dropped"].values())
    assert found["bytes_in"] == sum(len(row.encode()) for row in rows) == sizes + dropped_bytes + len("\x00")
    [example, *_] = found["dropped"]["length.min_characters"]["examples"]
    assert example["file"].endswith("rows.jsonl") and example["why"].endswith("bound 100") and "hort" in example["text"]
    assert [len(entry["examples"]) for entry in found["dropped"].values() if entry["documents"] > 3] == [3, 3]
    assert sum(file["documents_in"] - file["documents_kept"] for file in report["files"]) == sum(planted.values())

    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 30)
    prepare(_options(tmp_path, tmp_path / "two", tokenizer_folder, rules, workers=2))
    assert _files(tmp_path / "two") == _files(tmp_path / "one")
    assert prepare(_options(tmp_path, tmp_path / "two", tokenizer_folder, rules))["reused"] is True


def test_a_restart_judges_and_makes_only_what_is_missing(
    tmp_path: Path, tokenizer_folder: Path, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    _corpus(tmp_path)
    prepare(_options(tmp_path, tmp_path / "whole", tokenizer_folder, rules))
    done: list[tuple[str, int]] = []
    judge, make = workers.STEPS["judge"], units.UnitMaker.make

    def count(step: str, fail_at: int, work: Any) -> Any:
        def counted(*arguments: Any) -> None:
            number = next(value for value in arguments if isinstance(value, int))
            if number == fail_at and (step, -1) not in done:
                done.append((step, -1))
                raise OSError("the plug was pulled")
            done.append((step, number))
            work(*arguments)

        return counted

    monkeypatch.setitem(workers.STEPS, "judge", count("judge", 3, judge))
    monkeypatch.setattr(units.UnitMaker, "make", count("make", 5, make))
    for _ in range(2):
        with pytest.raises(OSError, match="plug"):
            prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, rules))
    report = prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, rules))
    for step in ("judge", "make"):
        assert [number for what, number in done if what == step and number >= 0] == list(range(report["units"]))
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_tokenizer_is_trained_on_what_the_rules_keep(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in PARAGRAPHS + ["Ünïcödë! " * 9] * 30])
    rules = Rules(length={"min_characters": 100}, duplicates="exact")
    report = prepare(_options(tmp_path, tmp_path / "out", None, rules, train_vocabulary=300, validation_fraction=0))
    assert report["tokenizer"]["sample_documents"] == report["splits"]["train"]["documents"] == len(PARAGRAPHS)


def test_of_a_document_in_both_inputs_the_one_for_validation_stays(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in PARAGRAPHS[:8]])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": text} for text in PARAGRAPHS[5:10]])
    options = _options(tmp_path, tmp_path / "out", tokenizer_folder, Rules(duplicates="exact"))
    options.validation_inputs = [str(tmp_path / "validation.jsonl")]
    report = prepare(options)
    assert _texts(tmp_path / "out" / "validation") == PARAGRAPHS[5:10]
    assert _texts(tmp_path / "out" / "train") == PARAGRAPHS[:5]
    assert report["rules"]["dropped"]["duplicates.exact"]["documents"] == 3
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in PARAGRAPHS[5:8] * 2])
    options.output = tmp_path / "none"
    with pytest.raises(ValueError, match=r"all training documents stand in the validation inputs, too \(duplicates"):
        prepare(options)
    assert not any(options.output.iterdir())
    write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="the train inputs hold no documents"):
        prepare(options)


def test_of_a_text_that_is_repeated_often_one_hash_a_unit_is_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in [PARAGRAPHS[0]] * 30 + PARAGRAPHS[:2] * 2])
    plan = make_plan(_options(tmp_path, tmp_path / "out", tokenizer_folder, Rules(duplicates="exact"), unit_bytes=9000))
    (plan.output / unit_documents.RECORDS).mkdir(parents=True)
    for unit in plan.units:
        unit_documents.judge_unit(plan, unit.number, lambda share: None)
    paths = [unit_documents.judged_path(plan, unit.number, "train.hashes") for unit in plan.units]
    sizes = [path.stat().st_size // 8 for path in paths]
    assert len(sizes) > 1 and sum(sizes) == len(sizes) + 1
    duplicates.mark_duplicates(plan)
    verdicts = b"".join(path.with_name(path.name.replace("train.hashes", "verdicts")).read_bytes() for path in paths)
    repeated = unit_documents.REPEATED
    assert list(verdicts) == [0, *[repeated] * 30, unit_documents.KEPT, repeated, repeated]


def test_a_bad_row_leaves_the_verdicts_for_a_call_that_skips_it(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*({"text": text} for text in PARAGRAPHS), {"text": 1}])
    options = _options(tmp_path, tmp_path / "out", tokenizer_folder, Rules(length={"min_characters": 9}))
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d+: the field 'text'"):
        prepare(options)
    judged: list[int] = []
    judge = workers.STEPS["judge"]
    monkeypatch.setitem(
        workers.STEPS, "judge", lambda plan, number, report: judged.append(number) or judge(plan, number, report)
    )
    options.read = ReadOptions(skip_bad_rows=True)
    report = prepare(options)
    assert judged == [report["units"] - 1] and report["units"] > 2
    assert sum(entry["count"] for entry in report["skipped_rows"].values()) == 1


def test_without_rules_nothing_is_another(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Rules that do nothing give the bytes of no rules; the identity tells them apart."""
    _corpus(tmp_path)
    plain = prepare(_options(tmp_path, tmp_path / "plain", tokenizer_folder, None))
    idle = prepare(_options(tmp_path, tmp_path / "idle", tokenizer_folder, Rules(length={"min_characters": 1})))
    assert "rules" not in plain and "rules" not in plain["options"] and plain["identity"] != idle["identity"]
    files = [_files(tmp_path / name) for name in ("plain", "idle")]
    for file in files:
        del file["report.json"], file["report.html"]
    assert files[0] == files[1]
    assert "--rules" in idle["command"] and "--rules" not in plain["command"]
    with pytest.raises(ValueError, match="other options"):
        prepare(_options(tmp_path, tmp_path / "plain", tokenizer_folder, Rules(duplicates="exact")))


def test_scripts_without_spaces_are_a_line_in_the_report(tmp_path: Path, tokenizer_folder: Path, rules: Rules) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{n}。" + "天地玄黃。宇宙洪荒。" * 30} for n in range(5)])
    report = prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, rules, validation_fraction=0))
    assert report["splits"]["train"]["documents"] == 5
    [remark] = report["rules"]["remarks"]
    assert remark.startswith("documents in scripts without spaces between words: 5; for them the bounds on words")


def test_the_reports_show_no_personal_data_that_is_replaced(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Not next to what another rule repairs, not next to another kind, not where it is found only after a repair."""
    every = Rules(
        encoding=True,
        control_characters=True,
        unicode="NFKC",
        personal_data=list(PLANTED),
        length={"max_characters": 99},
    )
    values = [value for kind in PLANTED for value in PLANTED[kind]]
    for place, value in enumerate(values):
        other = values[(place + 7) % len(values)]
        rows = [
            f"schÃ¶n {value} or {other}",
            f"\x00 {other} or {value}",
            f"ﬁ {value} or {other}",
            f"{value} no repair {other}",
        ]
        rows += [f"{value[:3]}\x00{value[3:]}", "long " * 25 + value, f"{value} " + "long " * 25]
        cleaner, tally = Cleaner(every), no_tally(every)
        for row in rows:
            after = cleaner.repair(document(row), tally)
            if reason := cleaner.broken_bound(after, tally):
                clean.drop(tally, reason, after, "")
        shown = json.dumps(tally, ensure_ascii=False)
        assert "schön" in shown and '"before"' in shown and "length.max" in shown
        for text in (value, other, value[3:]):
            assert json.dumps(text)[1:-1] not in shown, (text, shown)
    write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"schÃ¶n {value}"} for values in PLANTED.values() for value in values]
    )
    prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, every, validation_fraction=0, unit_bytes=60))
    reports = b"".join((tmp_path / "out" / name).read_bytes() for name in ("report.json", "report.html"))
    assert reports.count("schön".encode()) > 9
    assert [value for value in values if value.encode() in reports] == []


def test_short_conversations_stay_with_the_shipped_rules(tmp_path: Path, tokenizer_folder: Path, rules: Rules) -> None:
    turns = [[{"role": "user", "content": f"你好{n}"}, {"role": "assistant", "content": "你好。"}] for n in range(4)]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in turns])
    report = prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, rules, validation_fraction=0))
    assert report["documents"] == {"in": 4, "kept": 4, "empty": 0, "dropped": 0}
    [remark] = report["rules"]["remarks"]
    assert remark == "of conversations length.min_characters and the bounds on words, lines and n-grams were off"


# Refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("duplicate: exact", "unknown key duplicate: did you mean duplicates?"),
        ("gopher_quality: {min_word: 3}", "unknown key gopher_quality.min_word: did you mean min_words?"),
        ("length: {min_characters: 9, max_characters: 3}", "min_characters is 9 and max_characters 3: no document"),
        ("personal_data: [e-mail]", "personal_data.0"),
        ("- length", "holds list, not a mapping"),
        ("length: {min_characters: ten}", "length.min_characters"),
    ],
)
def test_a_wrong_rules_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rules.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"rules .*rules.yaml.*{re.escape(message)}"):
        load_section(Rules, str(tmp_path / "rules.yaml"), "rules")


def test_a_missing_rules_file_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"rules file nowhere\.yaml does not exist"):
        load_section(Rules, "nowhere.yaml", "rules")


def test_rules_that_drop_everything_are_refused_with_the_counts(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "short"}] * 4 + [{"text": text} for text in PARAGRAPHS[:3]])
    none = Rules(length={"min_characters": 10, "max_characters": 20}, duplicates="exact")
    counts = re.escape("of 7 documents in all they drop length.min_characters 4, length.max_characters 3: loosen")
    with pytest.raises(ValueError, match=f"the rules keep no document; {counts}"):
        prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, none))
    assert not any((tmp_path / "out").iterdir())
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "tiny"}])
    options = _options(tmp_path, tmp_path / "out", tokenizer_folder, Rules(length={"min_characters": 10}))
    options.validation_inputs = [str(tmp_path / "validation.jsonl")]
    with pytest.raises(ValueError, match="keep no document in the validation inputs; of 8 documents"):
        prepare(options)


def test_rules_are_refused_for_tasks_and_for_token_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match="tasks see their own share only"):
        prepare(_options(tmp_path, tmp_path / "out", tokenizer_folder, Rules(), task=(0, 2)))
    for suffix in ("bin", "idx"):
        (tmp_path / f"ids.{suffix}").write_bytes(b"MMIDIDX")
    options = _options(tmp_path, tmp_path / "out", tokenizer_folder, Rules())
    options.inputs = [str(tmp_path / "ids.bin")]
    with pytest.raises(ValueError, match="holds token ids, to which rules"):
        prepare(options)


def test_the_command(tmp_path: Path, tokenizer_folder: Path) -> None:
    _, planted = _corpus(tmp_path)
    arguments = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tokenizer_folder), "--workers", "1"]
    call = ["prepare", *arguments, "--out", str(tmp_path / "out"), "--rules", DEFAULT]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert f"rules.dropped.duplicates.exact: {planted['duplicates.exact']}" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["options"]["rules"] == Rules(**yaml.safe_load((ROOT / DEFAULT).read_text())).model_dump()
