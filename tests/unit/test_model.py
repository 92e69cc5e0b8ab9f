"""The model's configuration is checked against tokenizer, sequences and what transformers knows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_samples import CONTENT, PreparedData
from safetensors.torch import load_file, save_file
from small_checkpoint import make_model, make_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import gpt.model
from gpt import generate
from gpt.model import (
    DTYPES,
    CompiledLayers,
    build_config,
    build_model,
    check_weights,
    checkpoint_gradients,
    choose_attention,
    count_parameters,
    decoder_layers,
    describe_model,
    draws_random_numbers,
    elements_of,
    frozen_names,
    is_run_directory,
)
from gpt.recipe import Model

LLAMA: dict[str, Any] = CONTENT["model"]["config"]


@pytest.fixture(scope="module")
def tokenizer(prepared_data: PreparedData) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(prepared_data.text / "tokenizer")


def config_of(tokenizer: PreTrainedTokenizerBase, sequence_length: int = 32, **fields: Any) -> PreTrainedConfig:
    return build_config(Model(config=LLAMA | fields), tokenizer, sequence_length)


def refusal(tokenizer: PreTrainedTokenizerBase, sequence_length: int = 32, **fields: Any) -> str:
    with pytest.raises(ValueError) as caught:
        config_of(tokenizer, sequence_length, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("attention", "chosen"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_the_recipes(tokenizer: PreTrainedTokenizerBase, attention: str, chosen: str) -> None:
    config = config_of(tokenizer)
    choose_attention(config, attention)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == chosen


@pytest.mark.parametrize(("cuda", "lacks"), [(False, "a CUDA device"), (True, "the package flash-attn")])
def test_flash_attention_where_it_cannot_be_had_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, cuda: bool, lacks: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(gpt.model, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=f"attention is flash_attention_2, but this host has not {lacks}"):
        choose_attention(config_of(tokenizer), "flash_attention_2")


# From scratch


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    config = config_of(tokenizer)
    assert config.vocab_size == len(tokenizer) == 300
    assert config.eos_token_id == tokenizer.eos_token_id is not None
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    assert config.bos_token_id is None  # the tokenizer has none, whatever the model type's default is
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.hidden_size == 32
    assert config_of(tokenizer, eos_token_id=7).eos_token_id == 7


@pytest.mark.parametrize("vocabulary", [300, 384])
def test_a_vocabulary_up_to_the_next_multiple_of_128_is_good(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> None:
    assert config_of(tokenizer, vocab_size=vocabulary).vocab_size == vocabulary


def test_a_vocabulary_that_does_not_match_is_refused_both_ways(tokenizer: PreTrainedTokenizerBase) -> None:
    small = refusal(tokenizer, vocab_size=299)
    assert "vocab_size is 299, but the tokenizer has 300 tokens" in small
    large = refusal(tokenizer, vocab_size=385)
    assert "vocab_size is 385, but the tokenizer has 300 tokens: use 300, or at most 384" in large


def test_a_vocabulary_with_gaps_needs_room_for_its_largest_id(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["vocab"]["!"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    gappy = AutoTokenizer.from_pretrained(tmp_path)
    assert len(gappy) == 260
    assert gappy.encode("!") == [300]
    assert config_of(gappy).vocab_size == 301
    assert "vocab_size is 300, but the tokenizer has 301 tokens" in refusal(gappy, vocab_size=300)


@pytest.mark.parametrize("value", ["many", 300.5, None, True, [300]])
def test_a_vocabulary_that_is_no_number_is_refused_in_words(tokenizer: PreTrainedTokenizerBase, value: Any) -> None:
    assert "vocab_size" in refusal(tokenizer, vocab_size=value)


def test_sequences_longer_than_the_models_positions_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    assert config_of(tokenizer, 64).max_position_embeddings == 64
    message = refusal(tokenizer, 65)
    assert "data.sequence_length is 65, but the model has only 64 positions" in message
    with pytest.raises(ValueError, match="only 16 positions"):  # under the name that GPT-2 has for them
        build_config(Model(config={"model_type": "gpt2", "n_positions": 16}), tokenizer, 17)


def test_an_unknown_model_type_names_near_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    message = refusal(tokenizer, model_type="lama")
    assert "'lama' is unknown to transformers" in message
    assert "llama" in message.split("near:")[1]


def test_a_type_that_is_no_causal_language_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no causal language model of type 'vit'"):
        build_config(Model(config={"model_type": "vit"}), tokenizer, 32)


def test_an_unknown_field_names_the_nearest(tokenizer: PreTrainedTokenizerBase) -> None:
    message = refusal(tokenizer, hiden_size=32)
    assert "model.config.hiden_size is no field of transformers' llama configuration: did you mean hidden_size?" in (
        message
    )
    config = build_config(Model(config={"model_type": "gpt2", "hidden_size": 24}), tokenizer, 32)
    assert config.n_embd == 24  # a name that transformers itself takes for another


def test_what_transformers_refuses_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    message = refusal(tokenizer, hidden_size="wide")
    assert "model.config is refused by transformers" in message
    assert "hidden_size" in message


# From weights


@pytest.mark.parametrize("name", ["missing", "empty", "damaged"])
def test_a_pretrained_path_that_is_no_model_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name == "damaged":
        (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")
    with pytest.raises(
        ValueError, match="is neither a Trainyard run, nor a Hugging Face folder, nor a hub id"
    ) as caught:
        build_config(Model(pretrained=str(folder)), tokenizer, 32)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"model\.pretrained nobody/nothing is neither"):
        build_config(Model(pretrained="nobody/nothing"), tokenizer, 32)


def test_the_configuration_of_a_folder_is_held_against_tokenizer_and_sequences(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config_of(tokenizer, vocab_size=384).save_pretrained(tmp_path)
    weights = Model(pretrained=str(tmp_path))
    assert build_config(weights, tokenizer, 64).vocab_size == 384
    with pytest.raises(ValueError, match="only 64 positions"):
        build_config(weights, tokenizer, 65)
    config = config_of(tokenizer)
    config.vocab_size = 299
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 299, but the tokenizer has 300 tokens"):
        build_config(weights, tokenizer, 32)


def test_another_runs_directory_gives_the_configuration_of_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, make_model(), step=10, probe=False)
    write_checkpoint(run, make_model(num_hidden_layers=1), step=20, probe=False)
    assert not is_run_directory(str(run))  # without its recipe it is none
    (run / "recipe.yaml").write_text("name: run\n", encoding="utf-8")
    assert is_run_directory(str(run))
    config = build_config(Model(pretrained=str(run)), AutoTokenizer.from_pretrained(run / "tokenizer"), 32)
    assert config.num_hidden_layers == 1
    assert config.vocab_size == 260
    assert config.architectures == ["LlamaForCausalLM"]
    (run / "checkpoints" / "step_00000020" / "manifest.json").write_bytes(b"")
    config = build_config(Model(pretrained=str(run)), AutoTokenizer.from_pretrained(run / "tokenizer"), 32)
    assert config.num_hidden_layers == 2, "a damaged checkpoint is passed over here as it is in loading"


def test_a_run_without_checkpoints_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: run\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is a run without any checkpoint: train it first"):
        build_config(Model(pretrained=str(tmp_path)), tokenizer, 32)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    not_partitioned = SimpleNamespace(is_zero3=lambda: False)
    weights = Model(pretrained=str(tmp_path))
    loaded = build_model(weights, model.config, "fp32", 0, not_partitioned)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        build_model(weights, model.config, "fp32", 0, not_partitioned)


# Frozen parameters


def test_patterns_freeze_what_they_name(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(tie_word_embeddings=True)
    assert frozen_names(model, []) == []
    assert frozen_names(model, ["lm_head.*"]) == ["lm_head.weight"]  # the second name of a tied parameter
    norms = frozen_names(model, ["model.layers.1.*norm.weight", "model.norm.*"])
    assert norms == [
        f"model.{n}.weight" for n in ("layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm")
    ]
    check_weights(Model(config=LLAMA, frozen=["*.mlp.*"]), config_of(tokenizer), "bf16")
    with pytest.raises(ValueError, match="no parameter matches 'x'"):
        check_weights(Model(config=LLAMA, frozen=["x"]), config_of(tokenizer), "bf16")


@pytest.mark.parametrize(("width", "precision", "good"), [(36, "bf16", False), (36, "fp32", True), (40, "bf16", True)])
def test_experts_that_torch_cannot_multiply_are_refused(
    tokenizer: PreTrainedTokenizerBase, width: int, precision: str, good: bool
) -> None:
    fields = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    recipe = Model(config=fields | {"model_type": "mixtral", "intermediate_size": width, "num_local_experts": 2})
    config = build_config(recipe, tokenizer, 16)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    ids = torch.zeros(1, 4, dtype=torch.int64)
    if good:
        check_weights(recipe, config, precision)
        model(input_ids=ids, labels=ids).loss.backward()
        return
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"down_proj has rows of 36 numbers, 72 bytes in bf16.* multiples of 8"):
        check_weights(recipe, config, precision)


def test_pickles_are_no_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no weights as safetensors; pickles are not read"):
        build_config(Model(pretrained=str(tmp_path)), tokenizer, 16)
    with pytest.raises(ValueError, match=r"has no weights as safetensors; pickles \(\*\.bin\) can run code"):
        generate.load_model(tmp_path)


def test_a_pattern_that_matches_nothing_names_near_parameters() -> None:
    with pytest.raises(
        ValueError, match=r"no parameter matches 'embed_tokens\.weight'; near: model\.embed_tokens\.weight"
    ):
        frozen_names(make_model(), ["*norm*", "embed_tokens.weight"])


@pytest.mark.parametrize("patterns", [["*"], ["model.*", "lm_head.weight"]])
def test_a_model_with_nothing_left_to_train_is_refused(patterns: list[str]) -> None:
    with pytest.raises(ValueError, match="matches every parameter: nothing is left to train"):
        frozen_names(make_model(), patterns)


# What is set on the model from outside

# per layer: four attention matrices of 32 x 32 (two of them with half the heads), three of 32 x 64, two norms of 32
LLAMA_LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
EMBEDDING = 260 * 32


def test_parameters_are_counted_untied() -> None:
    total, matrices = count_parameters(make_model())
    assert total == 2 * LLAMA_LAYER + 32 + 2 * EMBEDDING
    assert matrices == 2 * LLAMA_LAYER + 32 + EMBEDDING


def test_a_tied_embedding_counts_once_and_as_the_output_layer() -> None:
    total, matrices = count_parameters(make_model(tie_word_embeddings=True))
    assert total == matrices == 2 * LLAMA_LAYER + 32 + EMBEDDING


def test_frozen_parameters_are_shown() -> None:
    model = make_model()
    assert describe_model(model, "bf16") == f"{count_parameters(model)[0]:,} parameters, LlamaForCausalLM, bf16"
    model.model.norm.requires_grad_(False)
    assert "parameters (32 of them frozen), Llama" in describe_model(model, "bf16")


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_parameters_count_with_their_whole_size(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    expected = count_parameters(model)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert count_parameters(model) == expected


@pytest.mark.parametrize(
    ("every", "recomputed"), [(1, [True] * 4), (2, [True, False] * 2), (3, [True, False, False, True])]
)
def test_every_nth_layer_is_recomputed(every: int, recomputed: list[bool]) -> None:
    model = make_model(num_hidden_layers=4)
    checkpoint_gradients(model, every)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == recomputed


def test_recomputed_layers_give_the_same_gradient() -> None:
    ids = torch.arange(20)[None]
    gradients = []
    for recompute in (False, True):
        model = make_model().train()
        if recompute:
            checkpoint_gradients(model, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_plain_layers_are_at_hand_and_given_back_even_after_an_error() -> None:
    model = make_model()
    before = [layer.forward for layer in decoder_layers(model)]
    compiled = CompiledLayers(model)
    while_training = [layer.forward for layer in decoder_layers(model)]
    assert all(a != b for a, b in zip(before, while_training, strict=True))
    with pytest.raises(KeyError), compiled.plain():
        assert [layer.forward for layer in decoder_layers(model)] == before
        raise KeyError
    assert [layer.forward for layer in decoder_layers(model)] == while_training


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_elements_are_counted_without_making_the_model(model_type: str) -> None:
    model = make_model(model_type, tie_word_embeddings=True)
    assert elements_of(model.config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_draws_random_numbers_in_training_is_known() -> None:
    off = {f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")}
    assert not draws_random_numbers(make_model("llama"))
    assert draws_random_numbers(make_model("llama", attention_dropout=0.1))  # a function's, in no module
    assert not draws_random_numbers(make_model("gpt2", **off))
    assert draws_random_numbers(make_model("gpt2", **off | {"embd_pdrop": 0.1}))
    model = make_model("llama")
    model.add_module("extra", torch.nn.Dropout(0.2))
    assert draws_random_numbers(model)
