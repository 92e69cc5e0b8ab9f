"""What reading sources is about: options, files, documents, parts that workers share out, and the ledger of losses.

Imports nothing of the project, so that every reader can use it.
"""

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMATS = ("auto", "text", "csv", "jsonl", "json", "parquet", "arrow", "megatron", "chat")
MAX_RECORD_BYTES = 256 * 2**20  # one row: above this, a quote or bracket that is never closed is the likelier reason
LOCATIONS_KEPT = 5

Message = dict[str, Any]
Row = tuple[int, Any, int]  # number in the part, a dict of fields or a BadRow, bytes of the file read so far


@dataclass(frozen=True)
class TaskTemplate:
    """What a row of a table becomes, as ``templates.parse_template`` reads it; ``{name}`` stands for a column."""

    file: str
    prompt: str  # the user's message
    response: str | None = None  # the assistant's; either this ...
    label: str | None = None  # ... or the column that holds the class, which is then the response
    system: str | None = None

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the fields are those of ``prepare.PrepareOptions``."""

    format: str = "auto"
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    delimiter: str | None = None
    encoding: str = "utf-8"
    skip_bad_rows: bool = False  # count bad rows in the ledger and go on, instead of stopping at the first
    template: TaskTemplate | None = None  # makes a conversation of each row of a table

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"the format {self.format!r} is unknown; the formats are {', '.join(FORMATS)}")
        if self.template is not None and self.format in ("text", "megatron"):
            raise ValueError(
                f"a template makes conversations of the rows of a table; the format {self.format} has none"
            )
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(f"a delimiter is one character, not {self.delimiter!r}")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"the encoding {self.encoding!r} is unknown; examples: utf-8, gb18030, cp1252") from None

    @property
    def wants_chat(self) -> bool:
        return self.format == "chat" or self.template is not None

    @property
    def codec(self) -> str:
        """The encoding's one name; utf-8 where a byte-order mark may or may not stand."""
        name = codecs.lookup(self.encoding).name
        return "utf-8" if name == "utf-8-sig" else name


@dataclass(frozen=True)
class SourceFile:
    """One input: a file, the folder of a Hugging Face dataset, or a dataset of the hub."""

    path: Path  # of a Megatron pair the .bin
    name: str  # relative to the input it was found under: what manifests and reports call it
    container: str  # text, csv, jsonl, json, parquet, arrow, megatron, dataset (a folder) or hub (hf://)
    bytes: int  # as stored; 0 of a hub dataset: unknown
    compression: str = ""  # "" or a value of byte_streams.COMPRESSIONS
    url: str = ""  # of a file that is read from afar; the path then only tells its name
    version: str = ""  # what its store says changes with its content

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.url or (self.name if self.container == "hub" else str(self.path))

    @property
    def place(self) -> str:
        """Equal where two inputs name the same file."""
        return self.url or str(self.path.resolve())


@dataclass(frozen=True)
class Part:
    """A piece of one file, ``[begin, end)`` in what its container counts.

    JSONL: bytes (the part owns the lines that begin in it); Parquet: row groups; Arrow files: record batches; datasets:
    rows; Megatron: documents. Everything else is whole: 0 to 1.
    """

    file: int  # index in the list of files
    begin: int
    end: int


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time."""

    number: int
    parts: tuple[Part, ...]


class BadRow(Exception):
    """A row that is no document. ``reason`` groups such rows in the ledger; the message tells of this one."""

    def __init__(self, reason: str, message: str, inside: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.inside = inside  # ", message 2"


def string_field(row: dict[str, Any], field: str, inside: str = "") -> str:
    """The text in a field. BadRow where it is missing, null, or anything but a text."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    if field not in row:
        listed = ", ".join(repr(name) for name in row)
        raise BadRow("missing field", f"there is no field {field!r}; the fields are {listed}", inside)
    shown = "null" if value is None else f"a {type(value).__name__}"
    reason = "null field" if value is None else "field that is not a text"
    raise BadRow(reason, f"the field {field!r} is {shown}, not a text: correct or remove the row", inside)


class Place:
    """Names rows of a part by their number in the file. What stands before the part is counted when first asked for."""

    __slots__ = ("_before", "_count_before", "_prefix")

    def __init__(self, prefix: str, count_before: Callable[[], int] | None = None) -> None:
        self._prefix = prefix
        self._count_before = count_before
        self._before = 0

    def name(self, number: int) -> str:
        """Of the part's ``number``-th line or row, counted from 1; "file:line" or "file, row number"."""
        if self._count_before is not None:
            self._before = self._count_before()
            self._count_before = None
        return f"{self._prefix}{self._before + number}" if number else self._prefix


