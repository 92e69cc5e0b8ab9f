"""The documents of one unit of ``prepare``: read, and judged by the rules where there are any.

With rules all units are judged before the first one is made, because whether a document is a duplicate depends on all.
A unit's verdicts are a byte a document; what they stand on is in its record ``j-<number>.json``, written last.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.documents import text_bytes, texts_of
from data_pipeline.plan import Plan
from data_pipeline.shard_writer import write_file_atomically
from data_pipeline.sources import Document, Ledger, read_documents

RECORDS = ".units"
KEPT, DROPPED, REPEATED, NEAR = range(4)
NEAR_HASHES = "near"  # beside those of the splits: some of each document, which near duplicates share
REPETITIONS = {
    REPEATED: ("duplicates.exact", "stands elsewhere"),
    NEAR: ("duplicates.near", "much of it stands elsewhere"),
}

Report = Callable[[float], None]  # the share of the unit that is done


def judged_path(plan: Plan, number: int, what: str) -> Path:
    """Of a unit: "json" its record, "verdicts", "train.hashes" and "train.places" (in the unit; of "near", too)."""
    return plan.output / RECORDS / f"j-{number:05d}.{what}"


def read_unit(plan: Plan, number: int, ledger: Ledger, report: Report) -> Iterator[tuple[int, Document]]:
    """(index of the file, document) of a unit."""
    parts = plan.units[number].parts
    for index, part in enumerate(parts):
        file = plan.files[part.file]
        by_bytes = file.container == "jsonl" and part.end > 1
        begin, size = (part.begin, part.end - part.begin) if by_bytes else (0, max(1, file.bytes))
        for count, document in enumerate(read_documents(file, plan.read, part, ledger)):
            if count % 256 == 0:
                report((index + min(1.0, max(0.0, (document.bytes_read - begin) / size))) / len(parts))
            yield part.file, document


def document_content(document: Document) -> bytes:
    """What makes a document the same as another; empty of an empty one."""
    if document.ids is not None:
        return document.ids.astype("<u4").tobytes()
    if document.messages is None:
        return document.text.encode()
    turns: list[Any] = []
    for message in document.messages:
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        turns.append([message["role"], message.get("content"), *([rest] if rest else [])])
    if document.tools:
        turns.append(document.tools)
    return json.dumps(turns, ensure_ascii=False, sort_keys=True).encode()


def kept_documents(
    plan: Plan, number: int, ledger: Ledger, report: Report, tally: dict[str, Any] | None = None
) -> Iterator[tuple[int, Document, bytes | None]]:
    """(index of the file, document, its content) of a unit, repaired; the content of one that a rule drops is None.

    Duplicates are counted in ``tally``; what other rules did is in the unit's record.
    """
    documents = read_unit(plan, number, ledger, report)
    if plan.rules is None:
        for file, document in documents:
            yield file, document, document_content(document)
        return
    from data_pipeline.clean import Cleaner, drop  # without rules nothing of them is loaded

    cleaner = Cleaner(plan.rules)
    verdicts = judged_path(plan, number, "verdicts").read_bytes()
    for verdict, (file, document) in zip(verdicts, documents, strict=True):
        if verdict == KEPT:
            document = cleaner.repair(document)
            yield file, document, document_content(document)
            continue
        if verdict in REPETITIONS and tally is not None:
            document = cleaner.repair(document)
            drop(tally, REPETITIONS[verdict], document, plan.files[file].label)
        yield file, document, None


def judge_unit(plan: Plan, number: int, report: Report) -> None:
    """Write a unit's verdicts, the hashes of the documents that its own rules keep, and its record."""
    from data_pipeline.clean import Cleaner, drop, no_tally
    from data_pipeline.decontamination import Contamination
    from data_pipeline.n_grams import band_hashes

    assert plan.rules is not None
    cleaner = Cleaner(plan.rules)
    contamination = Contamination(plan) if plan.evaluation_files else None
    tally = no_tally(plan.rules)
    verdicts = bytearray()
    groups = [*plan.splits, *([NEAR_HASHES] if plan.rules.duplicates == "near" else [])]
    kept: dict[str, tuple[array[int], array[int]]] = {name: (array("Q"), array("I")) for name in groups}
    for file, document in read_unit(plan, number, Ledger(), report):
        tally["documents_in"] += 1
        tally["bytes_in"] += text_bytes(document)
        label = plan.files[file].label
        document = cleaner.repair(document, tally, label)
        content = document_content(document)
        reason = cleaner.broken_bound(document, tally) if content else None
        text = "\n".join(texts_of(document))
        for_validation = plan.validation_threshold is None and file >= plan.train_files
        if contamination is not None and reason is None and not for_validation:
            reason = contamination.find(text)
        if reason is not None:
            drop(tally, reason, document, label)
        elif content:
            content_hash = xxhash.xxh3_64_intdigest(content, seed=plan.seed)
            hashes = {plan.split_of(file, content_hash): [content_hash]}
            if NEAR_HASHES in kept:
                hashes[NEAR_HASHES] = band_hashes(text)
            for name, values in hashes.items():
                kept[name][0].extend(values)
                kept[name][1].extend([len(verdicts)] * len(values))
        verdicts.append(KEPT if reason is None else DROPPED)
    counts = _write_hashes(plan, number, kept, verdicts)
    write_file_atomically(judged_path(plan, number, "verdicts"), bytes(verdicts))
    record = {"identity": plan.identity, "hashes": counts, "tally": tally}
    write_file_atomically(judged_path(plan, number, "json"), json.dumps(record).encode())


