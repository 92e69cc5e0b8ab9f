"""Files of text, where they are: on a disk, or at any fsspec URL, read in ranges and in bounded memory.

What is read must be what the plan was made of: each range has the length asked for, and the file its size and version.
"""

import glob
import hashlib
import io
import os
from collections import OrderedDict
from typing import Any

from data_pipeline.documents import SourceFile
from data_pipeline.remote_blocks import RemoteFolder

HTTP = ("http://", "https://")
RANGE_BYTES = 4 * 2**20
HELD_RANGES = 4
"""Of an open file: Parquet and Arrow readers go to and fro between a few places."""
DEADLINE_SECONDS = 300.0
ADVICE = "and start the same command again: it keeps the units that are done"
VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
"""How filesystems call what changes with a file's content; the first one counts."""


def open_stored(file: SourceFile) -> io.RawIOBase:
    """The file's bytes as they are stored, without a buffer."""
    return _RemoteStream(file) if file.url else open(file.path, "rb", buffering=0)


def list_files(url: str) -> tuple[list[str] | None, str]:
    """(names of the files under the folder at a URL or that its pattern matches, the folder); no names of one file.

    Over HTTP every URL is one file: its folders cannot be listed, and "?" begins a query.
    """
    if url.startswith(HTTP):
        return None, url
    if glob.has_magic(url):
        parts = url.split("/")
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        root, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:])
        return _folder(root).names(pattern), root
    folder = _folder(url)
    return (folder.names() if folder.info("")["type"] == "directory" else None), url.rstrip("/")


def describe_file(url: str) -> tuple[int, str]:
    """(size in bytes, version) of the file at a URL.

    Raises:
        FileNotFoundError, PermissionError, OSError, ValueError: see ``RemoteFolder``; or its store does not tell the
            size, or gives no ranges of it.
    """
    folder = _folder(url)
    info = folder.info("")
    size = info.get("size")
    if size is None:
        raise ValueError(f"{url} can only be read from its begin to its end (the store tells no size): fetch it first")
    if url.startswith(HTTP) and size > RANGE_BYTES and not folder.gives_ranges():
        raise ValueError(
            f"{url} can only be read from its begin to its end (its server gives no ranges): fetch it first"
        )
    version = _version(info)
    if not version:
        print(
            f"warning: of {url} the store tells neither an ETag nor a time: a change that keeps its size and its first "
            f"and last {RANGE_BYTES:,} bytes is not noticed",
            flush=True,
        )
        ends = [_read(folder, begin, min(begin + RANGE_BYTES, size)) for begin in (0, max(0, size - RANGE_BYTES))]
        version = hashlib.sha256(b"".join(ends)).hexdigest()
    return size, version


def _folder(url: str) -> RemoteFolder:
    return RemoteFolder(url, DEADLINE_SECONDS, ADVICE)


def _version(info: dict[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in VERSIONS if info.get(name)), "")


def _read(folder: RemoteFolder, begin: int, end: int) -> bytes:
    """The bytes ``[begin, end)`` of the file; what comes short is asked for twice."""
    for _ in range(2):
        content = folder.read("", begin, end)
        if len(content) == end - begin:
            return content
    raise ValueError(
        f"{folder.url}: of bytes {begin:,} to {end:,} {len(content):,} came, twice: see whether the file there is "
        "whole, and start the same command again"
    )


class _RemoteStream(io.RawIOBase):
    """Reads a file in aligned ranges, of which the last few are held."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._folder = _folder(file.url)
        self._position = 0
        self._held: OrderedDict[int, bytes] = OrderedDict()
        info = self._folder.info("")
        now = [info.get("size"), _version(info) or file.version]
        if now != [file.bytes, file.version]:
            raise ValueError(
                f"{file.url} was changed meanwhile ({file.bytes} bytes, {file.version}; now {now[0]} bytes, {now[1]}): "
                "start the same command again"
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As much as the range at hand has."""
        number, within = divmod(self._position, RANGE_BYTES)
        if self._position >= self._file.bytes:
            return 0
        if number not in self._held:
            begin = number * RANGE_BYTES
            self._held[number] = _read(self._folder, begin, min(begin + RANGE_BYTES, self._file.bytes))
            if len(self._held) > HELD_RANGES:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        piece = memoryview(self._held[number])[within : within + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
