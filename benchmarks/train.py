"""Training speed of `trainyard train` next to other trainers, alternating in one run.

    python benchmarks/train.py --model 42m --peers hf_trainer,ddp --pairs 5 [--json]

All train the same model on the same tokens, in the same batches and precision. Each peer runs twice in a pair: as its
documentation starts it, and with our thread and allocator settings; `ratios` are against the second. Everything is
made under build/train.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

START_ENVIRONMENT = dict(os.environ)  # torch adds to it as it is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.checkpoint import MODEL as SHAPE_135M  # noqa: E402
from benchmarks.checkpoint import make_data  # noqa: E402
from benchmarks.facts import Target, describe, judge, write_and_show  # noqa: E402
from benchmarks.train_peer import PEERS  # noqa: E402
from launch.environment import usable_cores, worker_environment  # noqa: E402

WORK = ROOT / "build" / "train"
LLAMA = {"model_type": "llama", "max_position_embeddings": 512, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "10m": LLAMA | {"hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 5, "num_key_value_heads": 5,
                    "intermediate_size": 864, "vocab_size": 8192},
    "42m": LLAMA | {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
                    "intermediate_size": 1376, "vocab_size": 32_000},
    "135m": SHAPE_135M,
}  # fmt: skip
MICRO_BATCH = {"10m": 8, "42m": 8, "135m": 4}
SEQUENCE = 512
WARM_STEPS = 2
"""The first steps allocate, compile and trace; what follows counts."""
SETTINGS = {"learning_rate": 3e-4, "weight_decay": 0.1}
SIZES = (1024, 2048, 4096)
PEAK_SECONDS = 1.0
SAVE_EVERY_STEPS = 50
SHARES = {"data_wait": 0.01, "forward": None, "backward": None, "communication": None, "optimizer": None,
          "logging": 0.005, "checkpoint_stall": 0.02}  # fmt: skip
"""Of a step's time: the phases of `performance/…_seconds`, and the bars that are set."""
START_PARTS = ("launcher: checks", "rank: imports, checks, meeting", "model and engine", "first step")
BARS: dict[str, tuple[float | None, float]] = {"42m": (1.75, 2.2), "135m": (None, 1.7)}
"""Of hf_trainer at 2 ranks and stage 3: against our settings, and as documented."""


def main() -> None:
    options = read_options()
    facts = describe(("torch", "transformers", "deepspeed", "accelerate"))
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_data(WORK, MODELS[options.model]["vocab_size"])
    recipe = write_recipe(options)
    settings = write_settings(options)
    contenders: dict[str, Callable[[], dict[str, Any]]] = {"ours": lambda: run_ours(recipe, options)}
    for peer in options.peers:
        for tuned in (True, False):
            name = peer if tuned else f"{peer} as documented"
            contenders[name] = lambda peer=peer, tuned=tuned: run_peer(peer, settings, options, tuned=tuned)
    facts["peak_flops"] = measure_peak()
    facts["runs"] = [
        {"pair": pair, "contender": name, **run()} for pair in range(options.pairs) for name, run in contenders.items()
    ]
    facts |= compare(facts["runs"], list(contenders), flops_per_token(MODELS[options.model]) / facts["peak_flops"])
    ours = [run for run in facts["runs"] if run["contender"] == "ours"]
    facts["start_parts"] = {part: statistics.median(run["start_parts"][part] for run in ours) for part in START_PARTS}
    facts["shares"] = {name: statistics.median(run["shares"][name] for run in ours) for name in SHARES}
    facts["targets"] = judge(targets(options, facts))
    shutil.rmtree(WORK)
    head = ("", "tokens/s", "of the peak", "peak memory, GiB", "to the first step, s", "ours / it")
    rows = [
        (name, f"{r['tokens_per_second']:,.0f}", f"{r['model_flops_utilization']:.3f}", f"{r['peak_gib']:.2f}",
         f"{r['start_seconds']:.1f}", f"{r['ratio']:.2f}")
        for name, r in facts["medians"].items()
    ]  # fmt: skip
    if options.json:
        print(json.dumps(facts))
        sys.stdout = sys.stderr
    write_and_show(facts, options.out, head, rows)
    print("of a step:", ", ".join(f"{name} {share:.2%}" for name, share in facts["shares"].items()))
    print("to the first step:", ", ".join(f"{part} {s:.1f} s" for part, s in facts["start_parts"].items()))
    plot(facts, options.out.with_suffix(".png"))


