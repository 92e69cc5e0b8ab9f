"""Engines: equal to Hugging Face tokenizers for every text, refused where they cannot be, caught where they are not."""

import json
import random
import re
import sys
from typing import Any

import numpy as np
import pytest
from data_samples import macbeth, small_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_pipeline import engines
from data_pipeline.engines import ENGINES, open_engine
from data_pipeline.tokenizer import WORD_PATTERN, plain_text_encoder

FAST = ENGINES[:2]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def gpt2_like(vocabulary_size: int = 600) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([macbeth(), "你好世界。你好世界的人们。" * 20, "ééüß" * 20], trainer)
    return wrapped(backend)


def qwen_like() -> PreTrainedTokenizerFast:
    """Normalises to NFC, and has added tokens that are not special."""
    backend = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return wrapped(backend)


def with_every_pair(pre_tokenizer: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Merges of a letter, a digit, a space, a line end, a mark with every byte: they show where words are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = []
    for one in "a1!\u0120\u010a":
        for other in alphabet:
            for pair in ((one, other), (other, one)):
                if "".join(pair) not in vocabulary:
                    vocabulary["".join(pair)] = len(vocabulary)
                    merges.append(pair)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    return wrapped(backend)


def tokenizer_from(**changes: Any) -> PreTrainedTokenizerFast:
    """Our own small tokenizer with parts of its definition, or of its model, replaced."""
    definition = json.loads(small_tokenizer().backend_tokenizer.to_str())
    for key, value in changes.items():
        (definition if key in definition else definition["model"])[key] = value
    return wrapped(Tokenizer.from_str(json.dumps(definition)))


def oracle_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoder = plain_text_encoder(tokenizer)
    return [encoder.encode(text, add_special_tokens=False).ids for text in texts]


def as_lists(result: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    flat, lengths = result
    assert lengths.dtype == np.int64 and flat.dtype == np.uint32 and len(flat) == lengths.sum()
    return [piece.tolist() for piece in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []


def random_texts(count: int, seed: int) -> list[str]:
    """Mixtures of scripts, words, marks, white space and special tokens."""
    dice = random.Random(seed)
    words = macbeth()[:20000].split()
    ranges = (
        (0, 0x80),
        (0, 0x800),
        (0x300, 0x370),
        (0, 0xD800),
        (0x4E00, 0x9FFF),
        (0xE000, 0x33500),
        (0x1F300, 0x1FAFF),
    )
    fixed = [
        "<|im_end|>",
        "<|endoftext|>",
        "<think>",
        "</think>",
        "\r\n",
        "\n\n",
        "   ",
        "'s",
        "'LL",
        " \t",
        "\u200d",
        "12",
    ]

    def piece() -> str:
        kind = dice.random()
        if kind < 0.4:
            return dice.choice(["", " "]) + dice.choice(words)
        if kind < 0.6:
            return dice.choice(fixed) * dice.choice([1, 1, 2, 30])
        first, last = dice.choice(ranges)
        return "".join(chr(dice.randrange(first, last)) for _ in range(dice.randint(1, 8)))

    return ["".join(piece() for _ in range(dice.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module", params=["own", "gpt2", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return {"own": small_tokenizer, "gpt2": gpt2_like, "qwen": qwen_like}[request.param]()


def installed(name: str) -> str:
    if name != "huggingface":
        pytest.importorskip(name)
    return name


@pytest.mark.parametrize("name", ENGINES)
def test_ids_equal_those_of_the_oracle(tokenizer: Any, name: str) -> None:
    if name == "tiktoken" and tokenizer.convert_tokens_to_ids("<think>") is not None:
        with pytest.raises(ValueError, match="added token"):
            open_engine(tokenizer, installed(name))
        return
    engine = open_engine(tokenizer, installed(name))
    assert engine.name == name
    texts = random_texts(1500, seed=1)
    assert as_lists(engine.encode(texts)) == oracle_ids(tokenizer, texts)
    assert as_lists(engine.encode([])) == []
    assert as_lists(engine.encode(["", "a"])) == oracle_ids(tokenizer, ["", "a"])


@pytest.mark.full
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("pattern", ["own", "gpt2", "nfc"])
def test_characters_of_every_kind_are_split_as_by_the_oracle(name: str, pattern: str) -> None:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = with_every_pair(
        pre_tokenizers.ByteLevel(add_prefix_space=False) if pattern == "gpt2" else split,
        normalizers.NFC() if pattern == "nfc" else None,
    )
    engine = open_engine(tokenizer, installed(name))
    codes = {*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x20000), *range(0xE0000, 0xE0200)}
    codes |= {*range(0x3400, 0xD800, 16), *range(0xE000, 0x33500, 16)}  # ideographs, Hangul, private use: a part
    codes |= {code for first, last in engines.UNICODE_17 for code in (first - 1, first, last, last + 1)}
    texts = [f"a{c}a!{c}\u0301\u03231{c}1 {c}\n{c}'{c}a" for c in map(chr, sorted(codes))]
    oracle = open_engine(tokenizer, "huggingface")
    for start in range(0, len(texts), 4096):
        chosen = texts[start : start + 4096]
        ours, theirs = engine.encode(chosen), oracle.encode(chosen)
        if not np.array_equal(ours[0], theirs[0]):
            pairs = zip(chosen, as_lists(ours), as_lists(theirs), strict=True)
            assert [f"{ord(text[1]):x}" for text, one, other in pairs if one != other] == []


def break_engine(monkeypatch: pytest.MonkeyPatch, name: str, wrong_text: str) -> None:
    kind = engines._FAST_ENGINES[name]
    encode = kind._encode_fast

    def broken(self: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        flat, lengths = encode(self, texts)
        flat = flat.copy()
        for index, text in enumerate(texts):
            if wrong_text in text:
                flat[lengths[:index].sum()] += 1
        return flat, lengths

    monkeypatch.setattr(kind, "_encode_fast", broken)


@pytest.mark.parametrize("name", FAST)
def test_wrong_engine_is_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    others = [installed(other) for other in ENGINES if other != name]
    break_engine(monkeypatch, name, "we'll")
    with pytest.raises(
        ValueError, match=f"engine {name} cannot be used.*other tokens than.*It's I'm.*auto or huggingface"
    ):
        open_engine(small_tokenizer(), name)
    engine = open_engine(small_tokenizer())
    assert engine.name in others
    assert engine.name == ("tiktoken" if name == "gigatoken" else "gigatoken")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("place", [0, 1000])
def test_wrong_ids_while_running_stop_the_work(monkeypatch: pytest.MonkeyPatch, name: str, place: int) -> None:
    engine = open_engine(small_tokenizer(), installed(name))
    break_engine(monkeypatch, name, "Duncan")
    texts = ["Hail!"] * 1001
    assert as_lists(engine.encode(texts[:400])) == oracle_ids(small_tokenizer(), texts[:400])
    texts[place] = "Duncan " * 30
    monkeypatch.setattr(engines, "SAMPLE_CHARACTERS", 5 if place == 0 else 10**9)
    with pytest.raises(
        ValueError, match=rf"{name} gives other tokens .* 'Duncan .*210 characters\).*--engine huggingface"
    ):
        engine.encode(texts) if place == 0 else engine.encode(texts[400:])


def test_of_a_long_text_the_beginning_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(small_tokenizer(), installed("gigatoken"))
    monkeypatch.setattr(engines, "SAMPLE_LONGEST", 100)
    compared = []
    monkeypatch.setattr(
        engine, "_oracle_ids", lambda text: compared.append(text) or np.array(oracle_ids(small_tokenizer(), [text])[0])
    )
    engine.encode(["fair is foul " * 100])
    assert compared == ["fair is foul " * 7 + "fair is f"]


def test_a_failing_engine_leaves_the_batch_to_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(small_tokenizer(), installed("gigatoken"))
    panic = type("PanicException", (BaseException,), {})

    def fail(self: Any, texts: list[str]) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr(engines._Gigatoken, "_encode_fast", fail)
    assert as_lists(engine.encode(["Hail!", "who"])) == oracle_ids(small_tokenizer(), ["Hail!", "who"])
    panic = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        engine.encode(["Hail!"])


def test_without_the_packages_hugging_face_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAST:
        monkeypatch.setitem(sys.modules, name, None)
    engine = open_engine(small_tokenizer())
    assert engine.name == "huggingface"
    assert len(engine.passed_over) == 2 and all("not installed" in reason for reason in engine.passed_over)
    assert as_lists(engine.encode(["Hail!"])) == oracle_ids(small_tokenizer(), ["Hail!"])
    with pytest.raises(
        ValueError, match=r"engine tiktoken cannot be used.*not installed \(pip install 'trainyard\[fast\]'\)"
    ):
        open_engine(small_tokenizer(), "tiktoken")


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="unknown engine fastest: choose auto, gigatoken, tiktoken, huggingface"):
        open_engine(small_tokenizer(), "fastest")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return wrapped(backend)


def overlapping() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    backend.add_tokens(["end|>"])
    return wrapped(backend)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (sentencepiece_like, "not a byte-level BPE"),
        (lambda: wrapped(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), "not a byte-level BPE"),
        (lambda: tokenizer_from(normalizer={"type": "Lowercase"}), "normalizer other than NFC"),
        (lambda: tokenizer_from(dropout=0.1), "dropout"),
        (lambda: tokenizer_from(pre_tokenizer={"type": "Whitespace"}), "leaves spaces as they are"),
        (
            lambda: with_every_pair(
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
                )
            ),
            "splits words in a way that is not supported (Digits)",
        ),
        (overlapping, "'end|>' and '<|im_end|>' overlap"),
    ],
)
def test_tokenizers_that_no_fast_engine_can_promise(name: str, make: Any, reason: str) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=f"engine {name} cannot be used for this tokenizer: .*{re.escape(reason)}"):
        open_engine(tokenizer, name)
    engine = open_engine(tokenizer)
    assert engine.name == "huggingface"
    assert as_lists(engine.encode(["a", "!"])) == oracle_ids(tokenizer, ["a", "!"])  # one byte: dropout has no part


def test_tiktoken_refuses_added_tokens_and_takes_no_merge_that_tokenizers_do_not() -> None:
    installed("tiktoken")
    with pytest.raises(ValueError, match=r"tiktoken cannot be used.*added tokens that are not special"):
        open_engine(qwen_like(), "tiktoken")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "ab", "bc", "abc", "cc"])}
    definition = {"vocab": vocabulary, "merges": [("b", "c"), ("a", "b"), ("ab", "c"), ("c", "c")]}
    backend = Tokenizer(models.BPE(**definition))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ["abc", "abcc", "ab", "aabbcc", "cabcab"]
    assert as_lists(open_engine(wrapped(backend), "tiktoken").encode(texts)) == oracle_ids(wrapped(backend), texts)
    backend.model = models.BPE(vocab=vocabulary, merges=[*definition["merges"], ("a", "bc")])
    with pytest.raises(ValueError, match="several of its merges give the same token"):
        open_engine(wrapped(backend), "tiktoken")
    backend.model = models.BPE(**definition, ignore_merges=True)
    with pytest.raises(ValueError, match="no merges lead to its token 'abc'"):
        open_engine(wrapped(backend), "tiktoken")


def test_tiktoken_leaves_long_runs_of_spaces_to_the_oracle(capfd: pytest.CaptureFixture[str]) -> None:
    engine = open_engine(small_tokenizer(), installed("tiktoken"))
    text = "a" + " " * 1_200_000 + "b"
    assert as_lists(engine.encode([text, "c"]))[1:] == oracle_ids(small_tokenizer(), ["c"])
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("limit", ["CACHE_TEXT_BYTES", "CACHE_MEMORY_BYTES"])
def test_the_cache_of_gigatoken_is_dropped(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    engine = open_engine(small_tokenizer(), installed("gigatoken"))
    texts = random_texts(20, seed=2)
    backend = engine._backend  # type: ignore[attr-defined]
    assert as_lists(engine.encode(texts)) == oracle_ids(small_tokenizer(), texts)
    assert engine._backend is backend  # type: ignore[attr-defined]
    monkeypatch.setattr(engines, limit, -(2**40))
    assert as_lists(engine.encode(texts)) == oracle_ids(small_tokenizer(), texts)
    assert engine._backend is not backend  # type: ignore[attr-defined]
