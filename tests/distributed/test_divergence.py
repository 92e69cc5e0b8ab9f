"""Numbers that are not finite, and losses that jump: real runs with a fault planted in some samples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_runs import GPT2_WITH_DROPOUT, Runs, environment
from planted import planted
from test_resume import assert_same_run

from gpt.checkpoint.format import read_manifest

HERE = Path(__file__).parent
SEQUENCES = 8
"""Of a global batch of `Runs.write_recipe`: rank 0 of 2 has the first four, two in each micro-batch."""
STAGES, PRECISIONS, PLANTS = (1, 2, 3), ("bf16", "fp16", "fp32"), ("output", "gradient")
ALL = [f"{stage}-{precision}-{plant}" for stage in STAGES for precision in PRECISIONS for plant in PLANTS]
ALL += ["3-bf16-none"]


def batch_of(*steps: int) -> list[int]:
    """Positions of the samples of these steps in a run that leaves nothing out."""
    return [(step - 1) * SEQUENCES + i for step in steps for i in range(SEQUENCES)]


def train(runs: Runs, name: str, kind: str, samples: list[int], processes: int = 2, **changes: Any) -> Any:
    """`trainyard train` with the fault planted."""
    with planted(kind, samples):
        return runs.train(name, processes=processes, check=False, **changes)


def run_that_never_sees(
    runs: Runs, name: str, first: int, end: int, kind: str, plants: list[int], **changes: Any
) -> None:
    """A run whose directory says from its beginning that these samples are left out."""
    runs.directory(name).mkdir(parents=True)
    event = {"time": 0, "generation": 0, "event": "samples skipped", "first": first, "end": end, "steps": []}
    (runs.directory(name) / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    done = train(runs, name, kind, plants, **changes)
    assert done.returncode == 0, done.stderr


def of_kind(runs: Runs, name: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in runs.events(name) if event["event"] == kind]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["3-bf16-output", "2-bf16-gradient", "1-fp32-output", "3-fp32-none"], marks=pytest.mark.few),
        pytest.param(ALL, marks=pytest.mark.full),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, cases: list[str]) -> None:
    """At every stage and precision, with DeepSpeed's own check off where it can be: all ranks skip the second step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "skip_worker.py"), str(tmp_path), *cases],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results) == cases
    for case, result in results.items():
        # with dropout: the second run of the batch leaves no trace in the random numbers
        assert result["random"] == results[cases[-1]]["random"], case
        if case.endswith("none"):
            assert result["unchanged"] == [[0, 0]] * 4 and result["skipped"] == [0, 0]
            continue
        assert result["unchanged"] == [[0, 0], [1, 1], [0, 0], [0, 0]], case
        assert result["skipped"] == [1, 1], case
        assert (result["losses"][1] is None) == case.endswith("output"), case
        assert result["rates"][2] == result["rates"][1] != result["rates"][3], case  # the schedule did not go on
        lines = (tmp_path / case / "events.jsonl").read_text(encoding="utf-8").splitlines()
        (event,) = [json.loads(line) for line in lines]
        assert (event["event"], event["step"]) == ("step skipped", 2)
        if "fp16" in case and case.endswith("gradient"):
            assert "module" not in event and "an overflow at the fp16 loss scale 65536" in event["reason"], case
        else:
            assert (event["rank"], event["micro_batch"]) == (1, 2), case
            assert event["module"] == "model.layers.1.mlp.down_proj", case
            assert event["is_gradient"] == case.endswith("gradient"), case


