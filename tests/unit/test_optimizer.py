"""Schedules against their closed forms, and which parameters decay."""

import itertools
import math
from typing import Any

import pytest
import torch
from recipe_samples import make_recipe
from transformers import get_linear_schedule_with_warmup

from gpt.optimizer import Schedule, build_optimizer, parameter_groups, state_names


def schedule(total_steps: int, **settings: Any) -> Schedule:
    recipe = make_recipe({f"optimizer.{key}": value for key, value in settings.items()})
    return Schedule(recipe.optimizer, total_steps)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 1e-4),
        (5, 5e-4),
        (10, 1e-3),
        (11, 1e-4 + 9e-4 * (1 + math.cos(math.pi / 100)) / 2),
        (35, 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2),
        (60, 5.5e-4),
        (85, 1e-4 + 9e-4 * (1 - math.sqrt(0.5)) / 2),
        (110, 1e-4),
    ],
)
def test_cosine_after_a_linear_warmup(step: int, expected: float) -> None:
    rates = schedule(110, learning_rate=1e-3, warmup_steps=10, minimum_learning_rate_ratio=0.1)
    assert rates.learning_rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 5e-4), (2, 1e-3), (3, 1e-3), (50, 1e-3), (80, 1e-3), (85, 7.75e-4), (100, 1e-4)]
)
def test_warmup_stable_decay(step: int, expected: float) -> None:
    rates = schedule(
        100, learning_rate=1e-3, schedule="warmup_stable_decay", warmup_steps=2, decay_steps=20,
        minimum_learning_rate_ratio=0.1,
    )  # fmt: skip
    assert rates.learning_rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 2.5e-4), (4, 1e-3), (5, 1e-3), (9, 1e-3)])
def test_constant_after_warmup(step: int, expected: float) -> None:
    rates = schedule(9, learning_rate=1e-3, schedule="constant", warmup_steps=4)
    assert rates.learning_rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
