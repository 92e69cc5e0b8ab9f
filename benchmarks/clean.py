"""Time the cleaning rules on one core, next to datatrove's filters and MinHash, on 320 MB of Debian documentation.

    python benchmarks/clean.py [--core 1] [--rounds 2] [--part-megabytes 4] [--out benchmarks/results/clean.json]

Every round runs all contenders one after another, each a process pinned to the same core with one thread, which reads
JSONL and writes what it found out, no texts. Rates are of processor time without the start, which is measured by the
same command on one document. datatrove gets every n-th document of the corpus. At the end near duplicates are marked
among invented hashes of 1.2 and of 4.8 million documents, to hold the memory against the formula in README.md.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import DEFAULT_FOLDER, build_corpus  # noqa: E402
from benchmarks.facts import describe, judge, peer_python, write_and_show  # noqa: E402
from benchmarks.prepare import text_bytes, timed  # noqa: E402

DOCUMENTS = (1_198_000, 4_792_000)  # whose hashes fill one bucket, and four
FORMULA_BYTES = 0.7 * 2**30
FORMULA_BYTES_A_DOCUMENT = 8
OURS = """
import sys
from pathlib import Path
import yaml
from data_pipeline.plan import PrepareOptions, make_plan
from data_pipeline.rules import Rules
from data_pipeline.unit_documents import RECORDS, judge_unit
rules, source, output = sys.argv[1:]
plan = make_plan(PrepareOptions([source], Path(output), rules=Rules(**yaml.safe_load(rules))))
(plan.output / RECORDS).mkdir(parents=True)
for unit in plan.units:
    judge_unit(plan, unit.number, lambda share: None)
"""
MARKING = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from data_pipeline.duplicates import mark_near
from data_pipeline.n_grams import BANDS
from data_pipeline.unit_documents import RECORDS, judged_path
_, documents, output = sys.argv[1:]
documents, unit_documents = int(documents), 2**17
units = [SimpleNamespace(number=number) for number in range(-(-documents // unit_documents))]
plan = SimpleNamespace(output=Path(output), units=units, validation_threshold=0)
(plan.output / RECORDS).mkdir(parents=True)
random = np.random.default_rng(0)
kinds = documents * BANDS * 5  # so about a tenth of the hashes stand there twice or more
for unit in units:
    count = min(unit_documents, documents - unit.number * unit_documents)
    hashes = np.sort(random.integers(0, kinds, count * BANDS, dtype="<u8") * (2**64 // kinds))
    hashes.tofile(judged_path(plan, unit.number, "near.hashes"))
    np.tile(np.arange(count, dtype="<u4"), BANDS).tofile(judged_path(plan, unit.number, "near.places"))
    judged_path(plan, unit.number, "verdicts").write_bytes(bytes(count))
mark_near(plan)
"""
# Exact versions: datatrove needs an xxhash before 4, and for English words spaCy.
DATATROVE = (
    *("datatrove==0.10.1", "humanize==4.17.0", "loguru==0.7.3", "orjson==3.13.0", "tokenizers==0.23.3"),
    *("ftfy==6.3.1", "nltk==3.10.4", "spacy==3.8.18", "xxhash==3.6.0"),
)
DATATROVE_PROGRAM = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
what, source, output = sys.argv[1:]
if what == "rules":
    steps = [FTFYFormatter(), PIIFormatter(), GopherQualityFilter(), FineWebQualityFilter(), GopherRepetitionFilter()]
else:
    steps = [MinhashDedupSignature(output + "/signatures")]
