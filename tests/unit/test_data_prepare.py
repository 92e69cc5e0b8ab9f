"""prepare: files in, token shards, tokenizer and report out; the same again, or refused."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_samples import EMBEDDED, VOCABULARY, macbeth, save_tokenizer, small_tokenizer, write_jsonl

from data_pipeline.prepare import MARKER_NAME, PrepareOptions, prepare
from data_pipeline.sources import ReadOptions
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint

ROWS = [f"{number}: {line}" for number, line in enumerate(macbeth().splitlines()) if line][:600]
CHAT = EMBEDDED / "chat" / "english"
CHAT_LINES = [x for file in sorted(CHAT.glob("*.jsonl")) for x in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _rows_file(folder: Path, kind: str = "jsonl") -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"text": row} for row in ROWS])
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerows([["id", "text"], *enumerate(ROWS)])
    else:
        parquet.write_table(pa.table({"text": ROWS}), path)
    return path


def _options(source: Path | str, output: Path, tokenizer: Path | None, **changes: Any) -> PrepareOptions:
    return PrepareOptions([str(source)], output, tokenizer=tokenizer, **changes)


def _documents(directory: Path) -> list[list[int]]:
    shards = TokenShards(directory)
    flat = shards.read(0, shards.tokens)
    return [part.tolist() for part in np.split(flat, np.cumsum(shards.document_lengths())[:-1])]


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, tokenizer_folder: Path, kind: str) -> None:
    output = tmp_path / "out"
    report = prepare(_options(_rows_file(tmp_path, kind), output, tokenizer_folder, validation_fraction=0.1))
    expected = {tuple(small_tokenizer()(row)["input_ids"] + [0]) for row in ROWS}
    stored = [tuple(ids) for split in ("train", "validation") for ids in _documents(output / split)]
    assert set(stored) == expected
    assert len(stored) == len(ROWS)
    splits = report["splits"].values()
    assert sum(split["tokens"] for split in splits) == sum(map(len, stored))
    assert sum(split["documents"] for split in splits) == len(ROWS)
    assert sum(split["text_bytes"] for split in splits) == sum(len(row.encode()) for row in ROWS)
    assert max(split["longest_document_tokens"] for split in splits) == max(map(len, stored))
    assert 0.05 < report["splits"]["validation"]["documents"] / len(ROWS) < 0.15
    assert report["tokenizer"]["sha256"] == tokenizer_fingerprint(tokenizer_folder)


def test_order_of_documents_is_that_of_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    prepare(_options(_rows_file(tmp_path), tmp_path / "out", tokenizer_folder, validation_fraction=0))
    assert not (tmp_path / "out" / "validation").exists()
    decoded = [small_tokenizer().decode(ids[:-1]) for ids in _documents(tmp_path / "out" / "train")]
    assert decoded == ROWS


def test_trained_tokenizer_sees_the_training_split_only_and_is_stored(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(macbeth())
    (tmp_path / "validation.txt").write_text("Ünïcödë " * 1000)
    output = tmp_path / "out"
    options = _options(tmp_path / "train.txt", output, None, train_vocabulary=VOCABULARY)
    options.validation_inputs = [str(tmp_path / "validation.txt")]
    calls: list[tuple[int, int]] = []
    report = prepare(options, lambda done, total: calls.append((done, total)))
    stored = load_tokenizer(output / "tokenizer")
    assert stored.get_vocab() == small_tokenizer().get_vocab()  # trained on macbeth() too
    assert report["tokenizer"] == {
        "sha256": tokenizer_fingerprint(output / "tokenizer"),
        "vocabulary_size": VOCABULARY,
        "trained": True,
        "sample_documents": 1,
        "sample_text_bytes": len(macbeth()),
    }
    assert [split["documents"] for split in report["splits"].values()] == [1, 1]
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]
    manifest = TokenShards(output / "validation").manifest
    size = (tmp_path / "validation.txt").stat().st_size
    assert manifest["units"] == [{"source": "validation.txt", "bytes": size, "documents_in": 1, "documents_kept": 1}]


def test_chat_shards_hold_rendered_conversations_and_masks(tmp_path: Path, tokenizer_folder: Path) -> None:
    report = prepare(_options(CHAT, tmp_path / "out", tokenizer_folder, validation_fraction=0))
    assert report["kind"] == "chat"
    shards = TokenShards(tmp_path / "out" / "train")
    lines = CHAT_LINES
    assert shards.documents == len(lines)
    lengths = shards.document_lengths()
    for index in (0, 7, len(lines) - 1):
        start, length = int(lengths[:index].sum()), int(lengths[index])
        expected = small_tokenizer().apply_chat_template(
            json.loads(lines[index])["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        assert shards.read(start, length).tolist() == expected["input_ids"]
        assert shards.read_mask(start, length).tolist() == [bool(value) for value in expected["assistant_masks"]]


def test_same_input_gives_the_same_bytes_and_no_local_paths(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        options = _options(_rows_file(tmp_path / place), tmp_path / place / "out", None, train_vocabulary=VOCABULARY)
        options.validation_fraction = 0.1
        prepare(options)
    first, second = _files(tmp_path / "a" / "out"), _files(tmp_path / "b" / "out")
    del first["report.json"], second["report.json"]  # it names the inputs as they were given
    assert first == second
    assert str(tmp_path).encode() not in first["train/manifest.json"]


def test_split_is_by_content_and_seed(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in [*ROWS, *reversed(ROWS)]])
    sets = {}
    for seed in (0, 1):
        output = tmp_path / str(seed)
        report = prepare(_options(source, output, tokenizer_folder, validation_fraction=0.2, seed=seed))
        sets[seed] = [{tuple(ids) for ids in _documents(output / split)} for split in ("train", "validation")]
        assert not sets[seed][0] & sets[seed][1]
        counts = [report["splits"][split]["documents"] // 2 for split in ("train", "validation")]
        assert report["duplicates"] == {
            "train_repeated_documents": counts[0],
            "validation_repeated_documents": counts[1],
            "documents_in_both_splits": 0,
        }
    assert sets[0][1] != sets[1][1]


def test_documents_in_both_splits_are_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": ""}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}, {"text": "three"}])
    options = _options(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_folder)
    options.validation_inputs = [str(tmp_path / "b.jsonl")]
    report = prepare(options)
    assert report["duplicates"]["documents_in_both_splits"] == 1
    assert report["documents"]["empty"] == 1
    assert [file["documents_in"] for file in report["files"]] == [3, 2]
    assert [file["documents_kept"] for file in report["files"]] == [2, 2]


def test_text_of_special_tokens_in_documents_stays_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|endoftext|>b<|im_end|>"}])
    prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0))
    [ids] = _documents(tmp_path / "out" / "train")
    assert ids[-1] == 0
    assert min(ids[:-1]) > 3
    assert small_tokenizer().decode(ids[:-1]) == "a<|endoftext|>b<|im_end|>"


def test_chinese_csv_in_gb18030(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [f"第{number}行：床前明月光" for number in range(50)]  # noqa: RUF001 - Chinese punctuation
    path = tmp_path / "a.csv"
    path.write_bytes(("编号,正文\n" + "".join(f"{n},{row}\n" for n, row in enumerate(rows))).encode("gb18030"))
    read = ReadOptions(text_field="正文")
    with pytest.raises(ValueError, match="--encoding gb18030"):
        prepare(_options(path, tmp_path / "out", tokenizer_folder, read=read, validation_fraction=0))
    read = ReadOptions(text_field="正文", encoding="gb18030")
    prepare(_options(path, tmp_path / "out", tokenizer_folder, read=read, validation_fraction=0))
    assert [small_tokenizer().decode(ids[:-1]) for ids in _documents(tmp_path / "out" / "train")] == rows


def test_a_second_call_reuses_and_other_options_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _rows_file(tmp_path)
    options = _options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0.1)
    first = prepare(options)
    before = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in _files(tmp_path / "out")}
    again = prepare(options)
    assert (first.pop("reused"), again.pop("reused")) == (False, True)
    assert (first.pop("run")["units_made"], again.pop("run")["units_made"]) == (1, 0)
    assert again == first
    assert before == {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in before}
    report = tmp_path / "out" / "report.json"
    content = report.read_text()
    report.write_text(content.replace('"version": "prepare/', '"version": "prepare/0'))
    with pytest.raises(ValueError, match=r"report\.json is not a report of this version of trainyard prepare: delete"):
        prepare(options)
    report.write_text(content)
    with pytest.raises(ValueError, match="other options or from other files"):
        prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0.1, seed=1))
    write_jsonl(source, [{"text": row} for row in ROWS[1:]])
    with pytest.raises(ValueError, match=r"other options or from other files .*delete it or choose another --out"):
        prepare(options)


def test_reuse_notices_a_damaged_output(tmp_path: Path, tokenizer_folder: Path) -> None:
    options = _options(_rows_file(tmp_path), tmp_path / "out", tokenizer_folder, validation_fraction=0.1)
    command = prepare(options)["command"]
    (tmp_path / "out" / "train" / "u-00000-000.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes") as caught:
        prepare(options)
    assert command in str(caught.value)
    assert "--validation-fraction 0.1" in command


def test_a_killed_merge_is_done_again_with_the_units_as_they_are(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _rows_file(tmp_path)
    script = f"""
        import os, signal
        from pathlib import Path
        import data_pipeline.merge as module
        from data_pipeline.prepare import PrepareOptions, prepare
        module.count_duplicates = lambda plan, hashes: os.kill(os.getpid(), signal.SIGKILL)
        prepare(PrepareOptions([{str(source)!r}], Path({str(tmp_path / "out")!r}),
            tokenizer=Path({str(tokenizer_folder)!r}), validation_fraction=0.1))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=EMBEDDED.parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / MARKER_NAME).exists()
    assert (tmp_path / "out" / "train" / "manifest.json").exists()
    report = prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0.1))
    assert report["run"]["units_made"] == 0
    prepare(_options(source, tmp_path / "clean", tokenizer_folder, validation_fraction=0.1))
    interrupted, clean = _files(tmp_path / "out"), _files(tmp_path / "clean")
    del interrupted["report.json"], clean["report.json"]  # they name their outputs
    assert interrupted == clean


