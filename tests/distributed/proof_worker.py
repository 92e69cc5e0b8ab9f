"""One rank that builds a recipe's real engine once and loads one run directory after another into it, as a start would.

Run by torchrun in the folder of the runs: `proof_worker.py RECIPE.yaml OUT.json BLOCK_BYTES RUN…`; a block size other
than the format's is for a checkpoint that was written with it. Rank 0 writes, for each run, the step that `resume`
returned or why it refused, its warnings, and the bytes that each rank read.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from gpt import distributed, resume
from gpt.checkpoint import files
from gpt.checkpoint.read import CheckpointReader
from gpt.optimizer import build_optimizer
from gpt.recipe_file import parse_recipe, read_mapping
from gpt.run_model import build_run_model
from gpt.train import plan_run


def main(recipe_file: Path, out: Path, block_bytes: int, names: list[str]) -> None:
    files.BLOCK_BYTES = block_bytes
    ranks = distributed.start()
    recipe = parse_recipe(read_mapping(recipe_file), str(recipe_file))
    plan = plan_run(recipe, ranks.world_size)
    keep_alive = distributed.zero_config(plan.deepspeed)
    model, *_ = build_run_model(plan, keep_alive, on_gpu=False)
    engine = distributed.initialize_engine(model, build_optimizer(model, recipe.optimizer), plan.deepspeed)
    state = distributed.ShardedState(engine, ranks)
    readers: list[CheckpointReader] = []
    load = resume.load_into_engine

    def load_and_keep(reader: CheckpointReader, *arguments: Any, **options: Any) -> None:
        readers.append(reader)
        load(reader, *arguments, **options)

    resume.load_into_engine = load_and_keep  # type: ignore[assignment]
    outcomes: dict[str, dict[str, Any]] = {}
    for name in names:
        readers.clear()
        own = dataclasses.replace(plan, recipe=recipe.model_copy(update={"name": name}))
        outcome: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                manifest = resume.resume(own, engine, state, ranks, None)
                outcome["step"] = manifest.step if manifest is not None else 0
            except ValueError as error:
                outcome["error"] = str(error)
        read = readers[-1].bytes_read if readers else 0
        outcome["bytes_read"] = distributed.gather_objects(read, ranks)
        outcomes[name] = outcome | {"warnings": printed.getvalue()}
    if ranks.is_first:
        out.write_text(json.dumps(outcomes), encoding="utf-8")
    distributed.stop()
    os._exit(0)  # native threads that outlive the interpreter now and then abort


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
