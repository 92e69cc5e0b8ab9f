"""One writer, and what may change when a run goes on, with real runs."""

from live_runs import Runs

from launch import status, why


def test_second_start_is_refused_while_the_first_is_alive(runs: Runs) -> None:
    long = {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 100_000, "seed": 3}
    live = runs.start("busy", train=long)
    try:
        live.wait_until(lambda: live.last_step() >= 2)
        before = (live.directory / "recipe.yaml").read_bytes()
        second = runs.train("busy", train=long, check=False)
        assert second.returncode == 1
        assert "is in use" in second.stderr and "process" in second.stderr
        assert "Traceback" not in second.stderr
        report = status.report(live.directory)
        assert report["state"] == "running", report
        assert any("another start was refused" in remark for remark in report["remarks"]), report
        reached = live.last_step()
        live.wait_until(lambda: live.last_step() > reached + 2)
        assert (live.directory / "recipe.yaml").read_bytes() == before
    finally:
        live.kill()
    found = why.explain(live.directory)
    assert (found["state"], found["cause"]) == ("dead", "died without a word")


def test_fixed_field_is_refused_and_fork_starts_from_the_weights(reference: Runs) -> None:
    other_seed = {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 20, "seed": 4}
    refused = reference.train("reference", train=other_seed, check=False)
    assert refused.returncode == 1
    assert "train.seed: 3 -> 4" in refused.stderr and "--fork" in refused.stderr
    forked = reference.train("reference", "--fork", "forked", train=other_seed)
    assert "PASS" in forked.stdout
    first, before = reference.metrics("forked")[1], reference.metrics("reference")
    # from the weights: near the old run's last loss, not near its first
    assert abs(first["train/loss"] - before[20]["train/loss"]) < abs(first["train/loss"] - before[1]["train/loss"])


def test_length_and_learning_rate_may_change_and_are_announced(reference: Runs) -> None:
    reference.copy("reference", "extended")
    more = {"global_batch_tokens": 512, "micro_batch_sequences": 1, "steps": 24, "seed": 3}
    done = reference.train("extended", train=more, optimizer={"learning_rate": 1e-3, "warmup_steps": 4})
    assert "train.steps: 20 -> 24" in done.stdout and "optimizer.learning_rate: 0.005 -> 0.001" in done.stdout
    assert len(reference.metrics("extended")) == 24
    changes = [event["change"] for event in reference.events("extended") if event["event"] == "recipe changed"]
    assert len(changes) == 2


def test_more_processes_than_sequences(runs: Runs) -> None:
    one = {"global_batch_tokens": 64, "micro_batch_sequences": 2, "steps": 20, "seed": 3}
    refused = runs.train("crowded", train=one, processes=2, check=False)
    assert refused.returncode == 1 and "2 processes but only 1 sequences" in refused.stderr
    assert not runs.directory("crowded").exists(), "a mistake in a recipe left a run behind"


def test_lost_weights_stop_the_run_and_are_not_saved(runs: Runs) -> None:
    """A learning rate that blows the weights up: one sentence, exit code 1, no checkpoint of the broken weights."""
    fast = {"learning_rate": 3e38, "schedule": "constant", "gradient_clip_norm": None}
    refused = runs.train("diverged", optimizer=fast, precision="fp32", check=False)
    assert refused.returncode == 1
    assert "step 11: 10 steps in a row had a loss or gradient that is not finite" in refused.stderr
    assert "no checkpoint to go back to" in refused.stderr and "Traceback" not in refused.stderr
    assert not list((runs.directory("diverged") / "checkpoints").iterdir())
    found = why.explain(runs.directory("diverged"))
    assert (found["state"], found["cause"]) == ("failed", "diverged")
