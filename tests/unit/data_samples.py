"""Small data sets and a tokenizer for the tests of data_pipeline."""

import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shard_writer import UnitWriter, write_manifest
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer

EMBEDDED = Path(__file__).parents[2] / "data_pipeline" / "embedded"
VOCABULARY = 400
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who art thou?"},
    {"role": "assistant", "content": " A friend.\nAnd thou? "},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "Well met."},
]


@functools.cache
def macbeth() -> str:
    return (EMBEDDED / "shakespeare" / "validation" / "macbeth.txt").read_text(encoding="utf-8")


@functools.cache
def small_tokenizer() -> Any:
    """Shared between tests: do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(save_tokenizer(Path(folder)))


def save_tokenizer(folder: Path) -> Path:
    train_tokenizer([macbeth()], VOCABULARY, folder)
    return folder


def add_document(writer: UnitWriter, ids: Sequence[int], mask: Sequence[bool] | None = None) -> None:
    tokens = np.asarray(ids)
    writer.add_documents(tokens, np.array([tokens.size]), None if mask is None else np.asarray(mask, dtype=bool))


def write_shards(
    directory: Path,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None = None,
    tokenizer_sha256: str = hashlib.sha256(b"a tokenizer").hexdigest(),
    shard_bytes: int = 256 * 2**20,
    vocabulary_size: int = 1000,
    pad: int | None = 1,
) -> Path:
    kind = "text" if masks is None else "chat"
    writer = UnitWriter(directory, kind=kind, vocabulary_size=vocabulary_size, shard_bytes=shard_bytes)
    for index, document in enumerate(documents):
        add_document(writer, document, None if masks is None else masks[index])
    write_manifest(
        directory,
        kind=kind,
        split="train",
        tokenizer_sha256=tokenizer_sha256,
        vocabulary_size=vocabulary_size,
        special_ids={"eos": 0, "pad": pad},
        shards=writer.finish(),
        units=[{"source": "made.txt", "bytes": 1, "documents_in": len(documents), "documents_kept": len(documents)}],
    )
    return directory


def random_documents(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 1000, generator.integers(1, longest + 1)) for _ in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
