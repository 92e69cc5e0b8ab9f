"""Tokenizers: training, loading, special text, bytes of tokens."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from data_samples import VOCABULARY, macbeth, save_tokenizer, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.tokenizer import (
    SPECIAL_TOKENS,
    copy_tokenizer,
    document_frame,
    load_tokenizer,
    plain_text_encoder,
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
    train_tokenizer(iter([macbeth()]), VOCABULARY).save_pretrained(str(tmp_path / "b"))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_vocabularies_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 26\d tokens only, 1000 were asked for"):
        train_tokenizer(["to be or not to be"], 1000)
    with pytest.raises(ValueError, match="vocabulary of 259 is too small"):
        train_tokenizer([macbeth()], 259)


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
