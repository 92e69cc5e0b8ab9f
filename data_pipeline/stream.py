"""Token shards as rows for training and validation, addressed by position: no iterator, no state to save."""

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_pipeline.mixture import PATTERN_SLOTS, Mixture, Stage
from data_pipeline.order import BLOCK_ORDER_VERSION, LANES, ORDER_VERSION, order_key, permute, permute_in_blocks
from data_pipeline.packing import PackTable, cut_long_documents, pack_best_fit
from data_pipeline.remote_blocks import RemoteOptions
from data_pipeline.token_shards import BLOCK_BYTES, TokenShards

STREAM_VERSION = 1
SOURCE_SHIFT = 48  # a sample id is (source << 48) | sample within the source
BLOCK_POSITIONS = 4096  # positions whose order is computed together: small calls cost as much as large ones
CACHED_BLOCKS = 8
EPOCHS_TO_WARN = 4
"""Repeating data up to about so often is nearly as good as new data, beyond it gains fade: Muennighoff et al.,
*Scaling Data-Constrained Language Models*, arXiv:2305.16264."""
WINDOWS_HELD = 2 * LANES
"""A source of so many windows is read as a whole however it is shuffled: 8 lanes would touch all of it at once."""
ORDERS = ("auto", "full", "block")
PACKINGS = ("concatenate", "best_fit")


