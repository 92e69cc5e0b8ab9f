"""Time and memory of `trainyard export` next to DeepSpeed's `zero_to_fp32`, of 135 M and of a billion parameters.

    python benchmarks/export.py [--models 135M 1B] [--rounds 3] [--out benchmarks/results/export.json]

Both read the same numbers, each from its own format, and ours also DeepSpeed's own files. Everything is made under
build/export (34 GB for 1B) and deleted. Each run is a fresh process; imports are neither timed nor counted as memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.export_side import anonymous_bytes  # noqa: E402
from benchmarks.facts import Target, describe, judge, write_and_show  # noqa: E402

WORK = ROOT / "build" / "export"
VOCABULARY_SIZE = 49_152
MODELS: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "intermediate_size": 1536},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 21, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 5632},
}  # fmt: skip
CONTENDERS = ("ours", "ours from DeepSpeed's files", "deepspeed")
DTYPES = ("fp32", "bf16")
POLL_SECONDS = 0.002
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def main() -> None:
    options = read_options()
    facts = describe(("torch", "transformers", "deepspeed", "safetensors", "xxhash"))
    facts |= {"rounds": options.rounds, "runs": [], "targets": []}
    for model in options.models:
        shutil.rmtree(WORK, ignore_errors=True)
        program = [sys.executable, str(ROOT / "benchmarks" / "export_checkpoints.py"), model, str(WORK)]
        subprocess.run(program, env=ENVIRONMENT, check=True)
        runs = [
            measure(model, contender, dtype, digested=number == 0)
            for number in range(options.rounds)
            for dtype in DTYPES
            for contender in CONTENDERS
        ]
        check_same(runs)
        facts["runs"] += runs
        facts["targets"] += judge(targets_of(model, runs))
    shutil.rmtree(WORK)
    head = ("model, written as, by", "seconds", "on disk", "with the gate", "MB above import", "largest tensor, MB")
    write_and_show(facts, options.out, head, table(facts["runs"]))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time exports next to DeepSpeed's own.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export.json")
    return parser.parse_args()


def measure(model: str, contender: str, dtype: str, *, digested: bool) -> dict[str, Any]:
    """One run. Its checkpoint is in the page cache and nothing waits to be written to the disk."""
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    warm(WORK / ("run" if contender == "ours" else "deepspeed"))
    os.sync()
    program = [sys.executable, str(ROOT / "benchmarks" / "export_side.py")]
    process = subprocess.Popen(
        [*program, contender, dtype, str(WORK), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None and process.stdout is not None
    imported = json.loads(process.stdout.readline())["imported_bytes"]
    peak, ended = [imported], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            try:
                peak[0] = max(peak[0], anonymous_bytes(process.pid))
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(POLL_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate("\n")
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{contender} of {model} in {dtype} ended with exit code {process.returncode}")
    result = {"model": model, "contender": contender, "dtype": dtype, "peak_bytes": peak[0] - imported}
    result |= json.loads(printed.splitlines()[-1])
    if digested:
        words = [*program, "digest", dtype, str(WORK), str(out)]
        result["digest"] = json.loads(subprocess.run(words, capture_output=True, check=True, env=ENVIRONMENT).stdout)
    shutil.rmtree(out)
    print({key: value for key, value in result.items() if key != "digest"}, file=sys.stderr)
    return result


def warm(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def check_same(runs: list[dict[str, Any]]) -> None:
    """All contenders must have written the same tensors, bit for bit."""
    for dtype in DTYPES:
        digests = [run.pop("digest") for run in runs if run["dtype"] == dtype and "digest" in run]
        if any(other != digests[0] for other in digests):
            raise RuntimeError(f"the contenders wrote other tensors in {dtype}")


def summary(runs: list[dict[str, Any]], contender: str, dtype: str) -> dict[str, float]:
    """Medians of the seconds, with and without the gate; the largest peak."""
    mine = [run for run in runs if run["contender"] == contender and run["dtype"] == dtype]
    return {
        **{
            key: statistics.median(run[key] - run.get("gate_seconds", 0.0) for run in mine)
            for key in ("seconds", "durable_seconds")
        },
        "gated_seconds": statistics.median(run["seconds"] for run in mine),
        "peak_bytes": max(run["peak_bytes"] for run in mine),
    }


def largest_bytes(model: str) -> int:
    """Of the embedding, as it is written in fp32."""
    return VOCABULARY_SIZE * MODELS[model]["hidden_size"] * 4


def targets_of(model: str, runs: list[dict[str, Any]]) -> list[Target]:
    targets: list[Target] = []
    theirs = summary(runs, "deepspeed", "fp32")
    for contender in CONTENDERS[:2]:
        mine = summary(runs, contender, "fp32")
        tensors = mine["peak_bytes"] / largest_bytes(model)
        targets.append((f"{model}, {contender}: memory above import in largest tensors, at most", 2, round(tensors, 3)))
        for key, what in (("seconds", "time"), ("durable_seconds", "time until the disk has it")):
            share = round(mine[key] / theirs[key], 3)
            targets.append((f"{model}, {contender}: {what} as a share of DeepSpeed's, at most", 0.5, share))
    return targets


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        of_model = [run for run in runs if run["model"] == model]
        for dtype in DTYPES:
            for contender in CONTENDERS:
                found = summary(of_model, contender, dtype)
                gated = f"{found['gated_seconds']:.2f}" if contender == "ours" else "-"
                size = largest_bytes(model) // (1 if dtype == "fp32" else 2)
                times = [f"{found['seconds']:.2f}", f"{found['durable_seconds']:.2f}"]
                cells = [*times, gated, f"{found['peak_bytes'] / 1e6:.1f}", f"{size / 1e6:.1f}"]
                rows.append([f"{model}, {dtype}, {contender}", *cells])
    return rows


if __name__ == "__main__":
    main()
