"""User files as a stream of documents: finding them, cutting them into units of work, and reading them.

Memory is bounded by the largest single row, whatever the size of a file; the readers are in the modules named for what
they read.
"""

import glob
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data_pipeline import arrow_tables, text_tables
from data_pipeline.byte_streams import COMPRESSIONS, keeps_ascii, open_bytes
from data_pipeline.conversations import conversation, conversation_fields, holds_conversations
from data_pipeline.documents import (
    BadRow,
    Document,
    Ledger,
    Part,
    Reading,
    ReadOptions,
    Row,
    SourceFile,
    Unit,
    string_field,
)
from data_pipeline.megatron import MegatronDocuments, megatron_documents
from data_pipeline.remote_blocks import is_url
from data_pipeline.remote_files import describe_file, list_files
from data_pipeline.templates import template_columns

CONTAINERS = {
    "text": (".txt", ".text", ".md"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
    "megatron": (".bin", ".idx"),
}
COMPRESSIBLE = ("text", "csv", "jsonl", "json")
UNIT_BYTES = 128 * 2**20
FIRST_RECORDS = 100  # looked at for their keys where the first may be a bad one


# Finding files


def find_files(inputs: Sequence[str], options: ReadOptions) -> tuple[list[SourceFile], list[str]]:
    """Resolve files, folders (recursively, in sorted order, by known extension) and globs, here or at URLs, and hf://
    names to source files.

    Returns:
        The files, and the paths found in folders but left out for their extension; hidden ones are in neither.

    Raises:
        FileNotFoundError: an input does not exist or matches nothing.
        ValueError: an empty file, a file of unknown kind, a folder without a readable file, a hub that does not answer.
    """
    found: dict[str, SourceFile] = {}
    ignored: list[str] = []
    for entry in inputs:
        files = _files_of(entry, options, ignored)
        if not files:
            wanted = ", ".join(_wanted_extensions(options))
            raise FileNotFoundError(
                f"{entry!r} gives no file to read; the extensions read are {wanted}, those of text also with "
                f"{', '.join(COMPRESSIONS)} behind them"
            )
        for file in files:
            if file.bytes == 0 and file.container != "hub":
                raise ValueError(f"{file.label} is empty: remove it or fill it")
            found.setdefault(file.place, file)  # inputs that overlap name a file once
    return [_with_layout(file) for file in found.values()], ignored


def content_paths(file: SourceFile) -> list[Path]:
    """The files here whose bytes are the content; none of a hub dataset or at a URL, which have a version."""
    if file.container == "dataset":
        return sorted(file.path.iterdir())
    if file.container == "megatron":
        return [file.path, file.path.with_suffix(".idx")]
    return [] if file.container == "hub" or file.url else [file.path]


def _files_of(entry: str, options: ReadOptions, ignored: list[str]) -> list[SourceFile]:
    if entry.startswith(arrow_tables.HUB_PREFIX):
        return [arrow_tables.hub_file(entry)]
    if is_url(entry):
        return _files_at(entry, options, ignored)
    path = Path(entry)
    if path.exists():
        return _files_under(path, options, ignored)
    if glob.has_magic(entry):
        # A glob matches folders beside files; only folders named as such are searched.
        matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True))]
        matches = [match for match in matches if match.is_file() or _is_dataset(match)]
        return [file for match in matches for file in _files_under(match, options, ignored)]
    if Path(entry + ".idx").is_file():  # Megatron's tools name a pair by what its two files share
        return _files_under(Path(entry + ".idx"), options, ignored)
    raise FileNotFoundError(f"there is no file or folder {entry!r}")


