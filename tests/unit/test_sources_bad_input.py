"""What is wrong in files: refused with a sentence, or skipped and counted; cut files give what precedes the cut."""

import gzip
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_samples import write_jsonl
from source_samples import read, read_in_a_process
from test_sources_containers import COMPRESS

from data_pipeline.sources import Ledger, ReadOptions, SourceFile, find_files, read_documents
from data_pipeline.text_tables import TEXT_BYTES

MIB = 2**20


def test_bad_rows_are_skipped_only_when_asked_for_and_counted(tmp_path: Path) -> None:
    lines = [
        *['{"text": "good"}', '{"body": "x"}', '{"text": null}', '{"text": {"a": 1}}', "not JSON", "[1]"],
        *['{"text": "\\ud800"}', '{"text": "also good", "score": NaN}', *['{"text": 3}'] * 7],
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n{"text": "last"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: there is no field 'text'"):
        read(path)
    ledger = Ledger()
    assert read(path, ledger=ledger, skip_bad_rows=True) == ["good", "also good", "last"]
    assert {reason: entry["count"] for reason, entry in ledger.skipped.items()} == {
        "missing field": 1,
        "null field": 1,
        "field that is not a text": 8,
        "not JSON": 1,
        "not an object": 1,
        "lone surrogate": 1,
        "not valid in the encoding": 1,
    }
    assert ledger.skipped["field that is not a text"]["locations"] == [f"{path}:{line}" for line in (4, 9, 10, 11, 12)]
    assert ledger.losses == {str(path): 14}
    assert ledger.cut_short == []
    again = Ledger(**json.loads(json.dumps(asdict(ledger))))
    again.merge(ledger)
    assert again.skipped["missing field"] == {"count": 2, "locations": [f"{path}:2"] * 2}
    assert again.losses == {str(path): 28}


def test_a_file_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": None}] * 3)
    with pytest.raises(ValueError, match=r"nothing of .*a\.jsonl can be used \(bad rows: 3\): remove it or replace it"):
        read(path, ledger=Ledger(), skip_bad_rows=True)
    path.write_text("no JSON\nat all\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no record that can be used"):
        read(path, ledger=Ledger(), skip_bad_rows=True)


def test_bad_rows_of_csv_and_parquet_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2\n3,a,b\n4,"caf\xe9\nau lait"\n5,"caf\xc3\xa9"\n')
    ledger = Ledger()
    assert read(path, ledger=ledger, skip_bad_rows=True) == ["good", "café"]
    assert ledger.skipped == {
        "wrong number of fields": {"count": 2, "locations": [f"{path}:3", f"{path}:4"]},
        "not valid in the encoding": {"count": 1, "locations": [f"{path}:5"]},
    }
    array = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0\5\0\0\0"), pa.py_buffer(b"ab\xffcd"))
    parquet.write_table(pa.table({"text": array}), tmp_path / "b.parquet")
    ledger = Ledger()
    assert read(tmp_path / "b.parquet", ledger=ledger, skip_bad_rows=True) == ["ab", "cd"]
    assert ledger.skipped["not valid in the encoding"]["locations"] == [f"{tmp_path / 'b.parquet'}, row 2"]
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: a text is not valid utf-8"):
        read(tmp_path / "b.parquet")


# Files cut short


def _cut_file(path: Path, ledger: Ledger | None = None) -> list[Any]:
    """What is read of a file that must be found cut."""
    with pytest.raises(ValueError, match=rf"{path.name} is cut short at byte \d+: .* is lost"):
        read(path)
    return read(path, ledger=ledger)


@pytest.mark.parametrize("extension", list(COMPRESS))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_compressed_files_cut_short_give_what_precedes_the_cut(tmp_path: Path, name: str, extension: str) -> None:
    texts = [f"{number}: {os.urandom(20).hex()} é" for number in range(8000)]
    rows = [{"text": text} for text in texts]
    content = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json": json.dumps(rows),
        "a.csv": "id,text\n" + "".join(f"x,{text}\n" for text in texts),
        "a.txt": "\n".join(texts),
    }[name].encode()
    whole = COMPRESS[extension](content)
    path = tmp_path / (name + extension)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    ledger = Ledger()
    found = _cut_file(path, ledger)
    if name == "a.txt":
        assert "\n".join(texts).startswith(found[0])
        assert len(found[0].encode()) > len(content) / 3
    else:
        assert found == texts[: len(found)]
        assert len(found) > len(texts) / 3
    (cut,) = ledger.cut_short
    assert (cut["file"], cut["position"]) == (str(path), len(whole) * 2 // 3)


@pytest.mark.parametrize("extension", list(COMPRESS))
def test_compressed_files_cut_in_their_last_bytes(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(COMPRESS[extension](b'{"text": "x"}\n')[:-1])
    ledger = Ledger()
    assert _cut_file(path, ledger) == ["x"]
    assert ledger.cut_short[0]["lost"] == "what followed"


@pytest.mark.parametrize("extension", list(COMPRESS))
def test_damage_inside_compressed_data_is_refused(tmp_path: Path, extension: str) -> None:
    compress = COMPRESS[extension]
    content = compress(b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(2000)))
    for position in (len(content) // 2, len(content) - 6):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        (tmp_path / f"a.jsonl{extension}").write_bytes(bytes(damaged))
        with pytest.raises(
            ValueError, match=rf"a\.jsonl\{extension} is damaged: its \w+ data cannot be read near byte"
        ):
            read(tmp_path / f"a.jsonl{extension}", ledger=Ledger(), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "lost", "position"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n{"text": "cu', r"the record at .*a\.jsonl:3", 28),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n{"text": "cut"', r"the record at .*a\.jsonl:3", 28),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n{"text": "\\ud83', r"the record at .*a\.jsonl:3", 28),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n{"text": tr', r"the record at .*a\.jsonl:3", 28),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"}\n{"text": "\xe4\xbd', r"the record at .*a\.jsonl:3", 28),
        ("a.json", '[{"text": "x"}, {"text": "y"}, {"text": "cu', "record 3", 31),
        ("a.json", '[{"text": "x"}, {"text": "y"}, ', "the end of the array", 31),
        ("a.json", '[{"text": "x"}, {"text": "y"}', "the end of the array", 29),
        ("a.csv", 'id,text\n1,x\n2,y\n3,"cut in\n the ', "the row at line 4, which ends inside a quote", 16),
        ("a.csv", b"id,text\n1,x\n2,y\n3,cut \xe4\xbd", "the row at line 4, which has 2 of 2 fields", 16),
        ("a.csv", "id,text\n1,x\n2,y\n3", "the row at line 4, which has 1 of 2 fields", 16),
    ],
)
def test_last_records_cut_in_the_middle(
    tmp_path: Path, name: str, content: str | bytes, lost: str, position: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ledger = Ledger()
    assert _cut_file(path, ledger) == ["x", "y"]
    (cut,) = ledger.cut_short
    assert cut["position"] == position
    assert re.fullmatch(lost, cut["lost"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "gb18030"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
def test_a_cut_at_any_byte_gives_the_records_before_it(tmp_path: Path, name: str, encoding: str) -> None:
    texts = ["first", '你好 "q" \\ \n', "😀 end", ""]
    rows = [{"n": -1.5e-3, "text": text, "o": {"k": [True, None]}} for text in texts]
    lines = [json.dumps(row, ensure_ascii=number == 0) for number, row in enumerate(rows)]
    content = ("".join(line + "\n" for line in lines) if name == "a.jsonl" else json.dumps(rows)).encode(encoding)
    content = gzip.compress(content, 0) if name.endswith(".gz") else content
    path, noted = tmp_path / name, 0
    for size in range(1, len(content) + 1):
        path.write_bytes(content[:size])
        ledger = Ledger()
        try:
            found = read(path, ledger=ledger, encoding=encoding)
        except ValueError as error:
            nothing = "no record that can be used|neither one JSON array|nothing of .* can be used"
            assert re.search(nothing, str(error)), (size, error)
            continue
        assert found == texts[: len(found)]
        assert len(ledger.cut_short) <= 1
        assert size < len(content) or (found == texts and ledger == Ledger())
        noted += len(ledger.cut_short)
    assert noted > len(content) / 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gb18030"])
def test_cuts_in_other_encodings_have_their_byte(tmp_path: Path, encoding: str) -> None:
    for name, whole, rest in (
        ("a.jsonl", '{"text": "你"}\n{"text": "y"}\n', '{"text": "c'),
        ("a.json", '[{"text": "你"}, {"text": "y"}, ', '{"text": "c'),
        ("a.csv", 'id,text\n1,"你"\n2,y\n', "3"),
    ):
        (tmp_path / name).write_bytes((whole + rest).encode(encoding))
        ledger = Ledger()
        assert read(tmp_path / name, ledger=ledger, encoding=encoding) == ["你", "y"]
        assert [cut["position"] for cut in ledger.cut_short] == [len(whole.encode(encoding))]


def test_a_last_line_that_is_wrong_rather_than_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for last in ('{"text": oops}', "oops", '{"text": "x"} trailing', '{"text": "x\ty"}'):
        path.write_text('{"text": "x"}\n' + last)
        with pytest.raises(ValueError, match=r"a\.jsonl:2: the line is not JSON"):
            read(path, ledger=Ledger())


def test_a_file_cut_in_its_first_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x')
    (tmp_path / "a.json").write_text('[{"text": "x')
    (tmp_path / "a.csv").write_text('id,text\n1,"x')
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x")[:5])
    for name, message in (
        ("a.jsonl", "no record that can be used"),
        ("a.json", "no record that can be used"),
        ("a.csv", r"nothing of .*a\.csv can be used \(it is cut short: the row at line 2, .* is lost\)"),
        ("a.txt.gz", r"a\.txt\.gz"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, ledger=Ledger())


def test_an_open_quote_that_swallows_too_much_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.text_tables.LARGEST_CUT_CHARACTERS", 1000)
    (tmp_path / "a.csv").write_text('id,text\n1,x\n2,"y\n' + "3,z\n" * 500 + "4,end")
    with pytest.raises(ValueError, match=r"a\.csv:3: the row is not valid CSV"):
        read(tmp_path / "a.csv", ledger=Ledger())


# Large ones


def test_a_large_json_array_cut_in_its_last_record_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = json.dumps({"id": 1, "text": "All work and no play. " * 300}) + ",\n"
    count = 100 * 10**6 // len(record)
    with open(path, "w") as file:
        file.write("[")
        for _ in range(count):
            file.write(record)
        file.write(record[:1000])
    start = time.monotonic()
    documents, longest, growth, cuts = read_in_a_process(path)
    assert documents == count
    assert longest == 6600
    assert cuts == [{"file": str(path), "position": 1 + count * len(record), "lost": f"record {count + 1}"}]
    assert growth < 40 * MIB
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_a_line_of_50_mb(tmp_path: Path, name: str) -> None:
    line = "word " * 10_000_000
    before, behind = {
        "a.jsonl": ('{"text": "first"}\n{"text": "', '"}\n{"text": "last"}\n'),
        "a.json": ('[{"text": "first"}, {"text": "', '"}, {"text": "last"}]'),
        "a.txt": ("first\n", "\nlast\n"),
        "a.csv": ('text\nfirst\n"', '"\nlast\n'),
    }[name]
    path = tmp_path / name
    path.write_text(before + line + behind)
    documents, longest, growth, cuts = read_in_a_process(path)
    assert cuts == []
    if name == "a.txt":
        assert documents == 3
        assert longest <= TEXT_BYTES + MIB
        assert growth < 120 * MIB
    else:
        assert (documents, longest) == (3, 50_000_000)
        assert growth < (700 if name == "a.csv" else 400) * MIB  # Python's csv and io hold four bytes a character


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_column_stores_are_read_in_bounded_memory(tmp_path: Path, container: str) -> None:
    path, rows = tmp_path / f"a.{container}", 10_000
    batch = pa.table({"id": range(rows), "text": ["word " * 4000] * rows})  # 200 MB
    if container == "parquet":
        parquet.write_table(batch, path, use_dictionary=False)
    else:
        with pa.ipc.new_stream(str(path), batch.schema) as writer:
            writer.write_table(batch, max_chunksize=1000)
    documents, longest, growth, _ = read_in_a_process(path)
    assert (documents, longest) == (rows, 20_000)
    assert growth < 100 * MIB


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "' + "y" * 3000, r"a\.jsonl:2: the line is longer than \d+ MiB"),
        ("a.json", '[{"text": "x"}, {"text": "' + "y" * 3000, r"a\.json, record 2 is longer than \d+ MiB, or a quote"),
        ("a.csv", 'id,text\n1,x\n2,"' + "y\n" * 2000, r"a\.csv:3: the row is not valid CSV \(field larger than"),
        ("a.csv", "id,text\n1," + "é" * 40_000 + "\n", r"a\.csv has a line of more than \d+ MiB"),
    ],
)
def test_a_record_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    monkeypatch.setattr("data_pipeline.text_tables.MAX_RECORD_BYTES", 1000)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, ledger=Ledger(), skip_bad_rows=True)


def test_large_texts_are_cut_at_line_ends_else_at_white_space_else_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.text_tables.TEXT_BYTES", 10_000)
    monkeypatch.setattr("data_pipeline.byte_streams.CHUNK_BYTES", 1000)
    path = tmp_path / "a.txt"
    for text, ends in (
        ("A líne of words.\r\n" * 5000, "\n"),
        ("wörds " * 20_000, " "),
        ("ünbroken" * 10_000, "ünbroken"),
        ("title\n" + "wörds " * 20_000, " "),
    ):
        path.write_bytes(text.encode())
        pieces = read(path)
        assert len(pieces) > 5
        assert "".join(pieces) == text
        assert all(piece[-1] in ends for piece in pieces)
        assert max(len(piece.encode()) for piece in pieces) <= 11_010
        assert min(len(piece.encode()) for piece in pieces[:-1]) >= 4000
    path.write_text("x" * 10_000)
    assert len(read(path)) == 1
    path.write_text("one\n" * 6000)
    files, _ = find_files([str(path)], ReadOptions())
    second = list(read_documents(files[0], ReadOptions()))[1]
    assert second.location == f"{path}:{read(path)[0].count(chr(10)) + 1}"


# Characters


def test_nul_bytes_stay_where_they_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b\n")
    (tmp_path / "b.jsonl").write_text('{"text": "a\\u0000b"}\n')
    (tmp_path / "c.csv").write_bytes(b"id,text\n1,a\0b\n")
    assert read(tmp_path) == ["a\0b\n", "a\0b", "a\0b"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_utf16_taken_for_utf8_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = '[{"text": "plain é"}]' if name == "a.json" else 'text\n"plain é"\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"looks like {encoding} without a byte-order mark .*--encoding {encoding}$"):
        read(tmp_path / name)


def test_mixed_encodings_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}\n'.encode() + '{"text": "é"}\n'.encode("cp1252") + b'{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the text is not valid utf-8; it looks like cp1252"):
        read(path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    os.rename(path, tmp_path / "b.txt.gz")
    with pytest.raises(ValueError, match=r"b\.txt\.gz:2: the text is not valid utf-8; it looks like cp1252"):
        read(tmp_path / "b.txt.gz")


def test_duplicate_columns_are_refused_everywhere(tmp_path: Path) -> None:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"a\.arrow has several columns named 'text': rename them"):
        read(tmp_path / "a.arrow")
    (tmp_path / "a.tsv").write_text("text\tid\ttext\na\tb\tc\n")
    with pytest.raises(ValueError, match=r"a\.tsv has several columns named 'text': rename them"):
        read(tmp_path / "a.tsv")


def test_a_cut_without_a_ledger_is_an_error_of_the_part_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y')
    file = SourceFile(path, "a.jsonl", "jsonl", path.stat().st_size)
    with pytest.raises(ValueError, match=r"a\.jsonl is cut short at byte 14"):
        list(read_documents(file, ReadOptions()))
