"""Recipe + DeepSpeed JSON file -> the dictionary that DeepSpeed gets.

DeepSpeed accepts unknown top-level keys silently and lets a file contradict the trainer; here both are errors.
"auto" marks what the recipe owns, and nothing else may be "auto".
"""

import difflib
import json
from pathlib import Path
from typing import Any

from gpt.batch import BatchPlan
from gpt.recipe import Recipe

ACCEPTED_KEYS = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "prescale_gradients",
        "gradient_predivide_factor", "seq_parallel_communication_data_type", "zero_force_ds_cpu_optimizer", "aio",
        "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    }
)  # fmt: skip
REFUSED_KEYS = {
    "optimizer": "the recipe's section optimizer owns it",
    "scheduler": "the recipe's optimizer.schedule owns it",
    "activation_checkpointing": "it does not act on transformers models; use the recipe's gradient_checkpointing",
    "torch_autocast": "use the recipe's precision",
    "amp": "use the recipe's precision",
    "tensorboard": "the trainer writes TensorBoard itself",
    "csv_monitor": "the trainer writes metrics.jsonl itself",
    "checkpoint": "the recipe's section checkpoint owns it",
    "zero_allow_untested_optimizer": "the trainer sets it for its own optimizer",
}
NEEDED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.offload_optimizer.device": (("none", "cpu"), "checkpoints read the state from memory"),
    "zero_optimization.offload_param.device": (("none", "cpu"), "checkpoints read the weights from memory"),
    "zero_optimization.offload_optimizer.ratio": ((1,), "DeepSpeed would update the rest by an AdamW of its own"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "it updates by an optimizer of its own"),
    "zero_optimization.round_robin_gradients": ((False,), "DeepSpeed then loses where it keeps which parameter"),
    "zero_optimization.zenflow": ((None,), "it changes what an update is"),
    "zero_optimization.compute_grad_norm": ((True,), "the trainer reports the norm and looks for lost values"),
    "bf16.bf16_master_weights_and_grads": ((False,), "master weights are fp32"),
    "bf16.bf16_optimizer_states": ((False,), "the optimizer's states are fp32"),
    "fp16.fp16_master_weights_and_grads": ((False,), "master weights are fp32"),
}
"""Values besides which there is no exact checkpoint: place -> (good values, why)."""


def build_deepspeed_config(recipe: Recipe, batch: BatchPlan, hidden_size: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, an unknown or refused key, a value that contradicts the
            recipe, a left-over "auto", or a ZeRO stage that is not supported.
    """
    config = _read(recipe.deepspeed)
    _check_keys(config, recipe.deepspeed)
    problems: list[str] = []
    for path, value in _owned_values(recipe, batch, hidden_size).items():
        _set_owned(config, path, value, problems)
    problems += [f'"auto" is left over at {place}, which the recipe does not own' for place in _autos(config)]
    zero = config["zero_optimization"]
    if isinstance(zero, dict):
        problems += _zero_problems(zero)
        for place, (good, why) in NEEDED_VALUES.items():
            value = _value_at(config, place.split("."), good[0])
            if value not in good:
                problems.append(f"{place} is {value!r}, but {why}: leave it out or set it to {good[-1]!r}")
    if problems:
        raise ValueError(f"DeepSpeed file {recipe.deepspeed}: " + "; ".join(dict.fromkeys(problems)))
    # torch's optimizers that the recipe offers: elementwise, and so right on flat partitions
    config["zero_allow_untested_optimizer"] = True
    config.setdefault("steps_per_print", 2**31)  # the trainer prints; DeepSpeed's own line would be a second one
    return config


def _zero_problems(zero: dict[str, Any]) -> list[str]:
    """What is wrong with the stage, or does not belong to it."""
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        return [
            f"zero_optimization.stage is {stage!r}, but checkpoints and fp32 accumulation need ZeRO stage 1, 2 or 3: "
            f"set it to one of them"
        ]
    of_stage_3 = [key for key in zero if stage != 3 and (key.startswith("stage3_") or key == "offload_param")]
    return [f"zero_optimization.{key} has no meaning at stage {stage}: leave it out" for key in of_stage_3]


def _value_at(node: Any, path: list[str], default: Any) -> Any:
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"DeepSpeed file {path} does not exist; shipped ones are in ds_configs/")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ValueError(f"DeepSpeed file {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed file {path} does not hold a JSON object")
    return config


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses a key that it has twice, of which Python would silently ignore the first."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return result


def _check_keys(config: dict[str, Any], path: str) -> None:
    problems = []
    for key in config:
        if key in REFUSED_KEYS:
            problems.append(f"{key} does not belong here: {REFUSED_KEYS[key]}")
        elif key not in ACCEPTED_KEYS:
            near = difflib.get_close_matches(key, ACCEPTED_KEYS, n=1)
            problems.append(f"unknown key {key}" + (f": did you mean {near[0]}?" if near else ""))
    if problems:
        raise ValueError(f"DeepSpeed file {path}: " + "; ".join(problems))


def _owned_values(recipe: Recipe, batch: BatchPlan, hidden_size: int) -> dict[tuple[str, ...], Any]:
    """What the recipe owns. A _Default fills only an "auto": sizes that the file may also state itself, with the values
    that transformers uses for them (its integrations/deepspeed.py)."""
    owned: dict[tuple[str, ...], Any] = {
        ("train_batch_size",): batch.rows_per_forward * batch.accumulation_steps * batch.world_size,
        ("train_micro_batch_size_per_gpu",): batch.rows_per_forward,
        ("gradient_accumulation_steps",): batch.accumulation_steps,
        ("gradient_clipping",): recipe.optimizer.gradient_clip_norm or 0.0,
        ("bf16", "enabled"): recipe.precision == "bf16",
        ("fp16", "enabled"): recipe.precision == "fp16",
        # DeepSpeed accumulates bf16 gradients in bf16 unless told otherwise
        ("data_types", "grad_accum_dtype"): "fp32",
        # with offload, torch's optimizer works on the CPU; DeepSpeed would ask for its own AdamW
        ("zero_force_ds_cpu_optimizer",): False,
    }
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    return owned | {("zero_optimization", key): _Default(size) for key, size in sizes.items()}


class _Default:
    """A value that replaces "auto" but yields to what the file states."""

    def __init__(self, value: int) -> None:
        self.value = value


def _set_owned(config: dict[str, Any], path: tuple[str, ...], value: Any, problems: list[str]) -> None:
    node = config
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            problems.append(f"{part} is {node!r}, not an object")
            return
    key = path[-1]
    if isinstance(value, _Default):
        if node.get(key) == "auto":
            node[key] = value.value
        return
    stated = node.get(key, "auto")
    if stated != "auto" and (type(stated) is bool) == (type(value) is bool) and stated == value:
        return
    if stated != "auto":
        problems.append(f'{".".join(path)} is {stated!r}, but the recipe makes it {value!r}: write "auto"')
    node[key] = value


def _autos(node: Any, place: str = "") -> list[str]:
    if node == "auto":
        return [place]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, child in children for found in _autos(child, f"{place}.{key}".lstrip("."))]
