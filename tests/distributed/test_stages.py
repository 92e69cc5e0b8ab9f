"""ZeRO stages, offload, frozen parameters, buffers and optimizers: each goes on exactly, and at another stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import LLAMA, Runs, trainyard
from test_resume import all_tensors, assert_same_run
from transformers import AutoConfig, AutoModelForCausalLM

from gpt.checkpoint.format import Manifest, list_checkpoints
from gpt.checkpoint.read import open_checkpoint

CALM = {"learning_rate": 1e-3, "warmup_steps": 4}

ROUNDING = 1e-5
"""At the same world size the stages add the same fp32 gradients in the same order; only the squares of the gradient
norm are summed in another, so that clipping scales by a factor that may differ in its last bits (a norm differed by
3e-7, and no loss in 12 steps)."""

OTHER_RANKS = 1e-3
"""What test_world_size allows, for its reason."""

MOE = {
    "model_type": "deepseek_v3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_shared_experts": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
"""A model with a persistent buffer, the routing bias of its second layer."""
ROUTING_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def steps(count: int, micro_batch_sequences: int = 2) -> dict[str, Any]:
    return {"global_batch_tokens": 512, "micro_batch_sequences": micro_batch_sequences, "steps": count, "seed": 3}


def stage(number: int) -> str:
    return f"ds_configs/zero{number}.json"


def offloaded(runs: Runs, number: int, *parts: str) -> str:
    """The DeepSpeed file of a stage with parts in the memory of the CPU."""
    content = json.loads(Path(__file__).parents[2].joinpath(stage(number)).read_text(encoding="utf-8"))
    content["zero_optimization"] |= {f"offload_{part}": {"device": "cpu", "pin_memory": False} for part in parts}
    file = runs.folder / f"offload-{number}-{'-'.join(parts)}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def assert_near(runs: Runs, name: str, expected: str, tolerance: float) -> None:
    mine, theirs = runs.metrics(name), runs.metrics(expected)
    assert mine.keys() == theirs.keys()
    for step, record in mine.items():
        assert record["sample_digest"] == theirs[step]["sample_digest"]
        for key in ("train/loss", "evaluate/loss"):
            assert record.get(key) == pytest.approx(theirs[step].get(key), abs=tolerance), f"{key} of step {step}"


def kill_behind(runs: Runs, name: str, saved_step: int, **changes: Any) -> None:
    """Start a run and kill it when it has committed `saved_step` or a later one, and gone beyond it."""
    live = runs.start(name, **changes)
    live.wait_until(lambda: live.last_step() > max([saved_step - 1, *list_checkpoints(live.directory)]) >= saved_step)
    live.kill()


def manifest(runs: Runs, name: str, step: int | None = None) -> Manifest:
    return open_checkpoint(runs.directory(name), step).manifest


@pytest.fixture(scope="module")
def calm(runs: Runs) -> Runs:
    """The uninterrupted run `calm`: 2 ranks, stage 3, 20 steps at a low learning rate."""
    runs.train("calm", optimizer=CALM, checkpoint={"every_steps": 5})
    return runs


@pytest.fixture(scope="module")
def staged(calm: Runs) -> Runs:
    """The uninterrupted runs `stage-1` and `stage-2`, as `calm` otherwise."""
    for number in (1, 2):
        calm.train(f"stage-{number}", deepspeed=stage(number), optimizer=CALM, checkpoint={"every_steps": 5})
    return calm


@pytest.mark.full
@pytest.mark.parametrize("number", [1, 2])
def test_killed_at_stages_1_and_2_equals_uninterrupted_run(staged: Runs, number: int) -> None:
    name, changes = f"stage-{number}", {"deepspeed": stage(number), "optimizer": CALM, "checkpoint": {"every_steps": 5}}
    assert_near(staged, name, "calm", ROUNDING)
    written = manifest(staged, name)
    assert written.zero_stage == number
    counts = [{count for _, count in ranges} for ranges in written.fragments.values()]
    assert all(0 in rank for rank in counts), "each rank holds no element of some parameter, as at these stages only"
    kill_behind(staged, f"{name}-killed", 5, **changes)
    done = staged.train(f"{name}-killed", **changes)
    assert "resumed at step" in done.stdout and "PASS" in done.stdout
    assert_same_run(staged, f"{name}-killed", name)


@pytest.mark.full
def test_stage_and_ranks_change_over_three_kills(calm: Runs) -> None:
    """2 -> 1 -> 3 -> 2 ranks, stage 3 -> 1 -> 2 -> 3, with SIGKILL between them."""
    changes: dict[str, Any] = {"optimizer": CALM, "checkpoint": {"every_steps": 5}}
    for number, (zero, ranks) in enumerate([(3, 2), (1, 1), (2, 3)]):
        kill_behind(calm, "wandering", 5 * number + 5, processes=ranks, deepspeed=stage(zero), **changes)
        newest = manifest(calm, "wandering")
        assert (newest.zero_stage, newest.world_size) == (zero, ranks) and newest.step < 20
    done = calm.train("wandering", deepspeed=stage(3), **changes)
    assert "written by 3 ranks" in done.stdout and "PASS" in done.stdout
    assert_near(calm, "wandering", "calm", OTHER_RANKS)


@pytest.mark.full
@pytest.mark.parametrize("number", [1, 2, 3])
def test_offload_changes_nothing(staged: Runs, number: int) -> None:
    """With torch's own AdamW on the CPU the weights are those of the run without offload, bit for bit on this host; the
    printed gradient norm is summed in another order. Killed, the run goes on exactly."""
    parts = ("optimizer", "param") if number == 3 else ("optimizer",)
    name, plain = f"offload-{number}", "calm" if number == 3 else f"stage-{number}"
    changes: dict[str, Any] = {
        "deepspeed": offloaded(staged, number, *parts), "optimizer": CALM, "checkpoint": {"every_steps": 5}
    }  # fmt: skip
    staged.train(name, **changes)
    assert_near(staged, name, plain, ROUNDING)
    mine, theirs = all_tensors(staged.directory(name)), all_tensors(staged.directory(plain))
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-7)
    kill_behind(staged, f"{name}-killed", 5, **changes)
    staged.train(f"{name}-killed", **changes)
    assert_same_run(staged, f"{name}-killed", name)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "options", "number"), [("nadam", {}, 2), ("radam", {}, 1), ("sgd", {"momentum": 0.9}, 3)]
)
def test_other_optimizers_go_on_exactly(calm: Runs, kind: str, options: dict[str, Any], number: int) -> None:
    """Also what each of them keeps besides AdamW's states: a product of momenta, one buffer only, no count of steps."""
    optimizer = {"type": kind, "learning_rate": 0.02 if kind == "sgd" else 1e-3, "warmup_steps": 4, **options}
    changes = {"optimizer": optimizer, "deepspeed": stage(number), "checkpoint": {"every_steps": 5}, "train": steps(12)}
    calm.train(kind, **changes)
    kill_behind(calm, f"{kind}-killed", 5, **changes)
    calm.train(f"{kind}-killed", **changes)
    assert_same_run(calm, f"{kind}-killed", kind)
    written = manifest(calm, kind).optimizer
    states = {"sgd": ["fp32", "momentum_buffer"]}.get(kind, ["fp32", "exp_avg", "exp_avg_sq"])
    scalars = {"sgd": set(), "nadam": {"step", "mu_product"}, "radam": {"step"}}[kind]
    assert (written.type, written.states) == (kind, states)
    assert [group.scalars.keys() for group in written.groups] == [scalars, scalars]


