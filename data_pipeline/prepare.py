"""Files in, token shards out: read, split, train or take a tokenizer, encode, write.

The report is written last: an output without one was interrupted, is recognised by its marker file, and is made anew.
"""

import hashlib
import json
import os
import shlex
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.chat import ChatRenderer
from data_pipeline.sources import (
    Document,
    ReadOptions,
    SourceFile,
    content_kind,
    content_paths,
    find_files,
    read_documents,
)
from data_pipeline.token_shards import ShardWriter, TokenShards, sync_directory, write_file_atomically
from data_pipeline.tokenizer import (
    copy_tokenizer,
    document_frame,
    load_tokenizer,
    plain_text_encoder,
    tokenizer_files,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)

REPORT_VERSION = "prepare/1"
REPORT_NAME = "report.json"
MARKER_NAME = "prepare.incomplete"
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**20  # what is encoded in one call: enough to keep every core busy, little enough to hold in memory
BATCH_DOCUMENTS = 4096

Progress = Callable[[int, int], None]


@dataclass
class PrepareOptions:
    """What ``trainyard prepare`` is asked to do."""

    inputs: list[str]  # files, folders, globs
    output: Path
    tokenizer: Path | None = None  # an existing tokenizer folder, or ...
    train_vocabulary: int | None = None  # ... the vocabulary size of one to train
    format: str = "auto"
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    delimiter: str | None = None
    encoding: str = "utf-8"
    validation_fraction: float = 0.01  # share of documents, where validation_inputs does not name files of their own
    validation_inputs: list[str] = field(default_factory=list)
    seed: int = 0

    def read_options(self) -> ReadOptions:
        delimiter = "\t" if self.delimiter == "\\t" else self.delimiter  # a shell passes the two characters
        return ReadOptions(
            self.format, self.text_field, self.prompt_field, self.response_field, delimiter, self.encoding
        )

    def command(self) -> str:
        """The command line that stands for these options."""
        words = ["trainyard", "prepare"]
        for entry in self.inputs:
            words += ["--input", entry]
        words += ["--out", str(self.output)]
        if self.tokenizer is not None:
            words += ["--tokenizer", str(self.tokenizer)]
        if self.train_vocabulary is not None:
            words += ["--train-tokenizer", str(self.train_vocabulary)]
        for entry in self.validation_inputs:
            words += ["--validation-input", entry]
        default = PrepareOptions([], self.output)
        names = ["format", "text_field", "prompt_field", "response_field", "delimiter", "encoding", "seed"]
        for name in names + ([] if self.validation_inputs else ["validation_fraction"]):
            if getattr(self, name) != getattr(default, name):
                words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        return shlex.join(words)


@dataclass
class _Split:
    """What is counted of one split while it is written."""

    writer: ShardWriter
    text_bytes: int = 0
    kept_by_file: dict[int, int] = field(default_factory=dict)
    content_hashes: array = field(default_factory=lambda: array("Q"))  # 8 bytes a document, where a list would take 40


