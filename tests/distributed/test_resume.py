"""A run that is killed with SIGKILL and started again equals the run that was never stopped, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import GPT2_WITH_DROPOUT, Runs, comparable

from gpt.checkpoint.read import open_checkpoint


def all_tensors(run: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(run)
    m = reader.manifest
    return {f"{s}/{p.name}": reader.read_tensor(p.name, s) for p in m.parameters for s in m.states_of(p)}


def assert_same_run(runs: Runs, name: str, expected: str) -> None:
    assert comparable(runs.metrics(name)) == comparable(runs.metrics(expected))
    mine, theirs = all_tensors(runs.directory(name)), all_tensors(runs.directory(expected))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), f"{key} differs after the resume"


def kill_after(runs: Runs, name: str, step: int, **changes: Any) -> int:
    """Start a run and kill it when it has passed `step`; returns the last step that it wrote."""
    live = runs.start(name, **changes)
    live.wait_until(lambda: live.last_step() > step and live.has_checkpoint(10))
    live.kill()
    return live.last_step()


def test_killed_run_equals_uninterrupted_run(reference: Runs) -> None:
    reached = kill_after(reference, "killed", step=10)
    done = reference.train("killed")
    assert "resumed at step 10" in done.stdout and "PASS" in done.stdout
    assert reached > 10, "the kill came before the checkpoint, so that nothing was tested"
    assert_same_run(reference, "killed", "reference")
    kinds = [event["event"] for event in reference.events("killed")]
    assert kinds.count("resume") == 1 and kinds[-1] == "end"
    probe = open_checkpoint(reference.directory("reference"), 10).manifest.probe
    assert probe is not None and probe.rows == 2, "it is not of the next step's first forward, which costs nothing"
    # moments really moved: a resume that reset them would differ above only if they matter
    assert all_tensors(reference.directory("killed"))["exp_avg_sq/model.norm.weight"].abs().sum() > 0


def test_asked_steps_are_traced_on_rank_0(reference: Runs) -> None:
    [file] = (reference.directory("reference") / "tensorboard").glob("*.pt.trace.json")
    names = [event.get("name") for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"]]
    assert file.name.startswith("rank0.") and names.count("_OutputLossSum") == 2 * 2  # steps, of 2 forwards each
    assert "aten::_fused_adamw_" in names


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_killed_run_with_dropout_and_gradient_checkpointing_or_noise(runs: Runs, precision: str) -> None:
    if precision == "bf16":
        changes: dict[str, Any] = {"gradient_checkpointing": {"every_layers": 2}}
    else:
        regularized = {"label_smoothing": 0.1, "neftune_noise_alpha": 5.0}
        changes = {"train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 20, **regularized}}
    changes |= {"model": {"config": GPT2_WITH_DROPOUT}, "precision": precision, "checkpoint": {"every_steps": 5}}
    name = f"dropout-{precision}"
    runs.train(name, **changes)
    kill_after(runs, f"{name}-killed", step=11, **changes)
    runs.train(f"{name}-killed", **changes)
    assert_same_run(runs, f"{name}-killed", name)


@pytest.mark.full
def test_sampling_text_changes_no_loss(reference: Runs) -> None:
    quiet = {"every_steps": 5, "batches": 1, "sample_tokens": 0}
    reference.train("unsampled", evaluate=quiet)
    assert comparable(reference.metrics("unsampled")) == comparable(reference.metrics("reference"))


def test_damaged_newest_checkpoint_is_passed_over(reference: Runs) -> None:
    reference.copy("reference", "damaged")
    newest = reference.directory("damaged") / "checkpoints" / "step_00000020" / "rank_00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = reference.train("damaged")
    assert "step 20 is passed over" in done.stdout and newest.name in done.stdout
    assert "resumed at step 10" in done.stdout
    assert_same_run(reference, "damaged", "reference")


def test_a_finished_run_started_again_does_nothing(reference: Runs) -> None:
    before = (reference.directory("reference") / "metrics.jsonl").read_bytes()
    done = reference.train("reference")
    assert "resumed at step 20" in done.stdout
    assert (reference.directory("reference") / "metrics.jsonl").read_bytes() == before
