"""Token documents from the ``.bin`` and ``.idx`` pairs that Megatron-LM's IndexedDataset writes."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.documents import Document, Place, Reading, SourceFile

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of a token, sequences, document boundaries
# Megatron's numbers of types; 6 and 7 are floating point, which no token id is.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class MegatronDocuments:
    """A pair, opened and its index checked against itself and against the size of the tokens' file.

    Raises:
        ValueError: either file is not what the index's header says.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        path = file.path.with_suffix(".idx")
        header = path.open("rb").read(HEADER.size)
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
        self._check(path, sequences)
        self._tokens = np.memmap(file.path, mode="r")

    def _check(self, path: Path, sequences: int) -> None:
        boundaries = self._boundaries
        if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != sequences or (np.diff(boundaries) < 0).any():
            raise ValueError(f"{path}: the document boundaries do not run from 0 to its {sequences} sequences")
        needed = int(self._lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        expected = np.cumsum(self._lengths, dtype=np.int64) * self.dtype.itemsize
        if (self._lengths < 0).any() or (self._pointers[1:] != expected[:-1]).any() or (self._pointers[:1] != 0).any():
            raise ValueError(f"{path}: its sequences do not follow one another without a gap")
        if needed != self._file.bytes:
            raise ValueError(
                f"{self._file.path} has {self._file.bytes} bytes, but its index {path.name} counts {needed}: "
                "the two do not belong together, or one is cut"
            )

    def __len__(self) -> int:
        return len(self._boundaries) - 1

    def start_bytes(self) -> np.ndarray:
        """int64 [documents + 1]: where each document begins in the .bin, and its size."""
        return np.append(self._pointers, self._file.bytes)[self._boundaries]

    def ids(self, document: int) -> np.ndarray:
        """[tokens] of one document, in the type in which they are stored."""
        begin, end = (
            int(self._pointers[sequence]) if sequence < len(self._pointers) else self._file.bytes
            for sequence in self._boundaries[document : document + 2]
        )
        return self._tokens[begin:end].view(self.dtype)


def megatron_documents(reading: Reading) -> Iterator[Document]:
    """The part's documents as token ids."""
    documents, part = MegatronDocuments(reading.file), reading.part
    place = Place(f"{reading.file.path}, document ")
    done = documents.start_bytes()[1:]
    for index in range(*((part.begin, part.end) if part else (0, len(documents)))):
        ids = documents.ids(index)
        if ids.dtype.kind == "i" and len(ids) and ids.min() < 0:
            raise ValueError(f"{place.name(index + 1)} holds the token {ids.min()}, which is below 0")
        yield Document(place, index + 1, "", None, None, ids, int(done[index]))
