"""One rank of the real engine at ZeRO stage 3 that evaluates random cases as a run does, with a prompt of its own each.

Run by torchrun: `lock_step_worker.py OUT.json CASES`. A case is two prompts: on 2 ranks each continues one of them at
the same time, on 1 rank they come one after another. Rank 0 writes, of each prompt, the validation loss, the prompt's
tokens and the new ones.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpt import distributed
from gpt.evaluate import RunEvaluation
from gpt.recipe_file import PROJECT_ROOT

sys.path.append(str(PROJECT_ROOT / "tests" / "numerics"))
from engine_worker import VOCABULARY, ragged_rows
from skip_worker import make_trainer

PROMPTS = 2


def rows(positions: np.ndarray) -> Any:
    """As of the stream, also none."""
    made = ragged_rows(np.append(positions, 0))
    return SimpleNamespace(**{name: values[:-1] for name, values in vars(made).items()})


def evaluation(case: int, prompt: int) -> RunEvaluation:
    """What all ranks share is drawn from the case alone; the prompt, and what ends its text, is one rank's own."""
    shared, own = np.random.default_rng(case), np.random.default_rng([case, prompt])
    stream: Any = SimpleNamespace(number_of_samples=int(shared.integers(1, 4)), rows=rows)
    tokenizer: Any = SimpleNamespace(decode=str)
    return RunEvaluation(
        stream=stream,
        batches=None,
        micro_batch_sequences=None,
        byte_lengths=None,
        tokenizer=tokenizer,
        sample_prompt_ids=own.integers(0, VOCABULARY, own.integers(1, 48)).tolist(),
        sample_tokens=int(shared.integers(1, 7)),
        end_ids=frozenset(own.integers(0, VOCABULARY, 20).tolist()),
    )


def main(out: Path, cases: int) -> None:
    ranks = distributed.start()
    trainer, _ = make_trainer(3, "fp32", out.with_suffix(""), ranks)
    results = []
    for case in range(cases):
        mine = []
        for prompt in range(ranks.rank, PROMPTS, ranks.world_size):
            found = evaluation(case, prompt)(trainer)
            assert found.greedy is not None
            mine.append((found.metrics["evaluate/loss"], found.greedy.prompt_ids, found.greedy.new_ids))
        results.append([one for everyone in distributed.gather_objects(mine, ranks) for one in everyone])
    trainer.batches.close()
    if ranks.is_first:
        out.write_text(json.dumps(results), encoding="utf-8")
    distributed.stop()
    os._exit(0)  # native threads that outlive the interpreter now and then abort


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
