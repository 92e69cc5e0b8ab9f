"""One rank of `checkpoint.py`'s DeepSpeed side: the same model, optimizer and engine, saved and loaded by DeepSpeed.

python -m torch.distributed.run … checkpoint_deepspeed.py save|load RECIPE FOLDER RESULT.json [--universal]
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from gpt import distributed
from gpt.loss import cross_entropy_sum, loss_for_backward
from gpt.metrics import peak_memory_gib
from gpt.optimizer import build_optimizer
from gpt.recipe_file import load_recipe
from gpt.train import RunPlan, _build_model, plan_run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["save", "load"])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--universal", action="store_true")
    options = parser.parse_args()
    ranks = distributed.start()
    plan = plan_run(load_recipe(options.recipe), ranks.world_size)
    config = plan.deepspeed | ({"checkpoint": {"load_universal": True}} if options.universal else {})
    keep_alive = distributed.zero_config(config)
    model, *_ = _build_model(plan, keep_alive, on_gpu=False)
    engine = distributed.initialize_engine(model, build_optimizer(model, plan.recipe.optimizer), config)
    result = save(engine, plan, ranks, options.folder) if options.mode == "save" else load(engine, plan, ranks, options)
    peaks = distributed.gather_floats([peak_memory_gib(ranks.device)], ranks)
    if ranks.is_first:
        options.result.write_text(json.dumps(result | {"peak_gib": float(peaks.max())}), encoding="utf-8")


def train_step(engine: Any, plan: RunPlan, ranks: distributed.Ranks) -> None:
    """One step on random tokens of the recipe's shape."""
    rows, length = plan.batch.rows_per_forward, plan.recipe.data.sequence_length
    ids = torch.randint(0, 1000, (rows, length))
    for _ in range(plan.batch.accumulation_steps):
        logits = engine(input_ids=ids, position_ids=torch.arange(length).expand(rows, -1), use_cache=False).logits
        loss = cross_entropy_sum(logits, ids, torch.ones_like(ids, dtype=torch.bool))
        engine.backward(
            loss_for_backward(loss, rows * length * ranks.world_size, ranks.world_size), scale_wrt_gas=False
        )
        engine.step()


def save(engine: Any, plan: RunPlan, ranks: distributed.Ranks, folder: Path) -> dict[str, Any]:
    """Seconds that each save held training, and of the steps; the last one stays."""
    held, steps = [], []
    every = plan.recipe.checkpoint.every_steps
    assert every is not None
    for step in range(1, plan.schedule.total_steps + 1):
        started = time.perf_counter()
        train_step(engine, plan, ranks)
        steps.append(time.perf_counter() - started)
        if step % every:
            continue
        distributed.gather_floats([0.0], ranks)  # all ranks begin together
        started = time.perf_counter()
        engine.save_checkpoint(str(folder), tag=f"step{step}")
        held.append(float(distributed.gather_floats([time.perf_counter() - started], ranks).max()))
        if ranks.is_first and step > every:
            shutil.rmtree(folder / f"step{step - every}")
    size = sum(file.stat().st_size for file in (folder / f"step{step}").rglob("*") if file.is_file())
    return {"held_seconds": held, "step_seconds": steps, "bytes": size, "tag": f"step{step}"}


def load(engine: Any, plan: RunPlan, ranks: distributed.Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds until the engine holds the checkpoint; a step follows, for the peak of memory."""
    distributed.gather_floats([0.0], ranks)
    started = time.perf_counter()
    path, _ = engine.load_checkpoint(str(options.folder))
    seconds = float(distributed.gather_floats([time.perf_counter() - started], ranks).max())
    if path is None:
        raise ValueError(f"DeepSpeed found no checkpoint in {options.folder}")
    train_step(engine, plan, ranks)
    return {"load_seconds": seconds}


if __name__ == "__main__":
    main()
