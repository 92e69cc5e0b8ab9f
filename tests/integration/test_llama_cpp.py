"""The GGUF files of every covered architecture in llama.cpp itself: the folder's tokens and logits."""

from pathlib import Path
from typing import Any

import torch
from in_llama_cpp import ask_llama_cpp, needs_llama_cpp
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data_pipeline.tokenizer import train_tokenizer
from gpt.gguf_export import write_gguf

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "mistral": {"num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
}
TEXTS = ["we'll meet at 12:30, won't we? I'LL go", "  two   spaces\n\nand\tlines, naïve 東京 🙂 x_1 = 3.14;\n"]
IDS = torch.randint(280, (1, 48), generator=torch.Generator().manual_seed(0))


def save(folder: Path, model_type: str) -> Path:
    """A random model in fp32 with the kind of tokenizer that `trainyard prepare` trains, and its GGUF file."""
    train_tokenizer(TEXTS * 3, 280, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2},
        **MODELS[model_type],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms and biases begin as ones and zeros, which hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 3], pad_token_id=1).save_pretrained(folder)
    write_gguf(folder, model_type)
    return folder


@needs_llama_cpp
def test_tokens_and_logits_of_every_architecture(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, name) for name in MODELS]
    asked = [{"file": f / "model.gguf", "texts": TEXTS, "ids": IDS[0].tolist(), "chat": None} for f in folders]
    for folder, answer in zip(folders, ask_llama_cpp(*asked), strict=True):
        assert answer["tokens"] == AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS, use_cache=False).logits[0]
        difference = float((torch.tensor(answer["logits"]) - expected).abs().max() / expected.abs().max())
        assert difference < 1e-4, f"{folder.name}: {difference}"
