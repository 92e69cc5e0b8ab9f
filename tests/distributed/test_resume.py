"""A run that is killed with SIGKILL and started again equals the run that was never stopped, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import GPT2_WITH_DROPOUT, Runs, comparable

from gpt.checkpoint.read import open_checkpoint
from gpt.phase_clock import COMPUTING, STEP_PHASES
from launch import status


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


def test_goodput_of_a_killed_run(reference: Runs) -> None:
    """Of the run of the test before."""
    found = status.report(reference.directory("killed"))["goodput"]
    events = reference.events("killed")
    [again], [resume] = ([e for e in events if e["event"] == kind] for kind in ("continue", "resume"))
    assert found["down_seconds"] == pytest.approx(again["time"] - again["last_seen"])
    assert found["lost_seconds"] == pytest.approx(resume["seconds_lost"]) and resume["seconds_lost"] > 0
    assert found["starting_seconds"] > resume["time"] - again["time"], "the first start took its time, too"
    records = reference.metrics("killed").values()
    computing = sum(sum(r[f"performance/{p}_seconds"] for p in (*COMPUTING, "communication")) for r in records)
    assert found["share"] * found["seconds"] == pytest.approx(computing)
    evaluations = [r["performance/evaluation_seconds"] for r in records if "evaluate/loss" in r]
    assert found["evaluation_seconds"] == pytest.approx(sum(evaluations)) and min(evaluations) > 0
    parts = [value for key, value in found.items() if key.endswith("_seconds")]
    assert sum(parts) == pytest.approx(found["seconds"]) and min(parts) > -0.5
    assert records_share(reference) == pytest.approx(found["share"], rel=0.3)


def records_share(runs: Runs) -> float:
    """What TensorBoard shows at the last step, before which nothing but its save comes."""
    return float(runs.metrics("killed")[20]["run/goodput"])


def trace_of(runs: Runs) -> list[dict[str, Any]]:
    """The main thread's events of `reference`, steps 4 and 5, in order."""
    [file] = (runs.directory("reference") / "tensorboard").glob("*.pt.trace.json")
    assert file.name.startswith("rank0.")
    events = [e for e in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    thread = next(event["tid"] for event in events if event["name"] == "forward")
    return sorted((e for e in events if e["tid"] == thread), key=lambda event: float(event["ts"]))


def seconds_in(outer: dict[str, Any], events: list[dict[str, Any]], *parts: str) -> float:
    """Of the events within `outer` whose names begin with one of `parts`, none within another one of them."""
    begin, end, total = outer["ts"], outer["ts"] + outer["dur"], 0.0
    for event in events:
        if event["name"].startswith(parts) and begin <= event["ts"] and event["ts"] + event["dur"] <= end:
            begin = event["ts"] + event["dur"]
            total += event["dur"] / 1e6
    return total


def test_asked_steps_are_traced_on_rank_0(reference: Runs) -> None:
    names = [event["name"] for event in trace_of(reference)]
    assert names.count("_OutputLossSum") == 2 * 2  # steps, of 2 forwards each
    assert "aten::_fused_adamw_" in names


def test_the_phases_of_a_step_are_those_of_its_trace(reference: Runs) -> None:
    events, records = trace_of(reference), reference.metrics("reference")
    spans = {name: [e for e in events if e["name"] == name] for name in ("data_wait", *COMPUTING)}
    assert {name: len(found) for name, found in spans.items()} == {
        "data_wait": 2, "forward": 4, "backward": 4, "optimizer": 4
    }  # fmt: skip
    told = {name: sum(records[step][f"performance/{name}_seconds"] for step in (4, 5)) for name in STEP_PHASES}
    inside = {name: sum(seconds_in(s, events, "communication") for s in found) for name, found in spans.items()}
    for name, found in spans.items():
        stall = sum(seconds_in(span, events, "checkpoint_stall") for span in found)
        whole = sum(span["dur"] for span in found) / 1e6 - inside[name] - stall
        assert told[name] == pytest.approx(whole, rel=0.2, abs=0.03), name  # the profiler takes its time
    spans["communication"] = [event for event in events if event["name"] == "communication"]
    every = {"ts": events[0]["ts"], "dur": events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]}
    waited = seconds_in(every, events, "communication")
    assert told["communication"] == pytest.approx(waited, rel=0.2, abs=0.03)
    # what torch itself records lies in the phases where it belongs
    spans["communication"] += [event for event in events if event["name"] == "evaluation"]  # whose own are its own
    for name, phase in (
        ("_OutputLossSum", "forward"), ("autograd::engine::evaluate_function:", "backward"),
        ("aten::_fused_adamw_", "optimizer"), ("c10d::", "communication"),
    ):  # fmt: skip
        found = [e for e in events if e["name"] == name or (name[-1] == ":" and e["name"].startswith(name))]
        assert found, name
        for event in found:
            assert any(0 <= event["ts"] - s["ts"] <= s["dur"] - event["dur"] for s in spans[phase]), (name, phase)
    assert sum(told.values()) < 1.2 * sum(records[step]["performance/step_seconds"] for step in (4, 5))


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
