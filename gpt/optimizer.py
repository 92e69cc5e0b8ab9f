"""Parameter groups and learning-rate schedules. A schedule is a pure function of the optimizer step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gpt.recipe import Optimizer, Recipe


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each optimizer step, 1 … total_steps."""

    settings: Optimizer
    total_steps: int

    def __post_init__(self) -> None:
        warmup, decay = self.settings.warmup_steps, self.settings.decay_steps or 0
        if self.settings.schedule == "range_test" and not self.settings.minimum_learning_rate_ratio:
            raise ValueError("optimizer.minimum_learning_rate_ratio is 0, from which range_test cannot rise: give 1e-6")
        if warmup >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps is {warmup}, but the whole run has {self.total_steps} steps: "
                f"use fewer warm-up steps or a longer run"
            )
        if warmup + decay > self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps {warmup} + decay_steps {decay} exceed the run's {self.total_steps} steps"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (the first is 1).

        Linear warm-up reaches the peak at step `warmup_steps`; then cosine (arXiv:1608.03983 equation 5 without
        restarts), linear, or constant and linear (arXiv:2404.06395), reaching the minimum at the last step. A range
        test rises from the minimum to the peak, by the same factor each step.
        """
        settings = self.settings
        peak, floor = settings.learning_rate, settings.learning_rate * settings.minimum_learning_rate_ratio
        if step <= settings.warmup_steps:
            return peak * step / settings.warmup_steps
        if settings.schedule == "constant":
            return peak
        if settings.schedule == "range_test":
            steps_left = (self.total_steps - step) / max(1, self.total_steps - settings.warmup_steps - 1)
            return peak * float(settings.minimum_learning_rate_ratio) ** min(1.0, max(0.0, steps_left))
        if settings.schedule == "cosine":
            progress = (step - settings.warmup_steps) / (self.total_steps - settings.warmup_steps)
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        left = (self.total_steps - step) / (settings.decay_steps or self.total_steps - settings.warmup_steps)
        return floor + (peak - floor) * max(0.0, min(left, 1.0))

    def describe(self) -> list[str]:
        """The schedule as a table, in optimizer steps."""
        settings = self.settings
        named = {1: "first step", settings.warmup_steps: "end of warm-up"}
        if settings.decay_steps:
            named[self.total_steps - settings.decay_steps] = "decay begins"
        elif settings.schedule in ("cosine", "linear"):
            named[(settings.warmup_steps + self.total_steps) // 2] = "half of the decay"
        named[self.total_steps] = "last step"
        rows = [(step, name) for step, name in sorted(named.items()) if 1 <= step <= self.total_steps]
        return [f"learning rate ({settings.schedule}, by optimizer step):"] + [
            f"  step {step:>9,}  {self.learning_rate(step):.3e}  {name}" for step, name in rows
        ]


def total_steps(recipe: Recipe, samples_per_epoch: int) -> int:
    """Optimizer steps of the run: tokens and epochs are rounded up to whole steps."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.tokens is not None:
        return -(-recipe.train.tokens // recipe.train.global_batch_tokens)
    assert recipe.train.epochs is not None
    return math.ceil(recipe.train.epochs * samples_per_epoch / recipe.global_batch_sequences - 1e-9)


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: parameters with two or more dimensions decay, the others (biases, norms) do not.

    Under ZeRO-3 a parameter's own shape is [0]; its real one is in `ds_shape`.
    """
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decay if len(shape) >= 2 else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """torch's optimizer of the recipe over the model's decay groups, fused where torch has it so."""
    groups = parameter_groups(model.named_parameters(), settings.weight_decay)
    learning_rate, betas = settings.learning_rate, (settings.betas[0], settings.betas[1])
    if settings.type == "sgd":
        assert settings.momentum is not None
        return torch.optim.SGD(groups, lr=learning_rate, momentum=settings.momentum, fused=True)
    if settings.type == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=settings.epsilon, fused=True)
    classes = {"nadam": torch.optim.NAdam, "radam": torch.optim.RAdam}
    return classes[settings.type](
        groups, lr=learning_rate, betas=betas, eps=settings.epsilon, decoupled_weight_decay=True
    )


def state_names(settings: Optimizer) -> list[str]:
    """The states of a parameter's size that the optimizer keeps from its first update on, by torch's names."""
    with torch.random.fork_rng(devices=[]):  # the state of training's is that of the checkpoint
        sample = torch.nn.Linear(2, 1, bias=False)
    sample.weight.grad = torch.zeros_like(sample.weight)
    optimizer = build_optimizer(sample, settings)
    optimizer.step()
    states = optimizer.state[sample.weight].items()
    return [name for name, value in states if torch.is_tensor(value) and value.shape == sample.weight.shape]
