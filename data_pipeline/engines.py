"""Token ids of plain texts by the fastest engine that is proven equal to Hugging Face tokenizers, which is the oracle.

gigatoken and tiktoken are optional packages. One of them is used for a tokenizer only when the tokenizer is of a kind
that it can be equal for, and when it gives the oracle's ids for a set of difficult texts. While it runs, samples are
compared; texts on which engines are known to differ (``_contested``) are left to the oracle.
"""

import abc
import importlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import orjson
import psutil
from tokenizers import Tokenizer, pre_tokenizers

from data_pipeline.tokenizer import plain_text_encoder, special_token_texts, split_patterns

ENGINES = ("gigatoken", "tiktoken", "huggingface")  # the fastest first
SAMPLE_TEXTS = 1000  # one text in so many is compared with the oracle, ...
SAMPLE_CHARACTERS = 2**22  # ... and the first text of a batch after so many characters: the oracle is 60 times slower
SAMPLE_LONGEST = 2**12  # of a longer text its beginning is encoded by both
CACHE_TEXT_BYTES = 2 * 10**9  # gigatoken 0.10 never empties its cache, whose 32-bit offsets would overflow one day
CACHE_MEMORY_BYTES = 2**29
LONGEST_RUN = 250_000  # characters of white space; a run of a million overflows the stack of tiktoken's regex engine

# Characters that Unicode 17 made letters or numbers: gigatoken 0.10 splits words by Unicode 17, tokenizers by 16.
UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
FIRST_UNASSIGNED = 0x378
FIRST_SURROGATE, LAST_SURROGATE = 0xD800, 0xDFFF  # UTF-16 writes code points above 0xFFFF as two of them
_ASSIGNED_PLANES = 0x40000  # no plane between 3 and 14 has characters, and 14 to 16 have neither letters nor numbers

# Of all texts one after another, uint32 [tokens]; tokens of each text, int64 [texts].
Ids = tuple[np.ndarray, np.ndarray]


class Engine:
    """Hugging Face tokenizers: no special tokens are added, and their texts are read as ordinary text.

    It uses as many threads as ``TOKENIZERS_PARALLELISM`` and ``RAYON_NUM_THREADS`` of the process allow; the other
    engines use one.
    """

    name = "huggingface"

    def __init__(self, tokenizer: Any) -> None:
        self.oracle: Tokenizer = plain_text_encoder(tokenizer)
        self.passed_over: list[str] = []  # why faster engines are not used, one sentence each

    def encode(self, texts: Sequence[str]) -> Ids:
        """The token ids of all texts, one text after another, and the number of tokens of each text."""
        return _flatten([entry.ids for entry in self.oracle.encode_batch_fast(list(texts), add_special_tokens=False)])