def _wanted_extensions(options: ReadOptions) -> list[str]:
    if options.format in CONTAINERS:
        return list(CONTAINERS[options.format])
    kinds = [kind for kind in CONTAINERS if not options.wants_chat or kind not in ("text", "megatron")]
    return [extension for kind in kinds for extension in CONTAINERS[kind]]


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _extensions(path: Path) -> tuple[str, str]:
    """(the extension that tells the container, the compression), lower case; each may be empty."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def _files_under(path: Path, options: ReadOptions, ignored: list[str]) -> list[SourceFile]:
    if path.is_file():
        return [_source_file(path, path.name, options)]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if _is_dataset(child))
        raise ValueError(f"{path} is a dataset with the splits {', '.join(splits)}: give one, as {path / splits[0]}")
    if _is_dataset(path):
        return [_dataset_file(path, path.name)]
    wanted = _wanted_extensions(options)
    files = []
    for child in sorted(_walk(path), key=lambda child: child.relative_to(path).as_posix()):
        name = child.relative_to(path).as_posix()
        extension = _extensions(child)[0]
        pair = {".bin": ".idx", ".idx": ".bin"}.get(extension)
        if child.is_dir():
            files.append(_dataset_file(child, name))
        elif extension not in wanted or (pair and not child.with_suffix(pair).is_file()):
            ignored.append(str(child))
        elif extension != ".idx":
            files.append(_source_file(child, name, options))
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Files, and folders that are datasets, under a folder; none that is hidden."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        datasets = [name for name in folders if _is_dataset(Path(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in datasets]
        yield from (Path(parent, name) for name in [*datasets, *names] if not name.startswith("."))


def _dataset_file(path: Path, name: str) -> SourceFile:
    return SourceFile(path, name, "dataset", sum(part.stat().st_size for part in path.glob("*.arrow")))


def _source_file(path: Path, name: str, options: ReadOptions) -> SourceFile:
    container, compression = _container(path, str(path), options)
    if container == "megatron":
        name, path = str(Path(name).with_suffix(".bin")), path.with_suffix(".bin")
        for half in (path, path.with_suffix(".idx")):
            if not half.is_file():
                raise FileNotFoundError(f"a Megatron pair is a .bin and an .idx file: {half} is missing")
    return SourceFile(path, name, container, path.stat().st_size, compression)


def _files_at(url: str, options: ReadOptions, ignored: list[str]) -> list[SourceFile]:
    """The file at a URL, or those under the folder there, or those that a pattern matches (not over HTTP)."""
    names, root = list_files(url)
    if names is None:
        return [_remote_file(url, Path(urlsplit(url).path).name, options)]
    files = []
    for name in names:
        if _extensions(Path(name))[0] in _wanted_extensions(options) and "/." not in f"/{name}":
            files.append(_remote_file(f"{root}/{name}", name, options))
        elif "/." not in f"/{name}":
            ignored.append(f"{root}/{name}")
    return files


def _remote_file(url: str, name: str, options: ReadOptions) -> SourceFile:
    container, compression = _container(Path(name), url, options)
    if container == "megatron":
        raise ValueError(
            f"{url}: Megatron pairs are read through memory maps: copy the .bin and the .idx file here first"
        )
    size, version = describe_file(url)
    return SourceFile(Path(name), name, container, size, compression, url, version)


def _container(path: Path, label: str, options: ReadOptions) -> tuple[str, str]:
    """(container, compression) by the name of a file, or as the options say."""
    extension, compression = _extensions(path)
    container = options.format if options.format in CONTAINERS else ""
    for candidate, extensions in CONTAINERS.items():
        if not container and extension in extensions and not (options.wants_chat and candidate == "text"):
            container = candidate
    if not container:
        known = ", ".join(_wanted_extensions(options))
        raise ValueError(
            f"{label}: the extension {extension!r} is unknown (known: {known}); say what it is with --format"
        )
    if compression and container not in COMPRESSIBLE:
        raise ValueError(f"{label}: {container} files are read as they are, not inside {path.suffix}: unpack it")
    return container, compression


def _with_layout(file: SourceFile) -> SourceFile:
    """A .json file whose first character opens no array holds one object a line, as .jsonl."""
    if file.container != "json":
        return file
    with open_bytes(file) as stream:
        start = stream.peek(4096).removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").lstrip(b"\xff\xfe \t\r\n")
    return file if start[:1] != b"{" else replace(file, container="jsonl")


# Units of work


def plan_units(files: Sequence[SourceFile], options: ReadOptions, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut the files into units of about ``unit_bytes`` as stored: small files share one, large ones are divided.

    The units in order, and the parts in each, give the documents in the order of the files. Nothing but the files
    (sizes, footers and indexes) decides, so all workers that plan get the same.

    Raises:
        ValueError: a footer or index cannot be read.
    """
    units: list[list[Part]] = []
    filled = 0
    for number, file in enumerate(files):
        edges = _edges(file, options, unit_bytes)
        for begin, end in itertools.pairwise(edges):
            size = file.bytes * (end - begin) // max(edges[-1], 1)
            if not units or filled + size > unit_bytes:
                units.append([])
                filled = 0
            units[-1].append(Part(number, begin, end))
            filled += size
    return [Unit(number, tuple(parts)) for number, parts in enumerate(units)]


