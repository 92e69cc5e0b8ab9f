"""Run task recipes from the fetched data to the table of scores; exit code 1 where a score is below its bar.

    python benchmarks/tasks.py spam genre chat [--processes 1]

Each recipe in launch/recipes/tasks starts from SmolLM2-135M-Instruct (tests/real_models.sh fetches it). The exported
model and the untouched one answer the test part, which nothing before has read. Writes
benchmarks/results/task_NAME.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.facts import Target, describe, judge, write_and_show  # noqa: E402
from benchmarks.task_data import SOURCES, write_parts  # noqa: E402

MODEL = Path("build/models/smollm2-135m-instruct")
SCORES: dict[str, tuple[str, float | None]] = {
    "spam": ("accuracy", 0.95),
    "genre": ("accuracy", 0.6),
    "chat": ("rougeL", 0.12),
}
"""Each task's score, and the bar that it must reach; with a bar, it must also beat every baseline, its 95 % interval
above that of the untouched model. Without one it is an honest number."""


def trainyard(*words: str) -> str:
    """What the command prints on stdout; its other lines go to the terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_recipe(name: str, processes: int) -> dict[str, Any]:
    """The answer of `trainyard evaluate --task`, with the seconds of each step."""
    recipe, data = Path("launch/recipes/tasks") / name, Path("data/tasks") / name
    run, exported = Path("runs") / f"task-{name}", Path("exports") / f"task-{name}"
    for folder in (data, run, exported):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    rows = write_parts(name, ROOT / data)
    steps = {
        "prepare": f"prepare --input {data}/train.jsonl --validation-input {data}/validation.jsonl "
        f"--template {recipe}/template.yaml --tokenizer {MODEL} --out {data}/tokens",
        "train": f"train {recipe}/recipe.yaml --processes {processes}",
        "export": f"export {run} --out {exported}",
        "evaluate": f"evaluate {exported} --task {recipe}/task.yaml --baseline {MODEL} "
        f"--predictions {exported}/predictions.jsonl --json",
    }
    seconds, printed = {}, ""
    for step, command in steps.items():
        begin = time.monotonic()
        printed = trainyard(*command.split())
        seconds[step] = round(time.monotonic() - begin, 1)
    return {"rows": rows, "processes": processes, "seconds": seconds, **json.loads(printed)}


def targets(name: str, answer: dict[str, Any]) -> list[Target]:
    """What the scores must reach."""
    score, bar = SCORES[name]
    if bar is None:
        return []
    reached = answer["scores"][score]
    wanted = [(f"{name}: {score}", bar, reached["value"])]
    for baseline, scores in answer["baselines"].items():
        wanted.append(
            (f"{name}: lower end of {score} and upper end of {baseline}", scores[score]["high"], reached["low"])
        )
    return wanted


def show(name: str, answer: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: the exported model and what it stands beside."""
    contenders = {f"{name}, fine-tuned": answer["scores"], **answer["baselines"]}
    return [
        [f"  {contender}" if number else contender, metric]
        + [f"{scores[metric][field]:.3f}" for field in ("value", "low", "high")]
        for number, (contender, scores) in enumerate(contenders.items())
        for metric in answer["scores"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run task recipes and hold their scores against the bars.")
    parser.add_argument("names", nargs="+", choices=list(SOURCES))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if not (ROOT / MODEL).is_dir():
        subprocess.run(["bash", "tests/real_models.sh"], cwd=ROOT, check=True, stdout=sys.stderr)
    missed = False
    for name in options.names:
        facts = describe(["torch", "transformers", "scikit-learn", "sacrebleu", "rouge_score"])
        answer = run_recipe(name, options.processes)
        facts |= {"result": answer, "targets": judge(targets(name, answer))}
        out = ROOT / "benchmarks" / "results" / f"task_{name}.json"
        write_and_show(facts, out, ["", "score", "value", "low", "high"], show(name, answer))
        missed = missed or not all(target["met"] for target in facts["targets"])
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
