"""Readers of what is stored as text: plain text, CSV and TSV, JSON lines, and JSON files that are one array."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import orjson

from data_pipeline import byte_streams
from data_pipeline.byte_streams import CHUNK_BYTES, check_start, is_cut, keeps_ascii, open_bytes, text_chunks
from data_pipeline.conversations import conversation_fields
from data_pipeline.documents import MAX_RECORD_BYTES, BadRow, Document, Place, Reading, ReadOptions, Row, SourceFile
from data_pipeline.remote_files import open_stored

DELIMITERS = (",", ";", "\t", "|")
TEXT_BYTES = 16 * 2**20  # a text file above this becomes several documents
BLOCK_BYTES = 2**16
LARGEST_CUT_CHARACTERS = 2**24  # a quote left open for longer is more likely a stray one than the row that was cut
SPACE = re.compile(r"[ \t\r\n]*")


# Plain text


def text_documents(reading: Reading) -> Iterator[Document]:
    """The file as one document; a large one as several, cut at a line end, else at white space, else anywhere."""
    path = reading.file.label
    pending, pending_bytes, line, bytes_read = "", 0, 1, 0
    for text, size in text_chunks(reading):
        pending += text
        pending_bytes += size
        bytes_read += size
        if pending_bytes > TEXT_BYTES:
            stop = _cut_point(pending)
            piece, pending = pending[:stop], pending[stop:]
            pending_bytes = _stored_bytes(pending, reading.options.codec)
            yield _text_document(reading, piece, line, min(bytes_read, reading.file.bytes))
            line += piece.count("\n")
    if not pending and line == 1:
        raise ValueError(f"{path} holds nothing but a byte-order mark: remove it or fill it")
    if pending:
        yield _text_document(reading, pending, line, reading.file.bytes)


def _text_document(reading: Reading, text: str, line: int, bytes_read: int) -> Document:
    place = reading.place if line == 1 else Place(f"{reading.place.name(0)}:{line}")
    return Document(place, 0, text, None, None, None, bytes_read)


def _cut_point(text: str) -> int:
    """Behind the last line end, else the last white space, of the second half; else the end."""
    stop = text.rfind("\n") + 1
    if stop * 2 < len(text):
        stop = len(text) if text[-1].isspace() else len(text) - len(text.rsplit(None, 1)[-1])
    return stop if stop * 2 >= len(text) else len(text)


# Lines


def _wide_lines(reading: Reading) -> Iterator[str]:
    """Lines of an encoding in which a line feed is not one byte."""
    pending = ""
    for text, _ in text_chunks(reading):
        pending += text
        # The last line stays, even with an end: its carriage return may be half of one.
        *lines, pending = io.StringIO(pending, newline="")
        yield from lines
    if pending:
        yield pending


def _stored_bytes(text: str, codec: str) -> int:
    """The size of the text inside a file: without the mark that encoding it by itself would begin with."""
    return len(text.encode(codec, "surrogateescape")) - len("".encode(codec))


class _CsvLines:
    """Lines for csv.reader, which wants carriage returns as line ends too; remembers what a bad row needs to tell."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.position = 0  # how far the file is read
        self.row: list[str] = []  # the lines handed out since the caller emptied it
        self.undecodable = False  # a line since the caller set it to False is not valid in the encoding

    def __iter__(self) -> Iterator[str]:
        for text in self._blocks() if keeps_ascii(self._reading.options.codec) else _wide_lines(self._reading):
            for line in io.StringIO(text, newline=""):
                self.row.append(line)
                yield line

    def at_end(self) -> bool:
        """Whether the last line handed out is the file's last and has no line end."""
        return bool(self.row) and not self.row[-1].endswith(("\n", "\r"))

    def begin_of_row(self) -> int:
        """The byte at which the row begins that is the file's last."""
        lost = _stored_bytes("".join(self.row), self._reading.options.codec)
        return self._reading.file.bytes - lost - self._reading.half_character_bytes

    def _blocks(self) -> Iterator[str]:
        """Whole lines, many at a time; single ones where some are not valid in the encoding."""
        reading, options = self._reading, self._reading.options
        with open_bytes(reading.file) as stream:
            stream.read(check_start(reading.file, options, stream.peek(4096)))
            at_start = True
            while data := stream.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += stream.readline(MAX_RECORD_BYTES)
                if len(data) > MAX_RECORD_BYTES + BLOCK_BYTES - 1:
                    raise ValueError(f"{reading.file.label} has a line of more than {MAX_RECORD_BYTES // 2**20} MiB")
                self.position = byte_streams.position_in_file(stream)
                whole = data.endswith(b"\n")  # else the file ends here, maybe inside a character
                reading.stream_cut = is_cut(stream)
                decoder = codecs.getincrementaldecoder(options.codec)()
                try:
                    text = decoder.decode(data, whole)
                except UnicodeError:
                    if not options.skip_bad_rows:
                        raise byte_streams.undecodable(reading.file, options.encoding) from None
                    yield from self._lines_one_by_one(data)
                else:
                    reading.half_character_bytes = len(decoder.getstate()[0])
                    reading.stream_cut |= reading.half_character_bytes > 0
                    yield text.removeprefix("\ufeff") if at_start else text
                at_start = False
            reading.stream_cut |= is_cut(stream)

    def _lines_one_by_one(self, data: bytes) -> Iterator[str]:
        codec = self._reading.options.codec
        for line in io.BytesIO(data):
            try:
                text = line.decode(codec)
            except UnicodeError:
                text = line.decode(codec, "surrogateescape")
                self.undecodable = True
            yield text


