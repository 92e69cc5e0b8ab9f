"""The model as a recipe wants it: adapter, attention, recomputed and compiled layers; and what a token costs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from gpt.distributed import mark_leaf_modules
from gpt.lora import add_adapter
from gpt.metrics import flops_per_token
from gpt.model import (
    CompiledLayers,
    build_model,
    checkpoint_gradients,
    choose_attention,
    count_parameters,
    decoder_layers,
    frozen_elements,
)
from gpt.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gpt.train import RunPlan

COMPILED_STEPS = 1000
"""From how many steps on `compile: auto` compiles on a CPU."""


def build_run_model(plan: "RunPlan", zero: Any, *, on_gpu: bool) -> tuple["PreTrainedModel", Callable[[], Any]]:
    """The model, and a context in which its compiled layers run plainly. `zero` is as `build_model` has it."""
    recipe = plan.recipe
    choose_attention(plan.config, recipe.attention)
    model = build_model(recipe.model, plan.config, recipe.precision, recipe.train.seed, zero)
    if recipe.lora is not None:
        add_adapter(model, recipe.lora, recipe.train.seed)
        model.enable_input_require_grads()  # as `build_model` does for frozen embeddings
    mark_leaf_modules(model, decoder_layers(model))
    if recipe.gradient_checkpointing is not None:
        checkpoint_gradients(model, recipe.gradient_checkpointing.every_layers)
    compiled = is_compiled(recipe, plan.schedule.total_steps, on_gpu=on_gpu)
    return model, CompiledLayers(model).plain if compiled else nullcontext


def is_compiled(recipe: Recipe, total_steps: int, *, on_gpu: bool) -> bool:
    """Whether a run of so many steps compiles its decoder layers."""
    return recipe.compile is True or (recipe.compile == "auto" and (on_gpu or total_steps >= COMPILED_STEPS))


def training_flops_per_token(recipe: Recipe, config: PreTrainedConfig, model: "PreTrainedModel") -> float:
    """Floating-point operations of training on a token, as `flops_per_token` counts them."""
    elements, matrices = count_parameters(model)
    trained = elements - frozen_elements(model)
    return flops_per_token(
        matrices,
        len(decoder_layers(model)),
        config.get_text_config().hidden_size,
        recipe.data.sequence_length,
        beside_adapter=matrices - trained if recipe.lora is not None else 0,
    )
