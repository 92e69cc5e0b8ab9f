"""The work on one unit of ``prepare``: read, split, encode, write, commit.

A unit counts when its record ``.units/u-<number>.json`` is there, which is written last and atomically. What a killed
worker leaves before that is written again with the same bytes under the same names.
"""

import errno
import functools
import json
import os
import shutil
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from data_pipeline.chat import ChatRenderer
from data_pipeline.documents import text_bytes, texts_of
from data_pipeline.engines import open_engine
from data_pipeline.plan import Plan
from data_pipeline.shard_writer import UnitWriter, write_file_atomically
from data_pipeline.sources import Document, Ledger
from data_pipeline.templates import Tally
from data_pipeline.token_shards import sum_bytes
from data_pipeline.tokenizer import (
    document_frame,
    load_text_tokenizer,
    load_tokenizer,
    token_byte_lengths,
    vocabulary_size,
)
from data_pipeline.unit_documents import RECORDS, Report, empty_tally, kept_documents

TOKENIZER = "tokenizer"
BATCH_CHARACTERS = 2**20  # what is encoded in one call
BATCH_DOCUMENTS = 4096
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def record_path(plan: Plan, number: int) -> Path:
    return plan.output / RECORDS / f"u-{number:05d}.json"


def hashes_path(plan: Plan, number: int, split: str) -> Path:
    """Sorted content hashes (uint64) of a unit's documents in a split."""
    return plan.output / RECORDS / f"u-{number:05d}.{split}.hashes"


def sample_path(plan: Plan, number: int) -> Path:
    """What a unit gives to the tokenizer's training: a JSON list of documents, each a list of texts."""
    return plan.output / RECORDS / f"s-{number:05d}.json"