class _ComparedEngine(Engine, abc.ABC):
    """What fast engines share: refusal of tokenizers, the proof at opening, samples, texts left to the oracle."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._definition = orjson.loads(self.oracle.to_str())
        self._patterns = split_patterns(self._definition)
        added = _separate_added_tokens(self._definition)
        # The oracle, too, reads special tokens as text; for the others they must not exist.
        self._definition["added_tokens"] = added
        # Only texts that are NFC already get here, see _contested.
        self._normalizes = self._definition["normalizer"] is not None
        self._definition["normalizer"] = None
        self._texts = 0
        self._characters = SAMPLE_CHARACTERS  # since the last sample at the start of a batch: the first is one
        self._load()
        self._prove(difficult_texts([*special_token_texts(tokenizer), *(token["content"] for token in added)]))

    @abc.abstractmethod
    def _load(self) -> None:
        """Make the engine anew, its cache empty."""

    @abc.abstractmethod
    def _encode_fast(self, texts: list[str]) -> Ids:
        """Ids and lengths of texts of which none is contested."""

    def encode(self, texts: Sequence[str]) -> Ids:
        """As the oracle does it.

        Raises:
            ValueError: a text that was compared has other ids than the oracle's.
        """
        contested = self._contested(texts)
        left = set(contested)
        try:
            flat, lengths = self._encode_fast(["" if index in left else text for index, text in enumerate(texts)])
        except BaseException as error:
            _raise_unless_engine_failed(error)
            self._load()
            return super().encode(texts)
        assert len(lengths) == len(texts) and lengths.sum() == len(flat)
        if contested:
            pieces = np.split(flat, np.cumsum(lengths)[:-1])
            for index in contested:
                pieces[index] = self._oracle_ids(texts[index])
            lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
            flat = np.concatenate(pieces)
        self._compare_samples(texts, flat, lengths)
        return flat, lengths

    def _oracle_ids(self, text: str) -> np.ndarray:
        return np.array(self.oracle.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def _contested(self, texts: Sequence[str]) -> list[int]:
        """Which texts are left to the oracle; ASCII never is, and nearly every batch passes as a whole."""
        beyond_ascii = [index for index, text in enumerate(texts) if not text.isascii()]
        if beyond_ascii and self._is_contested("\n".join(texts[index] for index in beyond_ascii)):
            return [index for index in beyond_ascii if self._is_contested(texts[index])]
        return []

    def _is_contested(self, text: str) -> bool:
        codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")  # half as long as the code points
        if ((codes >= FIRST_SURROGATE) & (codes <= LAST_SURROGATE)).any():
            codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        rare = codes[np.flatnonzero(codes >= FIRST_UNASSIGNED)].astype(np.int64)
        if _new_characters()[np.minimum(rare, _ASSIGNED_PLANES)].any():
            return True
        # Normal forms of different Unicode versions differ, but never for a text that is in its normal form.
        return self._normalizes and not unicodedata.is_normalized("NFC", text)

    def _compare_samples(self, texts: Sequence[str], flat: np.ndarray, lengths: np.ndarray) -> None:
        chosen = set(range(-self._texts % SAMPLE_TEXTS, len(texts), SAMPLE_TEXTS))
        if self._characters >= SAMPLE_CHARACTERS and len(texts):
            chosen.add(0)
            self._characters = 0
        self._texts += len(texts)
        self._characters += sum(map(len, texts))
        ends = np.cumsum(lengths)
        for index in sorted(chosen):
            text, ids = texts[index], flat[ends[index] - lengths[index] : ends[index]]
            if len(text) > SAMPLE_LONGEST:
                text = text[:SAMPLE_LONGEST]
                if self._contested([text]):
                    continue
                ids = self._encode_fast([text])[0]
            if not np.array_equal(ids, self._oracle_ids(text)):
                raise ValueError(
                    f"the engine {self.name} gives other tokens than Hugging Face tokenizers for the text "
                    f"{_shortened(text)}: use --engine huggingface"
                )

    def _prove(self, texts: list[str]) -> None:
        contested = set(self._contested(texts))
        texts = [text for index, text in enumerate(texts) if index not in contested]
        both = (self._encode_fast(texts), super().encode(texts))
        ours, theirs = (np.split(flat, np.cumsum(lengths)[:-1]) for flat, lengths in both)
        for text, ids, expected in zip(texts, ours, theirs, strict=True):
            if not np.array_equal(ids, expected):
                raise ValueError(f"it gives other tokens than Hugging Face tokenizers for the text {_shortened(text)}")


class _Gigatoken(_ComparedEngine):
    name = "gigatoken"

    def _load(self) -> None:
        package = importlib.import_module("gigatoken")
        self._backend = package.Tokenizer.from_json(orjson.dumps(self._definition).decode())
        self._cached_bytes = 0
        self._memory_bytes = psutil.Process().memory_info().rss

    def _encode_fast(self, texts: list[str]) -> Ids:
        # one by one: a batch would come as an awkward array, which takes longer to make, and 0.2 s to import
        pieces = [self._backend.encode(text) for text in texts]
        lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        flat = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
        self._cached_bytes += sum(map(len, texts))
        grown_bytes = psutil.Process().memory_info().rss - self._memory_bytes
        if self._cached_bytes > CACHE_TEXT_BYTES or grown_bytes > CACHE_MEMORY_BYTES:
            self._load()
        return flat, lengths


class _Tiktoken(_ComparedEngine):
    name = "tiktoken"

    def _load(self) -> None:
        if self._definition["added_tokens"]:
            raise ValueError("the tokenizer has added tokens that are not special")
        if len(self._patterns) != 1:
            raise ValueError("the tokenizer splits words in several steps")
        package = importlib.import_module("tiktoken")
        ranks, self._ids = _ranks(self._definition)
        self._backend = package.Encoding(
            "tokenizer", pat_str=self._patterns[0], mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_fast(self, texts: list[str]) -> Ids:
        flat, lengths = _flatten([self._backend.encode_ordinary(text) for text in texts])
        return self._ids[flat], lengths

    def _contested(self, texts: Sequence[str]) -> list[int]:
        long = [index for index, text in enumerate(texts) if len(text) > LONGEST_RUN]
        long = [i for i in long if any(len(run.group()) > LONGEST_RUN for run in re.finditer(r"\s+", texts[i]))]
        return sorted({*long, *super()._contested(texts)})


_FAST_ENGINES: dict[str, type[_ComparedEngine]] = {"gigatoken": _Gigatoken, "tiktoken": _Tiktoken}


def open_engine(tokenizer: Any, name: str = "auto") -> Engine:
    """The engine of a name for a tokenizer of transformers; ``auto``: the fastest that can be proven equal.

    Raises:
        ValueError: an unknown name, or an engine that was asked for by name and cannot be used, with the reason.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {name}: choose auto, {', '.join(ENGINES)}")
    passed_over = []
    for candidate in ENGINES if name == "auto" else (name,):
        if candidate not in _FAST_ENGINES:
            break
        reason = "it is not installed (pip install 'trainyard[fast]')"
        try:
            return _FAST_ENGINES[candidate](tokenizer)
        except ModuleNotFoundError:
            pass
        except BaseException as error:
            _raise_unless_engine_failed(error)
            reason = " ".join(str(error).split())
        passed_over.append(f"the engine {candidate} cannot be used for this tokenizer: {reason}")
        if name != "auto":
            raise ValueError(f"{passed_over[0]}; use --engine auto or huggingface")
    engine = Engine(tokenizer)
    engine.passed_over = passed_over
    return engine


