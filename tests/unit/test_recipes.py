"""Every shipped recipe and DeepSpeed file resolves for its GPU count, on a host without GPUs or data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import AutoConfig, AutoModelForCausalLM

from gpt.batch import plan_batch
from gpt.deepspeed_config import build_deepspeed_config
from gpt.optimizer import Schedule, total_steps
from gpt.recipe import Recipe
from gpt.recipe_file import PROJECT_ROOT, load_recipe

RECIPES = PROJECT_ROOT / "launch" / "recipes"
DEEPSPEED_FILES = PROJECT_ROOT / "ds_configs"

# file: (GPUs or processes, parameters, tokens of a batch, steps) as its comments and sources state them
EXPECTED = {
    "quickstart_pretrain.yaml": (2, 2.558e6, None, None),
    "quickstart_chat.yaml": (2, None, None, None),
    "gpt2_124m.yaml": (8, 124.4e6, 512 * 1024, 19_074),
    "llama_1b_8gpu.yaml": (8, 1.100e9, 1024 * 2048, 47_684),
    "llama_7b_64gpu.yaml": (64, 6.738e9, 1024 * 4096, 476_838),
    "llama_70b_512gpu.yaml": (512, 68.98e9, 1024 * 4096, 476_838),
}


class Ranks:
    """What DeepSpeed asks its caller's parallel layout for."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def get_data_parallel_world_size(self) -> int:
        return self.world_size


@pytest.fixture(autouse=True)
def _deepspeed_asks_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group DeepSpeed takes the world size for 1, whatever its caller's layout says."""
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)


def resolve(recipe: Recipe, world_size: int) -> dict[str, Any]:
    batch = plan_batch(recipe.global_batch_sequences, recipe.train.micro_batch_sequences, world_size)
    return build_deepspeed_config(recipe, batch, hidden_size=256)


def test_every_shipped_recipe_is_here() -> None:
    assert {file.name for file in RECIPES.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_resolves_from_any_folder_and_deepspeed_accepts_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world_size, _, batch_tokens, steps = EXPECTED[name]
    recipe = load_recipe(f"launch/recipes/{name}")
    config = resolve(recipe, world_size)
    read = DeepSpeedConfig(config, mpu=Ranks(world_size))
    assert read.zero_optimization_stage == 3
    assert read.train_batch_size == recipe.global_batch_sequences  # nothing is padded on the stated number of GPUs
    assert read.bfloat16_config.enabled
    if batch_tokens is not None:
        assert recipe.train.global_batch_tokens == batch_tokens
        assert total_steps(recipe, samples_per_epoch=10**9) == steps
    assert recipe.checkpoint.keep_last >= 1
    schedule = Schedule(recipe.optimizer, steps or 500)
    assert schedule.describe()


@pytest.mark.parametrize("name", [name for name, expected in EXPECTED.items() if expected[1]])
def test_model_has_the_published_size_and_room_for_the_sequence(name: str) -> None:
    recipe = load_recipe(RECIPES / name)
    assert recipe.model.config is not None
    values = {"vocab_size": 4096, **recipe.model.config}
    config = AutoConfig.for_model(**values)
    unknown = [key for key in values if key not in config.to_dict() and key not in config.attribute_map]
    assert unknown == []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(EXPECTED[name][1], rel=0.005)
    assert config.max_position_embeddings >= recipe.data.sequence_length


def test_recipes_name_their_source_and_whether_they_ran() -> None:
    for name, (_, _, batch_tokens, _) in EXPECTED.items():
        text = (RECIPES / name).read_text(encoding="utf-8")
        assert text.startswith("# ")
        if batch_tokens is not None:
            assert re.search(r"arXiv:\d{4}\.\d{5}", text), name
            assert "Not run here" in text, name


def test_every_deepspeed_file_fits_every_recipe() -> None:
    files = sorted(DEEPSPEED_FILES.glob("*.json"))
    assert len(files) == 5
    for name, (world_size, *_) in EXPECTED.items():
        for file in files:
            recipe = load_recipe(RECIPES / name, [f"deepspeed={file}"])
            DeepSpeedConfig(resolve(recipe, world_size), mpu=Ranks(world_size))


def test_deepspeed_files_are_described_and_leave_the_recipe_what_it_owns() -> None:
    readme = (DEEPSPEED_FILES / "README.md").read_text(encoding="utf-8")
    for file in DEEPSPEED_FILES.glob("*.json"):
        assert f"`{file.name}`" in readme
        config = json.loads(file.read_text(encoding="utf-8"))
        owned = [config[key] for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")]
        assert [*owned, config["bf16"]["enabled"], config["data_types"]["grad_accum_dtype"]] == ["auto"] * 5
