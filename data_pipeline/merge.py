"""The end of ``prepare``: the records of all units become the manifests of the splits and the report."""

import json
from dataclasses import asdict
from typing import Any

from data_pipeline.duplicates import count_duplicates
from data_pipeline.plan import Plan, PrepareOptions
from data_pipeline.shard_writer import write_manifest
from data_pipeline.sources import Ledger
from data_pipeline.templates import Tally, check_classes
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint
from data_pipeline.unit_documents import judged_tally
from data_pipeline.units import TOKENIZER, hashes_path, record_path


def merge_units(options: PrepareOptions, plan: Plan, sample: dict[str, int]) -> dict[str, Any]:
    """Write the manifests and return the report, the same bytes whoever made the units and however often it is done.

    Args:
        options: as given.
        plan: all of its units are done.
        sample: what a trained tokenizer was trained on, for the report.

    Raises:
        ValueError: no documents, a split without any, a file of which nothing could be used.
    """
    records = [json.loads(record_path(plan, unit.number).read_bytes()) for unit in plan.units]
    files = [[0] * (1 + len(plan.splits)) for _ in plan.files]  # documents in, and kept in each split
    ledger = Ledger()
    for record in records:
        ledger.merge(Ledger(**record["ledger"]))
        for file, *counts in record["files"]:
            files[file] = [one + other for one, other in zip(files[file], counts, strict=True)]
    ledger.refuse_unusable({file.label: counts[0] for file, counts in zip(plan.files, files, strict=True)})
    _require_documents(options, plan, records)
    sha256 = tokenizer_fingerprint(plan.output / TOKENIZER)
    header = {"kind": plan.kind, "tokenizer_sha256": sha256, **records[0]["tokenizer"]}
    trained = options.train_vocabulary is not None
    vocabulary = header["vocabulary_size"]
    hashes = {name: [hashes_path(plan, unit.number, name) for unit in plan.units] for name in plan.splits}
    seen = _task_rows(plan, records) if plan.read.template is not None else {"splits": {}}
    splits = {
        name: _write_split(plan, name, records, files, header) | seen["splits"].get(name, {}) for name in plan.splits
    }
    rules = None if plan.rules is None else _rules_report(plan, records)
    return {
        "kind": plan.kind,
        "options": _portable(options),
        "tokenizer": {"sha256": sha256, "vocabulary_size": vocabulary, "trained": trained, **sample},
        "units": len(plan.units),
        "splits": splits,
        **{key: value for key, value in seen.items() if key != "splits"},
        **_balance(records, sum(counts[0] for counts in files), rules),
        "skipped_rows": ledger.skipped,
        "cut_short": ledger.cut_short,
        "ignored_files": list(plan.ignored),
        "duplicates": count_duplicates(plan, hashes),
        "files": [
            {"name": file.name, "bytes": file.bytes, "documents_in": counts[0], "documents_kept": sum(counts[1:])}
            for file, counts in zip(plan.files, files, strict=True)
        ],
    } | ({} if rules is None else {"rules": rules})


def _balance(records: list[dict[str, Any]], documents_in: int, rules: dict[str, Any] | None) -> dict[str, Any]:
    """What became of all documents, and of their text; ids of a tokenizer without exact lengths have none."""
    splits = [split for record in records for split in record["splits"].values()]
    kept, empty = sum(split["documents"] for split in splits), sum(record["empty_documents"] for record in records)
    dropped = sum(entry["documents"] for entry in rules["dropped"].values()) if rules else 0
    documents = {"in": documents_in, "kept": kept, "empty": empty, "dropped": dropped}
    sizes = [split["text_bytes"] for split in splits]
    size = None if None in sizes else sum(sizes)
    lost = sum(entry["bytes"] for entry in rules["dropped"].values()) if rules else 0
    text_bytes = {"in": rules["bytes_in"] if rules else size, "kept": size, "dropped": lost}
    if rules and "augmented" in rules:
        added, added_bytes = (
            sum(entry[what] for entry in rules["augmented"].values()) for what in ("documents", "bytes")
        )
        documents |= {"kept": kept - added, "augmented": added}
        text_bytes |= {"kept": size and size - added_bytes, "augmented": added_bytes}
    return {"documents": documents, "text_bytes": text_bytes}


