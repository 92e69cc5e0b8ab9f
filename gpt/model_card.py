"""The README of an exported folder: where its weights come from, in numbers."""

import json
from pathlib import Path
from typing import Any

from gpt.checkpoint.format import Manifest
from gpt.run_directory import json_lines

UNKNOWN_LICENCE = "unknown"


def model_card(name: str, rows: dict[str, str], recipe: dict[str, Any] | None, *, licence: str, gated: bool) -> str:
    """The card's text: front matter as the hub reads it, the `rows` as a table, the recipe.

    `licence` is an identifier of the hub, and `gated` whether the folder was held against the training engine.
    """
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {licence}\ntags: [trainyard]\n---",
        f"# {name}\n\nA causal language model, exported by Trainyard.\n\n| | |\n| --- | --- |\n{table}",
    ]
    if gated:
        parts.append(
            "Before this folder got its name, transformers loaded it in a process of its own and its logits, text and "
            "tokens were found equal to the training engine's: see `export_report.json`."
        )
    else:
        parts.append(
            "**Not checked against the training engine** (`--ungated`): the checkpoint has no record of its logits. "
            "That this folder computes what was trained is not shown."
        )
    if licence == UNKNOWN_LICENCE:
        parts.append(
            "The licence of these weights is not stated: who trained them decides, and it depends on the data and on "
            "the weights that training began with. `trainyard export --license ID` writes it here."
        )
    if recipe is not None:
        parts.append(f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def card_of_run(run: Path, manifest: Manifest) -> dict[str, str]:
    """The table's rows for a checkpoint of the run directory `run`."""
    recipe, config = manifest.recipe, manifest.model_config_dict
    elements = sum(parameter.elements for parameter in manifest.parameters)
    frozen = sum(parameter.elements for parameter in manifest.parameters if parameter.group is None)
    data = recipe.get("data") or {}
    sources = ", ".join(Path(item["path"]).parent.name or item["path"] for item in data.get("train") or [])
    metrics = _last_evaluation(run / "metrics.jsonl", manifest.step)
    versions = {name: version for name, version in sorted(manifest.versions.items()) if version}
    return {
        "Architecture": f"{config.get('model_type')}, {elements:,} parameters"
        + (f", {frozen:,} of them frozen" if frozen else ""),
        "Started from": (recipe.get("model") or {}).get("pretrained") or "random weights",
        "Training data": f"{sources or 'unknown'} ({manifest.data_kind}), fingerprint {manifest.data_fingerprint}",
        "Trained on": f"{manifest.tokens:,} tokens in {manifest.step:,} steps, {manifest.world_size} ranks at the end",
        "Precision": manifest.precision,
        **{f"Validation {name.removeprefix('evaluate/')}": f"{value:.4f}" for name, value in metrics.items()},
        "Made with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _last_evaluation(path: Path, step: int) -> dict[str, float]:
    """The last evaluation metrics that the run recorded up to `step`; empty when there are none."""
    found: dict[str, float] = {}
    for record in json_lines(path):
        values = {k: v for k, v in record.items() if k.startswith("evaluate/") and isinstance(v, float)}
        if values and record["step"] <= step:
            found = values
    return found
