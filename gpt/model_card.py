"""The README of an exported folder: where its weights come from, in numbers."""

import json
import re
from typing import Any

from gpt.checkpoint.format import Precision
from gpt.export_source import ExportSource, versions_line
from gpt.run_directory import package_versions

UNKNOWN_LICENCE = "unknown"


def check_licence(licence: str) -> None:
    """Raises ValueError for what cannot be an identifier of the hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", licence):
        raise ValueError(
            f"The licence {licence!r} is no identifier of the hub; give one as apache-2.0, mit or other, in lower case."
        )


def model_card(source: ExportSource, precision: Precision, licence: str, report: dict[str, Any]) -> str:
    """The card's text: front matter as the hub reads it, a table, and what the gate's `report` says of the folder."""
    rows = source.card | {"Stored in": precision, "Exported with": versions_line(package_versions())}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {licence}\ntags: [trainyard]\n---",
        f"# {source.name}\n\nA causal language model, exported by Trainyard.\n\n| | |\n| --- | --- |\n{table}",
        _verdict(report),
    ]
    if licence == UNKNOWN_LICENCE:
        parts.append(
            "The licence of these weights is not stated: who trained them decides, and it depends on the data and on "
            "the weights that training began with. `trainyard export --license ID` writes it here."
        )
    if source.recipe is not None:
        parts.append(f"## Recipe\n\n```json\n{json.dumps(source.recipe, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def _verdict(report: dict[str, Any]) -> str:
    if not report["passed"]:
        return "**Do not use this folder**: it is not what was trained. `export_report.json` says what differs."
    if not report["gated"]:
        return (
            "**Not checked against the training engine** (`--ungated`): the checkpoint has no record of its logits. "
            "That this folder computes what was trained is not shown."
        )
    return (
        "Before this folder got its name, transformers loaded it in a process of its own; its logits and text were "
        "found equal to the training engine's, its tokens to those of the run's tokenizer: see `export_report.json`."
    )
