"""What a recipe names on the Hugging Face hub, fetched into the cache where the network is: jobs run offline."""

from pathlib import Path

from gpt.recipe import Recipe
from gpt.recipe_file import HUB_ID, HUB_PREFIX

WEIGHTS_PATTERNS = ["model*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""No pickles: `*.bin` and `*.pt` stay where they are."""
TOKENIZER_PATTERNS = ["*token*", "vocab*", "merges.txt", "chat_template*", "*.jinja", "config.json"]


def fetch(recipe: Recipe) -> Recipe:
    """Fetch the weights and the tokenizer that the recipe names on the hub, and pin what an adapter is added to.

    `model.pretrained` stays the hub id, which transformers finds in the cache; a tokenizer becomes its folder there.

    Raises:
        ValueError: something cannot be fetched, or has no safetensors weights; as `pin_base`.
    """
    pretrained = recipe.model.pretrained
    if pretrained is not None and HUB_ID.fullmatch(pretrained) and not Path(pretrained).exists():
        folder = _snapshot(pretrained, "model.pretrained", WEIGHTS_PATTERNS)
        if not any(folder.glob("model*.safetensors")):
            raise ValueError(
                f"model.pretrained {pretrained} has no safetensors weights on the hub; pickles are not read"
            )
    if recipe.tokenizer.startswith(HUB_PREFIX):
        name = recipe.tokenizer.removeprefix(HUB_PREFIX)
        recipe = recipe.model_copy(update={"tokenizer": str(_snapshot(name, "tokenizer", TOKENIZER_PATTERNS))})
    if recipe.lora is None:
        return recipe
    from gpt.lora import pin_base  # here, since it takes transformers, for which each start would wait

    return pin_base(recipe)


def _snapshot(name: str, field: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{field} {name!r} is no name on the hub: OWNER/NAME")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # also the hub's own errors, which are OSErrors or ValueErrors
        raise ValueError(f"{field} {name} cannot be fetched from the hub: {str(error).splitlines()[0]}") from error