# CSV


def csv_header(file: SourceFile, options: ReadOptions) -> tuple[str, list[str]]:
    """The delimiter and the column names of a CSV file: the delimiter that gives wanted or the most columns."""
    wanted = {options.text_field, *conversation_fields(options)}
    csv.field_size_limit(MAX_RECORD_BYTES)  # the default of 131,072 characters is shorter than many documents
    if options.delimiter:
        delimiters: tuple[str, ...] = (options.delimiter,)
    else:
        delimiters = ("\t",) if ".tsv" in [suffix.lower() for suffix in file.path.suffixes[-2:]] else DELIMITERS
    headers = {delimiter: _first_row(file, options, delimiter) for delimiter in delimiters}
    candidates = [delimiter for delimiter in headers if wanted & set(headers[delimiter])] or list(headers)
    widest = max(len(headers[delimiter]) for delimiter in candidates)
    best = [delimiter for delimiter in candidates if len(headers[delimiter]) == widest]
    if len(best) > 1 and widest > 1:
        raise ValueError(
            f"{file.label}: the columns may be divided by {' or '.join(map(repr, best))}: say which with --delimiter"
        )
    if not headers[best[0]]:
        raise ValueError(f"{file.label} has no header line that can be read as CSV with the delimiter {best[0]!r}")
    return best[0], headers[best[0]]


def _first_row(file: SourceFile, options: ReadOptions, delimiter: str) -> list[str]:
    lines = iter(_CsvLines(Reading(file, options)))
    try:
        return next((row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row), [])
    except csv.Error:
        return []  # quotes that another delimiter explains


def csv_rows(reading: Reading) -> Iterator[Row]:
    """Rows behind the header, as dicts."""
    delimiter, names = csv_header(reading.file, reading.options)
    reading.place = Place(f"{reading.file.label}:")
    lines = _CsvLines(reading)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    header_seen = False
    while True:
        line = reader.line_num + 1
        lines.row.clear()
        lines.undecodable = False
        try:
            row = next(reader, None)
        except csv.Error as error:
            short = sum(map(len, lines.row)) <= LARGEST_CUT_CHARACTERS
            if lines.at_end() and "unexpected end of data" in str(error) and short:
                reading.cut(lines.begin_of_row(), f"the row at line {line}, which ends inside a quote")
                return
            raise ValueError(
                f"{reading.place.name(line)}: the row is not valid CSV ({error}); a quote inside a quoted field is "
                "written twice"
            ) from None
        if row is None:
            return
        if not row:
            continue  # an empty line is no row
        if not header_seen:
            header_seen = True
        elif lines.at_end() and (reading.stream_cut or len(row) < len(names)):
            reading.cut(lines.begin_of_row(), f"the row at line {line}, which has {len(row)} of {len(names)} fields")
            return
        else:
            fields: Any = dict(zip(names, row, strict=False))
            if len(row) != len(names):
                wrong = f"the row has {len(row)} fields, the header has {len(names)}"
                fields = BadRow("wrong number of fields", wrong)
            elif lines.undecodable:
                fields = BadRow("not valid in the encoding", f"the row is not {reading.options.encoding}")
            yield line, fields, lines.position


