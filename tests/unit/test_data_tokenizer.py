"""Tokenizers: training, loading, special text, bytes of tokens."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import VOCABULARY, macbeth, save_tokenizer, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from data_pipeline.engines import difficult_texts
from data_pipeline.tokenizer import (
    SPECIAL_TOKENS,
    TURN_END,
    TextTokenizer,
    copy_tokenizer,
    document_frame,
    load_text_tokenizer,
    load_tokenizer,
    plain_text_encoder,
    special_token_texts,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)

ODD_TEXTS = [
    macbeth(),
    "",
    "héllo wörld 你好 🙂🙂",
    "\x00\t\r\n  \u2028 end ",
    "1234567",
    "<|im_end|> is text",
    "e\u0301",
]


def test_training_gives_the_size_asked_for_and_lossless_text() -> None:
    tokenizer = small_tokenizer()
    assert vocabulary_size(tokenizer) == len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    encoder = plain_text_encoder(tokenizer)
    for text in ODD_TEXTS:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert encoder.decode(ids, skip_special_tokens=False) == text
    assert len(encoder.encode("2026", add_special_tokens=False).ids) == 4  # digits one by one


def test_training_is_deterministic(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a")
    train_tokenizer(iter([macbeth()]), VOCABULARY, tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_vocabularies_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 26\d tokens only, 1000 were asked for"):
        train_tokenizer(["to be or not to be"], 1000, tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 259 is too small"):
        train_tokenizer([macbeth()], 259, tmp_path)


def test_saved_tokenizer_loads_equal_and_its_fingerprint_is_its_file(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    loaded = load_tokenizer(folder)
    assert loaded.chat_template == small_tokenizer().chat_template
    assert loaded("Out, damned spot!")["input_ids"] == small_tokenizer()("Out, damned spot!")["input_ids"]
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer_fingerprint(folder) == hashlib.sha256(content).hexdigest()
    (folder / "model.safetensors").write_bytes(b"weights")
    copy_tokenizer(folder, tmp_path / "copy")
    assert tokenizer_fingerprint(tmp_path / "copy") == tokenizer_fingerprint(folder)
    assert not (tmp_path / "copy" / "model.safetensors").exists()
    assert load_tokenizer(tmp_path / "copy").chat_template == loaded.chat_template


def test_folders_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a tokenizer"):
        load_tokenizer(tmp_path)


def test_text_of_special_tokens_stays_text() -> None:
    tokenizer = small_tokenizer()
    ids = plain_text_encoder(tokenizer).encode("a<|im_end|>b<|endoftext|>", add_special_tokens=False).ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert set(tokenizer("a<|im_end|>b")["input_ids"]) & {3}  # the tokenizer itself was not changed


def test_document_frame() -> None:
    assert document_frame(small_tokenizer()) == ([], [0])
    with_bos = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    from tokenizers.processors import TemplateProcessing

    with_bos.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)])
    framed = PreTrainedTokenizerFast(tokenizer_object=with_bos, eos_token="<|endoftext|>")
    assert document_frame(framed) == ([2], [0])
    with_bos.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    framed = PreTrainedTokenizerFast(tokenizer_object=with_bos, eos_token="<|endoftext|>")
    assert document_frame(framed) == ([], [0])
    with pytest.raises(ValueError, match="no end-of-text token"):
        document_frame(PreTrainedTokenizerFast(tokenizer_object=with_bos))


def test_byte_lengths_of_byte_level_bpe_sum_to_the_text() -> None:
    tokenizer = small_tokenizer()
    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    assert lengths.dtype == np.int32
    assert lengths.shape == (VOCABULARY,)
    assert lengths[:4].tolist() == [0, 0, 0, 0]
    encoder = plain_text_encoder(tokenizer)
    for text in ODD_TEXTS:
        assert int(lengths[encoder.encode(text, add_special_tokens=False).ids].sum()) == len(text.encode())


def _sentencepiece_like(byte_fallback: bool = True, prepend: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "</s>": 1}
    if byte_fallback:
        vocabulary |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for token in ("▁", "a", "b", "é", "▁a", "ab"):
        vocabulary[token] = len(vocabulary)
    model = models.BPE(
        vocabulary, [("▁", "a"), ("a", "b")], byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prepend else steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_byte_lengths_of_sentencepiece_like_tokenizers() -> None:
    tokenizer = _sentencepiece_like()
    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    vocabulary = tokenizer.get_vocab()
    assert [int(lengths[vocabulary[token]]) for token in ("<0xE4>", "▁a", "é", "</s>")] == [1, 2, 2, 0]
    encoder = plain_text_encoder(tokenizer)
    for text in ODD_TEXTS[1:]:
        assert int(lengths[encoder.encode(text, add_special_tokens=False).ids].sum()) == len(text.encode())


def test_byte_lengths_that_cannot_be_exact() -> None:
    assert token_byte_lengths(_sentencepiece_like(prepend=True)) is None  # a space that the text does not have
    assert token_byte_lengths(_sentencepiece_like(byte_fallback=False)) is None
    lower = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    assert token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=lower)) is None
    dropping = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    dropping.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", behavior="removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=dropping)) is None
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=words)) is None


def _assert_equal_for_texts(folder: Path, light: bool = True) -> None:
    """What transformers makes of the folder, and what plain texts are prepared with, agree in all that is used."""
    ours, theirs = load_text_tokenizer(folder), load_tokenizer(folder)
    assert isinstance(ours, TextTokenizer) == light
    for read in (document_frame, vocabulary_size, special_token_texts):
        assert read(ours) == read(theirs)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.get_vocab() == theirs.get_vocab()
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }
    lengths = [token_byte_lengths(tokenizer) for tokenizer in (ours, theirs)]
    assert np.array_equal(*lengths) if lengths[0] is not None else lengths[1] is None
    encoders = [plain_text_encoder(tokenizer) for tokenizer in (ours, theirs)]
    for text in [*ODD_TEXTS[1:], *(text[:500] for text in difficult_texts(special_token_texts(theirs)[:20]))]:
        ids = [encoder.encode(text, add_special_tokens=False).ids for encoder in encoders]
        assert ids[0] == ids[1], text[:80]


def _edit(folder: Path, config: dict[str, Any], definition: dict[str, Any] | None = None) -> Path:
    for name, changes in (("tokenizer_config.json", config), ("tokenizer.json", definition or {})):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return folder


BOS = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)])
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
FOUR = {str(index): {"content": text} | FLAGS for index, text in enumerate(SPECIAL_TOKENS)}
NEW = {str(VOCABULARY): {"content": "<|new|>"} | FLAGS}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "add_bos_token": True},
        {"added_tokens_decoder": FOUR, "extra_special_tokens": {"image_token": "<|im_end|>"}, "pad_token": None},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"} | FLAGS, "pad_token": "absent"},
    ],
)
def test_texts_need_no_transformers_where_it_takes_tokenizer_json_as_it_is(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    _assert_equal_for_texts(_edit(save_tokenizer(tmp_path / "plain"), config))
    with_bos = Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json"))
    with_bos.post_processor = BOS
    with_bos.add_tokens(["of the"])
    with_bos.save(str(tmp_path / "plain" / "tokenizer.json"))
    _assert_equal_for_texts(tmp_path / "plain")


@pytest.mark.parametrize(
    ("config", "definition"),
    [
        ({"eos_token": "<|new|>"}, {}),  # is added to the vocabulary
        ({"extra_special_tokens": ["<|new|>"]}, {}),
        ({"image_token": "<|new|>"}, {}),
        ({"added_tokens_decoder": FOUR | NEW}, {}),
        ({"tokenizer_class": "absent"}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": FOUR | NEW}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {}),  # normalises to NFC
        ({"tokenizer_class": "GPT2Tokenizer"}, {}),  # splits words in another way
        ({}, {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}),
    ],
)
def test_transformers_loads_what_it_would_change(
    tmp_path: Path, config: dict[str, Any], definition: dict[str, Any]
) -> None:
    _assert_equal_for_texts(_edit(save_tokenizer(tmp_path), config, definition), light=False)


@pytest.mark.parametrize("kind", [Qwen2Tokenizer, GPT2Tokenizer])
def test_classes_that_build_the_tokenizer_anew(tmp_path: Path, kind: Any) -> None:
    model = json.loads(small_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = {text: index - len(SPECIAL_TOKENS) for text, index in model["vocab"].items()}
    vocabulary = {text: index for text, index in vocabulary.items() if index >= 0}
    made = kind(vocab=vocabulary, merges=[tuple(merge) for merge in model["merges"]], extra_special_tokens=[TURN_END])
    made.save_pretrained(str(tmp_path))
    _assert_equal_for_texts(tmp_path)
    _assert_equal_for_texts(_edit(tmp_path, {"added_tokens_decoder": {}, "add_prefix_space": True}), light=False)


@pytest.mark.skipif("TRAINYARD_TOKENIZERS" not in os.environ, reason="see tests/real_tokenizers.sh")
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_real_tokenizers_need_no_transformers_for_texts(model: str) -> None:
    _assert_equal_for_texts(Path(os.environ["TRAINYARD_TOKENIZERS"]) / model)
