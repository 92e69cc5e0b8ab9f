"""The rate that `trainyard tune` suggests for the quickstart's model, next to a sweep of seven rates around all of it.

    python benchmarks/tune.py [--steps 200] [--out benchmarks/results/tune.json]

Every run has the recipe of the quickstart's pretraining, its schedule squeezed into --steps; what counts is the loss on
the kept plays at the end. Needs the quickstart's data (bash launch/quickstart.sh).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.facts import describe, judge, write_and_show  # noqa: E402

WORK = ROOT / "build" / "tune"
RECIPE = "launch/recipes/quickstart_pretrain.yaml"
RATES = [1e-4, 4e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2]
WITHIN = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description="The suggested rate next to a sweep.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tune.json")
    options = parser.parse_args()
    if not (ROOT / "data" / "quickstart" / "shakespeare").is_dir():
        parser.error("data/quickstart/shakespeare is not there: run bash launch/quickstart.sh first")
    facts = describe(("torch", "transformers", "deepspeed"))
    shutil.rmtree(WORK, ignore_errors=True)
    tuned = json.loads(trainyard("tune", RECIPE, f"runs_directory={WORK}", "--processes", "2", "--json"))
    suggested = tuned["learning_rate"]
    losses = {rate: final_loss(rate, options.steps) for rate in [suggested, *RATES]}
    best = min(RATES, key=lambda rate: losses[rate])
    facts |= {"steps": options.steps, "tune": tuned, "validation_losses": losses}
    share = losses[suggested] / losses[best]
    facts["targets"] = judge(
        [("loss at the suggested rate over the best of the sweep, at most", WITHIN, round(share, 4))]
    )
    shutil.rmtree(WORK)
    rows = [
        (
            "suggested" if rate == suggested else "best of the sweep" if rate == best else "",
            f"{rate:.2e}",
            f"{loss:.4f}",
        )
        for rate, loss in sorted(losses.items())
    ]
    write_and_show(facts, options.out, ("", "learning rate", "validation loss"), rows)


def trainyard(*words: str) -> str:
    """What the command prints on stdout; its other lines go to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def final_loss(rate: float, steps: int) -> float:
    name = f"rate-{rate:.2e}"
    settings: dict[str, Any] = {
        "name": name,
        "runs_directory": WORK,
        "optimizer.learning_rate": rate,
        "optimizer.warmup_steps": steps // 18,  # the recipe's share of its run
        "train.steps": steps,
        "checkpoint": "{}",
        "evaluate": "{sample_tokens: 0}",
    }
    trainyard("train", RECIPE, *(f"{key}={value}" for key, value in settings.items()), "--processes", "2")
    lines = (WORK / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["evaluate/loss"])


if __name__ == "__main__":
    main()
