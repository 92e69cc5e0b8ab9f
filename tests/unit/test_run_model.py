"""What `auto` of a recipe's model settings comes to."""

import pytest
from recipe_samples import make_recipe

from gpt.run_model import COMPILED_STEPS, is_compiled


@pytest.mark.parametrize(
    ("value", "steps", "on_gpu", "compiled"),
    [
        ("auto", COMPILED_STEPS - 1, False, False),
        ("auto", COMPILED_STEPS, False, True),
        ("auto", 1, True, True),
        (True, 1, False, True),
        (False, COMPILED_STEPS, True, False),
    ],
)
def test_layers_are_compiled_where_a_run_is_long_enough(
    value: object, steps: int, on_gpu: bool, compiled: bool
) -> None:
    assert is_compiled(make_recipe({"compile": value}), steps, on_gpu=on_gpu) is compiled
