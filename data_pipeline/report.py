"""The report of ``prepare`` for people."""

from typing import Any

SHOWN = ("kind", "tokenizer", "splits", "duplicates", "empty_documents", "skipped_rows", "cut_short", "task", "units")


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """What the terminal shows: of the rules only what they did, in documents."""
    shown = {key: report[key] for key in (*SHOWN, "units_done", "reused", "run") if key in report}
    if "rules" in report:
        rules = report["rules"]
        counts = {
            what: {name: entry["documents"] for name, entry in rules[what].items() if entry["documents"]}
            for what in ("changed", "dropped")
        }
        shown["rules"] = {"documents_in": rules["documents_in"], **counts, "remarks": rules["remarks"]}
    return shown
