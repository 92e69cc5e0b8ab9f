"""Measure what share of two packages' text is duplicates, next to what a count of repeated paragraphs gave elsewhere.

    python benchmarks/duplicates.py [--corpus build/corpus] [--out benchmarks/results/duplicates.json]

freebsd-manpages holds many pages under several names, openjdk-17-doc repeats its navigation on every page. Both are
prepared by ``trainyard prepare`` with the rule ``duplicates``: paragraph by paragraph with ``exact``, which the
reference figures count, and page by page with ``exact`` and ``near``. The reference does not say how it made text of
HTML: its unique text of openjdk-17-doc is ours, and its text in all is ours without the foot of every page, a notice of
copyright. So that is what is compared, and the whole pages stand beside it.
"""

import argparse
import gzip
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import BLANK_LINES, DEFAULT_FOLDER, decoded, html_text, unpack  # noqa: E402
from benchmarks.facts import describe, judge, write_and_show  # noqa: E402
from data_pipeline.plan import PrepareOptions  # noqa: E402
from data_pipeline.prepare import prepare  # noqa: E402
from data_pipeline.rules import Rules  # noqa: E402

REFERENCE_MEGABYTES = {"freebsd-manpages": (22.2, 3.9), "openjdk-17-doc": (63.7, 31.9)}  # of text, and of it unique
LARGEST_DIFFERENCE = 0.03
FOOT = re.compile(r"<footer\b.*?</footer>", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="The duplicate share of two packages, next to the reference's.")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_FOLDER, help="folder where packages are unpacked")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "duplicates.json")
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    versions = {package: unpack(package, options.corpus) for package in REFERENCE_MEGABYTES}
    facts = describe(("numpy", "xxhash"), **versions)
    results, targets = [], []
    for package, (text, unique) in REFERENCE_MEGABYTES.items():
        pages = list(pages_of(options.corpus / package))
        expected = round(1 - unique / text, 3)
        found = dropped_share(paragraphs_of(pages), "exact") | {"package": package, "of": "paragraphs, exact"}
        results += [found | {"reference_share": expected, "reference_text_megabytes": text}]
        results += [
            dropped_share(pages, how) | {"package": package, "of": f"pages, {how}"} for how in ("exact", "near")
        ]
        if whole := [html_text(decoded(path.read_bytes())) for path in html_files(options.corpus / package)]:
            found_whole = dropped_share(paragraphs_of(whole), "exact")
            results.append(found_whole | {"package": package, "of": "paragraphs of whole pages, exact"})
        name = f"{package}, paragraphs: difference from the reference's {expected} (at most)"
        targets.append((name, LARGEST_DIFFERENCE, round(abs(found["share"] - expected), 3)))
    facts |= {"results": results, "targets": judge(targets)}
    head = ("package", "documents are", "documents", "text MB", "duplicates, share of the bytes", "reference")
    rows = [
        [entry[key] for key in ("package", "of", "documents")]
        + [f"{entry['text_bytes'] / 1e6:.1f}", entry["share"], entry.get("reference_share", "")]
        for entry in results
    ]
    write_and_show(facts, options.out, head, rows)


def pages_of(folder: Path) -> Iterator[str]:
    """The text of manual pages, without requests and comments, or of HTML pages, without the foot of each."""
    for path in sorted((folder / "usr" / "share" / "man").rglob("*.gz")):
        lines = decoded(gzip.decompress(path.read_bytes())).splitlines()
        yield "\n".join(line for line in lines if not line.startswith((".", "'")))
    for path in html_files(folder):
        yield html_text(FOOT.sub("", decoded(path.read_bytes())))


def html_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.html")) if path.is_file() and not path.is_symlink()]


def paragraphs_of(pages: Iterable[str]) -> Iterator[str]:
    return (part.strip() for page in pages for part in BLANK_LINES.split(page))


def dropped_share(texts: Iterable[str], how: str) -> dict[str, Any]:
    """Prepare the texts with the rule ``duplicates: how``."""
    work = ROOT / "build" / "duplicates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with open(work / "texts.jsonl", "w", encoding="utf-8") as output:
        output.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    options = PrepareOptions([str(work / "texts.jsonl")], work / "out", train_vocabulary=1000, validation_fraction=0)
    options.rules, options.rules_file = Rules(duplicates=how), "rules.yaml"  # type: ignore[arg-type]
    options.tokenizer_sample_bytes = 2**20
    report = prepare(options)
    shutil.rmtree(work)
    sizes = report["text_bytes"]
    counts = {"documents": report["documents"]["in"], "text_bytes": sizes["in"], "dropped_bytes": sizes["dropped"]}
    return counts | {"share": round(sizes["dropped"] / sizes["in"], 3)}


if __name__ == "__main__":
    main()