# JSON


def jsonl_rows(reading: Reading) -> Iterator[Row]:
    """One JSON object a line; empty lines are passed over. Of a part, the lines that begin in it."""
    codec = reading.options.codec
    if not keeps_ascii(codec):
        reading.place = Place(f"{reading.file.label}:")
        yield from _rows_of_lines(reading, _wide_lines(reading), None, len("".encode(codec)))
        return
    with open_bytes(reading.file) as stream:
        mark = check_start(reading.file, reading.options, stream.peek(4096))
        part = None if reading.file.compression else reading.part
        begin, end = (part.begin, max(part.end, mark + 1)) if part else (0, None)  # the mark belongs to the first line
        if begin:
            stream.seek(begin - 1)
            while (skipped := stream.readline(CHUNK_BYTES)) and not skipped.endswith(b"\n"):
                pass
        else:
            stream.read(mark)
        position = 0 if reading.file.compression else stream.tell()
        reading.place = Place(
            f"{reading.file.label}:", partial(_count_lines, reading.file, position) if begin else None
        )
        lines = iter(partial(stream.readline, MAX_RECORD_BYTES), b"")
        yield from _rows_of_lines(reading, lines, stream, position, end)
        reading.stream_cut = is_cut(stream)


def _rows_of_lines(
    reading: Reading, lines: Iterator[Any], stream: io.BufferedReader | None, position: int, end: int | None = None
) -> Iterator[Row]:
    """Rows of lines (bytes of ``stream``, or text) up to the first that begins at ``end``."""
    codec = reading.options.codec
    to_decode = stream is not None and codec != "utf-8"
    compressed = stream if reading.file.compression else None
    for number, line in enumerate(lines, start=1):
        if end is not None and position >= end:
            return
        begin, position = position, position + (len(line) if stream is not None else _stored_bytes(line, codec))
        try:
            row = orjson.loads(line.decode(codec) if to_decode else line)
        except ValueError:
            if not line.strip():
                continue
            row = _second_look(reading, line, number, stream, begin)
            if row is None:
                return
        if type(row) is not dict and type(row) is not BadRow:
            row = BadRow("not an object", f"the line holds a {type(row).__name__}, not an object with fields")
        yield number, row, position if compressed is None else byte_streams.position_in_file(compressed)


def _second_look(reading: Reading, line: bytes | str, number: int, stream: io.BufferedReader | None, begin: int) -> Any:
    """What a line holds that orjson refuses (NaN is fine for us), or a BadRow, or None where the file is cut in it."""
    if len(line) >= MAX_RECORD_BYTES:
        raise ValueError(
            f"{reading.place.name(number)}: the line is longer than {MAX_RECORD_BYTES // 2**20} MiB; JSON lines need "
            "one record a line"
        )
    if isinstance(line, bytes):
        at_end = not line.endswith(b"\n")
        try:
            text = codecs.getincrementaldecoder(reading.options.codec)().decode(line, not at_end)
        except UnicodeError:
            wrong = byte_streams.undecodable_text(line[:CHUNK_BYTES], reading.options.encoding)
            return BadRow("not valid in the encoding", wrong)
    else:
        text, at_end = line, not line.endswith("\n")
    try:
        row = json.loads(text)
    except RecursionError:
        return BadRow("not JSON", "the line is not JSON that can be read: it is nested too deeply")
    except json.JSONDecodeError as error:
        cut = stream is not None and is_cut(stream)
        if at_end and (cut or (text.lstrip().startswith("{") and _is_incomplete(text, error))):
            reading.cut(begin, f"the record at {reading.place.name(number)}")
            return None
        return BadRow("not JSON", f"the line is not JSON ({error})")
    return _lone_surrogate(row, reading) or row


