"""GGUF files: read back by transformers they are the folder's model, and what cannot be written is refused."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from small_checkpoint import make_model, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from data_pipeline.tokenizer import train_tokenizer
from gpt import export, gguf_export
from gpt.export import export_run
from gpt.export_check import expected_of, gate_memory
from gpt.export_gate import check_folder
from gpt.export_source import source_of_run
from gpt.gguf_export import check_convertible, write_gguf
from gpt.gguf_gate import check_gguf

VOCABULARY = 300
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen3": ("qwen3", {"head_dim": 128}),
}
TEXTS = ["we'll meet at 12:30, won't we? I'LL go", "  two   spaces\n\nand\tlines"] * 3


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 280, folder)
    return folder


def save_folder(
    folder: Path, tokenizer: Path, model_type: str = "llama", dtype: str = "bfloat16", name: str = "tiny", **fields: Any
) -> Path:
    """A model of 300 rows with a tokenizer of 280 tokens, as `trainyard export` writes it, and its GGUF file."""
    model = make_model(model_type, vocab_size=VOCABULARY, **fields).to(getattr(torch, dtype))
    for parameter in model.parameters():  # norms and biases begin as ones and zeros, which hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 3], pad_token_id=1).save_pretrained(folder)
    write_gguf(folder, name)
    return folder


def failures(folder: Path) -> list[str]:
    return [check["check"] for check in check_gguf(folder) if not check["passed"]]


def fields_of(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}


@pytest.mark.parametrize("name", MODELS)
def test_read_back_it_is_the_folders_model(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    model_type, fields = MODELS[name]
    folder = save_folder(tmp_path, tokenizer_folder, model_type, name=model_type, **fields)
    assert failures(folder) == []


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_matrices_keep_their_dtype_and_vectors_are_fp32(
    tmp_path: Path, tokenizer_folder: Path, dtype: str, kind: str
) -> None:
    folder = save_folder(tmp_path, tokenizer_folder, dtype=dtype)
    assert failures(folder) == []
    kinds = {
        tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors if len(tensor.shape) > 1
    }
    vectors = {
        tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors if len(tensor.shape) == 1
    }
    assert (kinds, vectors) == ({kind}, {"F32"})


def test_several_weight_files_make_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save_folder(tmp_path, tokenizer_folder)
    whole = (folder / "model.gguf").read_bytes()
    model = make_model(vocab_size=VOCABULARY)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    write_gguf(folder, "tiny")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.gguf").read_bytes() != whole
    assert failures(folder) == []


def test_what_llama_cpp_reads_of_the_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    fields = fields_of(save_folder(tmp_path, tokenizer_folder))
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "tiny (llama)"
    assert fields["llama.attention.head_count"] == 4 and fields["llama.attention.head_count_kv"] == 2
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCABULARY
    assert tokens[:4] == ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[280] == "[PAD280]"
    control, unused = int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNUSED)
    kinds = fields["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == control] == [0, 1, 2, 3]
    assert [i for i, kind in enumerate(kinds) if kind == unused] == list(range(280, VOCABULARY))
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "padding")}
    assert special == {"eos": 0, "eot": 3, "padding": 1}
    assert "tokenizer.ggml.bos_token_id" not in fields and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.pre"] == "qwen2" and "im_start" in fields["tokenizer.chat_template"]


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = gguf_export._CASELESS + r"|\p{N}{1,3}" + gguf_export._SPACES


def splitting(*steps: Any, model: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model or models.BPE(vocab={"a": 0, "<end>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_names_of_word_patterns() -> None:
    from tokenizers import Regex

    def pattern(text: str) -> Any:
        return pre_tokenizers.Split(Regex(text), behavior="isolated")

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert gguf_export._pre_tokenizer(splitting(BYTE_LEVEL)) == "gpt-2"
    assert gguf_export._pre_tokenizer(splitting(digits, BYTE_LEVEL)) == "smollm"
    merging = models.BPE(vocab={"a": 0, "<end>": 1}, merges=[], ignore_merges=True)
    assert gguf_export._pre_tokenizer(splitting(pattern(LLAMA3), plain, model=merging)) == "llama-bpe"
    for other in (
        splitting(pattern(LLAMA3), plain),  # llama.cpp takes whole words here
        splitting(pattern("a+"), plain),
        splitting(pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL),
        splitting(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        splitting(plain),
        splitting(digits, digits, BYTE_LEVEL),
        splitting(pre_tokenizers.Metaspace()),
        splitting(BYTE_LEVEL, model=models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")),
    ):
        with pytest.raises(ValueError, match=r"llama\.cpp calls gpt-2, smollm, qwen2, llama-bpe can"):
            gguf_export._pre_tokenizer(other)


@pytest.mark.parametrize(
    ("model_type", "fields", "problem"),
    [
        ("gpt2", {}, "A gpt2 model cannot be written as GGUF; llama, mistral, qwen2, qwen3 can"),
        ("mistral", {"sliding_window": 16}, "sliding window 16 .* only with None"),
        ("qwen3", {}, "head_dim 8 .* only with 128"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu .* only with silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type linear .* only with default",
        ),
    ],
)
def test_refused_models(tokenizer_folder: Path, model_type: str, fields: dict[str, Any], problem: str) -> None:
    config = make_model(model_type, vocab_size=VOCABULARY, **fields).config
    with pytest.raises(ValueError, match=problem):
        check_convertible(config, AutoTokenizer.from_pretrained(tokenizer_folder))


def test_without_an_end_token_it_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="without an end token"):
        check_convertible(make_model(vocab_size=VOCABULARY).config, tokenizer)


def test_the_gate_sees_wrong_weights_tokens_and_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = save_folder(tmp_path, tokenizer_folder)
    good = (folder / "model.gguf").read_bytes()
    weights = gguf.GGUFReader(folder / "model.gguf").tensors
    for index, tensor in enumerate(weights):  # a changed element of any tensor
        raw = bytearray(good)
        end = tensor.data_offset + tensor.n_bytes
        raw[end - 1] ^= 0x40
        (folder / "model.gguf").write_bytes(raw)
        assert failures(folder) == ["gguf_logits"], weights[index].name
    (folder / "model.gguf").write_bytes(good.replace(b"<|im_end|>", b"<|im_eat|>", 1))
    assert failures(folder) == ["gguf_tokenizer"]


@pytest.fixture
def in_process_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own gate without the seconds that a process takes; tests/unit/test_export.py runs the real one."""
    monkeypatch.setattr(export, "run_gate", check_folder)


