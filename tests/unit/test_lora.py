"""LoRA: where the adapter goes, what it is pinned to, and its way out, merged or alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipe_samples import CONTENT
from safetensors.torch import load_file, save_file
from small_checkpoint import change_manifest, in_dtype, make_model, make_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from gpt import export
from gpt.checkpoint.format import read_manifest
from gpt.export import export_run
from gpt.export_gate import check_folder
from gpt.lora import add_adapter, load_adapted_model, pin_base, saved_elements, target_names
from gpt.model import build_config
from gpt.recipe import Lora, Model, Recipe
from gpt.recipe_file import parse_recipe
from gpt.run_directory import compare_recipes


@pytest.fixture
def in_process_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "run_gate", check_folder)


def recipe_with(base: Path, **lora: Any) -> Recipe:
    content = CONTENT | {"model": {"pretrained": str(base)}, "lora": {"rank": 4, "alpha": 8} | lora}
    return parse_recipe(content, "of the test")


def adapted_run(folder: Path, model_type: str, precision: str) -> PreTrainedModel:
    """A run directory `run` on the model in `base`, with an adapter that matters; the live model."""
    shape = {"initializer_range": 0.1}  # the usual 0.02 to 0.1: larger weights blow rounding errors up
    base = make_model(model_type, seed=1, **shape)
    base.save_pretrained(folder / "base")
    recipe = pin_base(recipe_with(folder / "base"))
    assert recipe.lora is not None
    live = make_model(model_type, seed=1, **shape)
    add_adapter(live, recipe.lora, seed=5)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    directory = write_checkpoint(folder / "run", live, precision=precision, trained_only=True)
    stored = read_manifest(directory).recipe
    change_manifest(directory, recipe=stored | {"model": recipe.model.model_dump(), "lora": recipe.lora.model_dump()})
    return live


def masters_on_rounded_base(live: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """In fp32: the base's weights as training had them, and the adapter's fp32 masters."""
    result = in_dtype(in_dtype(live, dtype), torch.float32)
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            result.get_parameter(name).data = parameter.data
    return result


@pytest.mark.parametrize(("model_type", "precision"), [("llama", "bf16"), ("gpt2", "fp32")])
@pytest.mark.usefixtures("in_process_gate")
def test_merged_or_alone_the_export_computes_what_the_engine_did(
    tmp_path: Path, model_type: str, precision: str
) -> None:
    live = adapted_run(tmp_path, model_type, precision)
    export_run(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    export_run(tmp_path / "run", tmp_path / "rounded")
    alone = export_run(tmp_path / "run", tmp_path / "alone", adapter=True)
    assert alone["weight_files"] == ["adapter_model.safetensors"] and alone["bytes"] < 40_000
    whole = in_dtype(live, torch.bfloat16 if precision == "bf16" else torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=whole.dtype)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "alone", autocast_adapter_dtype=False)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(by_peft(input_ids=ids).logits, whole(input_ids=ids).logits)
        loaded = load_adapted_model(tmp_path / "run")
        assert torch.equal(loaded(input_ids=ids).logits, whole(input_ids=ids).logits)
        wide = load_adapted_model(tmp_path / "run", torch.float32)
        assert torch.equal(wide(input_ids=ids).logits, masters_on_rounded_base(live, whole.dtype)(input_ids=ids).logits)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    exact = masters_on_rounded_base(live, whole.dtype)
    for name, weights in exact.named_parameters():
        if name.endswith("base_layer.weight"):
            layer = exact.get_submodule(name.removesuffix(".base_layer.weight"))
            assert layer.get_delta_weight("default").abs().max() > 0.01, "the adapter matters"
            weights = weights + layer.get_delta_weight("default")
        if "lora_" not in name:
            key = name.replace(".base_layer", "")
            assert torch.allclose(merged[key], weights, rtol=1e-6, atol=1e-7), key


@pytest.mark.usefixtures("in_process_gate")
def test_the_gate_finds_a_changed_adapter_and_a_base_without_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted_run(tmp_path, "llama", "bf16")

    def tamper(name: str) -> Any:
        def gate(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
            tensors = load_file(folder / name)
            if name == "model.safetensors":
                tensors = load_file(tmp_path / "base" / name)  # as though nothing had been merged
            else:
                key = next(key for key in tensors if "lora_B" in key)
                tensors[key] = -tensors[key]
            save_file(tensors, folder / name, {"format": "pt"})
            return check_folder(folder, expected)

        return gate

    for name, adapter in (("model.safetensors", False), ("adapter_model.safetensors", True)):
        monkeypatch.setattr(export, "run_gate", tamper(name))
        with pytest.raises(ValueError, match=r"The export is not what the run trained: .* logits"):
            export_run(tmp_path / "run", tmp_path / f"out-{adapter}", adapter=adapter)


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapted_run(tmp_path, "llama", "fp32")
    pinned = pin_base(recipe_with(tmp_path / "base"))
    make_model("llama", seed=2).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="but the adapter is of a base with"):
        pin_base(pinned)
    with pytest.raises(ValueError, match="bring that one back"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="neither a folder nor in the hub's cache"):
        pin_base(recipe_with(tmp_path / "gone"))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights as"):
        pin_base(recipe_with(tmp_path / "base"))


def test_an_adapter_is_no_model_to_begin_with(tmp_path: Path) -> None:
    adapted_run(tmp_path, "llama", "fp32")
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "adapter_config.json").touch()
    for place, words in (
        (tmp_path / "run", "whose checkpoints hold an adapter only"),
        (tmp_path, "is an adapter, not"),
    ):
        with pytest.raises(ValueError, match=words):
            build_config(Model(pretrained=str(place)), make_tokenizer(tmp_path / "tokenizer"), 32)
    with pytest.raises(ValueError, match="is a run, but lora adapts a Hugging Face folder"):
        pin_base(recipe_with(tmp_path / "run"))


def test_a_run_keeps_its_adapter_and_its_base(tmp_path: Path) -> None:
    """Full weights where an adapter was trained, the reverse, and another rank or base."""
    adapter = recipe_with(tmp_path)
    full = adapter.model_copy(update={"lora": None})
    for stored, new, words in (
        (adapter, full, "lora.rank: 4 -> None"),
        (full, adapter, "lora.rank: None -> 4"),
        (adapter, recipe_with(tmp_path, rank=5), "lora.rank: 4 -> 5"),
        (adapter, recipe_with(tmp_path, base_xxh3="0"), "lora.base_xxh3: None -> '0'"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_recipes(stored, new)


def test_an_adapter_is_asked_of_a_run_that_has_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", make_model())
    with pytest.raises(ValueError, match="trained no adapter"):
        export_run(tmp_path / "run", tmp_path / "out", adapter=True)


def test_targets_are_linear_layers_of_the_decoder_layers() -> None:
    model = make_model()
    assert len(target_names(model, Lora(rank=2))) == 2 * 7, "the output layer is none of them"
    two = target_names(model, Lora(rank=2, targets=["q_proj", "layers.1.mlp.up_proj"]))
    layers = [f"model.layers.{i}" for i in range(2)]
    assert two == [f"{layers[0]}.self_attn.q_proj", f"{layers[1]}.self_attn.q_proj", f"{layers[1]}.mlp.up_proj"]
    for target in ("q_prj", "lm_head", "input_layernorm", "proj"):
        with pytest.raises(ValueError, match=f"no linear layer of the decoder layers is named '{target}'; near: "):
            target_names(model, Lora(rank=2, targets=["v_proj", target]))


def test_what_a_checkpoint_of_the_adapter_holds_is_counted(tmp_path: Path) -> None:
    model = make_model()
    recipe = recipe_with(tmp_path, targets=["q_proj"])
    assert recipe.lora is not None
    counted = saved_elements(recipe, model.config)
    add_adapter(model, recipe.lora, seed=0)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: Input should be greater than 0, got 0"),
        ({"lora": {"rank": 4, "targets": []}}, "lora.targets"),
        ({"lora": {"rank": 4, "dropout": 1}}, "lora.dropout"),
        ({"lora": {"rank": 4}}, "lora adapts weights that are there"),
        ({"lora": {"rank": 4}, "model": {"pretrained": "x", "frozen": ["*"]}}, "no model.frozen"),
    ],
)
def test_recipes_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_recipe(CONTENT | changes, "of the test")
