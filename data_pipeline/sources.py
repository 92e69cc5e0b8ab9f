"""User files as a stream of documents: text, CSV, JSONL, Parquet, chat tables and Hugging Face datasets saved on disk.

Memory is bounded by the largest single document; of a text file that is the file.
"""

import codecs
import csv
import glob
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as parquet

FORMATS = ("auto", "text", "csv", "jsonl", "parquet", "chat")
CONTAINERS = {
    "text": (".txt", ".text", ".md"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
DELIMITERS = (",", ";", "\t", "|")
MESSAGES_FIELD = "messages"
BATCH_ROWS = 1024
# These change what a turn means; other keys beside role and content (ids, weights) say something about a message only.
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the fields are those of ``prepare.PrepareOptions``."""

    format: str = "auto"
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    delimiter: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"the format {self.format!r} is unknown; the formats are {', '.join(FORMATS)}")
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(f"a delimiter is one character, not {self.delimiter!r}")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"the encoding {self.encoding!r} is unknown; examples: utf-8, gb18030, cp1252") from None


@dataclass(frozen=True)
class SourceFile:
    """One input: a file, or the folder of a Hugging Face dataset."""

    path: Path
    name: str  # relative to the input it was found under: what manifests and reports call it
    container: str  # a key of CONTAINERS, or "dataset"
    bytes: int


@dataclass(frozen=True)
class Document:
    """One document. ``text`` of a chat is empty; ``messages`` of a text is None."""

    location: str  # "file:line" (or row), for error messages
    text: str
    messages: list[dict[str, str]] | None
    bytes_read: int  # how far into its file reading has come, for progress


def find_files(inputs: Sequence[str], options: ReadOptions) -> tuple[list[SourceFile], list[str]]:
    """Resolve files, folders (recursively, in sorted order, by known extension) and globs to source files.

    Returns:
        The files, and the paths found in folders but left out for their extension; hidden ones are in neither.

    Raises:
        FileNotFoundError: an input does not exist or matches nothing.
        ValueError: an empty file, a file of unknown kind, a folder without a readable file.
    """
    found: dict[Path, SourceFile] = {}
    ignored: list[str] = []
    for entry in inputs:
        path = Path(entry)
        if path.exists():
            files = _files_under(path, options, ignored)
        elif glob.has_magic(entry):
            # A glob matches folders beside files; only folders named as such are searched.
            matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True))]
            matches = [match for match in matches if match.is_file() or _is_dataset(match)]
            files = [file for match in matches for file in _files_under(match, options, ignored)]
        else:
            raise FileNotFoundError(f"there is no file or folder {entry!r}")
        if not files:
            wanted = ", ".join(_wanted_extensions(options))
            raise FileNotFoundError(f"{entry!r} gives no file to read; the extensions read are {wanted}")
        for file in files:
            if file.bytes == 0:
                raise ValueError(f"{file.path} is empty: remove it or fill it")
            found.setdefault(file.path.resolve(), file)  # inputs that overlap name a file once
    return list(found.values()), ignored


def content_kind(file: SourceFile, options: ReadOptions) -> str:
    """Whether the documents of the file are "text" or "chat", from the format asked for and the file's columns.

    Raises:
        ValueError: the columns needed for that are missing or ambiguous, or the file cannot be read at all.
    """
    if file.container == "text":
        return "text"
    columns = _columns(file, options)
    pair = (options.prompt_field, options.response_field)
    is_chat = MESSAGES_FIELD in columns or set(pair) <= set(columns)
    kind = "chat" if options.format == "chat" or (options.format == "auto" and is_chat) else "text"
    listed = ", ".join(repr(name) for name in columns)
    if kind == "text" and options.text_field not in columns:
        raise ValueError(
            f"{file.path} has no column {options.text_field!r}; its columns are {listed}: choose one with --text-field"
        )
    if kind == "chat" and not is_chat:
        raise ValueError(
            f"{file.path} has neither a column {MESSAGES_FIELD!r} nor both {pair[0]!r} and {pair[1]!r}; its "
            "columns are "
            f"{listed}: choose them with --prompt-field and --response-field"
        )
    return kind


def read_documents(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a file in order. ValueError names file and line (or row) of the first bad one."""
    kind = content_kind(file, options)
    if file.container == "text":
        yield _text_document(file, options)
        return
    rows = {"csv": _csv_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows, "dataset": _dataset_rows}
    for location, row, bytes_read in rows[file.container](file, options):
        if kind == "chat":
            yield Document(location, "", _messages(location, row, options), bytes_read)
        else:
            yield Document(location, _string_field(location, row, options.text_field), None, bytes_read)


def _wanted_extensions(options: ReadOptions) -> list[str]:
    if options.format in CONTAINERS:
        return list(CONTAINERS[options.format])
    kinds = [kind for kind in CONTAINERS if options.format != "chat" or kind != "text"]
    return [extension for kind in kinds for extension in CONTAINERS[kind]]


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _files_under(path: Path, options: ReadOptions, ignored: list[str]) -> list[SourceFile]:
    if path.is_file():
        return [SourceFile(path, path.name, _container(path, options), path.stat().st_size)]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if _is_dataset(child))
        raise ValueError(f"{path} is a dataset with the splits {', '.join(splits)}: give one, as {path / splits[0]}")
    if _is_dataset(path):
        return [SourceFile(path, path.name, "dataset", sum(part.stat().st_size for part in path.glob("*.arrow")))]
    wanted = _wanted_extensions(options)
    files = []
    for child in sorted(path.rglob("*"), key=lambda child: child.relative_to(path).as_posix()):
        name = child.relative_to(path).as_posix()
        if not child.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        if child.suffix.lower() in wanted:
            files.append(SourceFile(child, name, _container(child, options), child.stat().st_size))
        else:
            ignored.append(str(child))
    return files


def _container(path: Path, options: ReadOptions) -> str:
    if options.format in CONTAINERS:
        return options.format
    for container, extensions in CONTAINERS.items():
        if path.suffix.lower() in extensions and not (options.format == "chat" and container == "text"):
            return container
    known = ", ".join(_wanted_extensions(options))
    raise ValueError(f"{path}: the extension {path.suffix!r} is unknown (known: {known}); say what it is with --format")


def _columns(file: SourceFile, options: ReadOptions) -> list[str]:
    """Names of a table's columns; of JSONL the keys of the first record."""
    if file.container == "csv":
        return _csv_header(file, options)[1]
    if file.container == "jsonl":
        first = next(_jsonl_rows(file, options), None)
        return list(first[1]) if first else []
    names = list(_dataset(file).column_names if file.container == "dataset" else _parquet_file(file).schema_arrow.names)
    return _refuse_duplicates(file, names)


def _refuse_duplicates(file: SourceFile, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{file.path} has several columns named {', '.join(map(repr, repeated))}: rename them")
    return names


# Fields


def _string_field(location: str, row: dict[str, Any], field: str) -> str:
    if field not in row:
        listed = ", ".join(repr(name) for name in row)
        raise ValueError(f"{location}: there is no field {field!r}; the fields are {listed}")
    value = row[field]
    if not isinstance(value, str):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{location}: the field {field!r} is {shown}, not a text: correct or remove the row")
    if not value.isascii():
        _refuse_lone_surrogates(location, field, value)
    return value


def _refuse_lone_surrogates(location: str, field: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{location}: the field {field!r} holds half of a surrogate pair ({value[error.start]!r}), which is no text"
        ) from None


def _messages(location: str, row: dict[str, Any], options: ReadOptions) -> list[dict[str, str]]:
    if MESSAGES_FIELD not in row:
        prompt = _string_field(location, row, options.prompt_field)
        response = _string_field(location, row, options.response_field)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    value = row[MESSAGES_FIELD]
    if isinstance(value, str):  # a table of plain columns holds the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{location}: the field {MESSAGES_FIELD!r} is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{location}: the field {MESSAGES_FIELD!r} is not a list of objects with role and content")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"{location}, message {number}"
        for key in UNSUPPORTED_MESSAGE_KEYS:
            if message.get(key):
                raise ValueError(f"{where}: the key {key!r} is not supported; messages have role and content")
        messages.append({key: _string_field(where, message, key) for key in ("role", "content")})
    return messages


# Text of any encoding


def _open_text(file: SourceFile, options: ReadOptions) -> tuple[io.TextIOWrapper, BinaryIO]:
    """The file as text, line ends as they are and any byte-order mark skipped; and the raw file, for its position."""
    raw = open(file.path, "rb")  # noqa: SIM115 - closed with the wrapper
    start = raw.read(4)
    raw.seek(0)
    encoding = codecs.lookup(options.encoding).name
    if encoding in ("utf-8", "utf-8-sig"):
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raw.close()
            raise ValueError(f"{file.path} begins with the byte-order mark of UTF-16: read it with --encoding utf-16")
    elif start.startswith(codecs.BOM_UTF8):
        raw.close()
        raise ValueError(
            f"{file.path} begins with the byte-order mark of UTF-8, but {options.encoding} was asked for: "
            "read it with --encoding utf-8"
        )
    text = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")
    try:
        # Only the plain utf-16 and utf-32 codecs take the mark away; elsewhere it comes as the first character.
        if text.read(1) != "\ufeff":
            text.seek(0)
    except UnicodeError:
        text.close()
        raise
    return text, raw


def _lines(file: SourceFile, options: ReadOptions) -> Iterator[tuple[str, int]]:
    """(line with its end, bytes read so far); lines end with a line feed or a carriage return, as csv wants them."""
    try:
        text, raw = _open_text(file, options)
        with text:
            for line in text:
                yield line, raw.tell()
    except UnicodeError:
        raise _undecodable(file.path, options.encoding) from None


def _text_document(file: SourceFile, options: ReadOptions) -> Document:
    try:
        text, _ = _open_text(file, options)
        with text:
            content = text.read()
    except UnicodeError:
        raise _undecodable(file.path, options.encoding) from None
    if not content:
        raise ValueError(f"{file.path} holds nothing but a byte-order mark: remove it or fill it")
    return Document(str(file.path), content, None, file.bytes)


def _undecodable(path: Path, encoding: str) -> ValueError:
    """Read the file again to say on which line decoding fails and which encoding fits."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with open(path, "rb") as raw:
        for bytes_line in raw:
            try:
                decoder.decode(bytes_line)
            except UnicodeError:
                break
            line += 1
        else:
            return ValueError(f"{path} ends in the middle of a character of {encoding}: the file is cut short")
        sample = bytes_line + raw.read(2**20)
    likely = _likely_encoding(sample)
    if likely is None or likely == encoding:
        return ValueError(f"{path}:{line}: the text is not valid {encoding}, nor any other encoding that is recognised")
    return ValueError(
        f"{path}:{line}: the text is not valid {encoding}; it looks like {likely}: read it with --encoding {likely}"
    )


def _likely_encoding(sample: bytes) -> str | None:
    if b"\0" in sample:
        return None  # no text in an encoding that keeps ASCII as it is
    for encoding in ("utf-8", "gb18030"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeError:
            continue
        if encoding == "utf-8":
            return encoding
        # A Western letter and the letter behind it often make a rare Chinese character; common ones are in GB2312.
        other = [character for character in text if not character.isascii()]
        common = "".join(other).encode("gb2312", errors="ignore").decode("gb2312")
        if len(common) * 2 > len(other):
            return encoding
    return "cp1252"


# Tables


def _csv_header(file: SourceFile, options: ReadOptions) -> tuple[str, list[str]]:
    """The delimiter and the column names of a CSV file."""
    csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is shorter than many documents
    if options.delimiter:
        delimiters: tuple[str, ...] = (options.delimiter,)
    else:
        delimiters = ("\t",) if file.path.suffix.lower() == ".tsv" else DELIMITERS
    headers = {delimiter: _first_row(file, options, delimiter) for delimiter in delimiters}
    wanted = {options.text_field, MESSAGES_FIELD, options.prompt_field}
    candidates = [delimiter for delimiter in headers if wanted & set(headers[delimiter])] or list(headers)
    widest = max(len(headers[delimiter]) for delimiter in candidates)
    best = [delimiter for delimiter in candidates if len(headers[delimiter]) == widest]
    if len(best) > 1 and widest > 1:
        raise ValueError(
            f"{file.path}: the columns may be divided by {' or '.join(map(repr, best))}: say which with --delimiter"
        )
    if not headers[best[0]]:
        raise ValueError(f"{file.path} has no header line that can be read as CSV with the delimiter {best[0]!r}")
    return best[0], _refuse_duplicates(file, headers[best[0]])


def _first_row(file: SourceFile, options: ReadOptions, delimiter: str) -> list[str]:
    lines = (line for line, _ in _lines(file, options))
    try:
        return next((row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row), [])
    except csv.Error:
        return []  # quotes that another delimiter explains


def _csv_rows(file: SourceFile, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any], int]]:
    delimiter, names = _csv_header(file, options)
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for line, bytes_read in _lines(file, options):
            position = bytes_read
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header_seen = False
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{file.path}:{line}: the row is not valid CSV ({error}); a quote inside a quoted field is written "
                "twice"
            ) from None
        if row is None:
            return
        if not row:
            continue  # an empty line is no row
        if not header_seen:
            header_seen = True
        elif len(row) != len(names):
            raise ValueError(f"{file.path}:{line}: the row has {len(row)} fields, the header has {len(names)}")
        else:
            yield f"{file.path}:{line}", dict(zip(names, row, strict=True)), position


def _jsonl_rows(file: SourceFile, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any], int]]:
    for number, (line, position) in enumerate(_lines(file, options), start=1):
        if not line.strip():
            continue
        location = f"{file.path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{location}: the line is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{location}: the line holds a {type(row).__name__}, not an object with fields")
        yield location, row, position


def _parquet_file(file: SourceFile) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(file.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.path} cannot be read as Parquet: {error}") from None


def _parquet_rows(file: SourceFile, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any], int]]:
    table = _parquet_file(file)
    batches = table.iter_batches(BATCH_ROWS, columns=_columns_to_read(table.schema_arrow.names, options))
    yield from _arrow_rows(file, batches, table.metadata.num_rows)


def _dataset(file: SourceFile) -> Any:
    import datasets  # two seconds to import, and only this container needs it

    try:
        return datasets.load_from_disk(str(file.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.path} cannot be read as a Hugging Face dataset: {error}") from None


def _dataset_rows(file: SourceFile, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any], int]]:
    dataset = _dataset(file)
    dataset = dataset.select_columns(_columns_to_read(dataset.column_names, options)).with_format("arrow")
    yield from _arrow_rows(file, dataset.iter(batch_size=BATCH_ROWS), len(dataset))


def _columns_to_read(columns: list[str], options: ReadOptions) -> list[str]:
    used = (options.text_field, MESSAGES_FIELD, options.prompt_field, options.response_field)
    return [name for name in columns if name in used]


def _arrow_rows(file: SourceFile, batches: Iterable[Any], rows: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file.path}, row {number}", row, file.bytes * number // rows
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise ValueError(f"{file.path} cannot be read behind row {number}: {error}") from None
