"""The command `trainyard tune`: which learning rate and which batch a recipe's model and data ask for.

Both come from short runs of the trainer itself, below `<runs_directory>/<name>-tune`:

- `range`: the learning rate rises exponentially from step to step (Smith, arXiv:1506.01186, section 3.3). A tenth of
  the rate at which the smoothed loss was lowest is suggested (as fastai does: Howard and Gugger, arXiv:2002.04688).
- `warm` trains some steps at that rate; `large` and `small` then measure gradients of two batch sizes on its weights,
  which give the gradient noise scale (McCandlish et al., arXiv:1812.06162, appendix A.1).
"""

import importlib.util
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.recipe import Recipe
from gpt.recipe_file import fork_recipe, parse_recipe
from gpt.run_directory import json_lines

SMOOTHING = 0.9
"""Weight of the past in the moving average of the losses."""
GIVEN_UP_AT = 4.0
"""The curve ends where the smoothed loss is so many times the lowest."""
BELOW_LOWEST = 10.0
LARGE_STEPS, SMALL_STEPS = 16, 128
STILL = 1e-12
"""A learning rate that changes no weight that is rounded to fp32."""
RUNS = ("range", "warm", "large", "small")
OTHER_NAMES = ("tune.json", "tune.png", "tensorboard")


class StoppedError(Exception):
    """A run ended before its last step; `exit_code` is what the command should end with."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a run ended with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(frozen=True)
class RateRange:
    """Rates and smoothed losses of the range test up to where the loss had got out of hand, and what they say."""

    rates: list[float]
    losses: list[float]
    suggested: float
    lowest_loss_at: float


def tune(recipe: Recipe, *, processes: int, steps: int, lowest: float, highest: float) -> dict[str, Any]:
    """Run the tests with `processes` ranks on this host; returns what tune.json holds.

    Raises:
        ValueError: no usable range of rates, a loss that never fell, or as `gpt.train.check`.
        StoppedError: a run was stopped or failed; why is on stderr.
    """
    if not 0 < lowest < highest or steps < 20:
        raise ValueError(
            f"--lowest {lowest:g}, --highest {highest:g}, --steps {steps}: give 0 < lowest < highest, and at least "
            f"20 steps"
        )
    folder = Path(recipe.runs_directory) / f"{recipe.name}-tune"
    _clear(folder)
    content = _without_extras(recipe.model_dump() | {"runs_directory": str(folder)})
    records = _run(range_recipe(content, steps, lowest, highest), processes)
    found = find_rate([r["train/learning_rate"] for r in records], [r["train/loss"] for r in records])
    result: dict[str, Any] = {
        "learning_rate": found.suggested,
        "lowest_loss_at": found.lowest_loss_at,
        "recipe_learning_rate": recipe.optimizer.learning_rate,
        "curve": [
            {"learning_rate": r, "smoothed_loss": loss} for r, loss in zip(found.rates, found.losses, strict=True)
        ],
        "batch": None
        if recipe.lora is not None
        else _measure_batch(content, recipe, found.suggested, processes, steps),
    }
    (folder / "tune.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    result["picture"] = _draw(found, folder)
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """The answer in words."""
    lines = [
        f"learning rate: {result['learning_rate']:.2g}, a tenth of {result['lowest_loss_at']:.2g}, where the loss was "
        f"lowest; the recipe has {result['recipe_learning_rate']:.2g}"
    ]
    batch = result["batch"]
    if batch is None:
        lines.append("batch: not measured, since an adapter cannot be trained on from another run's weights")
    elif batch["noise_scale_tokens"] is None:
        lines.append("batch: the gradients' noise was too large to be measured in so few steps; raise --steps")
    else:
        lines.append(
            f"batch: the gradient noise scale is {batch['noise_scale_tokens']:,.0f} tokens after "
            f"{batch['after_steps']} steps: train.global_batch_tokens {batch['suggested_tokens']:,}, now "
            f"{batch['recipe_tokens']:,}. Smaller batches need more steps, larger ones more tokens; the scale grows as "
            f"the loss falls"
        )
    picture = result["picture"]
    lines.append(f"curve: {picture}" if picture else "curve: no picture without matplotlib (the extra `plot`)")
    return lines


def range_recipe(content: dict[str, Any], steps: int, lowest: float, highest: float) -> Recipe:
    """The recipe of the range test."""
    optimizer = content["optimizer"] | {
        "learning_rate": highest,
        "schedule": "range_test",
        "minimum_learning_rate_ratio": lowest / highest,
        "warmup_steps": 0,
        "decay_steps": None,
    }
    return parse_recipe(_with_steps(content, "range", steps) | {"optimizer": optimizer}, "of the range test")


def find_rate(rates: list[float], losses: list[float]) -> RateRange:
    """What a range test says. Raises ValueError where the loss never fell, or fell to the last step."""
    smoothed: list[float] = []
    average, finite = 0.0, []
    for step, (rate, loss) in enumerate(zip(rates, losses, strict=True), start=1):
        if loss is None or not math.isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        value = average / (1 - SMOOTHING**step)
        if smoothed and value > GIVEN_UP_AT * min(smoothed):
            break
        smoothed.append(value)
        finite.append(rate)
    best = smoothed.index(min(smoothed)) if smoothed else 0
    if best == 0:
        raise ValueError(
            f"the loss did not fall at any rate from {rates[0]:.2g} on: lower --lowest, or look at the data"
        )
    if best == len(rates) - 1:
        raise ValueError(f"the loss still fell at the highest rate, {rates[-1]:.2g}: raise --highest")
    return RateRange(finite, smoothed, finite[best] / BELOW_LOWEST, finite[best])


def noise_scale(small: float, large: float, small_square: float, large_square: float) -> float | None:
    """Gradient noise scale, in the unit of the batch sizes `small` and `large`: the ratio of appendix A.1's two
    unbiased estimates, from the mean squared norm of the gradient of each. None where one is not positive: too few
    steps."""
    gradient = (large * large_square - small * small_square) / (large - small)
    variance = (small_square - large_square) / (1 / small - 1 / large)
    return variance / gradient if gradient > 0 and variance > 0 else None


def _measure_batch(content: dict[str, Any], recipe: Recipe, rate: float, processes: int, steps: int) -> dict[str, Any]:
    """Norms of gradients of two batch sizes on the same weights, of a model that has begun to learn."""
    warm_content = _with_steps(content, "warm", steps)
    warm_content["optimizer"] = content["optimizer"] | {
        "learning_rate": rate,
        "schedule": "constant",
        "decay_steps": None,
        "warmup_steps": min(recipe.optimizer.warmup_steps, steps // 2),
    }
    warm = parse_recipe(warm_content, "of the warm run")
    _run(warm, processes)
    small = processes
    large = max(recipe.global_batch_sequences, 8 * small)
    squares = {}
    for name, sequences, many in (("large", large, LARGE_STEPS), ("small", small, SMALL_STEPS)):
        still = _with_steps(fork_recipe(warm, name).model_dump(), name, many)
        still["train"] |= {
            "global_batch_tokens": sequences * recipe.data.sequence_length,
            "seed": recipe.train.seed + 1,  # other samples than those that it was trained on
        }
        still["optimizer"] |= {"learning_rate": STILL, "warmup_steps": 0, "weight_decay": 0.0}
        norms = [r["train/gradient_norm"] for r in _run(parse_recipe(still, f"of the run {name}"), processes)]
        if None in norms:  # as metrics.jsonl has what is not finite
            raise ValueError(
                f"a gradient of the run {name} was not finite at the suggested rate {rate:.2g}: look at the data"
            )
        squares[name] = sum(norm**2 for norm in norms) / len(norms)
    length = recipe.data.sequence_length
    scale = noise_scale(small * length, large * length, squares["small"], squares["large"])
    return {
        "noise_scale_tokens": scale,
        "suggested_tokens": None if scale is None else max(1, round(scale / length)) * length,
        "recipe_tokens": recipe.train.global_batch_tokens,
        "after_steps": steps,
    }


def _without_extras(content: dict[str, Any]) -> dict[str, Any]:
    """Without validation, checkpoints on the way, going back, and what depends on the length of the real run."""
    never = {"spike_z_score": None, "skipped_steps": 10**9}
    content["data"] |= {"validation": None, "stages": []}
    return content | {"checkpoint": {}, "evaluate": {}, "profile": None, "divergence": never}


def _with_steps(content: dict[str, Any], name: str, steps: int) -> dict[str, Any]:
    train = content["train"] | {"steps": steps, "tokens": None, "epochs": None}
    return content | {"name": name, "train": train, "optimizer": dict(content["optimizer"])}


def _clear(folder: Path) -> None:
    """Remove what an earlier call left. Raises ValueError where there is anything else."""
    foreign = (
        [entry.name for entry in folder.iterdir() if entry.name not in RUNS + OTHER_NAMES] if folder.exists() else []
    )
    if foreign:
        raise ValueError(f"{folder} holds {', '.join(sorted(foreign))}, which tune did not write: move it away")
    shutil.rmtree(folder, ignore_errors=True)


def _run(recipe: Recipe, processes: int) -> list[dict[str, Any]]:
    """Train to the end; the run's records, one a step."""
    from gpt.train import check
    from launch.local import run_workers
    from launch.log_folder import refusals_recorded

    with refusals_recorded(recipe.run_directory()):
        check(recipe, processes)
        code = run_workers(recipe, processes=processes)
    if code != 0:
        raise StoppedError(code)
    return [record for record in json_lines(recipe.run_directory() / "metrics.jsonl") if "train/loss" in record]


def _draw(found: RateRange, folder: Path) -> str | None:
    """The curve in TensorBoard, and as tune.png where matplotlib is installed; its path."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True), start=1):
            board.add_scalar("tune/learning_rate", rate, step)
            board.add_scalar("tune/smoothed_loss", loss, step)
        if importlib.util.find_spec("matplotlib") is None:
            return None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="learning rate", ylabel="smoothed training loss", xscale="log")
        axes.plot(found.rates, found.losses)
        axes.axvline(found.suggested, linestyle="--", label=f"suggested: {found.suggested:.2g}")
        axes.legend()
        figure.savefig(folder / "tune.png", dpi=120)
        board.add_figure("tune/range_test", figure, close=False)
    return str(folder / "tune.png")