class Rows(NamedTuple):
    """``n`` rows of ``L`` tokens, each with the token that follows. Padding is a document whose targets never count.

    Where documents begin is kept as a short list; position ids, as large as the tokens, are made on demand.
    """

    tokens: np.ndarray  # int64 [n, L + 1]
    target_mask: np.ndarray  # bool [n, L]: the target is of the input's document, and for chat the assistant's
    begin_rows: np.ndarray  # int64 [documents]: those that begin inside a row, at columns from 1 to L
    begin_columns: np.ndarray

    @property
    def input_ids(self) -> np.ndarray:
        """int64 ``[n, L]``, a view."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        """int64 ``[n, L]``, a view: the token that follows each input."""
        return self.tokens[:, 1:]

    @property
    def position_ids(self) -> np.ndarray:
        """int64 ``[n, L]``, made at each call: from 0 at the start of a row and at each document."""
        shape = self.target_mask.shape
        inside = self.begin_columns < shape[1]
        begins = self.begin_rows[inside] * shape[1] + self.begin_columns[inside]
        begins = np.sort(np.concatenate([np.arange(shape[0]) * shape[1], begins]))
        steps = np.ones(shape[0] * shape[1], dtype=np.int64)
        steps[begins[1:]] = begins[:-1] - begins[1:] + 1
        steps[:1] = 0
        return np.cumsum(steps, out=steps).reshape(shape)


class _TextSamples:
    """Windows of ``sequence_length + 1`` tokens of the flat stream; the last of one is the first of the next."""

    def __init__(self, shards: TokenShards, sequence_length: int, padded: bool) -> None:
        self._shards = shards
        self._length = sequence_length
        self._padded = padded
        targets = shards.tokens - 1
        self.count = -(-targets // sequence_length) if padded else targets // sequence_length
        self.left_out_tokens = 0 if padded else targets % sequence_length
        self.may_join_documents = shards.documents > 1
        self.samples_per_block = max(1, BLOCK_BYTES // (shards.token_bytes * sequence_length))

    def rows(self, samples: np.ndarray) -> Rows:
        starts = samples.astype(np.int64) * self._length
        width, end = self._length + 1, self._shards.tokens
        if self._padded and starts.size and int(starts.max()) + width > end:
            return self._padded_rows(starts)
        tokens, rows, columns = self._shards.read_windows(starts, width)
        target_mask = np.ones((len(starts), self._length), dtype=bool)
        target_mask[rows, columns - 1] = False
        return Rows(tokens, target_mask, rows, columns)

    def _padded_rows(self, starts: np.ndarray) -> Rows:
        """Rows of which some reach over the end of the data, read one by one."""
        width, end = self._length + 1, self._shards.tokens
        tokens = np.full((len(starts), width), _padding_id(self._shards), dtype=np.int64)
        target_mask = np.ones((len(starts), self._length), dtype=bool)
        begins: list[tuple[int, int]] = []
        for row, start in enumerate(starts.tolist()):
            kept = min(width, end - start)
            tokens[row, :kept], _, columns = self._shards.read_windows(np.array([start]), kept)
            begins += [(row, column) for column in columns.tolist()]
            if kept < width:
                target_mask[row, kept - 1 :] = False
                begins.append((row, kept))
        rows, columns = np.array(begins, dtype=np.int64).reshape(-1, 2).T
        target_mask[rows, columns - 1] = False
        return Rows(tokens, target_mask, rows, columns)

    def describe(self) -> list[str]:
        tail = f", {self.left_out_tokens:,} tokens at the end left out" if self.left_out_tokens else ""
        return [
            f"{self._shards.tokens:,} tokens in {self._shards.documents:,} documents: "
            f"{self.count:,} samples of {self._length:,} tokens{tail}"
        ]


class _PackedSamples:
    """Rows that hold whole documents, packed best-fit, padded to ``sequence_length + 1`` tokens.

    A conversation that is longer is left out and reported; a text is cut into pieces. Takes 24 bytes a document or
    piece, and time for all of them when opened: 0.4 seconds a million.
    """

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        self._shards = shards
        self._length = sequence_length
        self._lengths = shards.document_lengths()
        if shards.kind == "chat":
            self._starts = np.cumsum(self._lengths) - self._lengths
        else:
            self._starts, self._lengths = cut_long_documents(self._lengths, sequence_length)
        self._packs: PackTable = pack_best_fit(self._lengths, sequence_length + 1)
        self.count = len(self._packs.offsets) - 1
        self.may_join_documents = bool((np.diff(self._packs.offsets) > 1).any())

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
                learnt = self._shards.read_mask(start, length) if self._shards.kind == "chat" else True
                produced[row, column : column + length] = learnt
                column += length
                beginnings.append((row, column))  # of the next document, or of the padding
        inside = np.array(beginnings, dtype=np.int64).reshape(-1, 2)
        inside = inside[inside[:, 1] <= self._length]
        rows, columns = inside[:, 0], inside[:, 1]
        target_mask = produced[:, 1:]
        target_mask[rows, columns - 1] = False
        return Rows(tokens, target_mask, rows, columns)

    def describe(self) -> list[str]:
        what = "conversations" if self._shards.kind == "chat" else f"documents, {self._lengths.size:,} pieces"
        lines = [
            f"{self._shards.tokens:,} tokens in {self._shards.documents:,} {what}: {self.count:,} samples of "
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


def _open_samples(
    shards: TokenShards, sequence_length: int, padded: bool, packing: str = "concatenate"
) -> _TextSamples | _PackedSamples:
    if sequence_length < 1:
        raise ValueError(f"the sequence length is {sequence_length}; it must be at least 1 token")
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}; it must be one of {', '.join(PACKINGS)}")
    samples = (
        _PackedSamples(shards, sequence_length)
        if shards.kind == "chat" or packing == "best_fit"
        else _TextSamples(shards, sequence_length, padded)
    )
    if samples.count == 0:
        lengths = shards.document_lengths()
        wanted = (
            f"its shortest conversation has {int(lengths.min()):,} and its longest {int(lengths.max()):,} tokens"
            if shards.kind == "chat"
            else f"it has {shards.tokens:,} tokens"
        )
        raise ValueError(
            f"{shards.directory} gives not one sample of {sequence_length + 1:,} tokens ({wanted}): "
            "use more data or another sequence_length"
        )
    return samples


def _window_of(samples: _TextSamples | _PackedSamples) -> int | None:
    """Samples that the order in blocks mixes with one another; None where it shuffles all of them."""
    if not isinstance(samples, _TextSamples) or samples.count <= WINDOWS_HELD * samples.samples_per_block:
        return None
    return samples.samples_per_block


class TrainingStream:
    """All training samples in the order of a seed. Position p holds the same sample whoever asks, however often.

    Epochs follow one another, each a new permutation of each source. Reading is safe from several threads.

    Args:
        sources: (directory or URL of token shards, weight). The weights need not sum to 1.
        sequence_length: tokens in a row.
        seed: of the order; the data and the fingerprint do not depend on it.
        stages: of a curriculum; their ends are positions. Empty: the sources' weights from beginning to end.
        packing: "concatenate" cuts the flat stream of a text source into rows; "best_fit" packs its documents.
        order: "full" shuffles each source as a whole; "block" in windows of 8 MiB, see ``permute_in_blocks``. As a
            whole are shuffled all the same: rows of packed documents, whose order knows no windows, and a source of
            at most 16 windows, which a rank can hold. "auto": "block" where a source is at a URL or on a network file
            system.
        remote: how sources at URLs are read.

    Attributes:
        fingerprint: of the sources' manifests, the mixture and the sequence length; equal fingerprints and seeds
        give equal rows.
        sources, padding_ids: the directory of each source, and the token that fills its rows.
        kind: "text", "chat" or "mixed".
        is_remote: whether a source is at a URL or on a network file system, so that reading it may wait.
        samples_per_epoch: of a single source; of several, the sum.
        may_join_documents: whether a row may hold tokens of several documents.

    Raises:
        FileNotFoundError, ValueError: a source that is missing, damaged, too small or made with another tokenizer.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path | str, float]],
        sequence_length: int,
        seed: int,
        *,
        stages: Sequence[Stage] = (),
        packing: str = "concatenate",
        order: str = "auto",
        remote: RemoteOptions | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
        self._mixture = Mixture(stages or [Stage([weight for _, weight in sources])])
        self._shards = [TokenShards(path, remote) for path, _ in sources]
        _require_one_tokenizer(self._shards)
        self._samples = [_open_samples(shards, sequence_length, False, packing) for shards in self._shards]
        self._counts = np.array([samples.count for samples in self._samples], dtype=np.uint64)
        self._seed = seed
        self._sequence_length = sequence_length
        self.is_remote: bool = any(shards.remote for shards in self._shards)
        in_blocks = order == "block" or (order == "auto" and self.is_remote)
        self._windows = [_window_of(samples) if in_blocks else None for samples in self._samples]
        self.sources: list[Path | str] = [shards.directory for shards in self._shards]
        self.padding_ids: list[int] = [_padding_id(shards) for shards in self._shards]
        kinds = {shards.kind for shards in self._shards}
        self.kind: str = kinds.pop() if len(kinds) == 1 else "mixed"
        self.tokenizer_sha256: str = self._shards[0].tokenizer_sha256
        self.vocabulary_size: int = self._shards[0].vocabulary_size
        self.samples_per_epoch: int = int(self._counts.sum())
        self.may_join_documents: bool = any(samples.may_join_documents for samples in self._samples)
        one_stage = {"slots": self._mixture.slots[0].tolist()}
        many_stages = {"slots": self._mixture.slots.tolist(), "ends": self._mixture.ends}
        self.fingerprint: str = _fingerprint(
            order=ORDER_VERSION,
            sources=[shards.fingerprint for shards in self._shards],
            sequence_length=sequence_length,
            **(many_stages if self._mixture.ends else one_stage),
            **({"packing": packing} if packing != "concatenate" and self.kind != "chat" else {}),
            **({"windows": self._windows, "block_order": BLOCK_ORDER_VERSION} if any(self._windows) else {}),
        )
        self._blocks: dict[int, np.ndarray] = {}
        self._blocks_lock = threading.Lock()

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """The samples at ``[start, start + count)``, uint64 ``source << 48 | sample``, without reading data."""
        first, last = start // BLOCK_POSITIONS, (start + count - 1) // BLOCK_POSITIONS
        if first == last:
            return self._block(first)[start % BLOCK_POSITIONS :][:count]
        return self._ids_at(np.arange(start, start + count, dtype=np.uint64))

    def rows(self, positions: np.ndarray | range) -> Rows:
        """The rows at any positions (integers, at least 0), in the order given. A range is the fastest way to ask."""
        if isinstance(positions, range) and positions.step == 1 and len(positions) and positions.start >= 0:
            ids = self.sample_ids(positions.start, len(positions))
        else:
            positions = np.asarray(positions)
            if positions.size and int(positions.min()) < 0:
                raise ValueError(f"position {int(positions.min())} was asked for; positions begin at 0")
            ids = self._ids_at(positions.astype(np.uint64))
        if len(self._samples) == 1:
            return self._samples[0].rows(ids)  # the source's number is 0, so the id is the sample
        source_of = (ids >> np.uint64(SOURCE_SHIFT)).astype(np.int64)
        sample_of = ids & np.uint64((1 << SOURCE_SHIFT) - 1)
        tokens = np.empty((len(ids), self._sequence_length + 1), dtype=np.int64)
        target_mask = np.empty((len(ids), self._sequence_length), dtype=bool)
        begins = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for source in set(source_of.tolist()):
            chosen = np.flatnonzero(source_of == source)
            part = self._samples[source].rows(sample_of[chosen])
            tokens[chosen], target_mask[chosen] = part.tokens, part.target_mask
            begins.append((chosen[part.begin_rows], part.begin_columns))
        return Rows(tokens, target_mask, *(np.concatenate(parts) for parts in zip(*begins, strict=True)))

    def check_files(self) -> None:
        """Raise for the first file of a source that is missing or of the wrong size; see ``TokenShards``."""
        for shards in self._shards:
            shards.check_files()

    def describe(self) -> list[str]:
        """What the sources give, a sentence or two each, for people."""
        lines = []
        for source, (shards, samples) in enumerate(zip(self._shards, self._samples, strict=True)):
            shares = ", then ".join(f"{slots / PATTERN_SLOTS:.1%}" for slots in self._mixture.slots[:, source])
            share = f" ({shares} of the samples)" if len(self._shards) > 1 else ""
            lines += [f"{shards.directory}{share}: {line}" for line in samples.describe()]
            if self._windows[source] is not None:
                lines.append(f"{shards.directory}: shuffled in windows of {self._windows[source]:,} samples")
        return lines

    def epochs(self, samples: int) -> list[float]:
        """How often the first ``samples`` samples repeat each source."""
        return (self._mixture.counts(samples) / self._counts).tolist()

    def describe_run(self, samples: int, max_epochs: Sequence[float | None]) -> list[str]:
        """Warnings about a run of so many samples.

        Args:
            max_epochs: of each source, how often it may be repeated; None: as often as it comes, with a warning.

        Raises:
            ValueError: a source is repeated more often than its ``max_epochs``.
        """
        lines = []
        for shards, epochs, most in zip(self._shards, self.epochs(samples), max_epochs, strict=True):
            if most is not None and epochs > most + 1e-9:
                raise ValueError(
                    f"the run repeats {shards.directory} {epochs:.2f} times, but its max_epochs is {most:g}: shorten "
                    "the run, lower its weight, add data or raise max_epochs"
                )
            if most is None and epochs > EPOCHS_TO_WARN:
                lines.append(
                    f"warning: the run repeats {shards.directory} {epochs:.1f} times; beyond about {EPOCHS_TO_WARN} "
                    "epochs more of the same data gains little (arXiv:2305.16264)"
                )
        begun = [0, *self._mixture.ends]
        if begun[-1] >= samples:
            late = sum(begin >= samples for begin in begun)
            lines.append(f"warning: the run ends before its last {late} of {len(begun)} stages of data begin")
        return lines

    def _ids_at(self, positions: np.ndarray) -> np.ndarray:
        ids = np.empty(positions.shape, dtype=np.uint64)
        blocks = positions // np.uint64(BLOCK_POSITIONS)
        for block in set(blocks.tolist()):
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
        for source in set(source_of.tolist()):  # not np.unique, whose first call imports for 15 ms
            chosen = np.flatnonzero(source_of == source)
            count = self._counts[source]
            epoch_of, within = index_of[chosen] // count, index_of[chosen] % count
            for epoch in set(epoch_of.tolist()):
                now = epoch_of == epoch
                samples = self._permute(source, epoch, within[now])
                ids[chosen[now]] = np.uint64(source << SOURCE_SHIFT) | samples
        ids.flags.writeable = False  # slices of it are handed out
        return ids

    def _permute(self, source: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        count, window = int(self._counts[source]), self._windows[source]
        if window is None:
            return permute(indices, count, order_key(self._seed, source, epoch))
        return permute_in_blocks(indices, count, window, functools.partial(order_key, self._seed, source, epoch))


class ValidationStream:
    """All samples of one directory of token shards in fixed order, the last one padded.

    For text every token but the first is a target exactly once (those that begin a document are masked). Raises as
    ``TrainingStream``.
    """

    def __init__(self, path: Path | str, sequence_length: int, remote: RemoteOptions | None = None) -> None:
        self._shards = TokenShards(path, remote)
        self._samples = _open_samples(self._shards, sequence_length, padded=True)
        self.kind: str = self._shards.kind
        self.is_remote: bool = self._shards.remote is not None
        self.number_of_samples: int = self._samples.count
        self.may_join_documents: bool = self._samples.may_join_documents
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
