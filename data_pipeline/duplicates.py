"""Duplicates by 64-bit hashes: exact ones by that of their content, near ones by those of their MinHash bands.

Hashes are held a bucket at a time, so that memory does not grow with their number, but for one that stands there very
often: all its occurrences are held, with rules (of equal documents) one of each unit. Clusters of near duplicates take
8 bytes a document beside.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.plan import Plan
from data_pipeline.unit_documents import KEPT, NEAR, NEAR_HASHES, REPEATED, judged_path

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
    """Mark in the verdicts all but the first of equal documents and, where the rules say so, of each cluster of near
    duplicates; those in files for validation come before training's.

    Done again, as after an interruption, it marks the same.

    Raises:
        ValueError: nothing is left in training, as all of it stands in the files for validation.
    """
    assert plan.rules is not None
    _mark_exact(plan)
    if plan.rules.duplicates == "near":
        mark_near(plan)
    left = {int(verdict) for unit in plan.units for verdict in _training_verdicts(plan, unit.number)}
    if plan.validation_threshold is None and left and left <= {REPEATED, NEAR}:
        raise ValueError(
            "all training documents stand in the validation inputs, too (duplicates: "
            f"{plan.rules.duplicates}): give other files"
        )


def _mark_exact(plan: Plan) -> None:
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


def mark_near(plan: Plan) -> None:
    """Of each cluster, which is what equal bands link, the first document stays.

    Clusters are trees in an array, which names for each document one before it, or itself.
    """
    sizes = [judged_path(plan, unit.number, "verdicts").stat().st_size for unit in plan.units]
    begins = np.cumsum([0, *sizes])
    above = np.arange(begins[-1])
    first = _first_for_validation(plan, begins)
    hash_paths, place_paths = (
        [judged_path(plan, unit.number, f"{NEAR_HASHES}.{what}") for unit in plan.units]
        for what in ("hashes", "places")
    )
    for [parts] in zip(*_buckets([hash_paths]), strict=True):
        hashes = np.concatenate([part for _, part in parts])
        spans = [(edge, part.size) for edge, part in parts]
        parts.clear()  # of a full bucket 128 MiB, as is each array that follows
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        linked = np.flatnonzero(hashes[1:] == hashes[:-1])
        del hashes
        documents = np.concatenate(
            [
                np.fromfile(path, "<u4", size, offset=4 * edge) + (begin - first)
                for path, begin, (edge, size) in zip(place_paths, begins, spans, strict=False)
            ]
        )
        documents %= max(1, above.size)
        ones, others = documents[order[linked]], documents[order[linked + 1]]
        del documents, order, linked
        _join(above, ones, others)
        del ones, others
    for begin, end, unit in zip(begins, begins[1:], plan.units, strict=False):
        documents = (np.arange(begin, end) - first) % max(1, above.size)
        repeated = _roots(above, documents) != documents
        if repeated.any():
            verdicts = np.memmap(judged_path(plan, unit.number, "verdicts"), np.uint8, "r+")
            verdicts[repeated & (verdicts == KEPT)] = NEAR


def _first_for_validation(plan: Plan, begins: np.ndarray) -> int:
    """The first document of the files for validation, which are the last ones; 0 where there are no such files."""
    if plan.validation_threshold is None:
        for begin, unit in zip(begins, plan.units, strict=False):
            places = np.fromfile(judged_path(plan, unit.number, "validation.places"), "<u4")
            if places.size:
                return int(begin + places.min())
    return 0


def _join(above: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Make one tree of the two that each pair stands in."""
    while ones.size:
        ones, others = _roots(above, ones), _roots(above, others)
        apart = ones != others
        ones, others = np.minimum(ones, others)[apart], np.maximum(ones, others)[apart]
        np.minimum.at(above, others, ones)


def _roots(above: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first places of their trees; the way to them is made short."""
    roots = above[places]
    while not np.array_equal(higher := above[roots], roots):
        roots = higher
    above[places] = roots
    return roots


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
