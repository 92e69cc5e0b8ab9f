"""Reading user files: formats, encodings, and one clear sentence for each thing that can be wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_samples import CONVERSATION, write_jsonl

from data_pipeline.sources import ReadOptions, content_kind, find_files, read_documents


def _read(*inputs: Path | str, **options: Any) -> list[Any]:
    """Texts, or messages, of all documents."""
    chosen = ReadOptions(**options)
    files, _ = find_files([str(entry) for entry in inputs], chosen)
    documents = [document for file in files for document in read_documents(file, chosen)]
    return [document.text if document.messages is None else document.messages for document in documents]


def _csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_text_files_are_documents_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"zwei\r\nZeilen\n")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfwith a mark")
    assert _read(tmp_path) == ["with a mark", "zwei\r\nZeilen\n"]


def test_folders_globs_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("z.txt", "deep/er/a.txt", "deep/b.txt", ".hidden/c.txt", "deep/picture.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    files, ignored = find_files([str(tmp_path)], ReadOptions())
    assert [file.name for file in files] == ["deep/b.txt", "deep/er/a.txt", "z.txt"]
    assert ignored == [str(tmp_path / "deep" / "picture.png")]
    assert _read(tmp_path / "*.txt") == ["z.txt"]
    assert _read(f"{tmp_path}/**/*.txt") == ["deep/b.txt", "deep/er/a.txt", "z.txt"]
    assert _read(tmp_path / "z.txt", tmp_path) == ["z.txt", "deep/b.txt", "deep/er/a.txt"]  # each file once
    assert _read(tmp_path / "deep" / "picture.png", format="text") == ["deep/picture.png"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_quoted_newlines_any_delimiter_and_a_mark(tmp_path: Path, delimiter: str) -> None:
    rows = ["id,text,note".replace(",", delimiter), f'1{delimiter}"line one\nline {delimiter} ""two"""{delimiter}x', ""]
    path = _csv(tmp_path / "a.csv", "\ufeff" + "\r\n".join([*rows, f"2{delimiter}plain{delimiter}y", ""]))
    assert _read(path) == [f'line one\nline {delimiter} "two"', "plain"]
    assert _read(path, delimiter=delimiter, text_field="note") == ["x", "y"]


def test_delimiter_is_found_by_the_columns_wanted(tmp_path: Path) -> None:
    assert _read(_csv(tmp_path / "a.csv", "id;name, first, last;text\n1;x;good\n")) == ["good"]
    assert _read(_csv(tmp_path / "b.tsv", "id\ttext, long\n1\tgood\n"), text_field="text, long") == ["good"]
    assert _read(_csv(tmp_path / "c.csv", "text\nonly, one column\n".replace(",", " "))) == ["only  one column"]
    with pytest.raises(ValueError, match=r"divided by ',' or ';': say which with --delimiter"):
        _read(_csv(tmp_path / "d.csv", "a,b;c\n1,2;3\n"))


def test_long_csv_fields(tmp_path: Path) -> None:
    assert [len(text) for text in _read(_csv(tmp_path / "a.csv", f'text\n"{"x" * 500_000}"\n'))] == [500_000]


def test_encodings(tmp_path: Path) -> None:
    text = "标题,text\n一,你好世界。这是一个测试。\n"
    for encoding in ("gb18030", "utf-16", "utf-16-le", "utf-8-sig", "utf-8"):
        path = _csv(tmp_path / f"{encoding}.csv", text, encoding)
        assert _read(path, encoding=encoding) == ["你好世界。这是一个测试。"]
    marked = _csv(tmp_path / "marked.csv", "\ufeff" + text, "gb18030")
    assert _read(marked, encoding="GB18030", text_field="标题") == ["一"]


@pytest.mark.parametrize(
    ("encoding", "text", "likely"),
    [("gb18030", "编号,text\n一,你好世界\n", "gb18030"), ("cp1252", "id,text\n1,café “au” lait\n", "cp1252")],
)
def test_invalid_utf8_names_file_line_and_likely_encoding(
    tmp_path: Path, encoding: str, text: str, likely: str
) -> None:
    path = _csv(tmp_path / "a.csv", text, encoding)
    line = 1 if encoding == "gb18030" else 2
    message = rf"a\.csv:{line}: the text is not valid utf-8; it looks like {likely}: read it with --encoding {likely}"
    with pytest.raises(ValueError, match=message):
        _read(path)
    assert _read(path, encoding=likely) == [text.splitlines()[1].split(",")[1]]


def test_invalid_utf8_far_inside_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain\n" * 50_000 + "naïve".encode("cp1252") + b"\nplain\n")
    with pytest.raises(ValueError, match=r"a\.txt:50001: .*cp1252"):
        _read(path)
    path.write_bytes(b"plain\n\xff\x00\x01")
    with pytest.raises(ValueError, match=r"a\.txt:2: the text is not valid utf-8, nor any other encoding"):
        _read(path)
    path.write_bytes("plain\n你".encode()[:-1])
    with pytest.raises(ValueError, match=r"ends in the middle of a character|a\.txt:2"):
        _read(path)
    path.write_bytes("déjà vu".encode())
    with pytest.raises(ValueError, match=r"a\.txt:1: the text is not valid ascii; it looks like utf-8"):
        _read(path, encoding="ascii")


