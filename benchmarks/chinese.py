"""Prepare Chinese with the shipped rules: the pages of manpages-zh, the Chinese conversations of chatterbot-corpus.

    python benchmarks/chinese.py

Prints what the rules drop; exit code 1 where one of them is anything but a duplicate. The packages are downloaded and
unpacked under build, not installed.
"""

import gzip
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import DEFAULT_FOLDER, unpack  # noqa: E402
from benchmarks.task_data import wheel  # noqa: E402
from data_pipeline.plan import PrepareOptions  # noqa: E402
from data_pipeline.prepare import prepare  # noqa: E402
from data_pipeline.rules import Rules  # noqa: E402

RULES = ROOT / "data_pipeline" / "default_rules.yaml"


def main() -> None:
    DEFAULT_FOLDER.mkdir(parents=True, exist_ok=True)
    unpack("manpages-zh", DEFAULT_FOLDER)
    others = 0
    for name, rows in (("manpages-zh", pages()), ("chatterbot-corpus", conversations())):
        work = ROOT / "build" / "chinese"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with open(work / "rows.jsonl", "w", encoding="utf-8") as output:
            output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        options = PrepareOptions([str(work / "rows.jsonl")], work / "out", train_vocabulary=1000)
        options.rules, options.rules_file = Rules(**yaml.safe_load(RULES.read_text())), str(RULES)
        options.tokenizer_sample_bytes = 10**6
        report = prepare(options)
        dropped = {rule: entry["documents"] for rule, entry in report["rules"]["dropped"].items() if entry["documents"]}
        others += sum(count for rule, count in dropped.items() if not rule.startswith("duplicates."))
        print(f"{name}: {report['documents']['in']} documents, dropped {dropped or 'none'}")
    sys.exit(others > 0)


def pages() -> Iterator[dict[str, Any]]:
    """Manual pages without comments and macros, the requests' names and the signs for fonts."""
    for path in sorted((DEFAULT_FOLDER / "manpages-zh" / "usr" / "share" / "man").rglob("*.gz")):
        if path.is_symlink():
            continue
        text = re.sub(r"^\.de1? .*?^\.\.\s*$", "", gzip.decompress(path.read_bytes()).decode(), flags=re.M | re.S)
        lines = [line for line in text.split("\n") if not line.startswith(('.\\"', "'\\\""))]
        text = "\n".join(re.sub(r"^[.']\s*\w*\s*", "", line) for line in lines)
        yield {"text": re.sub(r"\\(f.|\(..|[&|^])", "", text).replace("\\-", "-")}


def conversations() -> Iterator[dict[str, Any]]:
    for path in sorted((wheel("chatterbot-corpus==1.3.3") / "chatterbot_corpus/data/chinese").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            roles = ["user", "assistant"] * len(turns)
            yield {"messages": [{"role": r, "content": str(t)} for r, t in zip(roles, turns, strict=False)]}


if __name__ == "__main__":
    main()