class _Reading:
    """Reads all files once or several times, deals documents to splits and reports how far it has come."""

    def __init__(self, options: PrepareOptions, progress: Progress | None) -> None:
        self.read_options = options.read_options()
        self.files, self.ignored = find_files(options.inputs, self.read_options)
        self.train_files = len(self.files)
        if options.validation_inputs:
            validation_files, ignored = find_files(options.validation_inputs, self.read_options)
            self.files += _separate_files(self.files, validation_files)
            self.ignored += ignored
        kinds = {content_kind(file, self.read_options): file for file in self.files}
        if "ids" in kinds:
            raise ValueError(f"{kinds['ids'].path} holds token ids, not text to prepare")
        if len(kinds) > 1:
            raise ValueError(
                f"{kinds['chat'].path} holds conversations and {kinds['text'].path} plain text: prepare them separately"
            )
        self.kind = next(iter(kinds))
        self._seed = options.seed
        self.own_validation_files = bool(options.validation_inputs)
        self._threshold = int(options.validation_fraction * 2**64)
        self._progress = progress
        self._passes = 2 if options.train_vocabulary is None else 3  # checksums, (tokenizer,) encoding
        self._bytes_done = 0
        self.documents_in = [0] * len(self.files)
        self.empty_documents = 0

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def advance(self, file_bytes: int, bytes_in_file: int, finished: bool = False) -> None:
        """Report progress; ``finished`` moves the base behind the file."""
        if self._progress is not None:
            self._progress(self._bytes_done + bytes_in_file, self.total_bytes * self._passes)
        if finished:
            self._bytes_done += file_bytes

    def documents(self, wanted: Sequence[str] = SPLITS) -> Iterator[tuple[int, Document, str, int]]:
        """(index of the file, document, its split, hash of its content) of every document that is not empty."""
        self.empty_documents = 0
        for index, file in enumerate(self.files):
            self.documents_in[index] = 0
            if wanted == ("train",) and index >= self.train_files:
                self.advance(file.bytes, file.bytes, finished=True)
                continue
            for number, document in enumerate(read_documents(file, self.read_options), start=1):
                self.documents_in[index] = number
                if number % 256 == 0:
                    self.advance(file.bytes, document.bytes_read)
                if document.messages is None and not document.text:
                    self.empty_documents += 1
                    continue
                content = xxhash.xxh3_64_intdigest(_content(document), seed=self._seed)
                split = self._split_of(index, content)
                if split in wanted:
                    yield index, document, split, content
            self.advance(file.bytes, file.bytes, finished=True)

    def _split_of(self, file_index: int, content_hash: int) -> str:
        """By file where validation has its own, else by content: equal documents always fall to one split."""
        if self.own_validation_files:
            return SPLITS[file_index >= self.train_files]
        return SPLITS[content_hash < self._threshold]


def prepare(options: PrepareOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``train``, ``validation``, ``tokenizer`` and ``report.json`` into ``options.output`` and return the report.

    The same options on the same files give the same bytes. Where the output already holds exactly that, nothing is
    done and the stored report comes back with ``"reused": True``.

    Args:
        options: see ``PrepareOptions``.
        progress: called now and then with (bytes done, bytes in all), passes over the files counted each.

    Raises:
        FileNotFoundError, ValueError: bad options, bad input, or an output that holds something else; one sentence.
    """
    _check_options(options)
    reading = _Reading(options, progress)
    identity = _identity(options, reading)
    output = Path(options.output)
    stored = _stored_report(output, identity)
    if stored is not None:
        return {**stored, "reused": True}
    _clear_output(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER_NAME).touch()
    sync_directory(output)
    try:
        report = _make(options, reading, output)
    except Exception:
        _clear_output(output)  # a refused input leaves nothing behind; a killed process is cleaned up by the next start
        raise
    report = {"version": REPORT_VERSION, "identity": identity, "command": options.command(), **report}
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_file_atomically(output / REPORT_NAME, content.encode())
    (output / MARKER_NAME).unlink()
    return {**report, "reused": False}


def _check_options(options: PrepareOptions) -> None:
    if (options.tokenizer is None) == (options.train_vocabulary is None):
        raise ValueError("give either a tokenizer folder (--tokenizer) or the size of one to train (--train-tokenizer)")
    if not 0 <= options.validation_fraction < 1:
        raise ValueError(f"the validation fraction is {options.validation_fraction}; it must be at least 0 and below 1")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"the seed is {options.seed}; it must be at least 0 and below 2**64")
    if not options.inputs:
        raise ValueError("give at least one input")
    output = Path(options.output).resolve()
    used = [*options.inputs, *options.validation_inputs]
    for entry in used if options.tokenizer is None else [*used, str(options.tokenizer)]:
        if Path(entry).resolve().is_relative_to(output):
            raise ValueError(f"{entry} is inside the output {options.output}: choose another output directory")


def _separate_files(train: list[SourceFile], validation: list[SourceFile]) -> list[SourceFile]:
    shared = {file.path.resolve() for file in train} & {file.path.resolve() for file in validation}
    if shared:
        raise ValueError(f"{min(shared)} is both a training and a validation input: leave it out of one")
    return validation


def _content(document: Document) -> bytes:
    """What makes two documents the same."""
    if document.messages is None:
        return document.text.encode()
    turns = [[message["role"], message["content"]] for message in document.messages]
    return json.dumps(turns, ensure_ascii=False).encode()


def _text_bytes(document: Document) -> int:
    if document.messages is None:
        return len(document.text.encode())
    return sum(len(message["content"].encode()) for message in document.messages)


# The output directory


def _identity(options: PrepareOptions, reading: _Reading) -> str:
    """A hash of all that the result depends on: options, the tokenizer, names, sizes and contents of the files."""
    choices = {
        key: value for key, value in asdict(options).items() if key not in ("output", "inputs", "validation_inputs")
    }
    if options.tokenizer is not None:
        choices["tokenizer"] = {file.name: _file_digest(file) for file in tokenizer_files(options.tokenizer)}
    digests = []
    for index, file in enumerate(reading.files):
        digests.append(
            [file.name, file.bytes, [_file_digest(path) for path in content_paths(file)], index >= reading.train_files]
        )
        reading.advance(file.bytes, file.bytes, finished=True)
    content = json.dumps([REPORT_VERSION, choices, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as content:
        while block := content.read(2**23):
            digest.update(block)
    return digest.hexdigest()


def _stored_report(output: Path, identity: str) -> dict[str, Any] | None:
    """The report of an earlier, equal preparation; None where there is none; ValueError for an unequal one."""
    path = output / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        same = report["identity"] == identity
        fingerprints = {split: report["splits"][split]["fingerprint"] for split in report["splits"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not a report of trainyard prepare: delete {output} or choose another --out"
        ) from None
    if not same:
        raise ValueError(
            f"{output} already holds data made with other options or from other files "
            f"({report.get('command', 'unknown')}): "
            "delete it or choose another --out"
        )
    for split, fingerprint in fingerprints.items():
        if TokenShards(output / split).fingerprint != fingerprint:
            raise ValueError(
                f"{output / split} is not the data that {path} describes: delete {output} and prepare it again"
            )
    (output / MARKER_NAME).unlink(missing_ok=True)
    return report


def _clear_output(output: Path) -> None:
    """Empty what an interrupted preparation left; refuse a directory that holds anything not made by one."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file: choose another --out")
    names = {entry.name for entry in output.iterdir()}
    if not names:
        return
    if MARKER_NAME not in names or names - {*SPLITS, "tokenizer", MARKER_NAME, REPORT_NAME + ".tmp"}:
        raise ValueError(f"{output} is not empty and was not made by trainyard prepare: choose another --out")
    for name in sorted(names - {MARKER_NAME}):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / MARKER_NAME).unlink()


