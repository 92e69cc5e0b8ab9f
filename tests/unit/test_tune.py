"""What `trainyard tune` reads from losses and gradients."""

import math
from pathlib import Path

import numpy as np
import pytest

from gpt.optimizer import Schedule
from gpt.recipe import Optimizer
from launch.tune import RateRange, _clear, describe, find_rate, noise_scale

RATES = [10 ** (-6 + 6 * step / 199) for step in range(200)]


def losses_with_least_at(rate: float) -> list[float]:
    """A parabola over the logarithm of the rate."""
    return [3 + (math.log10(r) - math.log10(rate)) ** 2 for r in RATES]


def test_the_rate_is_a_tenth_of_where_the_loss_was_lowest() -> None:
    found = find_rate(RATES, losses_with_least_at(1e-2))
    assert found.suggested == found.lowest_loss_at / 10
    # the average runs behind by nine steps of 3 % of a decade each
    assert 1e-2 < found.lowest_loss_at < 2.5e-2


def test_the_curve_ends_where_the_loss_is_not_finite_or_out_of_hand() -> None:
    losses = losses_with_least_at(1e-3)
    whole = find_rate(RATES, losses)
    for far in (math.nan, math.inf, None, 1e6):
        cut: list[float] = [*losses[:150], *([far] * 50)]  # type: ignore[list-item]  # null in metrics.jsonl
        found = find_rate(RATES, cut)
        assert (found.suggested, len(found.losses)) == (whole.suggested, 150)


@pytest.mark.parametrize(
    ("rate", "message"),
    [(1e-9, "the loss did not fall at any rate from 1e-06 on"), (1e3, "the loss still fell at the highest rate, 1:")],
)
def test_a_range_without_the_lowest_loss_is_refused(rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_rate(RATES, losses_with_least_at(rate))
    with pytest.raises(ValueError, match="did not fall"):
        find_rate(RATES, [math.nan] * len(RATES))


def test_the_noise_scale_is_that_of_gradients_with_known_noise() -> None:
    """Gradients of one sample are g + e with |g|^2 = 4 and E|e|^2 = 60: the scale is 15 samples."""
    generator = np.random.default_rng(0)
    gradient, deviation = np.full(100, 0.2), math.sqrt(0.6)

    def mean_square(batch: int) -> float:
        noise = generator.normal(0, deviation / math.sqrt(batch), (20_000, 100))
        return float(((gradient + noise) ** 2).sum(1).mean())

    assert noise_scale(2, 32, mean_square(2), mean_square(32)) == pytest.approx(15, rel=0.02)
    # in tokens of rows of 64
    assert noise_scale(128, 2048, mean_square(2), mean_square(32)) == pytest.approx(15 * 64, rel=0.02)


@pytest.mark.parametrize(("small", "large"), [(1.0, 2.0), (100.0, 1.0)])
def test_no_noise_scale_where_an_estimate_is_not_positive(small: float, large: float) -> None:
    """A larger batch with the larger gradient, and one whose gradient is all noise."""
    assert noise_scale(2, 32, small, large) is None


def test_the_schedule_rises_by_one_factor() -> None:
    settings = Optimizer(learning_rate=1.0, schedule="range_test", minimum_learning_rate_ratio=1e-6)
    rates = [Schedule(settings, 200).learning_rate(step) for step in range(1, 201)]
    assert rates == pytest.approx(RATES, rel=1e-9)
    with pytest.raises(ValueError, match="minimum_learning_rate_ratio is 0, from which range_test cannot rise"):
        Schedule(settings.model_copy(update={"minimum_learning_rate_ratio": 0.0}), 200)


def test_only_what_tune_wrote_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run-tune"
    (folder / "range").mkdir(parents=True)
    (folder / "mine.txt").write_text("notes", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which tune did not write: move it away"):
        _clear(folder)
    assert (folder / "range").is_dir()
    (folder / "mine.txt").unlink()
    _clear(folder)
    assert not folder.exists()


def test_the_answer_says_what_was_not_measured() -> None:
    found: RateRange = find_rate(RATES, losses_with_least_at(1e-2))
    result = {"learning_rate": found.suggested, "lowest_loss_at": found.lowest_loss_at, "recipe_learning_rate": 1e-3}
    none = describe(result | {"batch": None, "picture": None})
    assert "not measured, since an adapter" in none[1] and "without matplotlib" in none[2]
    noisy = {"noise_scale_tokens": None, "suggested_tokens": None, "recipe_tokens": 512, "after_steps": 20}
    assert "raise --steps" in describe(result | {"batch": noisy, "picture": "tune.png"})[1]
