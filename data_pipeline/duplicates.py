"""Exact duplicates by the 64-bit hash of their content, in memory that does not grow with the number of documents.

But for one text that stands there very often: all its hashes are held at a time, with rules one of each unit.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.plan import Plan
from data_pipeline.unit_documents import REPEATED, judged_path

BUCKET_HASHES = 2**24  # held in memory at a time: 128 MiB, and as much again twice to mark them


def count_duplicates(plan: Plan, hashes: dict[str, list[Path]]) -> dict[str, int]:
    """Documents that repeat another one in their split, and those in both. ``hashes``: of each split, sorted files."""
    result = {f"{name}_repeated_documents": 0 for name in plan.splits}
    if len(plan.splits) > 1:
        result["documents_in_both_splits"] = 0
    for split_hashes in zip(*_buckets(list(hashes.values())), strict=True):
        unique = []
        for name, parts in zip(hashes, split_hashes, strict=True):
            values = np.concatenate([part for _, part in parts])
            unique.append(np.unique(values))
            result[f"{name}_repeated_documents"] += values.size - unique[-1].size
        if len(unique) > 1:
            result["documents_in_both_splits"] += np.intersect1d(unique[0], unique[1], assume_unique=True).size
    return result


def mark_duplicates(plan: Plan) -> None:
    """Mark in the verdicts all but the first of equal documents; validation's come before training's.

    Done again, as after an interruption, it marks the same.

    Raises:
        ValueError: nothing is left in training, as all of it stands in the files for validation.
    """
    units = [(unit.number, split) for split in reversed(plan.splits) for unit in plan.units]
    for [parts] in zip(
        *_buckets([[judged_path(plan, number, f"{split}.hashes") for number, split in units]]), strict=True
    ):
        hashes = np.concatenate([part for _, part in parts])
        order = np.argsort(hashes, kind="stable")
        repeated = np.zeros(hashes.size, dtype=bool)
        repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
        end = 0
        for (number, split), (begin, part) in zip(units, parts, strict=True):
            marked = np.flatnonzero(repeated[end : end + part.size])
            end += part.size
            if marked.size:
                places = np.fromfile(judged_path(plan, number, f"{split}.places"), "<u4")
                verdicts = np.memmap(judged_path(plan, number, "verdicts"), np.uint8, "r+")
                verdicts[places[begin + marked]] = REPEATED
    left = {int(verdict) for unit in plan.units for verdict in _training_verdicts(plan, unit.number)}
    if plan.validation_threshold is None and left == {REPEATED}:
        raise ValueError(
            "all training documents stand in the validation inputs, too (duplicates: exact): give other files"
        )


def _training_verdicts(plan: Plan, number: int) -> np.ndarray:
    """The different verdicts on the training documents of a unit that the rules before this one keep."""
    places = np.fromfile(judged_path(plan, number, "train.places"), "<u4")
    return np.unique(np.fromfile(judged_path(plan, number, "verdicts"), np.uint8)[places])


def _buckets(groups: Sequence[list[Path]]) -> list[Iterator[list[tuple[int, np.ndarray]]]]:
    """Of each group of sorted files, bucket after bucket of hash values: (where it begins in the file, values) of each
    file."""
    total = sum(path.stat().st_size // 8 for paths in groups for path in paths)
    count = max(1, -(-total // BUCKET_HASHES))
    bounds = np.array([2**64 * bucket // count for bucket in range(1, count)], dtype=np.uint64)
    return [_read_buckets(paths, bounds) for paths in groups]


def _read_buckets(paths: list[Path], bounds: np.ndarray) -> Iterator[list[tuple[int, np.ndarray]]]:
    edges = []
    for path in paths:
        hashes = np.fromfile(path, "<u8")
        edges.append([0, *np.searchsorted(hashes, bounds).tolist(), hashes.size])
    for bucket in range(bounds.size + 1):
        yield [
            (edge[bucket], np.fromfile(path, "<u8", count=edge[bucket + 1] - edge[bucket], offset=8 * edge[bucket]))
            for path, edge in zip(paths, edges, strict=True)
        ]
