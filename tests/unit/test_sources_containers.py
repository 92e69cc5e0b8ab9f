"""Every kind of file gives the documents that were put in."""

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pytest
import zstandard
from data_samples import CONVERSATION, write_jsonl
from source_samples import read, values

from data_pipeline.arrow_tables import hub_column_names, rows_of_dataset
from data_pipeline.documents import Reading
from data_pipeline.sources import (
    Ledger,
    ReadOptions,
    SourceFile,
    content_kind,
    content_paths,
    find_files,
    read_documents,
)

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": partial(bz2.compress, compresslevel=1),  # small blocks
    ".xz": lzma.compress,
}
TEXTS = [f"document {number}: naïve 你好 " + "word " * (number % 50) for number in range(3000)]
CONTENTS = {
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "a.json": json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False),
    "a.csv": "id,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS),
    "a.tsv": "id\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS),
}


@pytest.mark.parametrize("extension", ["", *COMPRESS])
@pytest.mark.parametrize("name", list(CONTENTS))
def test_tables_of_text_plain_and_compressed(tmp_path: Path, name: str, extension: str) -> None:
    content = CONTENTS[name].encode()
    (tmp_path / (name + extension)).write_bytes(COMPRESS[extension](content) if extension else content)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("extension", list(COMPRESS))
def test_streams_one_after_another_are_one_file(tmp_path: Path, extension: str) -> None:
    compress, path = COMPRESS[extension], tmp_path / f"a.txt{extension}"
    path.write_bytes(compress(b"one\n") + compress(b"two\n" * 100_000) + b"\0" * 8 + compress(b"three"))
    assert read(path) == ["one\n" + "two\n" * 100_000 + "three"]


def test_csv_with_carriage_returns_as_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\r1,"one\rline"\r2,two\r3,x')
    assert read(tmp_path / "a.csv") == ["one\rline", "two", "x"]
    (tmp_path / "a.csv").write_bytes(b"id,text\r1,one\r2\r3,three")
    with pytest.raises(ValueError, match=r"a\.csv:3: the row has 1 fields"):
        read(tmp_path / "a.csv", ledger=Ledger())


def test_zstandard_with_a_skippable_frame_and_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(b'{"text": "far"}\n') + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(struct.pack("<II", 0x184D2A50, 3) + b"abc" + frame)
    assert read(tmp_path / "a.jsonl.zst") == ["far"]


def test_compressed_files_under_another_name_are_named(tmp_path: Path) -> None:
    for extension, compress in COMPRESS.items():
        (tmp_path / "a.jsonl").write_bytes(compress(b'{"text": "x"}\n'))
        with pytest.raises(ValueError, match=rf"a\.jsonl is compressed .*ends in {extension}$"):
            read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz is damaged: its gzip data cannot be read near byte 14"):
        read(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"parquet files are read as they are, not inside \.gz"):
        read(tmp_path / "c.parquet.gz")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-7", "gb18030", "shift_jis", "utf-8-sig"])
def test_json_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    texts = [f"{number}: 日本\r\n" for number in range(2000)]
    rows = [{"text": text} for text in texts]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
    (tmp_path / "b.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
    assert read(tmp_path / "a.jsonl", encoding=encoding) == texts
    assert read(tmp_path / "b.json", encoding=encoding) == texts


def test_json_files_hold_an_array_or_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, expected in (
        ('\ufeff [{"text": "x"} ,\n\n{"text": "y", "n": [1, {"a": "]"}]}]\n ', ["x", "y"]),
        ('\ufeff\n{"text": "x", "score": NaN}\n{"text": "y"}\n', ["x", "y"]),
    ):
        path.write_text(content)
        assert read(path) == expected
    for content, message in (
        ("[]", "holds no record that can be used"),
        ('"text"', "neither one JSON array nor one JSON object a line"),
        ('[{"text": "x"}] [', "goes on behind its array"),
        ('[{"text": "x"} {"text": "y"}]', r"a\.json, record 1 is followed by '\{' instead of a comma"),
        (
            '[{"text": "x"}, {"text": oops}, {"text": "y"}]',
            r"a\.json, record 2 is not JSON .*where the next one begins",
        ),
        ('[{"text": "x"},]', r"record 2 is not JSON"),
        ('[{"text": "x"}, {"text": ' + "[" * 100_000, r"record 2 is nested too deeply"),
        ('[{"text": "x"}, 12]', r"a\.json, record 2: it is a int, not an object with fields"),
        ('[{"text": "x"}, {"text": "\\ud800"}]', r"a\.json, record 2: the field 'text' holds half of a surrogate pair"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_arrow_files_streams_and_feather(tmp_path: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS, "more": [[1]] * len(TEXTS)})
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    feather.write_feather(table, str(tmp_path / "compressed.feather"), compression="zstd")
    for name in ("file.arrow", "stream.arrow", "compressed.feather"):
        assert read(tmp_path / name) == TEXTS
    with pytest.raises(ValueError, match=r"file\.arrow, row 1: the field 'more' is a list"):
        read(tmp_path / "file.arrow", text_field="more")
    content = (tmp_path / "stream.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.arrow cannot be read behind .*cut\.arrow, row \d+"):
        read(tmp_path / "cut.arrow")
    (tmp_path / "none.arrow").write_bytes(b"this is no arrow")
    with pytest.raises(ValueError, match="cannot be read as Arrow"):
        read(tmp_path / "none.arrow")


def test_folders_hold_datasets_and_pairs_beside_files(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["in a dataset"]}).save_to_disk(str(tmp_path / "b" / "saved"))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "in a file"}])
    (tmp_path / "b" / "weights.bin").write_bytes(b"no index beside it")
    _megatron_pair(tmp_path / "c" / "pair", [[1]])
    files, ignored = find_files([str(tmp_path)], ReadOptions())
    assert [(file.name, file.container) for file in files] == [
        ("a.jsonl", "jsonl"),
        ("b/saved", "dataset"),
        ("c/pair.bin", "megatron"),
    ]
    assert ignored == [str(tmp_path / "b" / "weights.bin")]
    assert [path.name for path in content_paths(files[2])] == ["pair.bin", "pair.idx"]
    assert "state.json" in [path.name for path in content_paths(files[1])]
    with pytest.raises(FileNotFoundError, match=r"weights\.idx is missing"):
        find_files([str(tmp_path / "b" / "weights.bin")], ReadOptions())


