"""Trains recipes with the real ZeRO-3 engine, and writes what the live engine held beside each run.

    python export_worker.py RECIPE.yaml:RANKS…     in the folder of the runs

The parent imports everything once and forks the ranks of each run: a start costs no imports. Each rank is
`gpt.train.run`; before its engine is given up, rank 0 writes live.safetensors (weights in the training dtype, gathered
by DeepSpeed) and live_fp32.safetensors (the masters) into the run directory.
"""

import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

import gpt.evaluate
import gpt.isolation
import gpt.metrics
import gpt.model
import gpt.optimizer
import gpt.resume
import gpt.saver  # noqa: F401  the modules that `run` imports late
from gpt import train, trainer
from gpt.recipe_file import load_recipe


def write_live_weights(finished: trainer.Trainer) -> None:
    """Gather every parameter from the engine; a collective."""
    live, masters = {}, {}
    for name, parameter in finished.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            live[name] = parameter.detach().clone()
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        masters[name] = (live[name] if master is None else master).detach().float().clone()
    if finished.ranks.is_first:
        save_file(live, finished.run / "live.safetensors")
        save_file(masters, finished.run / "live_fp32.safetensors")


def run_rank(recipe_file: Path, rank: int, world_size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), GROUP_RANK="0", GROUP_WORLD_SIZE="1")
    fit = trainer.Trainer.fit

    def fit_and_write(self: trainer.Trainer) -> None:
        fit(self)
        write_live_weights(self)

    trainer.Trainer.fit = fit_and_write  # type: ignore[method-assign]
    train.run(load_recipe(recipe_file), lambda: False)


def free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        recipe_file, _, ranks = case.rpartition(":")
        children, port = [], free_port()
        for rank in range(int(ranks)):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(Path(recipe_file), rank, int(ranks), port)
                    sys.stdout.flush()
                    os._exit(0)  # native threads that outlive the interpreter now and then abort
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        # as the launcher's agent has one; after the forks, since its thread must not be forked; the ranks wait for it
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{case}: the ranks ended with {codes}")
        del store


if __name__ == "__main__":
    main(sys.argv[1:])