def unit_is_done(plan: Plan, number: int) -> bool:
    """Whether a unit's record fits the plan and its files are there in the sizes that it names."""
    try:
        record = json.loads(record_path(plan, number).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    if record["identity"] != plan.identity or plan.engine not in ("auto", record["engine"]):
        return False
    if record["ledger"]["skipped"] and not plan.read.skip_bad_rows:
        return False
    sizes = {hashes_path(plan, number, name): 8 * split["documents"] for name, split in record["splits"].items()}
    for name, split in record["splits"].items():
        for shard in split["shards"]:
            base = plan.output / name / shard["name"]
            sizes |= {base.with_suffix(f".{suffix}"): size for suffix, size in shard["bytes"].items()}
            sizes[base.with_suffix(".sums")] = sum_bytes(shard["bytes"])
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def no_room(error: OSError, output: Path) -> OSError:
    """The sentence for a disk that is full, or a limit of files' sizes; any other error as it is."""
    if error.errno not in NO_ROOM:
        return error
    free = shutil.disk_usage(output).free
    return OSError(
        f"{output} cannot be written: {os.strerror(error.errno).lower()} ({free:,} bytes are free there): make room "
        "and start the same command again; it keeps the units that are done"
    )


class UnitMaker:
    """Makes units of one plan, one after another; opening loads the tokenizer."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        tokenizer = (load_tokenizer if plan.kind == "chat" else load_text_tokenizer)(plan.output / TOKENIZER)
        self._header: dict[str, Any] = {
            "vocabulary_size": vocabulary_size(tokenizer),
            "special_ids": {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
        }
        self._encoder = _ChatEncoder(tokenizer) if plan.kind == "chat" else _TextEncoder(tokenizer, plan.engine)
        self.engine: str = self._encoder.engine
        self._augmenter = None
        if plan.rules is not None and plan.rules.augmentation is not None:
            from data_pipeline.augment import Augmenter  # without augmentation nothing of it is loaded

            self._augmenter = Augmenter(plan)
        self.remarks: str = "; ".join([self.engine, *self._encoder.remarks])
        """For people: the engine, and what they should know of it or of the chat template."""

    def make(self, number: int, report: Report) -> None:
        """Write the unit's shards, hashes and record.

        Raises:
            ValueError: bad input, named with its place.
            OSError: the disk is full, or a file cannot be read.
        """
        plan = self._plan
        for name in plan.splits:
            for leftover in (plan.output / name).glob(f"u-{number:05d}-*.tmp"):
                leftover.unlink(missing_ok=True)
        splits: dict[str, _Split] = {}
        try:
            for name in plan.splits:
                splits[name] = _Split(plan, number, name, self._header["vocabulary_size"], self._encoder)
            record = self._fill(number, splits, report)
            for name, split in splits.items():
                record["splits"][name] = split.finish()
                hashes = np.sort(np.array(split.hashes, dtype="<u8"))
                write_file_atomically(hashes_path(plan, number, name), hashes.tobytes())
            write_file_atomically(record_path(plan, number), json.dumps(record).encode())
        finally:
            for split in splits.values():
                split.writer.abandon()

    def _fill(self, number: int, splits: dict[str, "_Split"], report: Report) -> dict[str, Any]:
        ledger = Ledger()
        files = {part.file: [0, *[0] * len(splits)] for part in self._plan.units[number].parts}
        places = {name: place for place, name in enumerate(splits, start=1)}
        empty = 0
        repeated = None if self._plan.rules is None else empty_tally(self._plan)
        for file, document, content in kept_documents(self._plan, number, ledger, report, repeated):
            counts = files[file]
            counts[0] += 1
            if content is None:
                continue
            if not content:
                empty += 1
                continue
            content_hash = xxhash.xxh3_64_intdigest(content, seed=self._plan.seed)
            name = self._plan.split_of(file, content_hash)
            try:
                splits[name].add(document, content, content_hash)
            except _UnusableConversation as error:
                if not self._plan.read.skip_bad_rows:
                    raise ValueError(f"{document.location}: {error}") from None
                ledger.skip(self._plan.files[file], "conversation refused", f"{document.location}: {error}")
                counts[0] -= 1
                continue
            counts[places[name]] += 1
            if name == "train" and self._augmenter is not None:
                assert repeated is not None
                self._add_variants(document, content_hash, splits[name], repeated["augmented"], file)
        return {
            "identity": self._plan.identity,
            "engine": self.engine,
            "tokenizer": self._header,
            "splits": {},
            "files": [[file, *counts] for file, counts in files.items()],
            "empty_documents": empty,
            "ledger": asdict(ledger),
        } | ({} if repeated is None else {"repeated": repeated})

    def _add_variants(
        self, document: Document, content_hash: int, train: "_Split", tally: dict[str, Any], file: int
    ) -> None:
        """Add the variants of a training document behind it; those that the chat template refuses are counted."""
        from data_pipeline.augment import count_variant

        assert self._augmenter is not None
        for variant in self._augmenter.variants(document, content_hash, tally):
            try:
                train.add(variant.document, variant.content, variant.content_hash)
            except _UnusableConversation:
                tally[variant.kind]["refused"] += 1
                continue
            count_variant(tally[variant.kind], document, variant.document, self._plan.files[file].label)


def sample_unit(plan: Plan, number: int, report: Report) -> None:
    """Write the unit's share of the texts that a tokenizer is trained on: those of the smallest content hashes."""
    sample = _Sample(plan.sample_bytes[number])
    for file, document, content in kept_documents(plan, number, Ledger(), report):
        if not content:
            continue
        content_hash = xxhash.xxh3_64_intdigest(content, seed=plan.seed)
        if plan.split_of(file, content_hash) == "train":
            sample.add(content_hash, texts_of(document))
    write_file_atomically(sample_path(plan, number), orjson.dumps(sample.finish()))


class _Sample:
    """The documents of the smallest hashes, together ``size`` bytes; the last one is cut to fit."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[tuple[int, int, int, list[str]]] = []  # hash, place, bytes, texts
        self._bytes = 0
        self._limit = 2**64
        self._seen = 0

    def add(self, content_hash: int, texts: list[str]) -> None:
        self._seen += 1
        if content_hash > self._limit:
            return
        length = sum(len(text.encode()) for text in texts)
        self._kept.append((content_hash, self._seen, length, texts))
        self._bytes += length
        if self._bytes > 2 * self._size + 2**20:
            self._shrink()

    def finish(self) -> list[list[str]]:
        """In the order of the input."""
        self._shrink()
        if self._bytes > self._size:
            content_hash, place, length, texts = self._kept.pop()
            self._kept.append((content_hash, place, 0, _cut(texts, length - (self._bytes - self._size))))
        return [texts for _, _, _, texts in sorted(self._kept, key=lambda entry: entry[1])]

    def _shrink(self) -> None:
        """Keep the smallest hashes up to and with the one that reaches the size."""
        self._kept.sort()
        total = 0
        for index, (content_hash, _, length, _) in enumerate(self._kept):
            total += length
            if total >= self._size:
                del self._kept[index + 1 :]
                self._limit = content_hash
                break
        self._bytes = total


def _cut(texts: list[str], size: int) -> list[str]:
    """The first ``size`` bytes of the texts, not ending inside a character."""
    kept = []
    for text in texts:
        content = text.encode()[:size]
        kept.append(content.decode(errors="ignore"))
        size -= len(content)
    return kept


class _Split:
    """One split of the unit: what waits to be encoded, the writer, and what is counted."""

    def __init__(self, plan: Plan, number: int, name: str, vocabulary: int, encoder: "_TextEncoder | _ChatEncoder"):
        self.writer = UnitWriter(plan.output / name, kind=plan.kind, vocabulary_size=vocabulary, unit=number)
        self.hashes = array("Q")  # 8 bytes a document, where a list would take 40
        self._encoder = encoder
        self._batch_documents = BATCH_DOCUMENTS if plan.kind == "text" else 1
        self._batch: list[Document] = []
        self._characters = 0
        self._text_bytes: int | None = 0
        self._template = plan.read.template
        self._tally = Tally()

    def add(self, document: Document, content: bytes, content_hash: int) -> None:
        if self._batch and (self._batch[0].ids is None) != (document.ids is None):
            self._flush()
        self._batch.append(document)
        self._characters += len(document.text)
        if self._characters >= BATCH_CHARACTERS or len(self._batch) >= self._batch_documents:
            self._flush()
        self.hashes.append(content_hash)
        if document.ids is None:
            self._count_text(len(content) if document.messages is None else text_bytes(document))

    def finish(self) -> dict[str, Any]:
        """The split's part of the unit's record."""
        self._flush()
        return {
            "shards": self.writer.finish(),
            "documents": self.writer.documents,
            "tokens": self.writer.tokens,
            "text_bytes": self._text_bytes,
            "longest_document_tokens": self.writer.longest_document_tokens,
            "tally": self._tally.as_json(),
        }

    def _flush(self) -> None:
        batch, self._batch, self._characters = self._batch, [], 0
        if not batch:
            return
        encoded = self._encoder.encode(batch)
        self.writer.add_documents(encoded.tokens, encoded.lengths, encoded.mask)
        if self._template is not None and encoded.mask is not None:
            [document] = batch
            response = (document.messages or [])[-1]["content"]
            self._tally.add(self._template, response, len(encoded.mask), int(encoded.mask.sum()))
        if batch[0].ids is not None:
            self._count_text(encoded.text_bytes)

    def _count_text(self, size: int | None) -> None:
        self._text_bytes = None if size is None or self._text_bytes is None else self._text_bytes + size


class _Encoded(NamedTuple):
    tokens: np.ndarray  # ids of all documents one after another
    lengths: np.ndarray
    mask: np.ndarray | None
    text_bytes: int | None  # of documents that came as ids; None where the tokenizer does not tell


class _UnusableConversation(Exception):
    """Says what is wrong with a conversation."""


class _TextEncoder:
    """Texts to framed ids in batches; ids that a source brought are taken as they are, with an end token."""

    def __init__(self, tokenizer: Any, engine: str) -> None:
        self._tokenizer = tokenizer
        self._engine = open_engine(tokenizer, engine)
        self.engine: str = self._engine.name
        self.remarks = self._engine.passed_over
        self._before, self._behind = (np.array(ids, dtype=np.int64) for ids in document_frame(tokenizer))
        self._end = tokenizer.eos_token_id

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        return token_byte_lengths(self._tokenizer)

    def encode(self, batch: list[Document]) -> _Encoded:
        if batch[0].ids is not None:
            return self._take(batch)
        flat, lengths = self._engine.encode([document.text for document in batch])
        return _Encoded(*self._framed(flat, lengths), None, None)

    def _framed(self, flat: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before, behind = self._before, self._behind
        framed = lengths + (before.size + behind.size)
        ends = np.cumsum(framed)
        out = np.empty(int(ends[-1]), dtype=flat.dtype)
        body = np.ones(out.size, dtype=bool)
        for offset, token in enumerate(before):
            out[ends - framed + offset] = token
            body[ends - framed + offset] = False
        for offset, token in enumerate(behind, start=-behind.size):
            out[ends + offset] = token
            body[ends + offset] = False
        out[body] = flat
        return out, framed

    def _take(self, batch: list[Document]) -> _Encoded:
        arrays: list[np.ndarray] = []
        for document in batch:
            assert document.ids is not None
            ended = document.ids[-1] == self._end
            arrays.append(document.ids if ended else np.append(document.ids, self._end))
        tokens = np.concatenate(arrays)
        known = self._byte_lengths
        within = known is not None and int(tokens.min()) >= 0 and int(tokens.max()) < known.size
        text_bytes = int(known[tokens].sum()) if known is not None and within else None
        return _Encoded(tokens, np.array([array.size for array in arrays]), None, text_bytes)


class _ChatEncoder:
    """One conversation at a time, through the tokenizer's chat template."""

    engine = "huggingface"

    def __init__(self, tokenizer: Any) -> None:
        self._renderer = ChatRenderer(tokenizer)
        self.remarks = self._renderer.remarks

    def encode(self, batch: list[Document]) -> _Encoded:
        [document] = batch
        try:
            ids, mask = self._renderer.render(document.messages or [], document.tools)
        except ValueError as error:
            raise _UnusableConversation(str(error)) from None
        return _Encoded(np.array(ids), np.array([len(ids)]), np.array(mask, dtype=bool), None)
