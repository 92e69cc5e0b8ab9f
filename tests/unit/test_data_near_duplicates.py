"""Near duplicates: planted among prose, in one split or both, and how alike texts must be to be found."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import macbeth, save_tokenizer, write_jsonl

from data_pipeline import duplicates
from data_pipeline.n_grams import BAND_ROWS, BANDS, SHINGLE_WORDS, band_hashes, n_grams
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.rules import Rules
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load_tokenizer

WORDS = macbeth().split()
ORIGINALS = [" ".join(WORDS[begin : begin + 240]) for begin in range(0, 240 * 60, 240)]
NEAR = Rules(duplicates="near")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _near_duplicates(text: str) -> list[str]:
    """The text in small letters, with words replaced, without its beginning, with another end."""
    words = text.split()
    replaced = ["instead" if place in (60, 150) else word for place, word in enumerate(words)]
    other_end = [*words, *["which", "is", "all", "that", "was", "said"] * 2]
    return [text.lower().replace(",", " ;"), " ".join(replaced), " ".join(words[15:]), " ".join(other_end)]


def _others(number: int) -> str:
    """Shares a half with one original and a half with another, in whole runs of words."""
    return " ".join(WORDS[240 * number + 120 : 240 * number + 360])


def _similarity(one: str, other: str) -> float:
    ones, others = (set(n_grams(text, SHINGLE_WORDS).tolist()) for text in (one, other))
    return len(ones & others) / len(ones | others)


def _prepared(folder: Path, rows: list[str], tokenizer: Path, **changes: Any) -> dict[str, Any]:
    write_jsonl(folder / "rows.jsonl", [{"text": row} for row in rows])
    options: dict[str, Any] = {"rules": NEAR, "rules_file": "r.yaml", "unit_bytes": 30_000, "validation_fraction": 0.3}
    return prepare(PrepareOptions([str(folder / "rows.jsonl")], folder / "out", tokenizer, **(options | changes)))


def _kept(output: Path, tokenizer: Path) -> dict[str, list[str]]:
    decode, texts = load_tokenizer(tokenizer).decode, {}
    for split in (path.parent for path in output.glob("*/manifest.json")):
        shards = TokenShards(split)
        ids = np.split(shards.read(0, shards.tokens), np.cumsum(shards.document_lengths())[:-1])
        texts[split.name] = [decode(part[:-1]) for part in ids]
    return texts


def _bytes(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.*")) if path.is_file()}


def test_planted_near_duplicates_and_no_others_are_dropped(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision and recall are 1; no cluster stands in both splits; any workers and buckets give the same bytes."""
    planted = [near for original in ORIGINALS[:30] for near in _near_duplicates(original)]
    others = [_others(number) for number in range(30, 45)]
    behind = [*planted, *others, *ORIGINALS[50:55]]
    random.Random(0).shuffle(behind)
    report = _prepared(tmp_path, ORIGINALS + behind, tokenizer)
    dropped = report["rules"]["dropped"]
    assert (dropped["duplicates.exact"]["documents"], dropped["duplicates.near"]["documents"]) == (5, len(planted))
    [example, *_] = dropped["duplicates.near"]["examples"]
    assert example["why"] == "much of it stands elsewhere" and any(text.startswith(example["text"]) for text in planted)
    assert report["documents"]["in"] == len(ORIGINALS + behind) == report["documents"]["kept"] + 5 + len(planted)
    kept = _kept(tmp_path / "out", tokenizer)
    assert sorted(itertools.chain(*kept.values())) == sorted(ORIGINALS + others)
    assert min(map(len, kept.values())) > 10
    assert max(_similarity(one, other) for one in kept["train"] for other in kept["validation"]) < 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'duplicates.near</td><td class="n">{len(planted)}</td>' in page

    found = _bytes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 300)
    _prepared(tmp_path, ORIGINALS + behind, tokenizer, workers=2)
    assert _bytes(tmp_path / "out") == found


def test_interrupted_marking_is_done_again(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ORIGINALS[:12] + [near for original in ORIGINALS[:12] for near in _near_duplicates(original)]
    join, calls = duplicates._join, itertools.count()

    def fails_once(*arguments: Any) -> None:
        join(*arguments)
        if next(calls) == 3:
            raise OSError("the plug was pulled")

    _prepared(tmp_path, rows, tokenizer)
    found = _bytes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    monkeypatch.setattr(duplicates, "_join", fails_once)
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 60)
    with pytest.raises(OSError, match="plug"):
        _prepared(tmp_path, rows, tokenizer)
    judge = duplicates.mark_near
    monkeypatch.setattr(duplicates, "mark_near", lambda plan: (judge(plan), judge(plan)))
    _prepared(tmp_path, rows, tokenizer)
    assert _bytes(tmp_path / "out") == found


