"""A run that trains an adapter: killed, on other ranks and at other stages, exported merged and alone."""

import json
from typing import Any

import pytest
import torch
from live_runs import LLAMA, Runs, trainyard
from test_resume import assert_same_run
from test_stages import OTHER_RANKS, assert_near, kill_behind, stage
from transformers import AutoConfig, AutoModelForCausalLM

from gpt.checkpoint.read import open_checkpoint

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
CHANGES: dict[str, Any] = {
    "model": {"pretrained": "base"},
    "lora": LORA,
    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 2},
    "train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 12, "seed": 3},
    "checkpoint": {"every_steps": 4},
    "gradient_checkpointing": {"every_layers": 1},
}


@pytest.fixture(scope="module")
def adapted(runs: Runs) -> Runs:
    """The uninterrupted run `adapted`: 2 ranks, stage 3, 12 steps, on the random model in `base`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**LLAMA, vocab_size=600)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(runs.folder / "base")
    runs.train("adapted", **CHANGES)
    return runs


def test_only_the_adapter_is_trained_and_saved_and_a_killed_run_goes_on(adapted: Runs) -> None:
    reader = open_checkpoint(adapted.directory("adapted"))
    entries = reader.manifest.parameters
    assert len(entries) == 2 * 3 * 2 and all(".lora_" in entry.name and entry.group == 0 for entry in entries)
    assert all(reader.read_tensor(entry.name).abs().max() > 0 for entry in entries), "each B began as zeros"
    elements = sum(entry.elements for entry in entries)
    assert elements == 4 * 2 * ((48 + 48) + (48 + 24) + (100 + 48))
    losses = adapted.metrics("adapted")
    assert losses[12]["evaluate/loss"] < losses[5]["evaluate/loss"]
    kill_behind(adapted, "adapted-killed", 4, **CHANGES)
    done = adapted.train("adapted-killed", **CHANGES)
    assert "resumed at step" in done.stdout and "PASS" in done.stdout
    assert_same_run(adapted, "adapted-killed", "adapted")


@pytest.mark.full
def test_stage_and_ranks_change_over_two_kills(adapted: Runs) -> None:
    """Stage 1 on 2 ranks, 2 on 1, 3 on 2, with SIGKILL between them."""
    for number, (zero, ranks) in enumerate([(1, 2), (2, 1)]):
        kill_behind(adapted, "adapted-moved", 4 * number + 4, processes=ranks, deepspeed=stage(zero), **CHANGES)
    done = adapted.train("adapted-moved", deepspeed=stage(3), **CHANGES)
    assert "written by 1 ranks" in done.stdout and "PASS" in done.stdout
    assert_near(adapted, "adapted-moved", "adapted", OTHER_RANKS)


def test_merged_and_alone_the_export_gives_the_live_engines_logits(adapted: Runs) -> None:
    gates = {}
    for name, options in {"merged": (), "alone": ("--adapter",)}.items():
        words = ("--out", f"exports/lora-{name}", *options, "--json")
        done = trainyard("export", "runs/adapted", *words, cwd=adapted.folder)
        gates[name] = json.loads(done.stdout)["gate"]
    assert "differ by at most 0 from the live engine's" in gates["alone"]["logits"]
    assert "end_tokens" in gates["merged"] and gates["merged"]["greedy"]