def test_a_directory_of_others_is_never_touched(tmp_path: Path, tokenizer_folder: Path) -> None:
    output = tmp_path / "out"
    (output / "tokenizer").mkdir(parents=True)
    (output / "tokenizer" / "tokenizer.json").write_text("mine")
    source = _rows_file(tmp_path)
    with pytest.raises(ValueError, match="is not empty and was not made by trainyard prepare"):
        prepare(_options(source, output, tokenizer_folder))
    (output / MARKER_NAME).touch()
    (output / "notes.txt").write_text("mine too")
    with pytest.raises(ValueError, match="is not empty"):
        prepare(_options(source, output, tokenizer_folder))
    assert (output / "tokenizer" / "tokenizer.json").read_text() == "mine"
    with pytest.raises(ValueError, match="is inside the output"):
        prepare(_options(output / "notes.txt", output, tokenizer_folder))
    with pytest.raises(ValueError, match="is a file: choose another --out"):
        prepare(_options(source, output / "notes.txt", tokenizer_folder))


def test_a_refused_input_leaves_nothing_behind(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n' * 10 + '{"text": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:11"):
        prepare(_options(source, tmp_path / "out", tokenizer_folder))
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_conversations_are_named_with_file_and_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    two = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]}
    for bad, message in ((two, "must alternate"), ({"messages": []}, "conversation is empty")):
        source = write_jsonl(tmp_path / "a.jsonl", [good, good, bad])
        with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{message}"):
            prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0))


