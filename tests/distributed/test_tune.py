"""`trainyard tune` on a real model: its runs are the trainer's, and the gradients are measured on weights that stay."""

import importlib.util
import json

import pytest
import torch
from live_runs import Runs, trainyard

from gpt.checkpoint.read import load_plain_model


@pytest.mark.full
def test_tune_suggests_a_rate_and_a_batch(runs: Runs) -> None:
    recipe = runs.write_recipe("tuned")
    options = ("--processes", "2", "--steps", "40", "--lowest", "1e-5", "--highest", "10", "--json")
    answer = json.loads(trainyard("tune", str(recipe), *options, cwd=runs.folder).stdout)
    folder = runs.directory("tuned-tune")
    assert 1e-5 < answer["learning_rate"] < 1 and answer["lowest_loss_at"] == 10 * answer["learning_rate"]
    measured = runs.metrics("tuned-tune/range")
    rates = [measured[step]["train/learning_rate"] for step in range(1, 41)]
    assert rates == pytest.approx([10 ** (-5 + 6 * step / 39) for step in range(40)], rel=1e-6)
    if importlib.util.find_spec("matplotlib") is None:
        assert answer["picture"] is None
    else:
        assert (folder / "tune.png").stat().st_size > 5000 and answer["picture"] == str(folder / "tune.png")
    assert json.loads((folder / "tune.json").read_text("utf-8"))["learning_rate"] == answer["learning_rate"]

    squares = {}
    for name, steps, sequences in (("large", 16, 16), ("small", 128, 2)):
        norms = [record["train/gradient_norm"] for record in runs.metrics(f"tuned-tune/{name}").values()]
        targets = {record["train/target_tokens"] for record in runs.metrics(f"tuned-tune/{name}").values()}
        assert len(norms) == steps and targets == {sequences * 64}
        squares[name] = sum(norm**2 for norm in norms) / steps
    # |G|^2 + noise / tokens, at two sizes: a line through two points
    noise = (squares["small"] - squares["large"]) / (1 / 128 - 1 / 1024)
    expected = noise / (squares["large"] - noise / 1024)
    assert answer["batch"]["noise_scale_tokens"] == pytest.approx(expected, rel=1e-6)
    assert answer["batch"]["suggested_tokens"] == max(1, round(expected / 64)) * 64
    warm, still = (load_plain_model(folder / name, torch.float32).state_dict() for name in ("warm", "small"))
    assert all(torch.allclose(still[name], values, atol=1e-8) for name, values in warm.items())

    refused = trainyard("tune", str(recipe), "--lowest", "1", "--highest", "0.1", cwd=runs.folder, check=False)
    assert refused.returncode == 1 and "give 0 < lowest < highest" in refused.stderr
    assert (folder / "tune.json").exists(), "a refusal loses nothing"