def export_with_gguf(tmp_path: Path, tokenizer: Path, model_type: str = "llama", **options: Any) -> dict[str, Any]:
    run = tmp_path / "run"
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(run / "tokenizer")
    write_checkpoint(run, make_model(model_type, vocab_size=VOCABULARY), data_kind="chat")
    return export_run(run, tmp_path / "out", gguf=True, **options)


@pytest.mark.usefixtures("in_process_gate")
def test_export_writes_it_and_reads_it_back(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The real gate of the file, in a process of its own."""
    result = export_with_gguf(tmp_path, tokenizer_folder)
    assert "gives the folder's logits at 64 tokens" in result["gate"]["gguf_logits"]
    assert "tokens of a text and a chat" in result["gate"]["gguf_tokenizer"]
    assert "model.gguf" in json.loads((tmp_path / "out" / "checksums.json").read_text())["files"]
    assert fields_of(tmp_path / "out")["general.name"] == "out (llama)"


@pytest.mark.usefixtures("in_process_gate")
def test_an_unequal_file_fails_the_export(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys left in transformers' order, the classic mistake."""
    monkeypatch.setattr(gguf_export, "run_gguf_gate", check_gguf)
    monkeypatch.setattr(gguf_export, "_as_gguf", lambda tensor, *_: tensor.float() if tensor.dim() == 1 else tensor)
    with pytest.raises(ValueError, match=r"model\.gguf gives the folder's logits .* kept as .*out\.failed"):
        export_with_gguf(tmp_path, tokenizer_folder)
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.failed" / "export_report.json").read_text())
    assert not report["passed"] and [c["check"] for c in report["checks"] if not c["passed"]] == ["gguf_logits"]


def test_a_file_that_cannot_be_read_back_fails(tmp_path: Path, tokenizer_folder: Path) -> None:
    (save_folder(tmp_path, tokenizer_folder) / "model.gguf").write_bytes(b"GGUF")
    [check] = gguf_export.run_gguf_gate(tmp_path)
    assert not check["passed"] and "model.gguf could not be read back: " in check["sentence"]


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match="A gpt2 model cannot be written as GGUF"):
        export_with_gguf(tmp_path, tokenizer_folder, "gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("in_process_gate")
def test_a_model_that_memory_holds_in_its_own_dtype_only_is_refused(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's own gate needs 2 bytes a parameter, the file's 4 and twice the largest tensor."""
    lines: list[str] = []
    monkeypatch.setattr(gguf_export, "run_gguf_gate", check_gguf)
    monkeypatch.setattr(export, "available_memory_bytes", lambda: 2**40)
    export_with_gguf(tmp_path / "a", tokenizer_folder, say=lines.append)
    assert re.search(r"memory, 0\.5\d GiB to check the GGUF file, 1024\.00 GiB available", lines[1])
    model = make_model(vocab_size=VOCABULARY)
    sizes = [parameter.numel() for parameter in model.parameters()]
    expected = expected_of(source_of_run(tmp_path / "a" / "run"), "bf16")
    room = gate_memory(model, expected).rest
    needed = room + 4 * (sum(sizes) + 2 * max(sizes))
    monkeypatch.setattr(export, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"loads the whole model in fp32 and needs 0\.50 GiB .* leave --gguf out"):
        export_with_gguf(tmp_path / "b", tokenizer_folder, say=lines.append)
    assert "the whole model in memory" in lines[-1] and [p.name for p in (tmp_path / "b").iterdir()] == ["run"]
    monkeypatch.setattr(export, "available_memory_bytes", lambda: needed)
    export_with_gguf(tmp_path / "c", tokenizer_folder, say=lines.append)