class Document(NamedTuple):
    """One document: a text, a conversation (``messages``) or token ids. ``text`` of the latter two is empty."""

    place: Place
    number: int  # its line or row in the part
    text: str
    messages: list[Message] | None
    tools: list[Any] | None  # what the assistant of a conversation may call; goes to the chat template
    ids: np.ndarray | None  # [tokens], integers as stored
    bytes_read: int  # how far into its file reading has come, for progress

    @property
    def location(self) -> str:
        """ "file:line" (or row), for error messages."""
        return self.place.name(self.number)


def texts_of(document: Document) -> list[str]:
    """The text, or the contents of a conversation's messages."""
    if document.messages is None:
        return [document.text]
    return [message.get("content") or "" for message in document.messages]


def text_bytes(document: Document) -> int:
    """Its size in UTF-8."""
    return sum(len(text.encode()) for text in texts_of(document))


@dataclass
class Ledger:
    """What reading left out. Plain values: ``dataclasses.asdict`` gives JSON, and ``Ledger(**json)`` takes it back."""

    # reason: {"count": n, "locations": the first five}
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut_short: list[dict[str, Any]] = field(default_factory=list)  # {"file", "position" in bytes, "lost" in words}
    losses: dict[str, int] = field(default_factory=dict)  # file: rows skipped and cuts

    def skip(self, file: SourceFile, reason: str, location: str) -> None:
        entry = self.skipped.setdefault(reason, {"count": 0, "locations": []})
        entry["count"] += 1
        if len(entry["locations"]) < LOCATIONS_KEPT:
            entry["locations"].append(location)
        self.losses[file.label] = self.losses.get(file.label, 0) + 1

    def cut(self, file: SourceFile, position: int, lost: str) -> None:
        self.cut_short.append({"file": file.label, "position": position, "lost": lost})
        self.losses[file.label] = self.losses.get(file.label, 0) + 1

    def merge(self, other: "Ledger") -> None:
        """Add what came after; merging by unit number gives the same ledger whatever the workers were."""
        for reason, theirs in other.skipped.items():
            ours = self.skipped.setdefault(reason, {"count": 0, "locations": []})
            ours["count"] += theirs["count"]
            ours["locations"] = (ours["locations"] + theirs["locations"])[:LOCATIONS_KEPT]
        self.cut_short += other.cut_short
        for label, count in other.losses.items():
            self.losses[label] = self.losses.get(label, 0) + count

    def refuse_unusable(self, documents: Mapping[str, int]) -> None:
        """Raise ValueError for a file that lost rows and gave no document (``documents``: file label to count)."""
        for label in self.losses:
            if not documents.get(label):
                cuts = [f"it is cut short: {cut['lost']} is lost" for cut in self.cut_short if cut["file"] == label]
                bad = self.losses[label] - len(cuts)
                why = "; ".join(([f"bad rows: {bad}"] if bad else []) + cuts)
                raise ValueError(f"nothing of {label} can be used ({why}): remove it or replace it")


@dataclass
class Reading:
    """One pass over a part of a file: what a reader needs, and where it reports what it cannot use.

    ``ledger`` None: nothing may be lost, so bad rows and cut files raise ValueError.
    """

    file: SourceFile
    options: ReadOptions
    part: Part | None = None
    ledger: Ledger | None = None
    fields: tuple[str, ...] = ()  # the columns needed; readers of column stores read no others
    stream_cut: bool = False  # the content ended early: in a compressed stream or inside a character
    half_character_bytes: int = 0  # at the end of the content
    _cut_noted: bool = False

    def __post_init__(self) -> None:
        self.place = Place(self.file.label)

    def bad(self, number: int, row: BadRow) -> None:
        """Count a bad row, or raise it as ValueError with its place."""
        location = self.place.name(number) + row.inside
        if self.ledger is None or not self.options.skip_bad_rows:
            raise ValueError(f"{location}: {row}") from None
        self.ledger.skip(self.file, row.reason, location)

    def cut(self, position: int, lost: str) -> None:
        """Note that the file ends in the middle, at what byte the used part of it ends and what was behind.

        Of a compressed file the byte is that of its end, whatever ``position`` says.
        """
        self._cut_noted = True
        if self.file.compression:
            position = self.file.bytes
        if self.ledger is None:
            raise ValueError(f"{self.file.label} is cut short at byte {position}: {lost} is lost")
        self.ledger.cut(self.file, position, lost)

    def finish(self) -> None:
        """To be called at the end: notes a cut that fell between two rows."""
        if self.stream_cut and not self._cut_noted:
            self.cut(self.file.bytes, "what followed")