def _is_incomplete(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more text could make it JSON: the error is an open string, or half a literal or escape at the end."""
    if error.msg == "Extra data":
        return False
    rest = text[error.pos :]
    return error.msg.startswith("Unterminated string") or bool(
        not rest.strip() or re.fullmatch(r"[\\\w.+-]{1,9}", rest)
    )


def _lone_surrogate(row: Any, reading: Reading) -> BadRow | None:
    for field in reading.fields if isinstance(row, dict) else ():
        value = row.get(field)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            wrong = f"the field {field!r} holds half of a surrogate pair ({half!r}), which is no text"
            return BadRow("lone surrogate", wrong)
    return None


def _count_lines(file: SourceFile, begin: int) -> int:
    """Line ends in the first ``begin`` bytes."""
    count = 0
    with open_stored(file) as content:
        while begin > 0 and (block := content.read(min(begin, CHUNK_BYTES))):
            count += block.count(b"\n")
            begin -= len(block)
    return count


def json_rows(reading: Reading) -> Iterator[Row]:
    """The records of a JSON file that is one array, decoded one by one from a window of the text.

    The standard decoder does it, for parsers built on yajl put a "?" where half a surrogate pair stands.
    """
    reading.place = Place(f"{reading.file.label}, record ")
    window = _Window(reading)
    if window.next_character() != "[":
        raise ValueError(f"{reading.file.label} holds neither one JSON array nor one JSON object a line")
    window.at += 1
    number = 0
    while (character := window.next_character()) != "]":
        if number and character == ",":
            window.at += 1
            character = window.next_character()
        elif number and character:
            last = reading.place.name(number)
            raise ValueError(f"{last} is followed by {character!r} instead of a comma or the end of the array")
        number += 1
        row = window.record(reading.place.name(number)) if character else None
        if row is None:
            lost = f"record {number}" if character else "the end of the array"
            reading.cut(window.position(), lost)
            return
        if not isinstance(row, dict):
            row = BadRow("not an object", f"it is a {type(row).__name__}, not an object with fields")
        elif window.may_hold_surrogates:
            row = _lone_surrogate(row, reading) or row
        yield number, row, window.bytes_read
    window.at += 1
    if window.next_character():
        raise ValueError(f"{reading.file.label} goes on behind its array: it must hold one array, or one object a line")


class _Window:
    """The part of a text between the record being decoded and what has been read so far."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._chunks = text_chunks(reading)
        self._decoder = json.JSONDecoder()
        self._text = ""
        self.at = 0
        self.bytes_read = 0
        self.may_hold_surrogates = False  # the record last decoded has an escape of one

    def _more(self) -> bool:
        """Drop what is done and read on: as much again as is left, for a record is decoded from its start each time."""
        pieces, wanted = [self._text[self.at :]], max(len(self._text) - self.at, 1)
        self.at = 0
        while wanted > 0 and (chunk := next(self._chunks, None)):
            pieces.append(chunk[0])
            wanted -= len(chunk[0])
            self.bytes_read = min(self.bytes_read + chunk[1], self._reading.file.bytes)
        self._text = "".join(pieces)
        return len(pieces) > 1

    def next_character(self) -> str:
        """The next one that is not white space, which stays; "" at the end."""
        while True:
            self.at = SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def record(self, name: str) -> Any:
        """The value that begins here, whose end is then passed; None where the text ends inside."""
        while True:
            try:
                row, stop = self._decoder.raw_decode(self._text, self.at)
            except RecursionError:
                raise ValueError(f"{name} is nested too deeply") from None
            except json.JSONDecodeError as error:
                if not _is_incomplete(self._text, error):
                    raise ValueError(
                        f"{name} is not JSON ({error.msg}), and where the next one begins cannot be told"
                    ) from None
                if len(self._text) - self.at > MAX_RECORD_BYTES:
                    raise ValueError(
                        f"{name} is longer than {MAX_RECORD_BYTES // 2**20} MiB, or a quote in it is left open"
                    ) from None
                if not self._more():
                    return None
                continue
            if stop == len(self._text) and self._more():
                continue  # a number may go on
            self.may_hold_surrogates = any(self._text.find(half, self.at, stop) >= 0 for half in ("\\ud", "\\uD"))
            self.at = stop
            return row

    def position(self) -> int:
        """The byte of an uncompressed file at which the rest begins."""
        left = _stored_bytes(self._text[self.at :], self._reading.options.codec)
        return self.bytes_read - left - self._reading.half_character_bytes
