"""The report of prepare: its sums agree with the data, and its page shows them and is safe to open."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import CONVERSATION, macbeth, save_tokenizer, write_jsonl

from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.report import summarize
from data_pipeline.rules import Rules
from data_pipeline.token_shards import TokenShards

LINES = [line for line in macbeth().splitlines() if line][:300]
HOSTILE = "</pre><script>alert(1)</script> & <b>"


class _Page(HTMLParser):
    """Tags, attributes and texts; void elements aside, what is opened must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    folder = tmp_path_factory.mktemp("report")
    rows = [*LINES, "", *LINES[:7], HOSTILE * 3, "Write to ada@example.org and bob@example.org about the feast."]
    write_jsonl(folder / "rows.jsonl", [{"text": row} for row in rows])
    rules = Rules(length={"max_characters": 60, "min_characters": 12}, duplicates="exact", personal_data=["email"])
    tokenizer = save_tokenizer(folder / "tokenizer")
    options = PrepareOptions([str(folder / "rows.jsonl")], folder / "out", tokenizer, rules=rules, rules_file="r.yaml")
    options.validation_fraction = 0.2
    return folder / "out", prepare(options), rows


def test_every_document_and_byte_is_accounted_for(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, report, rows = made
    documents, dropped = report["documents"], report["rules"]["dropped"]
    assert documents["in"] == len(rows) == documents["kept"] + documents["empty"] + documents["dropped"]
    assert documents["empty"] == 1
    assert documents["kept"] == sum(split["documents"] for split in report["splits"].values())
    long = [row for row in rows if len(re.sub(r"\S+@\S+", "<email>", row)) > 60]
    assert dropped["length.max_characters"]["documents"] == len(long) > 0
    assert dropped["duplicates.exact"]["documents"] == len(LINES) + 7 - len(set(LINES)) - _short_repeats(rows)
    replaced = len("ada@example.orgbob@example.org") - len("<email><email>")
    size = report["text_bytes"]
    assert size["in"] == sum(len(row.encode()) for row in rows) == size["kept"] + size["dropped"] + replaced
    assert report["rules"]["changed"]["personal_data.email"]["replaced"] == 2


def _short_repeats(rows: list[str]) -> int:
    """Documents that repeat one that the bound on length has dropped."""
    dropped = [row for row in rows if row and not 12 <= len(row) <= 60 and "@" not in row]
    return len(dropped) - len(set(dropped))


def test_the_histogram_is_that_of_the_shards(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    output, report, _ = made
    for name in ("train", "validation"):
        lengths = TokenShards(output / name).document_lengths()
        expected = {
            int(2**power): int(n)
            for power, n in zip(*np.unique(np.log2(lengths) // 1, return_counts=True), strict=True)
        }
        found = report["splits"][name]["length_histogram"]
        assert {entry["from_tokens"]: entry["documents"] for entry in found} == expected and len(expected) > 2


def test_the_page_shows_the_numbers_and_runs_nothing(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    output, report, _ = made
    content = (output / "report.html").read_text(encoding="utf-8")
    page = _Page(content)
    words = page.words()
    assert "script" not in page.tags and page.addresses == [] and "http" not in content and "@import" not in content
    assert HOSTILE.strip() in page.text  # shown as it stands in the data
    for name, split in report["splits"].items():
        assert f"kept for {name} {split['documents']}" in words
        assert f"{name}: {split['documents']} documents, {split['tokens']:,} tokens" in words
    for name, entry in report["rules"]["dropped"].items():
        assert f"{name} {entry['documents']} " in words
    assert "On, and nothing changed: none" in words and "On, and nothing dropped: none" in words
    assert f"documents in both splits {report['duplicates']['documents_in_both_splits']}" in words
    bars = sum(len(split["length_histogram"]) for split in report["splits"].values())
    assert page.tags.count("rect") >= bars
    widths = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="0" width="([\d.]+)"', content)]
    assert sum(widths) == pytest.approx(1000)


def test_the_terminal_gets_a_summary(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, report, _ = made
    shown = summarize(report)
    assert shown["rules"]["dropped"] == {name: e["documents"] for name, e in report["rules"]["dropped"].items()}
    assert "length_histogram" not in shown["splits"]["train"] and shown["documents"] == report["documents"]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_without_rules(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [{"text": line} for line in LINES[:40]]
    if kind == "chat":
        rows = [{"messages": [*CONVERSATION, {"role": "user", "content": str(n)}, CONVERSATION[2]]} for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    report = prepare(PrepareOptions([str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer, validation_fraction=0))
    assert report["documents"] == {"in": 40, "kept": 40, "empty": 0, "dropped": 0}
    assert report["text_bytes"]["in"] == report["text_bytes"]["kept"] == report["splits"]["train"]["text_bytes"]
    page = _Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "kept for train 40 100.00 %" in page.words() and "Rules" not in page.words()