# Making it


def _make(options: PrepareOptions, reading: _Reading, output: Path) -> dict[str, Any]:
    tokenizer = _make_tokenizer(options, reading, output / "tokenizer")
    sha256 = tokenizer_fingerprint(output / "tokenizer")
    vocabulary = vocabulary_size(tokenizer)
    with_validation = bool(options.validation_inputs) or options.validation_fraction > 0
    splits = {
        name: _Split(
            ShardWriter(
                output / name,
                kind=reading.kind,
                tokenizer_sha256=sha256,
                vocabulary_size=vocabulary,
                special_ids={"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
                split=name,
            )
        )
        for name in SPLITS[: 2 if with_validation else 1]
    }
    try:
        _encode_all(reading, tokenizer, splits)
        _require_documents(options, splits)
        summaries = {name: _finish_split(reading, name, split) for name, split in splits.items()}
    finally:
        for split in splits.values():
            split.writer.abandon()
    kept = [sum(split.kept_by_file.get(index, 0) for split in splits.values()) for index in range(len(reading.files))]
    return {
        "kind": reading.kind,
        "options": _portable_options(options),
        "tokenizer": {"sha256": sha256, "vocabulary_size": vocabulary, "trained": options.train_vocabulary is not None},
        "splits": summaries,
        "empty_documents": reading.empty_documents,
        "ignored_files": reading.ignored,
        "duplicates": _count_duplicates(splits),
        "files": [
            {"name": file.name, "bytes": file.bytes, "documents_in": count, "documents_kept": kept[index]}
            for index, (file, count) in enumerate(zip(reading.files, reading.documents_in, strict=True))
        ],
    }


def _portable_options(options: PrepareOptions) -> dict[str, Any]:
    chosen = asdict(options)
    return {key: str(value) if isinstance(value, os.PathLike) else value for key, value in chosen.items()}


def _make_tokenizer(options: PrepareOptions, reading: _Reading, folder: Path) -> Any:
    """Train or copy the tokenizer into the output, and load it from there as everyone after us will."""
    if options.tokenizer is not None:
        copy_tokenizer(options.tokenizer, folder)
    elif options.train_vocabulary is not None:
        train_tokenizer(_training_texts(reading), options.train_vocabulary).save_pretrained(str(folder))
    return load_tokenizer(folder)


def _training_texts(reading: _Reading) -> Iterator[str]:
    for _, document, _, _ in reading.documents(("train",)):
        if document.messages is None:
            yield document.text
        else:
            for message in document.messages:
                yield message["content"]


def _encode_all(reading: _Reading, tokenizer: Any, splits: dict[str, _Split]) -> None:
    add = _chat_adder(tokenizer) if reading.kind == "chat" else _text_adder(tokenizer)
    batch: list[tuple[Document, _Split]] = []
    characters = 0
    for index, document, name, content_hash in reading.documents():
        split = splits[name]
        split.text_bytes += _text_bytes(document)
        split.kept_by_file[index] = split.kept_by_file.get(index, 0) + 1
        split.content_hashes.append(content_hash)
        batch.append((document, split))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            add(batch)
            batch, characters = [], 0
    add(batch)


def _text_adder(tokenizer: Any) -> Callable[[list[tuple[Document, _Split]]], None]:
    encoder = plain_text_encoder(tokenizer)
    before, behind = document_frame(tokenizer)

    def add(batch: list[tuple[Document, _Split]]) -> None:
        encodings = encoder.encode_batch_fast([document.text for document, _ in batch], add_special_tokens=False)
        for (_, split), encoding in zip(batch, encodings, strict=True):
            split.writer.add_document(before + encoding.ids + behind)

    return add


def _chat_adder(tokenizer: Any) -> Callable[[list[tuple[Document, _Split]]], None]:
    renderer = ChatRenderer(tokenizer)

    def add(batch: list[tuple[Document, _Split]]) -> None:
        for document, split in batch:
            try:
                ids, mask = renderer.render(document.messages or [])
            except ValueError as error:
                raise ValueError(f"{document.location}: {error}") from None
            split.writer.add_document(ids, mask)

    return add


def _require_documents(options: PrepareOptions, splits: dict[str, _Split]) -> None:
    documents = {name: split.writer.documents for name, split in splits.items()}
    if sum(documents.values()) == 0:
        raise ValueError("the inputs hold no documents")
    for name, count in documents.items():
        if count:
            continue
        if options.validation_inputs:
            raise ValueError(f"the {name} inputs hold no documents")
        other = "raise" if name == "validation" else "lower"
        raise ValueError(
            f"with --validation-fraction {options.validation_fraction} none of the {sum(documents.values())} "
            "documents falls to "
            f"the {name} split: {other} the fraction or give --validation-input"
        )


def _finish_split(reading: _Reading, name: str, split: _Split) -> dict[str, Any]:
    own = range(len(reading.files))
    if reading.own_validation_files:
        own = range(reading.train_files) if name == "train" else range(reading.train_files, len(reading.files))
    units = [
        {
            "source": reading.files[index].name,
            "bytes": reading.files[index].bytes,
            "documents_in": reading.documents_in[index],
            "documents_kept": split.kept_by_file.get(index, 0),
        }
        for index in own
    ]
    writer = split.writer
    writer.finish(units)
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": split.text_bytes,
        "longest_document_tokens": writer.longest_document_tokens,
        "fingerprint": TokenShards(writer.directory).fingerprint,
    }


def _count_duplicates(splits: dict[str, _Split]) -> dict[str, int]:
    """Exact duplicates by 64-bit hash: counted, not removed."""
    unique = {name: np.unique(np.array(split.content_hashes, dtype=np.uint64)) for name, split in splits.items()}
    result = {f"{name}_repeated_documents": splits[name].writer.documents - len(unique[name]) for name in splits}
    if "validation" in splits:
        shared = np.intersect1d(unique["train"], unique["validation"], assume_unique=True)
        result["documents_in_both_splits"] = len(shared)
    return result
