"""Overlap of validation with training: counted as by its definition, and shown in all forms of the report."""

from pathlib import Path

import numpy as np
import pytest
from data_samples import macbeth, random_documents, save_tokenizer, write_jsonl, write_shards

from data_pipeline import overlap
from data_pipeline.overlap import RUN_TOKENS, count_overlap
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.report import summarize
from data_pipeline.rules import Rules
from data_pipeline.token_shards import TokenShards


def _runs(documents: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(d[i : i + RUN_TOKENS]) for d in documents for i in range(len(d) - RUN_TOKENS + 1)]


@pytest.mark.parametrize("block", [2**20, 50])
def test_runs_are_counted_as_by_their_definition(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over the ends of blocks; not over the ends of documents."""
    monkeypatch.setattr(overlap, "BLOCK_TOKENS", block)
    train = [[*document.tolist(), 0] for document in random_documents(30, 60)]  # 0 ends a document
    validation = [document.tolist() for document in random_documents(10, 60, seed=1)]
    validation += [[*train[3][2:30], 5, 6, 7], train[4][-9:-1] + train[5][:12], [9] * 20, train[8], train[8]]
    train.append([9] * 15)
    shards = [
        TokenShards(write_shards(tmp_path / name, documents, shard_bytes=400))
        for name, documents in (("t", train), ("v", validation))
    ]
    known, runs = set(_runs(train)), _runs(validation)
    expected = {"validation_runs": len(runs), "validation_runs_in_training": sum(run in known for run in runs)}
    assert count_overlap(*shards) == expected and 8 < expected["validation_runs_in_training"] < len(runs)
    monkeypatch.setattr(overlap, "MOST_RUNS", sum(map(len, validation)) // 2)
    sample = count_overlap(*shards)
    assert 0.3 * len(runs) < sample["validation_runs"] < 0.7 * len(runs)


def test_of_conversations_only_what_the_assistant_says_counts(tmp_path: Path) -> None:
    documents = [list(range(100, 140))]
    masks = [[10 <= place < 30 for place in range(40)]]
    train = TokenShards(write_shards(tmp_path / "t", documents, [[True] * 40]))
    validation = TokenShards(write_shards(tmp_path / "v", documents, masks))
    runs = 20 - RUN_TOKENS + 1
    assert count_overlap(train, validation) == {"validation_runs": runs, "validation_runs_in_training": runs}


def test_the_reports_say_it(tmp_path: Path) -> None:
    words = macbeth().split()
    texts = [" ".join(words[begin : begin + 60]) for begin in range(0, 3000, 60)]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    write_jsonl(
        tmp_path / "validation.jsonl", [{"text": texts[0] + " and no more"}, {"text": " ".join(words[5000:5060])}]
    )
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    options = PrepareOptions(
        [str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer, rules=Rules(duplicates="exact")
    )
    options.validation_inputs = [str(tmp_path / "validation.jsonl")]
    report = prepare(options)
    found = report["rules"]["overlap"]
    lengths = np.array([TokenShards(tmp_path / "out" / "validation").document_lengths()])
    assert found["validation_runs"] == int((lengths - RUN_TOKENS + 1).sum())
    assert 0.4 < found["validation_runs_in_training"] / found["validation_runs"] < 0.6
    assert summarize(report)["rules"]["overlap"] == found
    sentence = "{validation_runs:,} runs of 13 tokens in validation {validation_runs_in_training:,} stand in training"
    assert sentence.format(**found) in (tmp_path / "out" / "report.html").read_text()
