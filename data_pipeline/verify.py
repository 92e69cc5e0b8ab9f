"""Full checks of prepared data: every byte against its checksum."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.prepare import REPORT_NAME
from data_pipeline.remote_blocks import RemoteFolder, is_url
from data_pipeline.token_shards import MANIFEST_NAME, TokenShards, rebuild_hint
from data_pipeline.tokenizer import tokenizer_at, tokenizer_fingerprint
from data_pipeline.units import TOKENIZER


def holds_prepared_data(directory: Path) -> bool:
    """Whether this is an output of ``prepare`` or one of its splits, whole or damaged."""
    return (directory / REPORT_NAME).is_file() or any(directory.glob("u-*.bin")) or any(directory.glob("u-*.sums"))


def verify_data(place: Path | str, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read an output of ``prepare``, or one split of it, and compare all of it with the checksums.

    Args:
        place: directory or URL of the output, with its report, or of a split, with its manifest.
        progress: called with (bytes done, bytes in all).

    Returns:
        ``kind`` ("prepared data" or "token shards") and of each split ``documents``, ``tokens`` and ``bytes``.

    Raises:
        FileNotFoundError, ValueError: the first missing or damaged file, its block, and the command that rebuilds it.
        OSError, PermissionError: what a store does not give; see ``RemoteFolder``.
    """
    try:
        content = RemoteFolder(str(place)).read(REPORT_NAME) if is_url(place) else Path(place, REPORT_NAME).read_bytes()
    except FileNotFoundError:
        return {"kind": "token shards", "splits": _verify([TokenShards(place)], progress)}
    return {"kind": "prepared data", "splits": _verify(_splits(place, content), progress)}


def _splits(place: Path | str, report_content: bytes) -> list[TokenShards]:
    """The splits that a report describes. ValueError where report, manifests and tokenizer do not fit together."""

    def inside(name: str) -> Path | str:
        return os.path.join(place, name) if is_url(place) else Path(place, name)

    try:
        report = orjson.loads(report_content)
        fingerprints = {name: split["fingerprint"] for name, split in report["splits"].items()}
        sha256 = report["tokenizer"]["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{inside(REPORT_NAME)} is damaged: {rebuild_hint(inside('train'))}") from None
    splits = [TokenShards(inside(name)) for name in fingerprints]
    for shards, fingerprint in zip(splits, fingerprints.values(), strict=True):
        if shards.fingerprint != fingerprint:
            raise ValueError(
                f"{shards.directory}/{MANIFEST_NAME} is not the one that {inside(REPORT_NAME)} describes: "
                f"{rebuild_hint(shards.directory)}"
            )
    with tokenizer_at(inside(TOKENIZER)) as folder:
        if tokenizer_fingerprint(folder) != sha256:
            raise ValueError(
                f"{inside(f'{TOKENIZER}/tokenizer.json')} is not the tokenizer that made the data: it was changed or "
                f"damaged; {rebuild_hint(inside('train'))}"
            )
    return splits


def _verify(splits: list[TokenShards], progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    sizes = [sum(shards.shard_bytes) for shards in splits]
    done = 0
    for shards in splits:
        for size in shards.check_all():
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return {
        shards.split: {"documents": shards.documents, "tokens": shards.tokens, "bytes": size}
        for shards, size in zip(splits, sizes, strict=True)
    }
