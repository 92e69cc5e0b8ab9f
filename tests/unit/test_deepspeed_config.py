"""Recipe + DeepSpeed file: what the recipe owns is filled in, and everything that contradicts it is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from recipe_samples import make_recipe

from gpt.batch import BatchPlan, plan_batch
from gpt.deepspeed_config import NEEDED_VALUES, REFUSED_KEYS, build_deepspeed_config

HIDDEN = 64
GOOD: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "zero_optimization": {"stage": 3},
}


class Ranks:
    """What DeepSpeed asks its caller's parallel layout for."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def get_data_parallel_world_size(self) -> int:
        return self.world_size


def build(
    folder: Path, content: Any, changes: dict[str, Any] | None = None, batch: BatchPlan | None = None
) -> dict[str, Any]:
    file = folder / "engine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    recipe = make_recipe({"deepspeed": str(file), **(changes or {})})
    return build_deepspeed_config(recipe, batch or plan_batch(8, 2, 2), HIDDEN)


def refusal(folder: Path, content: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(folder, content)
    message = str(caught.value)
    assert message.startswith(f"DeepSpeed file {folder / 'engine.json'}")
    return message


@pytest.mark.parametrize("content", [GOOD, {"zero_optimization": {"stage": 3}}])
def test_everything_the_recipe_owns_is_filled_in(tmp_path: Path, content: dict[str, Any]) -> None:
    config = build(tmp_path, content, {"optimizer.gradient_clip_norm": 0.5})
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_deepspeed_reads_the_result_as_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, world_size: int
) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # without a rank it takes the world size for 1
    batch = plan_batch(8, 2, world_size)
    config = build(tmp_path, GOOD, {"precision": precision, "optimizer.gradient_clip_norm": None}, batch)
    read = DeepSpeedConfig(config, mpu=Ranks(world_size))
    assert read.bfloat16_config.enabled is (precision == "bf16")
    assert read.float16_config.enabled is (precision == "fp16")
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_optimization_stage == 3
    assert read.gradient_clipping == 0.0
    assert read.gradient_accumulation_steps == batch.accumulation_steps
    assert read.train_micro_batch_size_per_gpu == batch.rows_per_forward
    assert read.zero_allow_untested_optimizer is True


def test_auto_sizes_follow_the_model_and_stated_ones_stay(tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 12_345,
        "stage3_param_persistence_threshold": "auto",
    }
    config = build(tmp_path, {"zero_optimization": zero})["zero_optimization"]
    assert config["reduce_bucket_size"] == HIDDEN * HIDDEN
    assert config["stage3_prefetch_bucket_size"] == 12_345
    assert config["stage3_param_persistence_threshold"] == 10 * HIDDEN
    assert build(tmp_path, GOOD)["zero_optimization"] == {"stage": 3}  # what is not there is DeepSpeed's own to choose
    zero["stage3_prefetch_bucket_size"] = "auto"
    filled = build(tmp_path, {"zero_optimization": zero})["zero_optimization"]
    assert filled["stage3_prefetch_bucket_size"] == int(0.9 * HIDDEN * HIDDEN)


def test_a_value_that_says_the_same_is_good(tmp_path: Path) -> None:
    stated = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    config = build(tmp_path, GOOD | stated)
    assert {key: config[key] for key in stated} == stated


@pytest.mark.parametrize(
    ("contradiction", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, but the recipe makes it 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, but the recipe makes it 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, but the recipe makes it 2"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True, but the recipe makes it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but the recipe makes it 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping is True, but the recipe makes it 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but the recipe makes it True"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1, but the recipe makes it True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but the recipe makes it False"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is 'bf16', but the recipe makes it 'fp32'"),
        ({"bf16": True}, "bf16 is True, not an object"),
    ],
)
def test_a_value_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, contradiction: dict[str, Any], said: str
) -> None:
    message = refusal(tmp_path, GOOD | contradiction)
    assert said in message
    assert message.count(";") == 0


def test_an_unknown_top_level_key_names_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD | {"gradient_cliping": 1.0, "zzz": 1})
    assert "unknown key gradient_cliping: did you mean gradient_clipping?" in message
    assert "unknown key zzz" in message


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_belongs_elsewhere_says_where(tmp_path: Path, key: str) -> None:
    assert f"{key} does not belong here: {REFUSED_KEYS[key]}" in refusal(tmp_path, GOOD | {key: {}})


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"prescale_gradients": "auto"}, "prescale_gradients"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "zero_optimization.sub_group_size"),
        ({"fp16": {"enabled": "auto", "loss_scale": "auto"}}, "fp16.loss_scale"),
        ({"aio": {"a": [1, {"b": ["auto"]}]}}, "aio.a.1.b.0"),
    ],
)
def test_auto_is_refused_wherever_the_recipe_owns_nothing(tmp_path: Path, content: dict[str, Any], place: str) -> None:
    assert f'"auto" is left over at {place},' in refusal(tmp_path, GOOD | content)


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 4}, {}, {"stage": "auto"}, {"stage": True}])
def test_stages_other_than_1_2_and_3_are_refused(tmp_path: Path, zero: dict[str, Any]) -> None:
    message = refusal(tmp_path, GOOD | {"zero_optimization": zero})
    assert f"zero_optimization.stage is {zero.get('stage', 0)!r}, but checkpoints and fp32 accumulation need" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_and_cpu_offload_are_good_with_the_recipes_own_optimizer(tmp_path: Path, stage: int) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}
    zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    config = build(tmp_path, GOOD | {"zero_optimization": zero})
    assert config["zero_optimization"] == zero
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.offload_param.device", "nvme"),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.offload_optimizer.super_offload", True),
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.compute_grad_norm", False),
        ("bf16.bf16_master_weights_and_grads", True),
        ("bf16.bf16_optimizer_states", True),
        ("fp16.fp16_master_weights_and_grads", True),
    ],
)
def test_what_has_no_exact_checkpoint_is_refused(tmp_path: Path, place: str, value: Any) -> None:
    content: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    *parents, last = place.split(".")
    node = content
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    message = refusal(tmp_path, content)
    assert f"{place} is {value!r}, but {NEEDED_VALUES[place][1]}" in message and message.count(";") == 0


@pytest.mark.parametrize("key", ["stage3_param_persistence_threshold", "offload_param"])
def test_keys_of_stage_3_are_refused_at_others(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 2, key: {}}})
    assert f"zero_optimization.{key} has no meaning at stage 2: leave it out" in message


@pytest.mark.parametrize("zero", [[], "auto", 3, None])
def test_a_zero_section_that_is_no_object_is_refused_in_words(tmp_path: Path, zero: Any) -> None:
    message = refusal(tmp_path, GOOD | {"zero_optimization": zero})
    assert message.count(f"zero_optimization is {zero!r}, not an object") == 1


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD | {"train_batch_size": 3, "aio": "auto", "zero_optimization": {"stage": 0}})
    assert all(part in message for part in ("train_batch_size is 3", "left over at aio", "stage is 0"))


def test_a_missing_file_names_the_shipped_ones(tmp_path: Path) -> None:
    recipe = make_recipe({"deepspeed": str(tmp_path / "none.json")})
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; shipped ones are in ds_configs/"):
        build_deepspeed_config(recipe, plan_batch(8, 2, 2), HIDDEN)


@pytest.mark.parametrize("content", ['{"a": 1,}', "", "{'a': 1}"])
def test_what_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    assert "is not JSON" in refusal(tmp_path, content)


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    assert "does not hold a JSON object" in refusal(tmp_path, "[1]")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 3, "stage": 3}}'
    assert re.search(r"the key stage is there twice", refusal(tmp_path, text))