def plot(facts: dict[str, Any], file: Path) -> None:
    """The medians as bars; ours first."""
    import matplotlib.pyplot as pyplot

    names = list(facts["medians"])
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 0.5 + 0.45 * len(names)), layout="constrained", sharey=True)
    for panel, key, label in (
        (panels[0], "tokens_per_second", "tokens/s"), (panels[1], "peak_gib", "peak memory of a rank, GiB"),
        (panels[2], "start_seconds", "seconds to the end of the first step"),
    ):  # fmt: skip
        bars = panel.barh(names, [facts["medians"][name][key] for name in names])
        panel.bar_label(bars, fmt="{:,.4g}")
        panel.set(xlabel=label)
        panel.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=80)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed next to other trainers.")
    parser.add_argument("--model", choices=list(MODELS), default="42m")
    parser.add_argument("--micro-batch", type=int, help="sequences of a rank's forward; default: 8, of 135m 4")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of every layer")
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(",") if text else [],
        default=["hf_trainer"],
        help=f'{", ".join(PEERS)}; "": none',
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help=f"of each run; all but the first {WARM_STEPS} count")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe values of our side")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/train_MODEL.json")
    options = parser.parse_args()
    options.out = options.out or ROOT / "benchmarks" / "results" / f"train_{options.model}.json"
    options.micro_batch = options.micro_batch or MICRO_BATCH[options.model]
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}")
    if options.steps < WARM_STEPS + 2:
        parser.error(f"--steps {options.steps}: at least {WARM_STEPS + 2}, since the first {WARM_STEPS} do not count")
    return options


