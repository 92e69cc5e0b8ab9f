"""How the cost of `trainyard train` grows with ranks, model and sequence, against the formulas of ZeRO-3.

    python benchmarks/scaling.py [--json]

Each run is a command of its own; its metrics.jsonl tells everything. The plot stands beside the JSON. Everything is
made under build/scaling.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.checkpoint import make_data  # noqa: E402
from benchmarks.facts import Target, describe, judge, write_and_show  # noqa: E402
from benchmarks.train import MODELS, START_ENVIRONMENT  # noqa: E402

WORK, OUT = ROOT / "build" / "scaling", ROOT / "benchmarks" / "results" / "scaling.json"
STEPS, WARM_STEPS, RANK_TOKENS = 6, 2, 2048
LAYERS = {1: 6, 2: 14, 4: 30}
"""Of the 10 M parameter model; with so many it has about twice and four times its parameters."""
BASE = {"ranks": 2, "times": 1, "sequence": 512}
PARTS: dict[str, list[dict[str, int]]] = {
    "ranks": [BASE | {"ranks": ranks} for ranks in (1, 2, 4)],
    "model": [BASE | {"times": times} for times in (1, 2, 4)],
    "sequence": [BASE, BASE | {"sequence": 2048}],
}
GATHERED_BYTES, REDUCED_BYTES = 2 * 2, 4
"""Of a parameter in a step: gathered in bf16 for the forward and again for the backward; its gradient in fp32."""
STATE_BYTES = 18
"""Of a parameter over all ranks: bf16 weight 2, fp32 master weight 4, AdamW's moments 8, fp32 gradient 4."""


def main() -> None:
    parser = argparse.ArgumentParser(description="How cost grows with ranks, model and sequence.")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    facts = describe(("torch", "transformers", "deepspeed"))
    facts["runs"] = []
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_data(WORK, MODELS["10m"]["vocab_size"])
    for case in (case for part in PARTS.values() for case in part):
        if case not in [run["case"] for run in facts["runs"]]:
            facts["runs"].append(measure(case))
    facts["targets"] = judge(targets(facts["runs"]))
    shutil.rmtree(WORK)
    if options.json:
        print(json.dumps(facts))
        sys.stdout = sys.stderr
    head = ("ranks x model x tokens", "parameters", "tokens/s", "GB of traffic", "by the formula", "peak, GiB a rank")
    rows = [
        (" x ".join(map(str, r["case"].values())), f"{r['parameters'] / 1e6:.1f} M", f"{r['tokens_per_second']:,.0f}",
         f"{r['communication_bytes'] / 1e9:.3f}", f"{expected_bytes(r) / 1e9:.3f}", f"{r['peak_gib']:.2f}")
        for r in facts["runs"]
    ]  # fmt: skip
    write_and_show(facts, OUT, head, rows)
    plot(facts["runs"], OUT.with_suffix(".png"))


def measure(case: dict[str, int]) -> dict[str, Any]:
    """One run: medians of its steady steps, the peak of all."""
    shutil.rmtree(WORK / "runs", ignore_errors=True)
    fields = MODELS["10m"] | {"num_hidden_layers": LAYERS[case["times"]], "max_position_embeddings": 2048}
    recipe = {
        "name": "run",
        "runs_directory": str(WORK / "runs"),
        "model": {"config": fields},
        "tokenizer": str(WORK / "tokenizer"),
        "data": {"train": [{"path": str(WORK / "data" / "train")}], "sequence_length": case["sequence"]},
        "train": {
            "global_batch_tokens": RANK_TOKENS * case["ranks"],
            "micro_batch_sequences": RANK_TOKENS // case["sequence"],
            "steps": STEPS,
        },
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": 1},
        "checkpoint": {"every_steps": None},
    }
    (WORK / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train = ["-m", "launch.cli", "train", str(WORK / "recipe.yaml"), "--processes", str(case["ranks"])]
    environment = {**START_ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *train], cwd=WORK, env=environment, stdout=sys.stderr, check=True)
    lines = (WORK / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steady = [json.loads(line) for line in lines][WARM_STEPS:]
    names = ("tokens_per_second", "communication_bytes", "communication_seconds", "step_seconds")
    medians = {name: statistics.median(record[f"performance/{name}"] for record in steady) for name in names}
    return {"case": case, "parameters": parameters(fields), **medians, "peak_gib": steady[-1]["memory/peak_gib"]}


def parameters(fields: dict[str, Any]) -> int:
    from transformers import AutoConfig

    from gpt.model import elements_of

    return int(elements_of(AutoConfig.for_model(**fields)))


def expected_bytes(run: dict[str, Any]) -> float:
    """ZeRO-3's traffic of a step: 3 x the parameters, twice in bf16 and once in fp32. One rank's has nowhere to go, but
    DeepSpeed calls its collectives all the same."""
    return float(run["parameters"] * (GATHERED_BYTES + REDUCED_BYTES))


def of(runs: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [run for case in PARTS[part] for run in runs if run["case"] == case]


def state_bytes(runs: list[dict[str, Any]]) -> float:
    """Of a parameter: by how much the peak of a rank falls when two share what one had, at the same tokens a rank."""
    one, two, _ = of(runs, "ranks")
    return float((one["peak_gib"] - two["peak_gib"]) * 2**30 / (one["parameters"] / 2))


def targets(runs: list[dict[str, Any]]) -> list[Target]:
    """The embedding, which is the output layer, too, is gathered for each: 7 % of the smallest model's traffic."""
    traffic = [run["communication_bytes"] / expected_bytes(run) for run in runs if run["case"]["ranks"] > 1]
    return [
        ("traffic over the formula, at most", 1.1, round(max(traffic), 3)),
        (f"bytes of state of a parameter (formula: {STATE_BYTES}), at most", 1.25 * STATE_BYTES,
         round(state_bytes(runs), 1)),
    ]  # fmt: skip


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Four panels: tokens/s by ranks and by sequence, traffic and memory by parameters, with the formulas."""
    import matplotlib.pyplot as pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for panel, part, key, label in (
        (panels[0], "ranks", "ranks", "ranks (2 cores)"), (panels[1], "sequence", "sequence", "tokens of a sequence"),
    ):  # fmt: skip
        found = of(runs, part)
        panel.plot([r["case"][key] for r in found], [r["tokens_per_second"] for r in found], "o-")
        panel.set(xlabel=label, ylabel="tokens/s", ylim=(0, None), xticks=[r["case"][key] for r in found])
    found = of(runs, "model")
    millions = [r["parameters"] / 1e6 for r in found]
    panels[2].plot(millions, [r["communication_bytes"] / 1e9 for r in found], "o", label="measured")
    panels[2].plot(millions, [expected_bytes(r) / 1e9 for r in found], "--", label="3 x parameters")
    panels[2].set(xlabel="million parameters, 2 ranks", ylabel="GB of traffic a step", ylim=(0, None))
    found = of(runs, "ranks")
    ranks, peaks = [r["case"]["ranks"] for r in found], [r["peak_gib"] for r in found]
    state = [r["parameters"] * STATE_BYTES / r["case"]["ranks"] / 2**30 for r in found]
    panels[3].plot(ranks, peaks, "o", label="measured")
    panels[3].plot(
        ranks, [s + peaks[-1] - state[-1] for s in state], "--", label=f"{STATE_BYTES} bytes a parameter / ranks"
    )
    panels[3].set(xlabel="ranks", ylabel="peak GiB of a rank", ylim=(0, None), xticks=ranks)
    for panel in panels[2:]:
        panel.legend()
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
