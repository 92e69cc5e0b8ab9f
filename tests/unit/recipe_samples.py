"""Recipes for the tests of gpt's core: a whole one as people write it, changed field by field, and data for it."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.recipe import Recipe
from gpt.recipe_file import parse_recipe


@dataclass(frozen=True)
class PreparedData:
    """Folders that `trainyard prepare` would write (fixture prepared_data); read them, do not change them."""

    text: Path
    chat: Path
    """Conversations, prepared with the tokenizer of `text`."""
    other: Path
    """The same text with a tokenizer of another size."""


CONTENT: dict[str, Any] = {
    "name": "small",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    },
    "tokenizer": "data/tokenizer",
    "data": {"train": [{"path": "data/train"}], "validation": "data/validation", "sequence_length": 32},
    "train": {"global_batch_tokens": 256, "micro_batch_sequences": 2, "steps": 10},
    "optimizer": {"learning_rate": "3e-4"},
}


def recipe_content(changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The sample with dotted keys set to new values, and others taken out."""
    content = copy.deepcopy(CONTENT)
    for key, value in (changes or {}).items():
        node, last = _place(content, key)
        node[last] = value
    for key in without:
        node, last = _place(content, key)
        del node[last]
    return content


def make_recipe(changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> Recipe:
    return parse_recipe(recipe_content(changes, without), "sample")


def _place(content: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *parents, last = key.split(".")
    for part in parents:
        content = content.setdefault(part, {})
    return content, last