def write_recipe(options: argparse.Namespace) -> Path:
    micro = options.micro_batch
    recipe = {
        "name": "run",
        "runs_directory": str(WORK / "runs"),
        "model": {"config": MODELS[options.model]},
        "tokenizer": str(WORK / "tokenizer"),
        "data": {"train": [{"path": str(WORK / "data" / "train")}], "sequence_length": SEQUENCE},
        "train": {
            "global_batch_tokens": SEQUENCE * micro * options.ranks,
            "micro_batch_sequences": micro,
            "steps": options.steps,
        },
        "optimizer": {**SETTINGS, "warmup_steps": 1},
        "gradient_checkpointing": {"every_layers": 1} if options.checkpointing else None,
        "deepspeed": f"ds_configs/zero{options.stage}.json",
        "compile": True,  # as `auto` does in runs that are not as short as these
        "checkpoint": {"every_steps": SAVE_EVERY_STEPS if options.steps > SAVE_EVERY_STEPS else None},
        "logging": {"console_every_steps": 1},
    }
    path = WORK / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_settings(options: argparse.Namespace) -> Path:
    """For the peers: the model, and the rows that ours trains on, in its order."""
    from gpt.recipe_file import load_recipe
    from gpt.train import open_training_data

    micro, rows = options.micro_batch, WORK / "rows.npy"
    stream = open_training_data(load_recipe(str(WORK / "recipe.yaml"), []))
    np.save(rows, stream.rows(range(options.steps * micro * options.ranks)).input_ids)
    settings = {
        "model": MODELS[options.model], "rows": str(rows), "folder": str(WORK), "steps": options.steps,
        "micro_batch": micro, "stage": options.stage, "checkpointing": options.checkpointing, **SETTINGS,
    }  # fmt: skip
    path = WORK / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def run_ours(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`trainyard train`; its metrics.jsonl tells the times."""
    shutil.rmtree(WORK / "runs", ignore_errors=True)
    command = ["-m", "launch.cli", "train", str(recipe), "--processes", str(options.ranks), *options.set]
    started = run(command, {})
    lines = (WORK / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steady = records[WARM_STEPS:]
    result = timed(started, [record["time"] for record in records], options)
    claim = json.loads((WORK / "runs" / "run" / "generations" / "000001.json").read_text(encoding="utf-8"))
    began = records[0]["time"] - records[0]["performance/step_seconds"]
    marks = [started, claim["pid_started"], claim["time"], began, records[0]["time"]]
    result["start_parts"] = dict(zip(START_PARTS, np.diff(marks).tolist(), strict=True))
    seconds = sum(r["performance/step_seconds"] for r in steady)
    shares = {name: sum(r[f"performance/{name}_seconds"] for r in steady) / seconds for name in SHARES}
    return result | {"shares": shares} | {"peak_gib": records[-1]["memory/peak_gib"]}


def run_peer(peer: str, settings: Path, options: argparse.Namespace, *, tuned: bool) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    program = [str(ROOT / "benchmarks" / "train_peer.py"), peer, str(settings)]
    started = run([*launcher, *program], worker_environment(options.ranks) if tuned else {})
    results = [json.loads((WORK / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(options.ranks)]
    return timed(started, results[0]["step_ends"], options) | {"peak_gib": max(r["peak_gib"] for r in results)}


def run(command: list[str], variables: dict[str, str]) -> float:
    """Run a program to its end, its output on stderr; the time (of the epoch) at which it was started."""
    environment = {**START_ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    started = time.time()
    subprocess.run([sys.executable, *command], cwd=WORK, env=environment, stdout=sys.stderr, check=True)
    return started


def timed(started: float, ends: list[float], options: argparse.Namespace) -> dict[str, Any]:
    """Start-up is from the command to the end of the first step. A step lasts from the end of the one before."""
    seconds = [end - before for before, end in zip(ends[WARM_STEPS - 1 :], ends[WARM_STEPS:], strict=False)]
    tokens = SEQUENCE * options.micro_batch * options.ranks
    return {
        "step_seconds": seconds,
        "start_seconds": ends[0] - started,
        "tokens_per_second": tokens / statistics.median(seconds),
    }


def flops_per_token(fields: dict[str, Any]) -> float:
    """6 for each parameter but the input embedding's, and 6 * layers * hidden * sequence for causal attention."""
    from transformers import AutoConfig

    from gpt.metrics import flops_per_token as formula
    from gpt.model import elements_of

    config = AutoConfig.for_model(**fields)
    matrix = elements_of(config)  # embeddings are tied: they count once, as the output layer
    return formula(matrix, config.num_hidden_layers, config.hidden_size, SEQUENCE)


def measure_peak() -> float:
    """FLOP/s of this machine on square bf16 matrix products, one process of one thread a core, all at once."""
    cores = usable_cores()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    variables = worker_environment(cores)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    with ProcessPoolExecutor(cores, context, initializer=_meet, initargs=(barrier,)) as pool:
        best = max(sum(pool.map(_multiply, [size] * cores)) for size in SIZES)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return best


def _meet(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _multiply(size: int) -> float:
    import torch

    torch.set_num_threads(1)
    a = torch.randn(size, size).to(torch.bfloat16)
    torch.mm(a, a)
    _barrier.wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < PEAK_SECONDS:
        torch.mm(a, a)
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - start)


def compare(runs: list[dict[str, Any]], contenders: list[str], share_of_peak: float) -> dict[str, Any]:
    """Medians over the pairs; a ratio is the median of the pairs' ratios, above 1 in our favour."""

    def of(name: str, key: str) -> list[float]:
        return [run[key] for run in runs if run["contender"] == name]

    ours, medians = of("ours", "tokens_per_second"), {}
    for name in contenders:
        rates = of(name, "tokens_per_second")
        medians[name] = {
            **{k: statistics.median(of(name, k)) for k in ("tokens_per_second", "peak_gib", "start_seconds")},
            "model_flops_utilization": statistics.median(rates) * share_of_peak,
            "ratio": statistics.median(a / b for a, b in zip(ours, rates, strict=True)),
        }
    ratios = {name: row["ratio"] for name, row in medians.items() if name != "ours"}
    return {
        "medians": medians,
        "ratios": {name: ratio for name, ratio in ratios.items() if not name.endswith(" as documented")},
        "ratios_as_documented": {
            name.removesuffix(" as documented"): r for name, r in ratios.items() if name.endswith(" as documented")
        },
    }


def targets(options: argparse.Namespace, facts: dict[str, Any]) -> list[Target]:
    """The bars that are set: shares of a step, and of the Trainer, at 2 ranks and stage 3 without gradient
    checkpointing."""
    waits = [
        (f"{name} in a step, at most", bar, round(facts["shares"][name], 4))
        for name, bar in SHARES.items()
        if bar is not None and (name != "checkpoint_stall" or options.steps > SAVE_EVERY_STEPS)
    ]
    if "hf_trainer" not in options.peers or (options.ranks, options.stage, options.checkpointing) != (2, 3, False):
        return waits
    ours, theirs = facts["medians"]["ours"], facts["medians"]["hf_trainer"]
    found: list[Target] = waits
    if options.model in BARS:
        tuned, documented = BARS[options.model]
        found += [] if tuned is None else [("tokens/s over the Trainer's", tuned, round(theirs["ratio"], 2))]
        ratio = facts["ratios_as_documented"]["hf_trainer"]
        found.append(("tokens/s over the Trainer's as documented", documented, round(ratio, 2)))
    if options.model == "42m":
        found.append(("share of the measured peak", 0.36, round(ours["model_flops_utilization"], 3)))
        found.append(("seconds to the first step, at most", 20.0, round(ours["start_seconds"], 1)))
    memory = round(ours["peak_gib"] / theirs["peak_gib"], 2)
    return [*found, ("peak memory over the Trainer's, at most", 0.75, memory)]


if __name__ == "__main__":
    main()