def test_bad_conversations_are_counted_and_skipped_where_that_is_asked_for(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    two = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]}
    source = write_jsonl(tmp_path / "a.jsonl", [good, two, good, {"messages": 1}])
    read = ReadOptions(skip_bad_rows=True)
    report = prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0, read=read))
    assert report["splits"]["train"]["documents"] == report["files"][0]["documents_in"] == 2
    assert sum(skipped["count"] for skipped in report["skipped_rows"].values()) == 2
    [refused] = report["skipped_rows"]["conversation refused"]["locations"]
    assert refused.startswith(f"{source}:2: message 2 is from 'user'")
    assert "--skip-bad-rows" in report["command"]
    none = write_jsonl(tmp_path / "b.jsonl", [two])
    with pytest.raises(ValueError, match=r"nothing of .*b\.jsonl can be used"):
        prepare(_options(none, tmp_path / "none", tokenizer_folder, validation_fraction=0, read=read))
    assert list((tmp_path / "none").iterdir()) == []


def test_a_cut_file_gives_what_is_before_the_cut_and_the_report_says_so(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _rows_file(tmp_path)
    source.write_bytes(source.read_bytes()[:-5])
    report = prepare(_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=0))
    assert report["splits"]["train"]["documents"] == len(ROWS) - 1
    [cut] = report["cut_short"]
    assert cut["file"] == str(source)