def _rules_report(plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rules changed and dropped, each with its first examples, and what of validation training holds."""
    from data_pipeline.clean import add_tally  # without rules nothing of them is loaded

    tally = judged_tally(plan)
    for record in records:
        add_tally(tally, record["repeated"])
    if "languages" in tally:
        tally["languages"] = dict(sorted(tally["languages"].items(), key=lambda entry: (-entry[1], entry[0])))
    remarks = []
    if tally["documents_without_spaces"]:
        remarks.append(
            f"documents in scripts without spaces between words: {tally['documents_without_spaces']:,}; for them the "
            "bounds on words, lines and n-grams (gopher_quality, fineweb_quality, gopher_repetition) were off"
        )
    if plan.evaluation_files:
        from data_pipeline.decontamination import RUN_WORDS, evaluation_counts

        counts = evaluation_counts(plan)
        assert counts is not None
        tally["evaluation"] = counts
        remarks.append(
            f"decontamination looked for {counts['runs']:,} runs of {RUN_WORDS} words, of {counts['texts']:,} texts of "
            f"evaluation files; {counts['texts_of_one_run']:,} of these are no longer than that, and each of "
            "them is looked for as a whole document"
        )
    if plan.kind == "chat":
        remarks.append("of conversations length.min_characters and the bounds on words, lines and n-grams were off")
    if "validation" in plan.splits:
        from data_pipeline.overlap import count_overlap

        tally["overlap"] = count_overlap(*(TokenShards(plan.output / name) for name in plan.splits))
    return tally | {"remarks": remarks}


def _portable(options: PrepareOptions) -> dict[str, Any]:
    """The options that the result depends on, in words of JSON."""
    chosen = asdict(options)
    for name in ("workers", "task", "engine", "rules", "rules_file"):
        del chosen[name]
    if options.rules is not None:
        chosen["rules"] = options.rules.model_dump()
    chosen |= {"output": str(options.output), "tokenizer": options.tokenizer and str(options.tokenizer)}
    return {**chosen.pop("read"), **chosen}


def _require_documents(options: PrepareOptions, plan: Plan, records: list[dict[str, Any]]) -> None:
    documents = {name: sum(record["splits"][name]["documents"] for record in records) for name in plan.splits}
    total = sum(documents.values())
    if total == 0:
        raise ValueError("the inputs hold no documents")
    for name, count in documents.items():
        if count:
            continue
        if options.validation_inputs:
            raise ValueError(f"the {name} inputs hold no documents")
        other = "raise" if name == "validation" else "lower"
        raise ValueError(
            f"with --validation-fraction {options.validation_fraction} none of the {total} documents falls to the "
            f"{name} split: {other} the fraction or give --validation-input"
        )


def _write_split(
    plan: Plan, name: str, records: list[dict[str, Any]], files: list[list[int]], header: dict[str, Any]
) -> dict[str, Any]:
    splits = [record["splits"][name] for record in records]
    own = range(len(plan.files))
    if plan.validation_threshold is None:
        own = range(plan.train_files) if name == "train" else range(plan.train_files, len(plan.files))
    place = 1 + plan.splits.index(name)
    units = [
        {"source": file.name, "bytes": file.bytes, "documents_in": counts[0], "documents_kept": counts[place]}
        for file, counts in [(plan.files[index], files[index]) for index in own]
    ]
    directory = plan.output / name
    shards = [shard for split in splits for shard in split["shards"]]
    write_manifest(directory, split=name, shards=shards, units=units, **header)
    written = TokenShards(directory)
    text_bytes = [split["text_bytes"] for split in splits]
    return {
        "documents": sum(split["documents"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
        "text_bytes": None if None in text_bytes else sum(text_bytes),
        "longest_document_tokens": max(split["longest_document_tokens"] for split in splits),
        "length_histogram": written.length_histogram(),
        "fingerprint": written.fingerprint,
    }


def _task_rows(plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a template's rows: lengths and classes. Raises ValueError for unusable classes."""
    tallies = {name: Tally() for name in plan.splits}
    for record in records:
        for name, tally in tallies.items():
            tally.merge(record["splits"][name]["tally"])
    found: dict[str, Any] = {"splits": {name: tally.report() for name, tally in tallies.items()}}
    if plan.read.template is not None and plan.read.template.label is not None:
        shared = check_classes(tallies, load_tokenizer(plan.output / TOKENIZER))
        found["labels_with_the_same_first_token"] = shared
    return found
