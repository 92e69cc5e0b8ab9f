"""Token shards as rows for training and validation, addressed by position: no iterator, no state to save."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.mixture import Mixture
from data_pipeline.order import ORDER_VERSION, order_key, permute
from data_pipeline.packing import PackTable, pack_best_fit
from data_pipeline.token_shards import TokenShards

STREAM_VERSION = 1
SOURCE_SHIFT = 48  # a sample id is (source << 48) | sample within the source
BLOCK_POSITIONS = 4096  # positions whose order is computed together: small calls cost as much as large ones
CACHED_BLOCKS = 8


@dataclass(frozen=True)
class Rows:
    """``n`` rows of ``sequence_length`` tokens. Padding is a document of its own whose targets never count."""

    input_ids: np.ndarray  # int64 [n, sequence_length]
    targets: np.ndarray  # int64 [n, sequence_length]: the token that follows each input
    position_ids: np.ndarray  # int64 [n, sequence_length]: from 0 at each document, and at the start of the row
    target_mask: (
        np.ndarray
    )  # bool [n, sequence_length]: the target is of the input's document, and for chat the assistant's


class _TextSamples:
    """Windows of ``sequence_length + 1`` tokens of the flat stream; the last of one is the first of the next."""

    def __init__(self, shards: TokenShards, sequence_length: int, padded: bool) -> None:
        self._shards = shards
        self._length = sequence_length
        targets = shards.tokens - 1
        self.count = -(-targets // sequence_length) if padded else targets // sequence_length
        self.left_out_tokens = 0 if padded else targets % sequence_length

    def rows(self, samples: np.ndarray) -> Rows:
        width = self._length + 1
        starts = samples.astype(np.int64) * self._length
        tokens = np.empty((len(samples), width), dtype=np.int64)
        whole = starts + width <= self._shards.tokens
        if whole.all():
            self._shards.read_windows(starts, tokens)
        else:
            tokens[:] = _padding_id(self._shards)
            for row in range(len(samples)):
                available = min(width, self._shards.tokens - int(starts[row]))
                tokens[row, :available] = self._shards.read(int(starts[row]), available)
        row_of, column_of = self._shards.document_beginnings(starts, width)
        produced = np.ones((len(samples), width), dtype=bool)
        for row in np.flatnonzero(~whole).tolist():
            available = self._shards.tokens - int(starts[row])
            produced[row, available:] = False
            row_of, column_of = np.append(row_of, row), np.append(column_of, available)
        return _rows(tokens, produced, row_of, column_of)

    def describe(self) -> list[str]:
        tail = f", {self.left_out_tokens:,} tokens at the end left out" if self.left_out_tokens else ""
        return [
            f"{self._shards.tokens:,} tokens in {self._shards.documents:,} documents: "
            f"{self.count:,} samples of {self._length:,} tokens{tail}"
        ]


class _ChatSamples:
    """Rows that hold whole conversations, packed best-fit, padded to ``sequence_length + 1`` tokens."""

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        self._shards = shards
        self._length = sequence_length
        self._lengths = shards.document_lengths()
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._packs: PackTable = pack_best_fit(self._lengths, sequence_length + 1)
        self.count = len(self._packs.offsets) - 1

    def rows(self, samples: np.ndarray) -> Rows:
        shape = (len(samples), self._length + 1)
        tokens = np.full(shape, _padding_id(self._shards), dtype=np.int64)
        produced = np.zeros(shape, dtype=bool)
        beginnings: list[tuple[int, int]] = []
        for row, sample in enumerate(samples.tolist()):
            column = 0
            for document in self._packs.documents[
                self._packs.offsets[sample] : self._packs.offsets[sample + 1]
            ].tolist():
                start, length = int(self._starts[document]), int(self._lengths[document])
                tokens[row, column : column + length] = self._shards.read(start, length)
                produced[row, column : column + length] = self._shards.read_mask(start, length)
                column += length
                beginnings.append((row, column))  # of the next document, or of the padding
        inside = np.array([beginning for beginning in beginnings if beginning[1] <= self._length], dtype=np.int64)
        inside = inside.reshape(-1, 2)
        return _rows(tokens, produced, inside[:, 0], inside[:, 1])

    def describe(self) -> list[str]:
        lines = [
            f"{self._shards.tokens:,} tokens in {self._shards.documents:,} conversations: {self.count:,} samples of "
            f"{self._length:,} tokens, {self._packs.fill:.1%} filled"
        ]
        if self._packs.too_long.size:
            lines.append(
                f"left out for being longer than {self._length + 1:,} tokens: {self._packs.too_long.size:,} "
                f"conversations (the longest has {int(self._lengths.max()):,})"
            )
        return lines


def _padding_id(shards: TokenShards) -> int:
    # The padding's targets never count, so where there is no padding token any id serves.
    pad, end = shards.special_ids["pad"], shards.special_ids["eos"]
    return pad if pad is not None else end if end is not None else 0


def _rows(tokens: np.ndarray, produced: np.ndarray, row_of: np.ndarray, column_of: np.ndarray) -> Rows:
    """Rows from windows [n, L + 1], what in them is to be learnt, and where documents begin (besides column 0)."""
    length = tokens.shape[1] - 1
    target_mask = produced[:, 1:]
    target_mask[row_of, column_of - 1] = False
    positions = np.empty((len(tokens), length), dtype=np.int64)
    positions[:] = counting = np.arange(length)
    order = np.lexsort((column_of, row_of))  # a later beginning in a row overwrites what an earlier one wrote
    for row, column in zip(row_of[order].tolist(), column_of[order].tolist(), strict=True):
        positions[row, column:] = counting[: max(length - column, 0)]
    return Rows(tokens[:, :-1], tokens[:, 1:], positions, target_mask)


def _open_samples(shards: TokenShards, sequence_length: int, padded: bool) -> _TextSamples | _ChatSamples:
    if sequence_length < 1:
        raise ValueError(f"the sequence length is {sequence_length}; it must be at least 1 token")
    samples = (
        _ChatSamples(shards, sequence_length)
        if shards.kind == "chat"
        else _TextSamples(shards, sequence_length, padded)
    )
    if samples.count == 0:
        lengths = shards.document_lengths()
        longest = int(lengths.max())
        wanted = (
            f"its shortest conversation has {int(lengths.min()):,} and its longest {longest:,} tokens"
            if shards.kind == "chat"
            else f"it has {shards.tokens:,} tokens"
        )
        raise ValueError(
            f"{shards.directory} gives not one sample of {sequence_length + 1:,} tokens ({wanted}): "
            "use more data or another sequence_length"
        )
    return samples


class TrainingStream:
    """All training samples in the order of a seed. Position p holds the same sample whoever asks, however often.

    Epochs follow one another, each a new permutation of each source. Reading is safe from several threads.

    Args:
        sources: (directory of token shards, weight). The weights need not sum to 1.
        sequence_length: tokens in a row.
        seed: of the order; the data and the fingerprint do not depend on it.

    Attributes:
        fingerprint: of the sources' manifests, the mixture and the sequence length; equal fingerprints and seeds
        give equal rows.
        kind: "text", "chat" or "mixed".
        samples_per_epoch: of a single source; of several, the sum.

    Raises:
        FileNotFoundError, ValueError: a source that is missing, damaged, too small or made with another tokenizer.
    """

    def __init__(self, sources: Sequence[tuple[Path, float]], sequence_length: int, seed: int) -> None:
        self._mixture = Mixture([weight for _, weight in sources])
        self._shards = [TokenShards(Path(path)) for path, _ in sources]
        _require_one_tokenizer(self._shards)
        self._samples = [_open_samples(shards, sequence_length, padded=False) for shards in self._shards]
        self._counts = np.array([samples.count for samples in self._samples], dtype=np.uint64)
        self._seed = seed
        self._sequence_length = sequence_length
        kinds = {shards.kind for shards in self._shards}
        self.kind: str = kinds.pop() if len(kinds) == 1 else "mixed"
        self.tokenizer_sha256: str = self._shards[0].tokenizer_sha256
        self.vocabulary_size: int = self._shards[0].vocabulary_size
        self.samples_per_epoch: int = int(self._counts.sum())
        self.fingerprint: str = _fingerprint(
            order=ORDER_VERSION,
            sources=[shards.fingerprint for shards in self._shards],
            slots=self._mixture.slots.tolist(),
            sequence_length=sequence_length,
        )
        self._blocks: dict[int, np.ndarray] = {}
        self._blocks_lock = threading.Lock()

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """The samples at ``[start, start + count)``, uint64 ``source << 48 | sample``, without reading data."""
        return self._ids_at(np.arange(start, start + count, dtype=np.uint64))

    def rows(self, positions: np.ndarray) -> Rows:
        """The rows at any positions (integers, at least 0), in the order given."""
        positions = np.asarray(positions)
        if positions.size and int(positions.min()) < 0:
            raise ValueError(f"position {int(positions.min())} was asked for; positions begin at 0")
        ids = self._ids_at(positions.astype(np.uint64))
        source_of = (ids >> np.uint64(SOURCE_SHIFT)).astype(np.int64)
        sample_of = ids & np.uint64((1 << SOURCE_SHIFT) - 1)
        if len(self._samples) == 1:
            return self._samples[0].rows(sample_of)
        shape = (len(ids), self._sequence_length)
        result = Rows(*(np.empty(shape, dtype) for dtype in (np.int64, np.int64, np.int64, bool)))
        for source in np.unique(source_of):
            chosen = np.flatnonzero(source_of == source)
            part = self._samples[source].rows(sample_of[chosen])
            for name in ("input_ids", "targets", "position_ids", "target_mask"):
                getattr(result, name)[chosen] = getattr(part, name)
        return result

    def check_files(self) -> None:
        """Raise for the first file of a source that is missing or of the wrong size; see ``TokenShards``."""
        for shards in self._shards:
            shards.check_files()

    def describe(self) -> list[str]:
        """What the sources give, a sentence or two each, for people."""
        lines = []
        for shards, samples, slots in zip(self._shards, self._samples, self._mixture.slots.tolist(), strict=True):
            share = f" ({slots / self._mixture.slots.sum():.1%} of the samples)" if len(self._shards) > 1 else ""
            lines += [f"{shards.directory}{share}: {line}" for line in samples.describe()]
        return lines

    def _ids_at(self, positions: np.ndarray) -> np.ndarray:
        ids = np.empty(positions.shape, dtype=np.uint64)
        blocks = positions // np.uint64(BLOCK_POSITIONS)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            ids[chosen] = self._block(block)[positions[chosen] - np.uint64(block * BLOCK_POSITIONS)]
        return ids

    def _block(self, block: int) -> np.ndarray:
        """The ids of one aligned block of positions; the most recent blocks are kept."""
        ids = self._blocks.get(block)
        if ids is None:
            ids = self._compute_block(block)
            with self._blocks_lock:
                if len(self._blocks) >= CACHED_BLOCKS:
                    self._blocks.pop(next(iter(self._blocks)))
                self._blocks[block] = ids
        return ids

    def _compute_block(self, block: int) -> np.ndarray:
        positions = np.arange(BLOCK_POSITIONS, dtype=np.uint64) + np.uint64(block * BLOCK_POSITIONS)
        source_of, index_of = self._mixture.locate(positions)
        ids = np.empty(BLOCK_POSITIONS, dtype=np.uint64)
        for source in np.unique(source_of).tolist():
            chosen = np.flatnonzero(source_of == source)
            count = self._counts[source]
            epoch_of, within = index_of[chosen] // count, index_of[chosen] % count
            for epoch in np.unique(epoch_of).tolist():
                now = epoch_of == epoch
                samples = permute(within[now], int(count), order_key(self._seed, source, epoch))
                ids[chosen[now]] = np.uint64(source << SOURCE_SHIFT) | samples
        return ids


class ValidationStream:
    """All samples of one directory of token shards in fixed order, the last one padded.

    For text every token but the first is a target exactly once (those that begin a document are masked). Raises as
    ``TrainingStream``.
    """

    def __init__(self, path: Path, sequence_length: int) -> None:
        self._shards = TokenShards(Path(path))
        self._samples = _open_samples(self._shards, sequence_length, padded=True)
        self.kind: str = self._shards.kind
        self.number_of_samples: int = self._samples.count
        self.tokenizer_sha256: str = self._shards.tokenizer_sha256
        self.vocabulary_size: int = self._shards.vocabulary_size
        self.fingerprint: str = _fingerprint(sources=[self._shards.fingerprint], sequence_length=sequence_length)

    def rows(self, indices: np.ndarray) -> Rows:
        """The rows of samples ``indices`` (integers in [0, number_of_samples)), in the order given."""
        indices = np.asarray(indices)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.number_of_samples:
            raise ValueError(
                f"validation samples {indices.min()} to {indices.max()} were asked for; there are "
                f"{self.number_of_samples}"
            )
        return self._samples.rows(indices)

    def check_files(self) -> None:
        """As ``TrainingStream.check_files``."""
        self._shards.check_files()

    def describe(self) -> list[str]:
        """What the data gives, for people."""
        return [f"{self._shards.directory}: {line}" for line in self._samples.describe()]


def _require_one_tokenizer(all_shards: Sequence[TokenShards]) -> None:
    first = all_shards[0]
    for shards in all_shards[1:]:
        if shards.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"{first.directory} and {shards.directory} were prepared with different tokenizers (sha256 "
                f"{first.tokenizer_sha256[:12]}… and {shards.tokenizer_sha256[:12]}…): prepare them with the same "
                "--tokenizer"
            )


def _fingerprint(**parts: object) -> str:
    content = json.dumps({"version": STREAM_VERSION, **parts}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(content.encode())