def test_steps_in_a_row_roll_the_run_back_past_their_samples(runs: Runs) -> None:
    """One NaN sample in step 13 is a skip; NaN samples in steps 15 and 16 lead back to the checkpoint of step 10."""
    plants = [12 * SEQUENCES + 6, 14 * SEQUENCES + 1, 15 * SEQUENCES + 1]
    settings: dict[str, Any] = {"divergence": {"skipped_steps": 2}}
    done = train(runs, "nan", "nan", plants, **settings)
    assert done.returncode == 0, done.stderr
    skips = of_kind(runs, "nan", "step skipped")
    assert [(e["step"], e["rank"], e["micro_batch"]) for e in skips] == [(13, 1, 2), (15, 0, 1), (16, 0, 1), (13, 1, 2)]
    assert all(e["module"] == "model.layers.1.mlp" and e["seconds"] < 5 for e in skips)
    (back,), (samples,) = of_kind(runs, "nan", "rollback"), of_kind(runs, "nan", "samples skipped")
    assert (back["step"], back["steps_lost"]) == (10, 6) and "2 steps in a row" in back["reason"]
    assert (samples["first"], samples["end"]) == (batch_of(15)[0], batch_of(16)[-1] + 1)
    assert "goes back to step 10 and leaves out samples 112 to 127, those of steps 15 to 16" in done.stdout
    metrics = runs.metrics("nan")
    assert metrics[13]["train/loss"] is None and metrics[13]["train/gradient_norm"] is None
    assert [metrics[step]["train/skipped_steps"] for step in (12, 13, 20)] == [0, 1, 1]
    assert metrics[14]["train/learning_rate"] == metrics[13]["train/learning_rate"]
    assert [metrics[step]["run/rollbacks"] for step in (10, 11, 20)] == [0, 1, 1]
    manifest = read_manifest(runs.directory("nan") / "checkpoints" / "step_00000020")
    assert manifest.skipped_samples == [(112, 128)] and manifest.samples_consumed == 22 * SEQUENCES
    run_that_never_sees(runs, "nan-unseen", 112, 128, "nan", plants, **settings)
    assert not of_kind(runs, "nan-unseen", "rollback")
    assert_same_run(runs, "nan", "nan-unseen")


@pytest.mark.full
def test_a_spike_rolls_the_run_back_and_a_resume_keeps_the_skip(runs: Runs) -> None:
    plants = batch_of(15, 16)
    settings: dict[str, Any] = {
        "divergence": {"spike_steps": 2, "spike_window_steps": 8, "spike_z_score": 5.0},
        "model": {"config": GPT2_WITH_DROPOUT},
    }
    run_that_never_sees(runs, "spike-unseen", 112, 128, "spike", plants, **settings)
    done = train(runs, "spike", "spike", plants, **settings)
    assert done.returncode == 0, done.stderr
    (back,) = of_kind(runs, "spike", "rollback")
    assert (back["step"], back["steps_lost"]) == (10, 6) and "the loss is" in back["reason"]
    assert_same_run(runs, "spike", "spike-unseen")
    # killed after the rollback and before the next checkpoint: only events.jsonl knows of the skip
    with planted("spike", plants):
        live = runs.start("spike-killed", **settings)
    live.wait_until(lambda: "goes back" in live.log.read_text() and live.last_step() in range(12, 19))
    live.kill()
    done = train(runs, "spike-killed", "spike", plants, **settings)
    assert done.returncode == 0 and "resumed at step 10" in done.stdout, done.stderr
    assert len(of_kind(runs, "spike-killed", "rollback")) == 1
    assert_same_run(runs, "spike-killed", "spike-unseen")
    # only the checkpoint knows of it, on another world size
    (runs.directory("spike") / "events.jsonl").unlink()
    longer = settings | {"train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 22, "seed": 3}}
    done = train(runs, "spike", "spike", plants, processes=1, **longer)
    assert done.returncode == 0, done.stderr
    run_that_never_sees(runs, "spike-longer", 112, 128, "spike", plants, **longer)
    digests = [
        [record["sample_digest"] for record in runs.metrics(name).values()] for name in ("spike", "spike-longer")
    ]
    assert digests[0] == digests[1]


@pytest.mark.full
def test_a_run_that_diverges_again_and_again_stops(runs: Runs) -> None:
    everything = [p for step in range(12, 60) for p in batch_of(step)]
    settings: dict[str, Any] = {"divergence": {"skipped_steps": 2, "rollbacks": 1}}
    done = train(runs, "hopeless", "nan", everything, **settings)
    assert done.returncode == 1
    assert "divergence.rollbacks allows no more after 1 of them" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(of_kind(runs, "hopeless", "rollback")) == 1
    done = train(runs, "hopeless", "nan", everything, **settings)  # the count is the run's, not the start's
    assert done.returncode == 1 and len(of_kind(runs, "hopeless", "rollback")) == 1


@pytest.mark.full
def test_without_a_checkpoint_to_go_back_to_the_run_stops(runs: Runs) -> None:
    done = train(runs, "early", "nan", batch_of(3, 4), divergence={"skipped_steps": 2})
    assert done.returncode == 1 and "there is no checkpoint to go back to" in done.stderr
