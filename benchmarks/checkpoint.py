"""Time the checkpoints of a 135 M parameter model on 2 ranks, next to DeepSpeed's own, in the same run.

    python benchmarks/checkpoint.py [--steps 10] [--every 2] [--out benchmarks/results/checkpoint.json]

Ours is `trainyard train`: what a save costs stands in its metrics.jsonl, commit and load times in its events.jsonl.
DeepSpeed's side (checkpoint_deepspeed.py) has the same model, optimizer, engine configuration and batch shape.
Everything is made under build/checkpoint. Sequences are short, so that little of a save can hide behind a step.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.facts import describe  # noqa: E402
from launch.environment import worker_environment  # noqa: E402

WORK = ROOT / "build" / "checkpoint"
VOCABULARY_SIZE = 49_152
MODEL = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 2048, "vocab_size": VOCABULARY_SIZE,
    "tie_word_embeddings": True,
}  # fmt: skip
BAR = 8
CONVERT = """
import argparse, json, sys, time
from deepspeed.checkpoint import ds_to_universal
source, target, workers = sys.argv[1:]
started = time.perf_counter()
ds_to_universal.main(argparse.Namespace(
    input_folder=source, output_folder=target, num_extract_workers=int(workers), num_merge_workers=int(workers),
    keep_temp_folder=False, strict=True, inject_missing_state=False,
))
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    options = read_options()
    facts = describe(("torch", "transformers", "deepspeed", "safetensors", "xxhash"))
    facts |= {"benchmark": "checkpoint", "command": shlex.join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]])}
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_data(WORK, VOCABULARY_SIZE)
    recipe = write_recipe(options)
    ours = run_ours(recipe)
    theirs = run_deepspeed(recipe)
    facts |= {"ours": ours, "deepspeed": theirs, "compared": compare(ours, theirs)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(WORK)
    for line in facts["compared"]:
        verdict = "" if line["met"] is None else f" (bar {BAR}: {'met' if line['met'] else 'missed'})"
        print(f"{line['what']:<56} ours {line['ours']:>9.3f}  DeepSpeed {line['deepspeed']:>9.3f}  "
              f"ratio {line['ratio']:>6.1f}{verdict}")  # fmt: skip


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time checkpoints next to DeepSpeed's own.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=2, help="steps between two saves")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint.json")
    return parser.parse_args()


def make_data(work: Path, vocabulary_size: int) -> None:
    """In `work`: a tokenizer of bytes with so many entries, and a play prepared with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<unused {i}>" for i in range(vocabulary_size - 258))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.save_pretrained(work / "tokenizer")
    play = ROOT / "data_pipeline" / "embedded" / "shakespeare" / "train" / "hamlet.txt"
    command = ["prepare", "--input", str(play), "--tokenizer", str(work / "tokenizer"), "--validation-fraction", "0"]
    trainyard(*command, "--out", str(work / "data"))


def write_recipe(options: argparse.Namespace) -> Path:
    recipe = {
        "name": "run",
        "runs_directory": str(WORK / "runs"),
        "model": {"config": MODEL},
        "tokenizer": str(WORK / "tokenizer"),
        "data": {"train": [{"path": str(WORK / "data" / "train")}], "sequence_length": 32},
        "train": {"global_batch_tokens": 128, "micro_batch_sequences": 2, "steps": options.steps},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
        "checkpoint": {"every_steps": options.every, "keep_last": 1},
        "logging": {"console_every_steps": 1},
    }
    path = WORK / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def trainyard(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)


def run_ours(recipe: Path) -> dict[str, Any]:
    """A run with its saves, then the same run started again for some steps, on 2 ranks and on 1."""
    folder = WORK / "runs" / "run"

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    trainyard("train", str(recipe), "--processes", "2")
    metrics, events = read("metrics.jsonl"), read("events.jsonl")
    stalls = [r["performance/checkpoint_stall_seconds"] for r in metrics if r["performance/checkpoint_stall_seconds"]]
    commits = [event for event in events if event["event"] == "checkpoint committed"]
    seconds = [record["performance/step_seconds"] for record in metrics]
    steps = len(metrics)
    result: dict[str, Any] = {
        "stall_seconds": stalls,
        "steps_while_writing": [seconds[event["step"]] for event in commits[:-1]],
        "other_steps": [
            s for step, s in enumerate(seconds, 1) if step > 1 and step - 1 not in {e["step"] for e in commits}
        ],
        "commit_seconds": [event["seconds"] for event in commits[:-1]],
        "last_save_seconds": commits[-1]["seconds"],
        "bytes": commits[-1]["bytes"],
        "peak_gib": max(record["memory/peak_gib"] for record in metrics),
    }
    for processes in (2, 1):
        steps += 1
        trainyard("train", str(recipe), "--processes", str(processes), f"train.steps={steps}")
        resume = [event for event in read("events.jsonl") if event["event"] == "resume"][-1]
        peak = read("metrics.jsonl")[-1]["memory/peak_gib"]
        result[f"load_{processes}"] = {
            "load_seconds": resume["load_seconds"],
            "peak_gib": peak,
            "proof": resume["proof"],
        }
    return result


def run_deepspeed(recipe: Path) -> dict[str, Any]:
    """The same with DeepSpeed's own checkpoints; another number of ranks needs the conversion."""
    folder, universal = WORK / "deepspeed", WORK / "deepspeed" / "universal"
    folder.mkdir()
    result = ranks(2, "save", recipe, folder)
    result["load_2"] = ranks(2, "load", recipe, folder)
    words = [
        sys.executable,
        "-c",
        CONVERT,
        str(folder / result["tag"]),
        str(universal),
        str(min(2, os.cpu_count() or 1)),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=child_environment(1))
    result["convert_seconds"] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    result["universal_bytes"] = sum(file.stat().st_size for file in universal.rglob("*") if file.is_file())
    result["load_1"] = ranks(1, "load", recipe, folder, "--universal")
    return result


def child_environment(processes: int) -> dict[str, str]:
    return {**os.environ, **worker_environment(processes), "PYTHONPATH": str(ROOT)}


def ranks(processes: int, mode: str, recipe: Path, folder: Path, *words: str) -> dict[str, Any]:
    result = WORK / "result.json"
    result.unlink(missing_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [
        str(ROOT / "benchmarks" / "checkpoint_deepspeed.py"),
        mode,
        str(recipe),
        str(folder),
        str(result),
        *words,
    ]
    subprocess.run([*launcher, *program], cwd=WORK, env=child_environment(processes), check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians over the saves; a ratio above 1 is in our favour.

    On a CPU the writer and the ranks share cores: the step that it writes behind is longer, no stall but a cost.
    """
    mine = statistics.median(ours["stall_seconds"])
    slower = statistics.mean(ours["steps_while_writing"]) - statistics.mean(ours["other_steps"])
    held = statistics.median(theirs["held_seconds"])
    elsewhere = theirs["convert_seconds"] + theirs["load_1"]["load_seconds"]
    lines = (
        ("a save holds training, s", mine, held, True),
        ("a save costs with the longer step behind it, s", mine + max(0.0, slower), held, False),
        (
            "from the begin to the commit, s (DeepSpeed: no fsync)",
            statistics.median(ours["commit_seconds"]),
            held,
            False,
        ),
        ("load on 2 ranks, s", ours["load_2"]["load_seconds"], theirs["load_2"]["load_seconds"], False),
        ("load on 1 rank, s (DeepSpeed: convert + load)", ours["load_1"]["load_seconds"], elsewhere, True),
        ("bytes, GB", ours["bytes"] / 1e9, theirs["bytes"] / 1e9, False),
        ("peak memory of a rank with saves, GiB", ours["peak_gib"], theirs["peak_gib"], False),
        ("peak memory of a rank, load on 2, GiB", ours["load_2"]["peak_gib"], theirs["load_2"]["peak_gib"], False),
        ("peak memory of a rank, load on 1, GiB", ours["load_1"]["peak_gib"], theirs["load_1"]["peak_gib"], False),
    )
    return [
        {"what": what, "ours": a, "deepspeed": b, "ratio": b / a, "met": b / a >= BAR if barred else None}
        for what, a, b, barred in lines
    ]


if __name__ == "__main__":
    main()