def test_megatron_ids_are_taken_as_they_are(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Beside texts; an end token is added where a document has none, and other tokenizers' ids are refused."""
    documents = [small_tokenizer()(row)["input_ids"] + [0] * (number % 2) for number, row in enumerate(ROWS[:50])]
    lengths = np.array([len(ids) for ids in documents])

    def write(ids: list[list[int]]) -> None:
        (tmp_path / "in" / "m.bin").write_bytes(np.concatenate(ids).astype("<i4").tobytes())
        header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(ids), len(ids) + 1)
        starts = (np.cumsum(lengths) - lengths) * 4
        index = [lengths.astype("<i4"), starts.astype("<i8"), np.arange(len(ids) + 1, dtype="<i8")]
        (tmp_path / "in" / "m.idx").write_bytes(header + b"".join(part.tobytes() for part in index))

    (tmp_path / "in").mkdir()
    write(documents)
    write_jsonl(tmp_path / "in" / "z.jsonl", [{"text": row} for row in ROWS[50:60]])
    report = prepare(_options(tmp_path / "in", tmp_path / "out", tokenizer_folder, validation_fraction=0))
    expected = [small_tokenizer()(row)["input_ids"] + [0] for row in ROWS[:60]]
    assert _documents(tmp_path / "out" / "train") == expected
    assert report["kind"] == "text"
    assert report["splits"]["train"]["text_bytes"] == sum(len(row.encode()) for row in ROWS[:60])
    with pytest.raises(ValueError, match="holds token ids: give the tokenizer that made them"):
        prepare(_options(tmp_path / "in", tmp_path / "trained", None, train_vocabulary=300))
    write([[VOCABULARY + 5] * len(ids) for ids in documents])
    with pytest.raises(ValueError, match=f"outside the vocabulary of {VOCABULARY}"):
        prepare(_options(tmp_path / "in", tmp_path / "wrong", tokenizer_folder, validation_fraction=0))


def test_options_that_cannot_be(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    chat = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Hi", "response": "Ho"}])
    empty = write_jsonl(tmp_path / "e.jsonl", [{"text": ""}])
    both = _options(source, tmp_path / "out", tokenizer_folder, train_vocabulary=300)
    overlap = _options(source, tmp_path / "out", tokenizer_folder, validation_inputs=[str(tmp_path / "a.jsonl")])
    mixed = PrepareOptions([str(source), str(chat)], tmp_path / "out", tokenizer=tokenizer_folder)
    for options, message in (
        (both, "either a tokenizer folder"),
        (_options(source, tmp_path / "out", None), "either a tokenizer folder"),
        (_options(source, tmp_path / "out", tokenizer_folder, validation_fraction=1.0), "fraction is 1.0"),
        (_options(source, tmp_path / "out", tokenizer_folder, seed=-1), "seed is -1"),
        (PrepareOptions([], tmp_path / "out", tokenizer=tokenizer_folder), "at least one input"),
        (overlap, "both a training and a validation input"),
        (mixed, r"c\.jsonl holds conversations and .*a\.jsonl plain text"),
        (
            _options(source, tmp_path / "out", tokenizer_folder),
            "validation split: raise the fraction or give --validation",
        ),
        (_options(empty, tmp_path / "out", tokenizer_folder), "hold no documents"),
        (_options(source, tmp_path / "out", None, train_vocabulary=5000), "5000 were asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(options)


def test_embedded_data_is_what_its_notice_says() -> None:
    notice = (EMBEDDED / "NOTICE.md").read_text(encoding="utf-8")
    for split, plays in (("train", 14), ("validation", 2)):
        files = sorted((EMBEDDED / "shakespeare" / split).glob("*.txt"))
        contents = [file.read_bytes() for file in files]
        assert len(files) == plays
        assert f"{sum(map(len, contents)):,} bytes" in notice
        assert not any(set(b"*_#\\\r\t") & set(content) or not content.isascii() for content in contents)
    conversations = [json.loads(line)["messages"] for line in CHAT_LINES]
    assert f"{len(conversations)} conversations, {sum(map(len, conversations)):,} turns" in notice
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in messages)


def test_preparing_texts_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """Nor what only other sources need; with workers, each of which would pay for it, too."""
    program = """
import sys
from pathlib import Path
from data_pipeline.prepare import PrepareOptions, prepare
source, output, tokenizer = sys.argv[1:]
chosen = {"tokenizer": Path(tokenizer)} if tokenizer else {"train_vocabulary": 300}
prepare(PrepareOptions([source], Path(output), validation_fraction=0, **chosen))
import data_pipeline.workers
rules = {"ftfy", "stdnum", "data_pipeline.clean", "data_pipeline.rules"}
print(({"torch", "transformers", "pyarrow", "datasets", "awkward"} | rules) & set(sys.modules))
"""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": macbeth()}])
    for output, tokenizer in (("trained", ""), ("given", str(save_tokenizer(tmp_path / "tokenizer")))):
        command = [sys.executable, "-c", program, str(source), str(tmp_path / output), tokenizer]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr
