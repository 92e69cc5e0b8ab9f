"""The engine's gradient, loss and AdamW steps against plain transformers and torch on one big batch."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_worker import LOOKED_AT_STEPS, MODEL, RECIPE, REGULARIZED, SEQUENCES, STEPS, ragged_rows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from gpt.embedding_noise import noise_seed
from gpt.optimizer import Schedule
from gpt.recipe_file import PROJECT_ROOT, parse_recipe

WORKER = Path(__file__).with_name("engine_worker.py")
SPLITS = [
    (1, 8, 3),
    (1, 3, 3),
    (2, 2, 3),
    (3, 2, 3),
    (2, 2, 2),
    *(pytest.param(split, marks=pytest.mark.full) for split in [(2, 2, 1), (3, 2, 1), (3, 2, 2)]),
]
"""(ranks, micro-batch sequences, ZeRO stage): one big forward; 3 uneven ones; 2 ranks x 2; 3 ranks with padding."""


@pytest.fixture(scope="module")
def engine_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What the engine gave for a split; each runs once."""
    folder = tmp_path_factory.mktemp("numerics")

    @functools.cache
    def result(split: tuple[int, int, int], *options: str) -> dict[str, Any]:
        ranks, micro, stage = split
        out = folder / f"{ranks}-{micro}-{stage}{options}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(WORKER), str(out), str(micro), str(stage), *options],
            env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        loaded: dict[str, Any] = torch.load(out)
        return loaded

    return result


def plain_model(weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.float32)
    model.load_state_dict(weights)
    return model


def big_batch_loss(model: PreTrainedModel, step: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean loss over the counted targets of a whole global batch, in one forward."""
    rows = ragged_rows(np.arange((step - 1) * SEQUENCES, step * SEQUENCES))
    logits = model(
        input_ids=torch.from_numpy(rows.input_ids), position_ids=torch.from_numpy(rows.position_ids), use_cache=False
    ).logits
    targets = torch.from_numpy(np.where(rows.target_mask, rows.targets, -100))
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )


def add_transformers_noise(model: PreTrainedModel) -> None:
    """transformers' NEFTune on the rows of step 1, each from its own seed."""

    def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        rows = []
        for position, row in enumerate(output.split(1)):
            torch.manual_seed(noise_seed(RECIPE["train"]["seed"], position))
            module.neftune_noise_alpha = REGULARIZED["neftune_noise_alpha"]
            rows.append(neftune_post_forward_hook(module, args, row))
        return torch.cat(rows)

    model.train().get_input_embeddings().register_forward_hook(add)


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_equals_one_big_batch(engine_results: Any, split: tuple[int, int, int]) -> None:
    """fp32 sums in another order: 1e-5 of the largest element is some ten units in the last place."""
    result = engine_results(split)
    model = plain_model(result["initial"])
    loss = big_batch_loss(model, 1)
    loss.backward()
    assert result["loss"][0] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (result["gradient"][name] - parameter.grad).abs().max()
        assert difference <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.full
def test_label_smoothing_and_embedding_noise_equal_one_big_batch_with_those_of_torch_and_transformers(
    engine_results: Any,
) -> None:
    """2 ranks x 2 forwards. The loss that is recorded is not smoothed."""
    result = engine_results((2, 2, 3), "regularized")
    model = plain_model(result["initial"])
    add_transformers_noise(model)
    assert result["loss"][0] == pytest.approx(big_batch_loss(model, 1).item(), rel=1e-6)
    big_batch_loss(model, 1, REGULARIZED["label_smoothing"]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (result["gradient"][name] - parameter.grad).abs().max()
        assert difference <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("split", SPLITS)
def test_initial_weights_do_not_depend_on_world_size_or_stage(engine_results: Any, split: Any) -> None:
    first = engine_results((1, 8, 3))["initial"]
    assert first["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.1)  # transformers' init, not torch's
    for name, value in engine_results(split)["initial"].items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("split", SPLITS)
def test_steps_equal_torch_adamw_with_clipping(engine_results: Any, split: tuple[int, int, int]) -> None:
    """Three steps of torch's plain AdamW with decay groups written out by hand, clipped, on the recipe's schedule.

    Adam divides a gradient by its own size, which shows the rounding of gradients near epsilon in full: hence a large
    epsilon here, and a bound of 1e-3 of the distance that the weights moved.
    """
    result = engine_results(split)
    settings = parse_recipe(RECIPE, "of the test").optimizer
    model = plain_model(result["initial"])
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5, fused=False)
    for step in range(1, LOOKED_AT_STEPS + 1):
        loss = big_batch_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = Schedule(settings, STEPS).learning_rate(step)
        optimizer.step()
        assert result["loss"][step - 1] == pytest.approx(loss.item(), rel=1e-5)
        assert result["norm"][step - 1] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5, "the clipping did nothing, so it was not tested"
        for name, parameter in model.named_parameters():
            moved = (parameter - result["initial"][name]).abs().max()
            difference = (result["weights"][step - 1][name] - parameter).abs().max()
            assert difference <= 1e-3 * moved, f"{name} after step {step}"


GOLDEN_TOLERANCE = 1e-5
"""1.2e-6 was seen between processors' instruction sets and between splits; a weight decay of 0.099 instead of 0.1 makes
7.9e-5."""


@pytest.mark.parametrize("split", SPLITS)
def test_losses_are_the_golden_ones(engine_results: Any, split: tuple[int, int, int]) -> None:
    """50 steps in fp32 against a file of this repository: whatever moves the losses, here or in a library, is seen."""
    golden = json.loads(WORKER.with_name("golden_losses.json").read_text(encoding="utf-8"))
    assert len(golden) == STEPS and golden[-1] < golden[0] - 1, "nothing was learnt, so equality says little"
    assert engine_results(split)["loss"] == pytest.approx(golden, rel=0, abs=GOLDEN_TOLERANCE)
