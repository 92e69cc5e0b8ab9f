"""One rank of the real engine and Trainer on made-up ragged data; rank 0 saves what a test compares.

Run by torchrun: `engine_worker.py OUT.pt MICRO_BATCH_SEQUENCES ZERO_STAGE [regularized]`. Rows are those of
`ragged_rows`, 8 sequences a step. On 1 rank, and regularized, the loss is that of whole logits; else the output layer
gives it. Into an OUT.json go the losses alone: `golden_losses.json` is that of 1 rank, 8 sequences and stage 3.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from transformers import AutoConfig

from gpt import distributed
from gpt.batch import plan_batch
from gpt.batch_source import BatchSource
from gpt.deepspeed_config import build_deepspeed_config
from gpt.embedding_noise import embedding_noise
from gpt.loss import output_layer
from gpt.model import build_model, decoder_layers
from gpt.optimizer import Schedule, build_optimizer
from gpt.recipe_file import PROJECT_ROOT, parse_recipe
from gpt.saver import Saver
from gpt.trainer import Trainer

SEQUENCES, TOKENS, VOCABULARY, STEPS = 8, 16, 97, 50
LOOKED_AT_STEPS = 3
"""Of the first steps the weights are compared, of all the losses."""
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
RECIPE: dict[str, Any] = {
    "name": "numerics",
    "model": {"config": MODEL},
    "tokenizer": "none",
    "data": {"train": [{"path": "none"}], "sequence_length": TOKENS},
    "train": {"global_batch_tokens": SEQUENCES * TOKENS, "micro_batch_sequences": 2, "steps": STEPS, "seed": 5},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "gradient_clip_norm": 0.5, "epsilon": 1e-5},
    "precision": "fp32",
}
REGULARIZED = {"label_smoothing": 0.2, "neftune_noise_alpha": 5.0}


def ragged_rows(positions: np.ndarray) -> Any:
    """Rows that are a function of their position: the share of counted targets goes from 1 of 16 to all of them, and
    each row holds two documents."""
    count = len(positions)
    # a first token and a stride for each row: the model can learn to go on from two tokens
    begin, stride = np.stack([np.random.default_rng(int(p)).integers(0, (VOCABULARY, 5)) for p in positions]).T
    tokens = (begin[:, None] + (1 + stride[:, None]) * np.arange(TOKENS + 1)) % VOCABULARY
    mask = np.arange(TOKENS)[None] < (1 + 15 * (positions.astype(np.int64) % SEQUENCES) // (SEQUENCES - 1))[:, None]
    position_ids = np.tile(np.concatenate([np.arange(6), np.arange(TOKENS - 6)]), (count, 1))
    return SimpleNamespace(input_ids=tokens[:, :-1], targets=tokens[:, 1:], position_ids=position_ids, target_mask=mask)


class RaggedStream:
    def sample_ids(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.uint64)

    def rows(self, positions: range) -> Any:
        return ragged_rows(np.array(positions))


def main(out: Path, micro_batch_sequences: int, zero_stage: int, regularized: bool) -> None:
    ranks = distributed.start()
    section = {
        **RECIPE["train"],
        "micro_batch_sequences": micro_batch_sequences,
        **(REGULARIZED if regularized else {}),
    }
    deepspeed = str(PROJECT_ROOT / "ds_configs" / f"zero{zero_stage}.json")
    recipe = parse_recipe({**RECIPE, "train": section, "deepspeed": deepspeed}, "of the test")
    batch = plan_batch(SEQUENCES, micro_batch_sequences, ranks.world_size)
    config = AutoConfig.for_model(**MODEL)
    settings = build_deepspeed_config(recipe, batch, config.hidden_size)
    keep_alive = distributed.zero_config(settings)
    model = build_model(recipe.model, config, recipe.precision, recipe.train.seed, keep_alive)
    distributed.mark_leaf_modules(model, decoder_layers(model))
    engine = distributed.initialize_engine(model, build_optimizer(model, recipe.optimizer), settings)

    def weights() -> dict[str, torch.Tensor]:
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()}
        return {n: safe_get_full_fp32_param(p).clone().reshape(shapes[n]) for n, p in model.named_parameters()}

    result: dict[str, Any] = {"initial": weights(), "loss": [], "norm": [], "weights": []}
    plain_step = engine.step

    def step_and_look() -> None:
        if engine.is_gradient_accumulation_boundary() and "gradient" not in result:
            result["gradient"] = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
        plain_step()

    engine.step = step_and_look
    fused = ranks.world_size > 1
    plan: Any = SimpleNamespace(recipe=recipe)  # nothing is saved: it is only asked for the settings
    trainer = Trainer(
        recipe=recipe,
        run=out.parent,
        owner=None,
        metrics=None,
        engine=engine,
        ranks=ranks,
        batches=BatchSource(RaggedStream(), batch, ranks),
        batch=batch,
        schedule=Schedule(recipe.optimizer, STEPS),
        evaluate=None,
        saver=Saver(plan, distributed.ShardedState(engine, ranks), ranks, None, 0, {}, lambda: None, True),
        stop_requested=lambda: False,
        embedding_noise=embedding_noise(model, recipe.train),
        output_layer=output_layer(recipe, model, engine, ranks.device) if fused else None,
    )
    assert (trainer.output_layer is not None) == (fused and not recipe.train.label_smoothing)
    for step in range(1, STEPS + 1):
        record = trainer.train_step(step, trainer.take(step))
        result["loss"].append(record.get("train/loss"))
        result["norm"].append(record.get("train/gradient_norm"))
        if step <= LOOKED_AT_STEPS:
            result["weights"].append(weights())
    if ranks.is_first and out.suffix == ".json":
        out.write_text(json.dumps(result["loss"], indent=0) + "\n", encoding="utf-8")
    elif ranks.is_first:
        torch.save(result, out)
    distributed.stop()
    os._exit(0)  # native threads that outlive the interpreter now and then abort


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["regularized"])
