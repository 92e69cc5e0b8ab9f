"""Attention by blocks is transformers' own, whatever the heads, the documents in a row and the window."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import gpt.attention
from gpt.attention import choose_attention

TOKENS = 300  # no multiple of the block
SMALL = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "bos_token_id": 0,
         "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},  # three heads share keys and values
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "mistral": {"num_key_value_heads": 6, "intermediate_size": 96, "sliding_window": 40, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 1, "intermediate_size": 96, "sliding_window": 40, "head_dim": 8},
}


def small_config(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **SMALL, **SHAPES[model_type])


def model_with(config: PreTrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config._attn_implementation = attention
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def logits_and_gradients(model: PreTrainedModel, lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of two rows, of which the first holds documents of these lengths and the second a single one."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 64, (2, TOKENS), generator=generator)
    first = torch.cat([torch.arange(length) for length in lengths])
    positions = torch.stack([first, torch.arange(TOKENS)])
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    weight = torch.randn(logits.shape, generator=generator)
    (logits * weight).mean().backward()
    return logits.detach(), [p.grad.float() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("model_type", SHAPES)
def test_blocks_give_the_logits_and_gradients_of_sdpa(model_type: str) -> None:
    lengths = [37, 130, 1, 132]
    expected, gradients = logits_and_gradients(model_with(small_config(model_type), "sdpa"), lengths)
    found, ours = logits_and_gradients(model_with(small_config(model_type), "blockwise"), lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32 sums in another order
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_in_bf16_blocks_are_as_near_to_fp32_as_eager_attention() -> None:
    exact, _ = logits_and_gradients(model_with(small_config("llama"), "sdpa"), [TOKENS])
    errors = {}
    for attention in ("eager", "blockwise"):
        model = model_with(small_config("llama"), attention, torch.bfloat16)
        errors[attention] = (logits_and_gradients(model, [TOKENS])[0] - exact).pow(2).mean().sqrt().item()
    assert 0 < errors["blockwise"] < 1.1 * errors["eager"]


def test_dropout_draws_and_keeps_the_mean() -> None:
    """With equal keys, each weight is 1 / (keys seen), so that the output of the last query is the mean of values."""
    torch.manual_seed(0)
    module = torch.nn.Module().train()
    query, value = torch.zeros(1, 1, TOKENS, 8), torch.ones(1, 1, TOKENS, 8)
    mask = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]
    output, _ = gpt.attention.blockwise_attention(module, query, query, value, mask, dropout=0.25)
    assert output.shape == (1, TOKENS, 1, 8)
    assert output[0, -100:].mean().item() == pytest.approx(1, abs=0.02)
    assert output[0, -100:].std().item() > 0.01


def test_a_layer_that_looks_ahead_sees_everything() -> None:
    module = torch.nn.Module().eval()
    module.is_causal = False
    query, value = torch.zeros(1, 1, TOKENS, 8), torch.arange(TOKENS, dtype=torch.float32).expand(1, 1, 8, -1).mT
    output, _ = gpt.attention.blockwise_attention(module, query, query, value, torch.zeros(1, 1, TOKENS, TOKENS))
    torch.testing.assert_close(output, torch.full_like(output, (TOKENS - 1) / 2))


def test_generation_with_a_cache_gives_the_text_of_sdpa() -> None:
    prompt = torch.arange(3, 60)[None]
    texts = [
        model_with(small_config("llama"), attention).generate(prompt, max_new_tokens=20, do_sample=False).tolist()
        for attention in ("sdpa", "blockwise")
    ]
    assert texts[0] == texts[1] and len(texts[0][0]) > prompt.shape[1]


@pytest.mark.parametrize(
    ("attention", "chosen"), [("auto", "sdpa"), ("blockwise", "blockwise"), ("sdpa", "sdpa"), ("eager", "eager")]
)
def test_attention_is_the_recipes(attention: str, chosen: str) -> None:
    config = small_config("llama")
    choose_attention(config, attention)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == chosen


def test_a_softcap_is_refused_and_not_left_out() -> None:
    query, mask = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="softcap"):
        gpt.attention.blockwise_attention(torch.nn.Module(), query, query, query, mask, softcap=50.0)


def test_a_model_without_sdpa_is_refused() -> None:
    config = AutoConfig.for_model("gpt_oss", **SMALL, num_local_experts=2, num_key_value_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match="attention is blockwise, which GptOssForCausalLM cannot use"):
        choose_attention(config, "blockwise")
    choose_attention(config, "auto")
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "eager"


@pytest.mark.parametrize(("cuda", "lacks"), [(False, "a CUDA device"), (True, "the package flash-attn")])
def test_flash_attention_where_it_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, lacks: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(gpt.attention, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=f"attention is flash_attention_2, but this host has not {lacks}"):
        choose_attention(small_config("llama"), "flash_attention_2")


def test_the_exported_configuration_does_not_name_it() -> None:
    config = small_config("llama")
    choose_attention(config, "blockwise")
    assert "blockwise" not in config.to_json_string(use_diff=False)
