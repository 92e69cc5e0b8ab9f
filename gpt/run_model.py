"""The model as a recipe wants it: adapter, attention, recomputed and compiled layers; and what a token costs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from gpt.distributed import mark_leaf_modules
from gpt.lora import add_adapter
from gpt.metrics import flops_per_token
from gpt.model import (
    CompiledLayers,
    build_model,
    checkpoint_gradients,
    count_parameters,
    decoder_layers,
    frozen_elements,
)
from gpt.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILED_STEPS = 1000
"""From how many steps on `compile: auto` compiles on a CPU."""


Context = Callable[[], AbstractContextManager[None]]


def build_run_model(
    recipe: Recipe, config: PreTrainedConfig, zero: Any, *, steps: int, on_gpu: bool
) -> tuple["PreTrainedModel", Context, Context]:
    """The model; a context in which its layers are not compiled; and one in which the attention, too, is that of a
    model that is loaded elsewhere. `zero` is as `build_model` has it, `steps` the run's."""
    from gpt.attention import choose_attention  # transformers' models, for which a launcher need not wait

    choose_attention(config, recipe.attention)
    model = build_model(recipe.model, config, recipe.precision, recipe.train.seed, zero)
    if recipe.lora is not None:
        add_adapter(model, recipe.lora, recipe.train.seed)
        model.enable_input_require_grads()  # as `build_model` does for frozen embeddings
    mark_leaf_modules(model, decoder_layers(model))
    if recipe.gradient_checkpointing is not None:
        checkpoint_gradients(model, recipe.gradient_checkpointing.every_layers)
    worth_it = on_gpu or steps >= COMPILED_STEPS
    compiled = recipe.compile is True or (recipe.compile == "auto" and worth_it)
    uncompiled: Context = CompiledLayers(model).plain if compiled else nullcontext
    config = model.config  # from_pretrained copies what it is given
    if config._attn_implementation != "blockwise":
        return model, uncompiled, uncompiled

    @contextmanager
    def as_exported() -> Iterator[None]:
        config._attn_implementation = "sdpa"
        try:
            with uncompiled():
                yield
        finally:
            config._attn_implementation = "blockwise"

    return model, uncompiled, as_exported


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