def difficult_texts(contents: Iterable[str]) -> list[str]:
    """Texts on which tokenizers are known to differ, those of special and added tokens among them."""
    added = list(contents)
    return [
        "",
        "\0",
        "a\0b\0\0 c",
        "It's I'm we'll they'd you've we're DON'T 'S 'Ll '\u017f '\u212a x'y ''s ' s",
        "0 12 123 1234 12345678901234567890 3.14 1,000 \u0663\u0664 \u2167 \u00bd x2y 2x",
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4",
        "\u0e44\u0e17\u0e22 \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05b8",
        "\U0001f642\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
        "\U0001f44d\U0001f3fd \U0001d54f \U00020000 \U000e0067\U000e007f \ue000 \U0010fffd",
        "e\u0301 a\u0323\u0301 a\u0301\u0323 \u1e69 \ufb01 \u00c5 \u212b \u1100\u1161 \u0344 \u0958",
        "\t\ttabs\t and\u00a0spaces\u2003\u2028\u2029\u3000\u0085\ufeff\u200b\x1c\x1f\x7f end ",
        "line\nline\r\nline\r\r\n\n\n  \n \n\tline\n\n   indented\n   ",
        " leading", "  two", "trailing  ", " ", "  ", "\n", " \n ", "a" + " " * 5000 + "b", "\n" * 300 + "x", "\t" * 77,
        *(character * 20_000 for character in ("a", " ", "!", "\u4f60", "\n", "1", "ab ", "\U0001f642", "e\u0301")),
        "!!! ??? ... --- ___ *** /// \\\\ <|x|> {[()]} a-b_c.d@e.f #tag $9 %d \u201cq\u201d\u2014\u2026",
        "def f(x):\n    return {'a': x[1:], \"b\": 0x1F}  # note\n\n\nclass A:\n\tpass\n",
        "pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaft aAaAaA HTTPServer2Go",
        "".join(map(chr, range(0x20, 0x250))),
        " ".join(map(chr, range(0x250, 0x1000, 7))),
        *added,
        *(f"a{text}b {text} {text}{text}\n{text}\t " for text in added),
        "".join(added),
        " ".join(text[1:] + text[:-1] for text in added),
    ]  # fmt: skip


