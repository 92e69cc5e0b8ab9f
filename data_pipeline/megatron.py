"""Token documents from the ``.bin`` and ``.idx`` pairs that Megatron-LM's IndexedDataset writes."""

import itertools
import struct
from collections.abc import Iterator

import numpy as np

from data_pipeline.documents import Document, Place, Reading, SourceFile

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of a token, sequences, document boundaries
# Megatron's numbers of types; 6 and 7 are floating point, which no token id is.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
BLOCK_DOCUMENTS = 2**16  # of the index in memory at once


class MegatronDocuments:
    """A pair, opened and its index checked against the size of the tokens' file.

    Raises:
        ValueError: either file is not what the index's header says.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        path = file.path.with_suffix(".idx")
        with open(path, "rb") as index:
            header = index.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{path} is not an index of Megatron: it does not begin with {MAGIC[:7].decode()}")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != 1:
            raise ValueError(f"{path} has the version {version}; version 1 can be read")
        if code not in TOKEN_TYPES:
            raise ValueError(f"{path} says that tokens have the type {code}, which is no integer type of Megatron's")
        self.dtype = np.dtype(TOKEN_TYPES[code]).newbyteorder("<")
        size = HEADER.size + 12 * sequences + 8 * boundaries
        if path.stat().st_size not in (size, size + sequences):  # the latter with a mode for each sequence
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but its header needs {size}: it is cut or damaged"
            )
        content = np.memmap(path, mode="r")
        self._lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        self._boundaries = np.frombuffer(content, "<i8", boundaries, HEADER.size + 12 * sequences)
        # Each document's own entries are checked when it is read; here only what holds all of them together.
        boundaries = self._boundaries
        if not boundaries.size or boundaries[0] != 0 or boundaries[-1] != sequences:
            raise ValueError(f"{path}: the document boundaries do not run from 0 to its {sequences} sequences")
        needed = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if sequences else 0
        if needed != file.bytes:
            raise ValueError(
                f"{file.path} has {file.bytes} bytes, but its index {path.name} counts {needed}: "
                "the two do not belong together, or one is cut"
            )
        self._tokens = np.memmap(file.path, mode="r")

    def __len__(self) -> int:
        return len(self._boundaries) - 1

    def even_edges(self, pieces: int) -> list[int]:
        """Document numbers that divide the tokens about evenly, 0 and the count of documents included."""
        wanted = self._file.bytes * np.arange(1, pieces) // pieces
        sequences = np.searchsorted(self._pointers, wanted)
        return sorted({0, *np.searchsorted(self._boundaries, sequences).tolist(), len(self)})

    def ids(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, int]]:
        """(ids [tokens] as stored, byte of the .bin at which they end) of the documents ``begin`` to ``end``."""
        index = self._file.path.with_suffix(".idx").name
        for block in range(begin, end, BLOCK_DOCUMENTS):
            boundaries = self._boundaries[block : min(block + BLOCK_DOCUMENTS, end) + 1]
            first, last = int(boundaries[0]), int(boundaries[-1])
            if (np.diff(boundaries) < 0).any() or not 0 <= first <= last <= len(self._lengths):
                raise ValueError(f"{index}: the boundaries of documents {block + 1} and following are out of order")
            starts = self._pointers[first : last + 1]
            if last == len(self._lengths):
                starts = np.append(starts, self._file.bytes)
            sizes = self._lengths[first:last].astype(np.int64) * self.dtype.itemsize
            if (sizes < 0).any() or (np.diff(starts) != sizes).any() or (first == 0 and starts[0] != 0):
                raise ValueError(
                    f"{index}: the sequences behind document {block} do not follow one another in the .bin"
                )
            edges = starts[boundaries - first].tolist()
            for start, stop in itertools.pairwise(edges):
                yield self._tokens[start:stop].view(self.dtype), stop


def megatron_documents(reading: Reading) -> Iterator[Document]:
    """The part's documents as token ids."""
    documents, part = MegatronDocuments(reading.file), reading.part
    place = Place(f"{reading.file.path}, document ")
    begin, end = (part.begin, part.end) if part else (0, len(documents))
    for number, (ids, stop) in enumerate(documents.ids(begin, end), start=begin + 1):
        if ids.dtype.kind == "i" and len(ids) and ids.min() < 0:
            raise ValueError(f"{place.name(number)} holds the token {ids.min()}, which is below 0")
        yield Document(place, number, "", None, None, ids, stop)