def test_rows_of_a_streaming_dataset_are_those_of_one_on_disk(tmp_path: Path) -> None:
    import datasets

    rows = write_jsonl(tmp_path / "a.jsonl", [{"messages": CONVERSATION, "id": number} for number in range(5)])
    streaming = datasets.load_dataset(
        "json", data_files=str(rows), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    file = SourceFile(Path("hf:/owner/name"), "hf://owner/name/:train@abc", "hub", 0)
    reading = Reading(file, ReadOptions())
    reading.fields = ("messages",)
    assert hub_column_names(streaming) == ["messages", "id"]
    found = list(rows_of_dataset(reading, streaming, ["messages", "id"], batch_rows=2))
    assert [(number, row) for number, row, _ in found] == [(n, {"messages": CONVERSATION}) for n in range(1, 6)]
    assert reading.place.name(3) == "hf://owner/name/:train@abc, row 3"


def test_hub_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hf://owner/name/config:test cannot be reached: .*offline[^\n]*$"):
        find_files(["hf://owner/name/config:test"], ReadOptions())
    for entry in ("hf://", "hf://a/b/c/d", "hf://a//b"):
        with pytest.raises(ValueError, match="is not a dataset of the hub: it is written hf://OWNER/NAME"):
            find_files([entry], ReadOptions())


def _megatron_pair(
    prefix: Path, documents: list[list[int]], code: int = 8, modes: bool = False, split: bool = False
) -> Path:
    """A pair as Megatron writes it; ``split``: each document in sequences of one token."""
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.get(code, "<f4")
    sequences = [[token] for ids in documents for token in ids] if split else documents
    boundaries = np.cumsum([0, *(len(ids) if split else 1 for ids in documents)])
    lengths = np.array([len(ids) for ids in sequences])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    content += lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + boundaries.astype("<i8").tobytes()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".idx").write_bytes(content + b"\0" * len(sequences) * modes)
    flat = [token for ids in documents for token in ids]
    prefix.with_suffix(".bin").write_bytes(np.array(flat).astype(dtype).tobytes())
    return prefix


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("split", [False, True])
def test_megatron_pairs_give_ids(tmp_path: Path, code: int, split: bool) -> None:
    expected = [[5, 6, 7], [], [100], [9] * 40, []]
    prefix = _megatron_pair(tmp_path / "pair", expected, code, modes=split, split=split)
    for entry in (prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx")):
        files, _ = find_files([str(entry)], ReadOptions())
        assert content_kind(files[0], ReadOptions()) == "ids"
        documents = list(read_documents(files[0], ReadOptions()))
        assert [document.ids.tolist() for document in documents if document.ids is not None] == expected
        assert documents[2].location == f"{tmp_path / 'pair.bin'}, document 3"


@pytest.mark.parametrize(
    ("half", "begin", "replacement", "message"),
    [
        (".idx", 0, b"TNTIDX", r"pair\.idx is not an index of Megatron: it does not begin with MMIDIDX"),
        (".idx", 9, b"\2", "has the version 2"),
        (".idx", 17, b"\7", "the type 7, which is no integer type"),
        (".idx", 18, b"\3", "has 82 bytes, but its header needs 94"),
        (".idx", 34, b"\2", r"pair\.idx: the sequences behind document 0 do not follow one another"),
        (".idx", 66, b"\3", r"the boundaries of documents 1 and following are out of order"),
        (".idx", 74, b"\3", "do not run from 0 to its 2 sequences"),
        (".bin", 10, b"\1\1", r"pair\.bin has 12 bytes, but its index pair\.idx counts 10"),
        (".idx", 17, b"\3", r"document 2 holds the token -2, which is below 0"),
    ],
)
def test_megatron_pairs_that_do_not_fit(
    tmp_path: Path, half: str, begin: int, replacement: bytes, message: str
) -> None:
    path = _megatron_pair(tmp_path / "pair", [[5, 6, 7], [1, 65534]]).with_suffix(half)
    content = path.read_bytes()
    path.write_bytes(content[:begin] + replacement + content[begin + len(replacement) :])
    with pytest.raises(ValueError, match=message):
        files, _ = find_files([str(path)], ReadOptions())
        list(read_documents(files[0], ReadOptions()))


def test_values_of_documents_come_with_a_ledger_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    files, _ = find_files([str(path)], ReadOptions())
    ledger = Ledger()
    assert values(read_documents(files[0], ReadOptions(), None, ledger)) == ["x"]
    assert ledger == Ledger()