def _write_hashes(
    plan: Plan, number: int, kept: dict[str, tuple["array[int]", "array[int]"]], verdicts: bytearray
) -> dict[str, int]:
    """Write hashes in their order, and the places of their documents; return how many there are.

    A unit's own exact duplicates are marked here, so that one text however frequent stays one hash.
    """
    assert plan.rules is not None
    counts = {}
    for name, columns in kept.items():
        hashes, places = (np.array(column, dtype=kind) for column, kind in zip(columns, ("<u8", "<u4"), strict=True))
        order = np.argsort(hashes, kind="stable")
        if name == NEAR_HASHES:
            order = order[np.frombuffer(verdicts, np.uint8)[places[order]] == KEPT]
        elif plan.rules.duplicates:
            again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
            for place in places[order[again]]:
                verdicts[place] = REPEATED
            order = np.delete(order, again)
        for what, values in (("hashes", hashes), ("places", places)):
            write_file_atomically(judged_path(plan, number, f"{name}.{what}"), values[order].tobytes())
        counts[name] = order.size
    return counts


def unit_is_judged(plan: Plan, number: int) -> bool:
    """Whether a unit's verdicts are of this plan, and there in full."""
    try:
        record = json.loads(judged_path(plan, number, "json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    if record["identity"] != plan.identity:
        return False
    sizes = {"verdicts": record["tally"]["documents_in"]}
    for name, count in record["hashes"].items():
        sizes |= {f"{name}.hashes": 8 * count, f"{name}.places": 4 * count}
    paths = {judged_path(plan, number, what): size for what, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def empty_tally(plan: Plan) -> dict[str, Any]:
    """What rules did with no document."""
    from data_pipeline.clean import no_tally

    assert plan.rules is not None
    return no_tally(plan.rules)


def judged_tally(plan: Plan) -> dict[str, Any]:
    """What the rules other than that on duplicates did in all units."""
    from data_pipeline.clean import add_tally

    total = empty_tally(plan)
    for unit in plan.units:
        add_tally(total, json.loads(judged_path(plan, unit.number, "json").read_bytes())["tally"])
    return total


def require_kept(plan: Plan) -> None:
    """Raise ValueError where the rules keep nothing of the inputs, or nothing of a split that has files of its own."""
    records = [json.loads(judged_path(plan, unit.number, "json").read_bytes()) for unit in plan.units]
    kept = {name: sum(record["hashes"][name] for record in records) for name in plan.splits}
    tally = judged_tally(plan)
    dropped = {name: entry["documents"] for name, entry in tally["dropped"].items() if entry["documents"]}
    empty = [name for name, count in kept.items() if not count]
    if not dropped or not empty or (plan.validation_threshold is not None and any(kept.values())):
        return
    where = "" if len(empty) == len(kept) else f" in the {empty[0]} inputs"
    counts = ", ".join(f"{name} {count:,}" for name, count in dropped.items())
    raise ValueError(
        f"the rules keep no document{where}; of {tally['documents_in']:,} documents in all they drop {counts}: loosen "
        "these bounds"
    )