reader = JsonlReader(source, glob_pattern="*.jsonl")
LocalPipelineExecutor(pipeline=[reader, *steps], tasks=1, workers=1, logging_dir=output + "/logs").run()
"""


def main() -> None:
    options = read_options()
    work = ROOT / "build" / "clean"
    inputs = make_inputs(build_corpus(options.corpus), work / "input", options.part_megabytes * 10**6)
    rules = (ROOT / "data_pipeline" / "default_rules.yaml").read_text()
    peer = peer_python("datatrove-clean", DATATROVE)
    contenders = {
        ("ours, rules", "whole"): command(Path(sys.executable), OURS, rules),
        ("ours, signatures", "whole"): command(Path(sys.executable), OURS, "duplicates: near"),
        ("datatrove, rules", "part"): command(peer, DATATROVE_PROGRAM, "rules"),
        ("datatrove, signatures", "part"): command(peer, DATATROVE_PROGRAM, "signatures"),
    }
    facts = describe(("numpy", "ftfy", "xxhash", "python-stdnum"), datatrove="0.10.1", spacy="3.8.18")
    facts["corpus"] = json.loads((options.corpus / "corpus.json").read_text())
    results: list[dict[str, Any]] = []
    for (name, part), make in contenders.items():
        seconds: dict[str, list[float]] = {"start": [], part: []}
        memory = 0
        for source, times in list(seconds.items()) * options.rounds:
            run = timed(make(str(inputs[source]), work / "out"), work / "out", options.core)
            times.append(run["cpu_seconds"])
            memory = max(memory, run["peak_memory_bytes"])
            print(f"{name}, {source}: CPU {run['cpu_seconds']:.1f} s", flush=True)
        size, start, whole = text_bytes(inputs[part]), min(seconds["start"]), min(seconds[part])
        rate = round(size / 1e6 / (whole - start), 2)
        results.append({"contender": name, "text_bytes": size, "start_cpu_seconds": start, "cpu_seconds": whole})
        results[-1] |= {"mb_per_cpu_second_without_start": rate, "peak_memory_bytes": memory}
    mark = command(Path(sys.executable), MARKING, "near")
    facts["marking"] = [
        {"documents": count} | timed(mark(str(count), work / "out"), work / "out", options.core) for count in DOCUMENTS
    ]
    shutil.rmtree(work / "out")
    facts |= {"results": results, "targets": targets(results, facts["marking"])}
    show(facts, options.out)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the cleaning rules next to datatrove, on one core.")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_FOLDER, help="folder of the corpus; made if absent")
    parser.add_argument("--core", type=int, default=os.cpu_count() - 1, help="the core that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part-megabytes", type=int, default=4, help="text that datatrove gets, about")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "clean.json")
    return parser.parse_args()


def make_inputs(corpus: Path, folder: Path, part_bytes: int) -> dict[str, Path]:
    """Folders with one JSONL file each: the whole corpus, every n-th document of it, one document."""
    shutil.rmtree(folder, ignore_errors=True)
    every = {"whole": 1, "part": max(1, corpus.stat().st_size // part_bytes), "start": 2**62}
    files = {name: folder / name / "corpus.jsonl" for name in every}
    for name, step in every.items():
        files[name].parent.mkdir(parents=True)
        with open(corpus, "rb") as lines, open(files[name], "wb") as output:
            output.writelines(line for number, line in enumerate(lines) if number % step == 0)
    return files


def command(python: Path, program: str, what: str) -> Callable[[str, Path], list[str]]:
    def words(source: str, output: Path) -> list[str]:
        folder = str(Path(source).parent) if program == DATATROVE_PROGRAM else source
        return [str(python), "-c", program, what, folder, str(output)]

    return words


def targets(results: list[dict[str, Any]], marking: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = {entry["contender"]: entry["mb_per_cpu_second_without_start"] for entry in results}
    judging = max(entry["peak_memory_bytes"] for entry in results if entry["contender"].startswith("ours"))
    largest = marking[-1]
    formula = FORMULA_BYTES + FORMULA_BYTES_A_DOCUMENT * largest["documents"]
    return judge(
        [
            ("rules, MB/s of CPU", 10.0, rates["ours, rules"]),
            ("MinHash signatures, MB/s of CPU", 8.0, rates["ours, signatures"]),
            ("rules / datatrove's", 1.0, round(rates["ours, rules"] / rates["datatrove, rules"], 1)),
            ("signatures / datatrove's", 1.0, round(rates["ours, signatures"] / rates["datatrove, signatures"], 1)),
            ("memory of judging, GiB (at most)", 0.7, round(judging / 2**30, 2)),
            (
                f"memory of marking among {largest['documents']:,} documents, share of the formula (at most)",
                1.0,
                round(largest["peak_memory_bytes"] / formula, 2),
            ),
        ]
    )


def show(facts: dict[str, Any], out: Path) -> None:
    head = ("contender", "text MB", "CPU s", "start CPU s", "MB/s of CPU without start", "MiB")
    rows = [
        (
            entry["contender"],
            f"{entry['text_bytes'] / 1e6:.1f}",
            f"{entry['cpu_seconds']:.1f}",
            f"{entry['start_cpu_seconds']:.1f}",
            entry["mb_per_cpu_second_without_start"],
            round(entry["peak_memory_bytes"] / 2**20),
        )
        for entry in facts["results"]
    ]
    write_and_show(facts, out, head, rows)
    for entry in facts["marking"]:
        mebibytes = round(entry["peak_memory_bytes"] / 2**20)
        print(f"marking among {entry['documents']:,} documents: CPU {entry['cpu_seconds']:.1f} s, {mebibytes} MiB")


if __name__ == "__main__":
    main()
