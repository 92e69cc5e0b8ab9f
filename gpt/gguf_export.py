"""A Hugging Face folder as one GGUF file for llama.cpp, tensor by tensor; memory is bounded by the largest tensor.

Covered is what was compared with llama.cpp or, tensor for tensor, with transformers' own reader of such files:
the architectures and word patterns of the two tables below. All else is refused before anything is written.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gpt.gguf_gate import GGUF_NAME

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model types and llama.cpp's names for them."""

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp knows how a tokenizer splits words by a name. These are (the digits taken one by one first, the pattern, a
# word of the vocabulary is taken whole) of its src/llama-vocab.cpp; None is GPT-2's pattern, built into `tokenizers`.
_PRE_TOKENIZERS = {
    (False, None, False): "gpt-2",
    (True, None, False): "smollm",
    (False, rf"{_CASELESS}|\p{{N}}{_SPACES}", False): "qwen2",
    (False, rf"{_CASELESS}|\p{{N}}{{1,3}}{_SPACES}", True): "llama-bpe",
}


def check_convertible(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, with the reason, where this model and tokenizer cannot be written as GGUF."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"A {kind} model cannot be written as GGUF; {', '.join(ARCHITECTURES)} can. Leave --gguf out.")
    rope = dict(config.rope_parameters)
    needed: dict[str, tuple[Any, Any]] = {
        "hidden_act": (config.hidden_act, "silu"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "attention_bias": (bool(getattr(config, "attention_bias", False)), False),
        "mlp_bias": (bool(getattr(config, "mlp_bias", False)), False),
        "sliding window": (_sliding_window(config), None),
    }
    if kind == "qwen3":  # transformers' reader, which the result is checked with, takes it for granted
        needed["head_dim"] = (config.head_dim, 128)
    for name, (value, expected) in needed.items():
        if value != expected:
            raise ValueError(f"A {kind} model with {name} {value} cannot be written as GGUF, only with {expected}.")
    _pre_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("A tokenizer without an end token cannot be written as GGUF.")


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """The window that attention really has in some layer; None where every token sees all before it."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = getattr(config, "use_sliding_window", True) and "sliding_attention" in layers
    return window if used and window is not None and window < config.max_position_embeddings else None


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for the way in which this byte-level BPE splits words."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = definition["model"], definition["pre_tokenizer"] or {}
    steps = [dict(step) for step in steps.get("pretokenizers", [steps])]
    last = steps.pop() if steps else {}
    digits = steps[:1] == [{"type": "Digits", "individual_digits": True}]
    steps = steps[digits:]
    pattern = steps.pop(0)["pattern"].get("Regex") if steps and steps[0].get("type") == "Split" else None
    split = (digits, pattern, bool(model.get("ignore_merges")))
    byte_level = model["type"] == "BPE" and last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    # llama.cpp knows no normalizer; NFC leaves text alone that is written the usual way
    plain = definition["normalizer"] in (None, {"type": "NFC"}) and last.get("use_regex") is (pattern is None)
    if steps or not byte_level or not plain or split not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise ValueError(
            f"This tokenizer ({model['type']}, word pattern {pattern!r}) cannot be written as GGUF; byte-level BPE "
            f"with the word patterns that llama.cpp calls {known} can. Leave --gguf out."
        )
    return _PRE_TOKENIZERS[split]


def write_gguf(folder: Path, name: str) -> None:
    """Write the model of the Hugging Face folder `folder` as `model.gguf` beside its weights, in their dtype.

    `name` is what the file says that the model is called.

    Vectors (norms, biases) are fp32, as llama.cpp wants them. Raises ValueError as `check_convertible` does.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_convertible(config, tokenizer)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(None, architecture)
    kinds = {code: kind for kind, code in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    _add_model(writer, config, name)
    _add_tokenizer(writer, tokenizer, config.vocab_size, _end_tokens(folder))
    files = sorted(folder.glob("*.safetensors"))
    for source, tensor in _tensors(files):
        place, _, suffix = source.rpartition(".")
        target = names.get_name(place)
        if target is None:
            raise ValueError(f"llama.cpp has no place for the tensor {source} of a {config.model_type} model.")
        values = _as_gguf(tensor, source, config)
        kind = gguf.GGMLQuantizationType[_TYPES[values.dtype]]
        writer.add_tensor_info(f"{target}.{suffix}", tensor.shape, _bytes(values).dtype, values.nbytes, kind)
    writer.write_header_to_file(folder / GGUF_NAME)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, tensor in _tensors(files):
        writer.write_tensor_data(_bytes(_as_gguf(tensor, source, config)))
    writer.close()


def add_gguf(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write the GGUF file of a folder that passed its gate, and add the checks of the file to the gate's `report`."""
    if report["passed"]:
        write_gguf(folder, name)
        report["checks"] += run_gguf_gate(folder)
        report["passed"] = all(check["passed"] for check in report["checks"])


def gate_weights_bytes(model: PreTrainedModel) -> int:
    """What the gate's weights take of memory: transformers reads a GGUF file whole into fp32, and a tensor of it is
    there twice more meanwhile. (Of 87 M parameters, 15 M of them in the embedding, 0.45 GB were measured.)"""
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    return sum(sizes) + 2 * max(sizes)


def run_gguf_gate(folder: Path) -> list[dict[str, Any]]:
    """Read the folder's GGUF file back in a fresh isolated Python, by `gguf_gate.py`; returns its checks.

    A file that cannot be read at all gives a check that did not pass.
    """
    result = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("gguf_gate.py")), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        checks: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return [{"check": "gguf", "passed": False, "sentence": f"{GGUF_NAME} could not be read back: {last}"}]
    return checks


_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor with its name, one after another, in the same order each time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                yield name, file.get_tensor(name)


def _as_gguf(tensor: torch.Tensor, name: str, config: PreTrainedConfig) -> torch.Tensor:
    """A tensor as llama.cpp wants it.

    Its llama architecture rotates neighbouring pairs (2i, 2i+1) of a head, transformers' the pairs (i, i + half): the
    rows of queries and keys are put in that order.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is not None and ARCHITECTURES[config.model_type] == "llama":
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor.float() if tensor.dim() == 1 else tensor.contiguous()


def _bytes(tensor: torch.Tensor) -> Any:
    """The same memory as an array of whole numbers, since numpy has no bfloat16."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


def _end_tokens(folder: Path) -> list[int]:
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _add_model(writer: Any, config: PreTrainedConfig, name: str) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = {"bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "float32": "ALL_F32"}[str(config.dtype).split(".")[-1]]
    writer.add_type("model")
    writer.add_name(f"{name} ({config.model_type})")  # transformers reads a file named just "mistral" as another kind
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: list[int]) -> None:
    """Vocabulary, merges, special tokens and chat template; rows of the model beyond them are unused tokens."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for index, token in tokenizer.added_tokens_decoder.items():
        kinds[index] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(vocabulary)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(vocabulary)])
    pairs = definition["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    end = int(tokenizer.eos_token_id)
    writer.add_eos_token_id(end)
    others = [token for token in ends if token != end]
    if len(others) > 1:
        raise ValueError(f"Generation ends at the tokens {ends}; GGUF holds two of them at most.")
    if others:
        writer.add_eot_token_id(others[0])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == end)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
