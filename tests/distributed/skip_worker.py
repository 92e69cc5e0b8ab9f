"""One rank of the real engine and Trainer, with values that are not finite planted on rank 1 in the second step.

Run by torchrun: `skip_worker.py FOLDER CASE…`; a case is STAGE-PRECISION-PLANT. Rank 0 writes FOLDER/results.json.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig

from gpt import distributed
from gpt.batch import plan_batch
from gpt.batch_source import BatchSource
from gpt.deepspeed_config import build_deepspeed_config
from gpt.model import build_model, decoder_layers
from gpt.optimizer import Schedule, build_optimizer
from gpt.recipe_file import PROJECT_ROOT, parse_recipe
from gpt.run_directory import RunDirectory
from gpt.saver import Saver
from gpt.trainer import Trainer

sys.path.append(str(PROJECT_ROOT / "tests" / "numerics"))
from engine_worker import MODEL, RECIPE, SEQUENCES, RaggedStream

STEPS = 4
PLANTED_STEP, PLANTED_MODULE = 2, "model.layers.1.mlp.down_proj"


def make_trainer(stage: int, precision: str, folder: Path, ranks: distributed.Ranks) -> tuple[Trainer, Any]:
    train = {**RECIPE["train"], "steps": STEPS}
    recipe = parse_recipe({**RECIPE, "precision": precision, "train": train}, "of the test")
    batch = plan_batch(SEQUENCES, 2, ranks.world_size)
    config = AutoConfig.for_model(**MODEL, attention_dropout=0.1)
    settings = build_deepspeed_config(recipe, batch, config.hidden_size)
    settings["zero_optimization"]["stage"] = stage
    if precision == "bf16":  # DeepSpeed's own check, on which nothing here may rest
        settings["bf16"]["check_grad_overflow"] = False
    keep_alive = distributed.zero_config(settings)
    model = build_model(recipe.model, config, precision, recipe.train.seed, keep_alive)
    distributed.mark_leaf_modules(model, decoder_layers(model))
    engine = distributed.initialize_engine(model, build_optimizer(model, recipe.optimizer), settings)
    owner = RunDirectory(folder) if ranks.is_first else None
    if owner is not None:
        folder.mkdir(parents=True)
    plan: Any = SimpleNamespace(recipe=recipe)  # nothing is saved: it is only asked for the settings
    trainer = Trainer(
        recipe=recipe,
        run=folder,
        owner=owner,
        metrics=None,
        engine=engine,
        ranks=ranks,
        batches=BatchSource(RaggedStream(), batch, ranks),
        batch=batch,
        schedule=Schedule(recipe.optimizer, STEPS),
        evaluate=None,
        saver=Saver(plan, distributed.ShardedState(engine, ranks), ranks, None, 0, {}, lambda: None, True),
        stop_requested=lambda: False,
    )
    return trainer, model


def plant(model: torch.nn.Module, kind: str, forwards: list[int], rank: int) -> Any:
    """A NaN output, or an infinite gradient, in rank 1's second forward."""

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> Any:
        forwards[0] += 1
        if rank != 1 or forwards[0] % 2:
            return None
        if kind == "output":
            return output * float("nan")
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    return model.get_submodule(PLANTED_MODULE).register_forward_hook(hook)


def state_of(model: torch.nn.Module, engine: Any) -> list[torch.Tensor]:
    """This rank's master weights, moments and counts of updates, and the training weights."""
    found = [(p.ds_tensor if hasattr(p, "ds_tensor") else p).detach().clone() for p in model.parameters()]
    for group in engine.optimizer.optimizer.param_groups:
        for flat in group["params"]:
            found.append(flat.detach().clone())
    for state in engine.optimizer.optimizer.state.values():
        found += [value.clone() for _, value in sorted(state.items())]
    return found


def run_case(case: str, folder: Path, ranks: distributed.Ranks) -> dict[str, Any]:
    stage, precision, kind = case.split("-")
    trainer, model = make_trainer(int(stage), precision, folder / case, ranks)
    torch.manual_seed(ranks.rank)
    result: dict[str, Any] = {"losses": [], "unchanged": [], "rates": [], "random": []}
    for step in range(1, STEPS + 1):
        batch = trainer.take(step)
        before = state_of(model, trainer.engine) if step > 1 else []
        handle = plant(model, kind, [0], ranks.rank) if step == PLANTED_STEP and kind != "none" else None
        record = trainer.train_step(step, batch)
        if handle is not None:
            handle.remove()
        result["random"].append(xxhash.xxh3_64_hexdigest(torch.get_rng_state().numpy().tobytes()))
        after = state_of(model, trainer.engine)
        mine = float(len(before) == len(after) and all(map(torch.equal, before, after)))
        result["unchanged"].append(distributed.gather_floats([mine], ranks)[:, 0].tolist())
        result["losses"].append(record.get("train/loss"))
        result["rates"].append(record.get("train/learning_rate"))
    skipped = distributed.gather_floats([trainer.engine.skipped_steps], ranks)[:, 0].tolist()
    trainer.batches.close()
    return result | {"skipped": skipped}


def main(folder: Path, cases: list[str]) -> None:
    ranks = distributed.start()
    # DeepSpeed refuses fp16 on a CPU for its speed; torch computes it
    get_accelerator().is_fp16_supported = lambda: True
    results = {case: run_case(case, folder, ranks) for case in cases}
    if ranks.is_first:
        clean = {c: r | {"losses": [x if np.isfinite(x) else None for x in r["losses"]]} for c, r in results.items()}
        (folder / "results.json").write_text(json.dumps(clean), encoding="utf-8")
    distributed.stop()
    os._exit(0)  # native threads that outlive the interpreter now and then abort


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