def _flatten(lists: list[list[int]]) -> Ids:
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    return np.fromiter(chain.from_iterable(lists), dtype=np.uint32, count=int(lengths.sum())), lengths


def _raise_unless_engine_failed(error: BaseException) -> None:
    """A panic in Rust is not an Exception; an interruption by the user neither."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}... ({len(text)} characters)"


@lru_cache(maxsize=1)
def _new_characters() -> np.ndarray:
    """bool ``[code point]``: unknown to this Python's Unicode tables, or new in Unicode 17."""
    table = np.zeros(_ASSIGNED_PLANES + 1, dtype=bool)
    table[:-1] = [category == "Cn" for category in map(unicodedata.category, map(chr, range(_ASSIGNED_PLANES)))]
    for first, last in UNICODE_17:
        table[first : last + 1] = True
    return table


def _separate_added_tokens(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are not special. ValueError for one that could overlap with another that is found in another pass.

    The oracle finds the places of special tokens even where it reads them as text, and nothing else in them.
    """
    tokens = definition["added_tokens"]
    added = [token for token in tokens if not token["special"]]
    if any(token["single_word"] for token in added):
        raise ValueError("it has added tokens that stand only for whole words")
    for one in added:
        for other in tokens:
            same_pass = not other["special"] and other["normalized"] == one["normalized"]
            if not same_pass and _overlap(one["content"], other["content"]):
                raise ValueError(f"its added tokens {one['content']!r} and {other['content']!r} overlap")
    return added


def _overlap(one: str, other: str) -> bool:
    if one in other or other in one:
        return True
    ends = range(1, min(len(one), len(other)))
    return any(one[-length:] == other[:length] or other[-length:] == one[:length] for length in ends)


def _ranks(definition: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """tiktoken's table (bytes of a token: its rank among the merges), and the token id of each rank, uint32.

    tiktoken joins two neighbours whenever their bytes together are in the table, tokenizers when the pair is in the
    list of merges. Both do the same if every token in the table is what tokenizers make of its own bytes: the
    neighbours then went through the same merges as there. Tokens that no merges lead to are left out.
    """
    model = definition["model"]
    rank_of = {left + right: 256 + place for place, (left, right) in enumerate(model["merges"])}
    if len(rank_of) != len(model["merges"]):
        raise ValueError("several of its merges give the same token")
    byte_of = _byte_of_character()
    rank_of |= byte_of
    merging = Tokenizer.from_str(json.dumps({**definition, "model": {**model, "ignore_merges": False}})).model
    ids = np.zeros(256 + len(model["merges"]), dtype=np.uint32)
    table = {}
    for token, index in model["vocab"].items():
        if token in rank_of and [part.id for part in merging.tokenize(token)] == [index]:
            ids[rank_of[token]] = index
            table[bytes(byte_of[character] for character in token)] = rank_of[token]
        elif model.get("ignore_merges"):
            raise ValueError(f"no merges lead to its token {token!r}")
    return table, ids


def _byte_of_character() -> dict[str, int]:
    """The byte for each character of the byte-level alphabet: printable ones stand for themselves, others follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(plain.values()))
    return plain | dict(zip(alphabet[len(plain) :], others, strict=True))
