"""Bytes and text of files in any encoding, compressed or not, in bounded memory."""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from data_pipeline.documents import Reading, ReadOptions, SourceFile
from data_pipeline.remote_files import open_stored

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
MAGIC = {".gz": b"\x1f\x8b\x08", ".zst": b"\\(\xb5/\xfd", ".bz2": b"BZh[1-9]1AY&SY", ".xz": b"\xfd7zXZ\0"}
INPUT_BYTES = 2**14  # decompressed at once: little, for what comes out may be a thousand times as much
CHUNK_BYTES = 2**20


# All have decompress(), eof and unused_data.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),  # 2 GiB: packed with --long
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class DecompressedFile(io.RawIOBase):
    """The content of a compressed file of one or more streams.

    The decompressors are driven by hand because the standard file objects lose what precedes a cut when they raise.
    Where the last stream ends early the content ends there and ``cut`` is True; damaged data raise ValueError.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._raw = open_stored(file)
        self._stream: Any = None
        self._input = b""
        self._ready = memoryview(b"")
        self.position = 0  # in the compressed file
        self.cut = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        if self._stream is not None and self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None
        if not self._input:
            self._input = self._raw.read(INPUT_BYTES)
            self.position += len(self._input)
            if not self._input:
                self.cut = self._stream is not None
                return False
        if self._stream is None:
            self._input = self._input.lstrip(b"\0")  # padding between streams
            if not self._input:
                return True
            self._stream = DECOMPRESSORS[self._file.compression]()
        try:
            self._ready = memoryview(self._stream.decompress(self._input))
        except (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError) as error:
            raise ValueError(
                f"{self._file.label} is damaged: its {self._file.compression} data cannot be read near byte "
                f"{self.position} ({error}); make or fetch it again"
            ) from None
        self._input = b""
        return True


def open_bytes(file: SourceFile) -> io.BufferedReader:
    """The file's content, decompressed."""
    return io.BufferedReader(DecompressedFile(file) if file.compression else open_stored(file), CHUNK_BYTES)


def is_cut(stream: io.BufferedReader) -> bool:
    """Whether a compressed stream, read to its end, had an end."""
    return isinstance(stream.raw, DecompressedFile) and stream.raw.cut


def position_in_file(stream: io.BufferedReader) -> int:
    """How many bytes of the file as it is stored have been read."""
    return stream.raw.position if isinstance(stream.raw, DecompressedFile) else stream.tell()


def keeps_ascii(encoding: str) -> bool:
    """Whether a byte below 128 always is that ASCII character or (some East Asian trail bytes) never a line feed."""
    try:
        return bytes(range(128)).decode(encoding) == "".join(map(chr, range(128)))
    except UnicodeError:
        return False


def check_start(file: SourceFile, options: ReadOptions, start: bytes) -> int:
    """Refuse a file whose first bytes show another encoding than asked for; return the length of a UTF-8 mark."""
    if not file.compression:
        for extension, magic in MAGIC.items():
            if re.match(magic, start):
                kind = COMPRESSIONS[extension]
                raise ValueError(f"{file.label} is compressed ({kind}): give it a name that ends in {extension}")
    if options.codec != "utf-8":
        if start.startswith(codecs.BOM_UTF8):
            raise ValueError(
                f"{file.label} begins with the byte-order mark of UTF-8, but {options.encoding} was asked for: "
                "read it with --encoding utf-8"
            )
        return 0
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{file.label} begins with the byte-order mark of UTF-16: read it with --encoding utf-16")
    wide = _utf16_by_zeros(start[:4096])
    if wide:
        raise ValueError(
            f"{file.label} looks like {wide} without a byte-order mark (every other byte is zero): "
            f"read it with --encoding {wide}"
        )
    return 3 if start.startswith(codecs.BOM_UTF8) else 0


def _utf16_by_zeros(sample: bytes) -> str | None:
    """UTF-16 of mostly ASCII text has a zero in most characters, always on the same side; NULs in a text do not."""
    low, high = sample[0::2].count(0), sample[1::2].count(0)
    if len(sample) < 4 or max(low, high) * 10 < len(sample) * 3 or min(low, high) * 20 > len(sample):
        return None
    return "utf-16-le" if high > low else "utf-16-be"


def text_chunks(reading: Reading) -> Iterator[tuple[str, int]]:
    """(text, bytes it was) in pieces of about a MiB, line ends as they are, without a byte-order mark.

    Sets ``reading.stream_cut`` at the end where the compressed stream, or the last character of a table, was cut.
    """
    file, options = reading.file, reading.options
    with open_bytes(file) as stream:
        check_start(file, options, stream.peek(4096))
        decoder = codecs.getincrementaldecoder(options.codec)()
        at_start = True
        try:
            while data := stream.read(CHUNK_BYTES):
                text = decoder.decode(data)
                if at_start and text:
                    # Only the plain utf-16 and utf-32 codecs take the mark away.
                    text, at_start = text.removeprefix("\ufeff"), False
                if text:
                    yield text, len(data)
            reading.half_character_bytes = len(decoder.getstate()[0])
            reading.stream_cut = is_cut(stream)
            if not reading.stream_cut and file.container == "text":
                decoder.decode(b"", True)  # a plain text has no records that would show where it was cut
            reading.stream_cut |= reading.half_character_bytes > 0
        except UnicodeError:
            raise undecodable(file, options.encoding) from None


def undecodable(file: SourceFile, encoding: str) -> ValueError:
    """Read the file again to say on which line decoding fails and which encoding fits."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with open_bytes(file) as stream:
        for bytes_line in iter(lambda: stream.readline(CHUNK_BYTES), b""):
            try:
                decoder.decode(bytes_line)
            except UnicodeError:
                break
            line += bytes_line.endswith(b"\n")
        else:
            return ValueError(f"{file.label} ends in the middle of a character of {encoding}: the file is cut short")
        sample = bytes_line + stream.read(CHUNK_BYTES)
    return ValueError(f"{file.label}:{line}: {undecodable_text(sample, encoding)}")


def undecodable_text(sample: bytes, encoding: str) -> str:
    """What to say of bytes that are not valid in the encoding."""
    likely = _likely_encoding(sample)
    if likely is None or likely == encoding:
        return f"the text is not valid {encoding}, nor any other encoding that is recognised"
    return f"the text is not valid {encoding}; it looks like {likely}: read it with --encoding {likely}"


def _likely_encoding(sample: bytes) -> str | None:
    if b"\0" in sample:
        return _utf16_by_zeros(sample[: len(sample) // 2 * 2])
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