def _edges(file: SourceFile, options: ReadOptions, unit_bytes: int) -> list[int]:
    """Where the file is cut, its begin and end included, in what its parts count (see ``Part``)."""
    pieces = max(1, -(-file.bytes // unit_bytes))
    if file.container == "jsonl" and not file.compression and keeps_ascii(options.codec):
        return _even_edges(file.bytes, pieces)
    if file.container == "parquet":
        metadata = arrow_tables.parquet_file(file).metadata
        sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])  # of each row group; edges are where an even division comes next to one
        wanted = starts[-1] * np.arange(1, pieces) // pieces
        return sorted({0, *np.searchsorted(starts, wanted).tolist(), len(sizes)})
    if file.container == "arrow" and arrow_tables.is_arrow_file(file):
        return _even_edges(arrow_tables.arrow_reader(file).num_record_batches, pieces)
    if file.container == "dataset":
        return _even_edges(len(arrow_tables.dataset_on_disk(file)), pieces)
    if file.container == "megatron":
        return MegatronDocuments(file).even_edges(pieces)
    return [0, 1]


def _even_edges(total: int, pieces: int) -> list[int]:
    return sorted({total * piece // pieces for piece in range(pieces + 1)}) if total else [0, 0]


# Reading


def content_kind(file: SourceFile, options: ReadOptions) -> str:
    """Whether the file holds "text", "chat" or token "ids", from the format asked for and the file's columns.

    Raises:
        ValueError: the columns needed for that are missing or ambiguous, or the file cannot be read at all.
    """
    if options.template is not None and file.container == "megatron":
        raise ValueError(f"{file.label} holds token ids; the template {options.template} needs a table")
    if file.container in ("text", "megatron"):
        return "text" if file.container == "text" else "ids"
    columns = _columns(file, options)
    is_chat = holds_conversations(columns, options)
    kind = "chat" if options.wants_chat or (options.format == "auto" and is_chat) else "text"
    listed = ", ".join(repr(name) for name in columns)
    if options.template is not None:
        if missing := [name for name in template_columns(options.template) if name not in columns]:
            raise ValueError(
                f"{file.label} has no column {missing[0]!r}, which the template {options.template} names; its columns "
                f"are {listed}"
            )
        return kind
    if kind == "text" and options.text_field not in columns:
        raise ValueError(
            f"{file.label} has no column {options.text_field!r}; its columns are {listed}: choose one with --text-field"
        )
    if kind == "chat" and not is_chat:
        raise ValueError(
            f"{file.label} has neither a column 'messages' nor both {options.prompt_field!r} and "
            f"{options.response_field!r} (nor 'conversations', nor 'instruction' and 'output'); its columns are "
            f"{listed}: choose them with --prompt-field and --response-field"
        )
    return kind


def _columns(file: SourceFile, options: ReadOptions) -> list[str]:
    """Names of a table's columns; of JSON the keys of the first record."""
    if file.container == "csv":
        names = text_tables.csv_header(file, options)[1]
    elif file.container in ("json", "jsonl"):
        return _keys(file, options)
    elif file.container == "parquet":
        names = arrow_tables.parquet_file(file).schema_arrow.names
    elif file.container == "arrow":
        names = arrow_tables.arrow_reader(file).schema.names
    elif file.container == "dataset":
        names = arrow_tables.dataset_on_disk(file).column_names
    else:
        names = arrow_tables.hub_column_names(arrow_tables.hub_dataset(file))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{file.label} has several columns named {', '.join(map(repr, repeated))}: rename them")
    return list(names)


def _keys(file: SourceFile, options: ReadOptions) -> list[str]:
    """The keys of the first record; of the first hundred, where bad ones are to be skipped."""
    reading = Reading(file, options, None, Ledger())
    keys: dict[str, None] = {}
    for number, (line, row, _) in enumerate(ROWS[file.container](reading), start=1):
        if isinstance(row, BadRow):
            reading.bad(line, row)
        else:
            keys |= dict.fromkeys(row)
        if not options.skip_bad_rows or number == FIRST_RECORDS:
            break
    if not keys:
        raise ValueError(f"{file.label} holds no record that can be used: remove it or fill it")
    return list(keys)


def read_documents(
    file: SourceFile, options: ReadOptions, part: Part | None = None, ledger: Ledger | None = None
) -> Iterator[Document]:
    """Yield the documents of a file, or of a part of it, in order.

    Args:
        file: of ``find_files``.
        options: how to read it.
        part: of ``plan_units``; None: the whole file. The parts of a file, one after another, give the whole file's
            documents whatever the sizes of the units.
        ledger: takes what is left out: the end of a file cut short and, where ``options.skip_bad_rows`` is set, bad
            rows. None: nothing may be left out.

    Raises:
        ValueError: a bad row that may not be skipped, with its file and line (or row); a damaged file; a whole file
            that loses rows and gives no document (of parts the caller sees that: ``Ledger.refuse_unusable``).
    """
    kind = content_kind(file, options)
    reading = Reading(file, options, part, ledger)
    reading.fields = conversation_fields(options) if kind == "chat" else (options.text_field,)
    if file.container == "text":
        documents = text_tables.text_documents(reading)
    elif kind == "ids":
        documents = megatron_documents(reading)
    else:
        documents = _documents_of_rows(reading, ROWS[file.container](reading), kind)
    first = next(documents, None)
    if first is not None:
        yield first
        yield from documents
    reading.finish()
    if first is None and part is None and ledger is not None:
        ledger.refuse_unusable({})


def read_tables(entry: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields, all columns, of each row of a table, of a folder of them, or of an ``hf://`` name.

    Raises:
        FileNotFoundError, ValueError: as ``find_files`` and ``read_documents``; a file that is no table.
    """
    options, path = ReadOptions(format="chat"), Path(entry)
    tables = _wanted_extensions(options)
    if path.is_file() and _extensions(path)[0] not in tables:
        raise ValueError(f"{path} is no table: the extensions of those are {', '.join(tables)}")
    for file in find_files([entry], options)[0]:
        reading = Reading(file, options)
        yield from ((reading.place.name(number), row) for number, row in _whole_rows(reading))


def _whole_rows(reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and all fields of each row of a table; a bad row, or a file that is cut short, is a ValueError."""
    reading.fields = tuple(_columns(reading.file, reading.options))
    for number, row, _ in ROWS[reading.file.container](reading):
        if isinstance(row, BadRow):
            reading.bad(number, row)
        yield number, row
    reading.finish()


def read_texts(file: SourceFile) -> Iterator[str]:
    """All texts of a file, whatever its columns: of a table each one in a row, also inside of lists and objects.

    Raises:
        ValueError: the file holds token ids, or cannot be read to its end.
    """
    reading = Reading(file, ReadOptions())
    if file.container == "text":
        yield from (document.text for document in text_tables.text_documents(reading))
    elif file.container == "megatron":
        raise ValueError(f"{file.label} holds token ids: give the texts")
    else:
        for _, row in _whole_rows(reading):
            yield from _texts_in(row)
        return
    reading.finish()


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _documents_of_rows(reading: Reading, rows: Iterator[Row], kind: str) -> Iterator[Document]:
    options, field = reading.options, reading.options.text_field
    make = tuple.__new__  # twice as fast as calling Document, where rows are short
    for number, row, position in rows:
        place = reading.place
        try:
            if type(row) is BadRow:
                raise row
            if kind == "text":
                text = row.get(field)
                if type(text) is not str:
                    text = string_field(row, field)
                yield make(Document, (place, number, text, None, None, None, position))
            else:
                messages, tools = conversation(row, options)
                yield Document(place, number, "", messages, tools, None, position)
        except BadRow as bad:
            reading.bad(number, bad)


ROWS: dict[str, Callable[[Reading], Iterator[Row]]] = {
    "csv": text_tables.csv_rows,
    "jsonl": text_tables.jsonl_rows,
    "json": text_tables.json_rows,
    "parquet": arrow_tables.parquet_rows,
    "arrow": arrow_tables.arrow_rows,
    "dataset": arrow_tables.dataset_rows,
    "hub": arrow_tables.hub_rows,
}