def test_linear_is_that_of_transformers(warmup: int) -> None:
    """Which begins with a step at rate 0: ours is one step ahead."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup, 9)
    rates = schedule(9, learning_rate=1e-3, schedule="linear", warmup_steps=warmup, minimum_learning_rate_ratio=0)
    for step in range(1, 10):
        optimizer.step()
        theirs.step()
        assert rates.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
    floor = schedule(9, learning_rate=1e-3, schedule="linear", minimum_learning_rate_ratio=0.1)
    assert floor.learning_rate(9) == pytest.approx(1e-4)


def test_without_warmup_and_down_to_zero() -> None:
    rates = schedule(4, learning_rate=1e-3, minimum_learning_rate_ratio=0)
    expected = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3, 4)]
    assert [rates.learning_rate(step) for step in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-18)


def test_every_schedule_rises_then_never_rises_again() -> None:
    for settings in (
        {},
        {"schedule": "constant"},
        {"schedule": "linear"},
        {"schedule": "warmup_stable_decay", "decay_steps": 30},
    ):
        rates = schedule(100, warmup_steps=20, **settings)
        values = [rates.learning_rate(step) for step in range(1, 101)]
        assert all(a < b for a, b in itertools.pairwise(values[:20]))
        assert all(a >= b for a, b in itertools.pairwise(values[19:]))
        assert max(values) == rates.settings.learning_rate


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warmup_that_is_not_shorter_than_the_run_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"optimizer.warmup_steps is {warmup}, but the whole run has 10 steps"):
        schedule(10, warmup_steps=warmup)
    assert schedule(10, warmup_steps=9).learning_rate(9) == pytest.approx(3e-4)


def test_warmup_and_decay_that_exceed_the_run_are_refused() -> None:
    settings = {"schedule": "warmup_stable_decay", "warmup_steps": 4}
    with pytest.raises(ValueError, match=r"warmup_steps 4 \+ decay_steps 7 exceed the run's 10 steps"):
        schedule(10, decay_steps=7, **settings)
    full = schedule(10, decay_steps=6, **settings)
    assert full.learning_rate(4) == pytest.approx(3e-4)
    assert full.learning_rate(10) == pytest.approx(3e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"warmup_steps": 10},
            [(1, "first step"), (10, "end of warm-up"), (55, "half of the decay"), (100, "last step")],
        ),
        (
            {"schedule": "warmup_stable_decay", "decay_steps": 30},
            [(1, "first step"), (70, "decay begins"), (100, "last step")],
        ),
        ({"schedule": "linear"}, [(1, "first step"), (50, "half of the decay"), (100, "last step")]),
        ({"schedule": "constant", "warmup_steps": 1}, [(1, "end of warm-up"), (100, "last step")]),
    ],
)
def test_the_table_names_the_steps_and_their_rates(settings: dict[str, Any], expected: list[tuple[int, str]]) -> None:
    rates = schedule(100, **settings)
    title, *rows = rates.describe()
    assert rates.settings.schedule in title
    assert [(int(row.split()[1]), " ".join(row.split()[3:])) for row in rows] == expected
    for row, (step, _) in zip(rows, expected, strict=True):
        assert row.split()[2] == f"{rates.learning_rate(step):.3e}"


def partitioned(shape: tuple[int, ...]) -> torch.nn.Parameter:
    """A parameter as ZeRO-3 leaves it between forwards: empty, its real shape beside it."""
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_shape = torch.Size(shape)  # type: ignore[attr-defined]
    return parameter


def test_parameters_decay_by_their_dimensions() -> None:
    named = {
        "embedding": torch.nn.Parameter(torch.zeros(4, 2)),
        "bias": torch.nn.Parameter(torch.zeros(4)),
        "sharded_matrix": partitioned((8, 8)),
        "sharded_norm": partitioned((8,)),
        "experts": torch.nn.Parameter(torch.zeros(2, 3, 4)),
        "frozen": torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False),
    }
    decay, no_decay = parameter_groups(named.items(), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in named.items()}
    assert [names[id(p)] for p in decay["params"]] == ["embedding", "sharded_matrix", "experts"]
    assert [names[id(p)] for p in no_decay["params"]] == ["bias", "sharded_norm"]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_an_empty_group_is_left_out() -> None:
    [group] = parameter_groups([("weight", torch.nn.Parameter(torch.zeros(2, 2)))], weight_decay=0.1)
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("kind", ["adamw", "nadam", "radam", "sgd"])
def test_optimizers_are_right_on_flat_pieces(kind: str) -> None:
    """ZeRO's use of them: one flat tensor instead of a matrix. A row-wise optimizer would give other numbers."""
    settings = make_recipe({"optimizer.type": kind, "optimizer.momentum": 0.9 if kind == "sgd" else None}).optimizer
    torch.manual_seed(0)
    whole, results = torch.randn(6, 4), []
    gradients = torch.randn(8, 24)
    for pieces in ([24], [7, 17]):
        model = torch.nn.Module()
        for number, piece in enumerate(whole.flatten().split(pieces)):
            shape = (6, 4) if pieces == [24] else (len(piece), 1)  # two dimensions: these decay
            model.register_parameter(f"p{number}", torch.nn.Parameter(piece.clone().view(shape)))
        optimizer = build_optimizer(model, settings)
        assert type(optimizer).__name__.lower() == kind
        assert state_names(settings) == (["momentum_buffer"] if kind == "sgd" else ["exp_avg", "exp_avg_sq"])
        for gradient in gradients:
            for parameter, piece in zip(model.parameters(), gradient.split(pieces), strict=True):
                parameter.grad = piece.clone().view(parameter.shape)
            optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert not torch.equal(results[0], whole.flatten())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


def test_adamw_gets_the_recipes_numbers_and_makes_the_step_of_its_formula() -> None:
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    settings = make_recipe(
        {"optimizer.learning_rate": 0.01, "optimizer.betas": [0.8, 0.9], "optimizer.epsilon": 1e-6}
    ).optimizer
    optimizer = build_optimizer(layer, settings)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all((g["lr"], g["betas"], g["eps"]) == (0.01, (0.8, 0.9), 1e-6) for g in optimizer.param_groups)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    # the first AdamW step is lr * g / (|g| + eps) after the decay by lr * weight_decay
    update = 0.01 / (1 + 1e-6)
    assert layer.weight.tolist() == [pytest.approx([1 - 0.01 * 0.1 - update] * 2, rel=1e-6)]
    assert layer.bias.tolist() == pytest.approx([1 - update], rel=1e-6)