def test_byte_order_marks_of_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"byte-order mark of UTF-16: read it with --encoding utf-16"):
        _read(_csv(tmp_path / "a.csv", "text\nx\n", "utf-16"))
    with pytest.raises(ValueError, match=r"byte-order mark of UTF-8, but cp1252 was asked for"):
        _read(_csv(tmp_path / "b.csv", "text\nx\n", "utf-8-sig"), encoding="cp1252")


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two", "n": 1}, {"text": ""}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n" + b'{"text": "last"}')
    assert _read(path) == ["one\u2028two", "", "last"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:2: the line is not JSON"),
        ("[" * 100_000, r"a\.jsonl:2: the line is not JSON"),
        ('["text"]', r"a\.jsonl:2: the line holds a list"),
        ('{"body": "x"}', r"a\.jsonl:2: there is no field 'text'; the fields are 'body'"),
        ('{"text": null}', r"a\.jsonl:2: the field 'text' is null"),
        ('{"text": ["x"]}', r"a\.jsonl:2: the field 'text' is a list"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: the field 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        _read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", r"has no column 'text'; its columns are 'id', 'body': choose one with --text-field"),
        ("text,text\n1,x\n", r"several columns named 'text'"),
        ("id,text\n1\n", r"a\.csv:2: the row has 1 fields, the header has 2"),
        ("id,text\n1,x\n2,y,z\n", r"a\.csv:3: the row has 3 fields, the header has 2"),
        ('id,text\n1,"x\n', r"a\.csv:2: the row is not valid CSV"),
        ('id,text\n1,x\n2,"a "quote" b"\n', r"a\.csv:3: the row is not valid CSV"),
        ("\n\n", r"has no header line"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(_csv(tmp_path / "a.csv", content))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": range(3000), "text": [f"row {index}" for index in range(3000)]}), path)
    assert _read(path) == [f"row {index}" for index in range(3000)]
    with pytest.raises(ValueError, match=r"has no column 'body'; its columns are 'id', 'text'"):
        _read(path, text_field="body")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the field 'id' is a int, not a text"):
        _read(path, text_field="id")
    parquet.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: the field 'text' is null"):
        _read(path)
    parquet.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"several columns named 'text'"):
        _read(path)
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        _read(path)


def test_hugging_face_dataset_on_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    rows.select([2, 0]).save_to_disk(str(tmp_path / "d"))
    assert _read(tmp_path / "d") == ["three", "one"]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ValueError, match=r"with the splits test, train: give one, as .*dict/test"):
        _read(tmp_path / "dict")
    assert _read(tmp_path / "dict" / "train") == ["one", "two", "three"]
    chat = datasets.Dataset.from_list([{"messages": CONVERSATION}])
    chat.save_to_disk(str(tmp_path / "chat"))
    assert _read(tmp_path / "chat") == [CONVERSATION]


def test_chat_from_every_container(tmp_path: Path) -> None:
    pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"messages": CONVERSATION, "id": 1}, {"messages": pair, "id": 2}])
    assert _read(jsonl) == [CONVERSATION, pair]
    parquet.write_table(pa.Table.from_pylist([{"messages": CONVERSATION}]), tmp_path / "b.parquet")
    assert _read(tmp_path / "b.parquet") == [CONVERSATION]
    quoted = json.dumps(pair).replace('"', '""')
    assert _read(_csv(tmp_path / "c.csv", f'id,messages\n1,"{quoted}"\n')) == [pair]
    assert _read(_csv(tmp_path / "d.csv", "prompt;response\nHi;Ho\n")) == [pair]
    assert _read(_csv(tmp_path / "e.csv", "q;a\nHi;Ho\n"), format="chat", prompt_field="q", response_field="a") == [
        pair
    ]


def test_format_decides_between_text_and_chat(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Ho", "text": "plain"}])
    kinds = {}
    for format in ("auto", "jsonl", "chat"):
        options = ReadOptions(format=format)
        kinds[format] = content_kind(find_files([str(path)], options)[0][0], options)
    assert kinds == {"auto": "chat", "jsonl": "text", "chat": "chat"}
    assert _read(path, format="jsonl") == ["plain"]
    with pytest.raises(ValueError, match=r"neither a column 'messages' nor both 'q' and 'response'"):
        _read(path, format="chat", prompt_field="q")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("no JSON", r"a\.jsonl:1: the field 'messages' is not JSON"),
        ({"role": "user"}, "is not a list of objects"),
        (["Hi"], "is not a list of objects"),
        ([{"role": "user"}], r"a\.jsonl:1, message 1: there is no field 'content'"),
        ([{"role": "user", "content": None}], r"message 1: the field 'content' is null"),
        ([{"role": "user", "content": ["x"]}], "message 1: the field 'content' is a list"),
        ([{"role": "assistant", "content": "x", "tool_calls": ["x"]}], "'tool_calls' is not a list of objects"),
        ([{"role": "assistant", "content": "x", "thinking": "y"}], "'thinking' is not supported"),
        (
            [{"role": "narrator", "content": "x"}],
            "a.jsonl:1, message 1: the role 'narrator' is unknown; known are system, ",
        ),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "odd.xyz").write_text("x")
    (tmp_path / "folder").mkdir()
    for entry, error, message in (
        ("none.txt", FileNotFoundError, "there is no file or folder"),
        ("*.csv", FileNotFoundError, "no file matches|gives no file"),
        ("empty.txt", ValueError, r"empty\.txt is empty"),
        ("mark.txt", ValueError, "nothing but a byte-order mark"),
        ("odd.xyz", ValueError, r"the extension '\.xyz' is unknown .*--format"),
        ("folder", FileNotFoundError, "gives no file to read"),
    ):
        with pytest.raises(error, match=message):
            _read(tmp_path / entry)


def test_bad_options() -> None:
    for options, message in (
        ({"format": "xml"}, "format 'xml' is unknown"),
        ({"delimiter": ";;"}, "a delimiter is one character"),
        ({"encoding": "klingon"}, "encoding 'klingon' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            ReadOptions(**options)  # type: ignore[arg-type]
