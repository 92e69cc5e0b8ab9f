"""The report of ``prepare`` for people: a page that needs nothing but itself, and what the terminal shows."""

from pathlib import Path
from typing import Any

FILES_SHOWN = 30
SHOWN = ("kind", "tokenizer", "documents", "text_bytes", "splits", "duplicates", "skipped_rows", "cut_short", "task")
COLOURS = {
    "kept for train": "#2a6f97",
    "kept for validation": "#61a5c2",
    "empty": "#adb5bd",
    "language": "#588157",
    "length": "#bc4749",
    "gopher_quality": "#e07a5f",
    "fineweb_quality": "#f2a65a",
    "gopher_repetition": "#7f5539",
    "decontamination": "#c9184a",
    "duplicates": "#9d4edd",
}


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """What the terminal shows: of the rules only what they did, in documents."""
    shown = {key: report[key] for key in (*SHOWN, "units", "units_done", "reused", "run") if key in report}
    if "splits" in shown:
        shown["splits"] = {
            name: {key: value for key, value in split.items() if key != "length_histogram"}
            for name, split in shown["splits"].items()
        }
    if "rules" in report:
        counts = {
            what: {name: entry["documents"] for name, entry in report["rules"][what].items() if entry["documents"]}
            for what in ("changed", "dropped")
        }
        counts |= {"languages": report["rules"]["languages"]} if "languages" in report["rules"] else {}
        if "augmented" in report["rules"]:
            counts["augmented"] = {
                name: {key: value for key, value in entry.items() if key != "examples"}
                for name, entry in report["rules"]["augmented"].items()
            }
        counts |= {"overlap": report["rules"]["overlap"]} if "overlap" in report["rules"] else {}
        shown["rules"] = counts | {"remarks": report["rules"]["remarks"]}
    return shown


def render_page(report: dict[str, Any]) -> str:
    """The report as one HTML file without scripts, fonts or images of others. Texts of the data are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # `summarize` needs none

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters["number"] = lambda value: "unknown" if value is None else f"{value:,}"
    environment.filters["percent"] = lambda part, whole: f"{100 * part / whole:.2f} %" if whole else "none"
    histograms = {name: split["length_histogram"] for name, split in report["splits"].items()}
    lengths = sorted({entry["from_tokens"] for histogram in histograms.values() for entry in histogram})
    files = sorted(report["files"], key=lambda file: -file["documents_in"])
    return environment.get_template("report.html.jinja").render(
        report,
        ways=_ways(report),
        lengths=lengths,
        bars={
            name: {entry["from_tokens"]: entry["documents"] for entry in histogram}
            for name, histogram in histograms.items()
        },
        files_shown=files[:FILES_SHOWN],
        tokens=sum(split["tokens"] for split in report["splits"].values()),
        rules=report.get("rules"),
    )


def _ways(report: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(what became of documents, how many, a colour), those kept first."""
    added = {"train": report["documents"].get("augmented", 0)}
    ways = [(f"kept for {name}", s["documents"] - added.get(name, 0)) for name, s in report["splits"].items()]
    ways.append(("empty", report["documents"]["empty"]))
    dropped = report["rules"]["dropped"] if "rules" in report else {}
    ways += [(name, entry["documents"]) for name, entry in dropped.items()]
    return [(name, count, COLOURS[name.partition(".")[0]]) for name, count in ways if count]