@pytest.fixture(scope="module")
def base(runs: Runs) -> Runs:
    """The run `base` from a Hugging Face folder whose routing bias is none that an initialisation gives."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MOE, vocab_size=600))
    bias = dict(model.named_buffers())[ROUTING_BIAS]
    bias.copy_(torch.randn(4) / 10)
    model.save_pretrained(runs.folder / "moe")
    torch.save(bias, runs.folder / "bias.pt")
    runs.train("base", processes=1, model={"pretrained": "moe"}, train=steps(2), optimizer={"learning_rate": 1e-3})
    return runs


def checked_bias(runs: Runs, name: str) -> torch.Tensor:
    assert manifest(runs, name).buffers == [ROUTING_BIAS]
    return open_checkpoint(runs.directory(name)).read_buffer(ROUTING_BIAS)


@pytest.mark.full
@pytest.mark.parametrize("number", [1, 3])
def test_frozen_parameters_and_buffers(base: Runs, number: int) -> None:
    """A tied embedding, norms and experts frozen; killed, on other ranks and at another stage, evaluated, exported.

    The run starts from a run, so that its own initialisation has neither the frozen weights nor the buffer.
    """
    frozen = ["lm_head.weight", "model.layers.0.*norm.weight", "model.layers.1.mlp.experts.*"]
    changes = {
        "model": {"pretrained": "runs/base", "frozen": frozen},
        "optimizer": CALM,
        "checkpoint": {"every_steps": 4},
        "train": steps(12),
        "gradient_checkpointing": {"every_layers": 1},
        "precision": "bf16",  # to which frozen weights are rounded
    }
    name = f"frozen-{number}"
    base.train(name, deepspeed=stage(number), **changes)
    before, after = open_checkpoint(base.directory("base")), open_checkpoint(base.directory(name))
    kept = [entry for entry in after.manifest.parameters if entry.group is None]
    assert {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} < {entry.name for entry in kept}
    assert after.manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    for entry in after.manifest.parameters:
        weights = before.read_tensor(entry.name)
        same = torch.equal(after.read_tensor(entry.name), weights.bfloat16().float())
        assert same == (entry.group is None), entry.name
        assert list(after.manifest.norms[entry.name]) == after.manifest.states_of(entry)
    assert torch.equal(checked_bias(base, name), torch.load(base.folder / "bias.pt"))

    kill_behind(base, f"{name}-killed", 4, deepspeed=stage(number), **changes)
    base.copy(f"{name}-killed", f"{name}-moved")
    done = base.train(f"{name}-killed", deepspeed=stage(number), **changes)
    assert "resumed at step" in done.stdout
    assert_same_run(base, f"{name}-killed", name)

    base.train(f"{name}-moved", deepspeed=stage(4 - number), processes=3, **changes)
    assert_near(base, f"{name}-moved", name, OTHER_RANKS)
    moved = open_checkpoint(base.directory(f"{name}-moved"))
    assert all(torch.equal(moved.read_tensor(entry.name), after.read_tensor(entry.name)) for entry in kept)
    assert torch.equal(checked_bias(base, f"{name}-moved"), checked_bias(base, name))

    trainyard("export", f"runs/{name}", "--out", f"exports/{name}", "--dtype", "fp32", cwd=base.folder)
    exported = AutoModelForCausalLM.from_pretrained(base.folder / "exports" / name)
    for entry in after.manifest.parameters:
        assert torch.equal(exported.get_parameter(entry.name), after.read_tensor(entry.name)), entry.name


def test_a_frozen_pattern_that_matches_nothing_is_refused_and_leaves_nothing(runs: Runs) -> None:
    done = runs.train("frozen-nothing", model={"config": LLAMA, "frozen": ["model.embed.weight"]}, check=False)
    assert done.returncode == 1
    assert "no parameter matches 'model.embed.weight'; near: model.embed_tokens.weight" in done.stderr
    assert "Traceback" not in done.stderr and not runs.directory("frozen-nothing").exists()