def test_of_a_cluster_in_both_inputs_the_one_for_validation_stays(tmp_path: Path, tokenizer: Path) -> None:
    """Also where both inputs share a unit, and where the document for validation is linked by a third one only."""
    chain = [" ".join(WORDS[begin : begin + 240]) for begin in (9000, 9025, 9050)]
    assert not set(band_hashes(chain[0])) & set(band_hashes(chain[2]))
    write_jsonl(tmp_path / "validation.jsonl", [{"text": text} for text in [*ORIGINALS[:5], chain[2]]])
    rows = [*(near for text in ORIGINALS[:5] for near in _near_duplicates(text)), *chain[:2], *ORIGINALS[5:8]]
    for unit_bytes in (3000, 2**20):
        changes = {"validation_inputs": [str(tmp_path / "validation.jsonl")], "unit_bytes": unit_bytes}
        report = _prepared(tmp_path, rows, tokenizer, **changes)
        assert _kept(tmp_path / "out", tokenizer) == {
            "train": ORIGINALS[5:8],
            "validation": [*ORIGINALS[:5], chain[2]],
        }
        assert report["rules"]["dropped"]["duplicates.near"]["documents"] == len(rows) - 3
        (tmp_path / "out").rename(tmp_path / str(unit_bytes))
    with pytest.raises(
        ValueError, match=r"all training documents stand in the validation inputs, too \(duplicates: near"
    ):
        _prepared(tmp_path, rows[:-3], tokenizer, **changes)


@pytest.mark.parametrize("changed_words", [30, 15, 8, 3])
def test_near_duplicates_are_found_as_often_as_minhash_promises(changed_words: int) -> None:
    """Pairs of equal similarity: the share with an equal band is 1 - (1 - s^rows)^bands, within four deviations."""
    found, expected, pairs = 0, [], 300
    for pair in range(pairs):
        words = [f"w{pair}x{place}" for place in range(400)]
        other = [f"{word}y" if place % (400 // changed_words) == 7 else word for place, word in enumerate(words)]
        one, other_text = " ".join(words), " ".join(other)
        expected.append(1 - (1 - _similarity(one, other_text) ** BAND_ROWS) ** BANDS)
        found += bool(set(band_hashes(one)) & set(band_hashes(other_text)))
    deviation = np.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(found - sum(expected)) <= 4 * deviation + 0.5


def test_words_and_shingles() -> None:
    """Case and punctuation do not count, order does; short texts, scripts without spaces and texts without words."""
    assert band_hashes("To be, or not to BE: that is") == band_hashes("to be or not to be that is")
    assert not set(band_hashes("to be or not to be")) & set(band_hashes("be not to to or be"))
    assert len(band_hashes("Hello")) == BANDS and band_hashes("Hello") == band_hashes("hello!")
    assert not set(band_hashes("Hello")) & set(band_hashes("Hello there"))
    assert band_hashes("") == band_hashes(" ... \n") == []
    assert len(n_grams("a b c d e f", 5)) == 2 and len(n_grams("a b", 5)) == 1
    chinese = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏"
    assert len(n_grams(chinese, 5)) == len(chinese) - 9
    assert set(n_grams(chinese[3:], 5)) < set(n_grams(chinese, 5))
    assert set(n_grams("。".join(chinese), 5)) == set(n_grams(chinese, 5))


def test_the_hashes_are_the_same_in_any_process() -> None:
    """They are stored between processes and restarts: none may hang on the interpreter's seed."""
    assert band_hashes("a rose is a rose is a rose")[:2] == [762243476262975750, 13957443147343979549]


def test_conversations(tmp_path: Path, tokenizer: Path) -> None:
    def turns(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "What is said?"}, {"role": "assistant", "content": text}]}

    rows = [turns(text) for text in [*ORIGINALS[:6], *_near_duplicates(ORIGINALS[0])]]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PrepareOptions([str(tmp_path / "chat.jsonl")], tmp_path / "out", tokenizer, rules=NEAR)
    options.validation_fraction = 0
    assert prepare(options)["rules"]["dropped"]["duplicates.near"]["documents"] == 4
