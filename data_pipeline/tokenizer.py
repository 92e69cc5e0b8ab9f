"""Tokenizers: train a byte-level BPE with a chat template, load any Hugging Face one, count the bytes of tokens."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.remote_blocks import RemoteFolder, is_url

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
BYTES = 256

# The pre-tokenizer of Qwen2 (its public tokenizer.json), itself GPT-4's with digits taken one by one: contractions,
# a word with at most one leading character, a digit, punctuation with the line ends behind it, line ends, other
# white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of tokenizers' ByteLevel pre-tokenizer (GPT-2's public encoder), used where a tokenizer has no pattern of its own.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# ChatML. The markers {% generation %} tell which tokens the assistant produces: its answer and the token that closes
# the turn, not the line end behind that. Contents are trimmed, so that an answer never merges with the line end
# before it. Tools stand in the system message as JSON, a line each; a call is JSON between <tool_call> tags, which are
# plain text, as Hermes and Qwen write it; a tool's result is a turn of its own.
CHAT_TEMPLATE = """\
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] | trim + '\\n\\n' -}}{%- endif -%}
  {{- 'These tools can be called:\\n<tools>\\n' -}}
  {%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
  {{- '</tools>\\nTo call one, write a JSON object with its name and arguments:\\n<tool_call>\\n' -}}
  {{- '{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if not (tools and loop.first and message['role'] == 'system') -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
    {%- set content = (message['content'] or '') | trim -%}
    {{- content -}}
    {%- for call in message['tool_calls'] or [] -%}
      {%- set function = call['function'] or call -%}
      {{- '\\n' if content or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": ' + function['name'] | tojson + ', "arguments": ' -}}
      {{- (function['arguments'] if function['arguments'] is string else function['arguments'] | tojson) -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- message['content'] | trim + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)


# transformers' classes that take tokenizer.json as it is, and those that build the tokenizer anew from its vocabulary
# and merges: their word pattern, normalizers and default special tokens.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")
_REBUILDING_CLASSES = {
    "Qwen2Tokenizer": (WORD_PATTERN, ["NFC"], ("unk_token", "eos_token", "pad_token")),
    "GPT2Tokenizer": (GPT2_PATTERN, [], ("unk_token", "bos_token", "eos_token")),
}


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer with the special tokens and the chat template above; deterministic.

    Writes the files into ``folder`` that transformers' ``save_pretrained`` would.

    Raises:
        ValueError: a vocabulary too small for bytes and special tokens, or texts in which too few pairs of tokens
        occur twice.
    """
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocabulary_size < smallest:
        raise ValueError(
            f"a vocabulary of {vocabulary_size} is too small: {BYTES} bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens make {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocabulary_size:
        raise ValueError(
            f"the training text gives a vocabulary of {reached} tokens only, {vocabulary_size} were asked for: "
            f"use more text or a vocabulary of at most {reached}"
        )
    config = {
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "extra_special_tokens": [TURN_START, TURN_END],
        "model_max_length": int(1e30),  # transformers' word for no limit
        "pad_token": PAD,
        "tokenizer_class": "TokenizersBackend",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_tokenizer(path: Path) -> Any:
    """Load a Hugging Face tokenizer folder; never from the network, never with code of its own.

    Raises:
        FileNotFoundError: the folder or its tokenizer.json does not exist.
        ValueError: the files there cannot be read as a tokenizer.
    """
    _tokenizer_json(path)
    from transformers import AutoTokenizer  # takes seconds: it imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, from KeyError to a bare Exception out of Rust
        raise ValueError(f"{path} cannot be loaded as a tokenizer: {' '.join(str(error).split())}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{path} loads as a tokenizer without tokenizer.json ({type(tokenizer).__name__}), which is not supported"
        )
    return tokenizer


class TextTokenizer:
    """A tokenizer for plain texts: what the functions below ask of one of transformers, under the same names."""

    def __init__(self, backend: Tokenizer, eos_token: str | None, pad_token: str | None) -> None:
        self.backend_tokenizer = backend
        backend.encode_special_tokens = True
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in self.added_tokens_decoder.items() if token.special}
        self.all_special_ids, self.all_special_tokens = list(special), list(special.values())
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        self.pad_token_id: int | None = None if pad_token is None else backend.token_to_id(pad_token)

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)


def load_text_tokenizer(path: Path) -> Any:
    """As ``load_tokenizer``, but for plain texts alone and in milliseconds where possible.

    Where transformers is sure to take tokenizer.json as it is, it is not imported. It does not where the class in
    tokenizer_config.json builds another tokenizer of the vocabulary, or other files add tokens.
    """
    try:
        definition = json.loads(_tokenizer_json(path).read_bytes())
        config = json.loads((path / "tokenizer_config.json").read_bytes())
        named = _special_tokens_where_equal(definition, config, {file.name for file in path.iterdir()})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        named = None  # transformers may know more, or says what is wrong
    if named is None:
        return load_tokenizer(path)
    return TextTokenizer(Tokenizer.from_file(str(path / "tokenizer.json")), named["eos_token"], named["pad_token"])


def _special_tokens_where_equal(
    definition: dict[str, Any], config: dict[str, Any], files: set[str]
) -> dict[str, str | None] | None:
    """The special tokens by name, if transformers 5 takes tokenizer.json as it is; else None.

    Follows ``AutoTokenizer.from_pretrained`` and ``TokenizersBackend.__init__``, leaving out what is rare.
    """
    name = config["tokenizer_class"].removesuffix("Fast")
    stored = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in definition["added_tokens"]}
    declared = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    if {"config.json", "tokenizer.model", "tekken.json"} & files or "auto_map" in config:
        return None
    if not declared and {"special_tokens_map.json", "added_tokens.json"} & files:
        return None
    if definition["truncation"] or definition["padding"] or config.get("backend", "tokenizers") != "tokenizers":
        return None
    defaults: tuple[str, ...] = ()
    if name in _REBUILDING_CLASSES:
        pattern, normalizers, defaults = _REBUILDING_CLASSES[name]
        steps = [step["type"] for step in _steps(definition["normalizer"], "normalizers")]
        if split_patterns(definition) != [pattern] or steps != normalizers or config.get("add_prefix_space"):
            return None
        if definition["model"].get("ignore_merges") or (declared and declared != stored):
            return None
    elif name not in _GENERIC_CLASSES or not declared.items() <= stored.items():
        return None
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    named = {"eos_token": None, "pad_token": None} | dict.fromkeys(defaults, END_OF_TEXT) | named
    lists = [config.get(key) or [] for key in ("extra_special_tokens", "additional_special_tokens")]
    more = [_content(value) for values in lists for value in (values.values() if isinstance(values, dict) else values)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {token["content"] for token in stored.values() if token["special"]}
    if name in _REBUILDING_CLASSES:  # adds its special tokens once more, as such
        known &= {token["content"] for token in stored.values() if token == plain | {"content": token["content"]}}
    return named if {text for text in [*named.values(), *more] if text is not None} <= known else None


def _content(token: Any) -> str | None:
    """The text of a special token in tokenizer_config.json; None of a flag such as add_bos_token."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def tokenizer_fingerprint(path: Path) -> str:
    """sha256 (hexadecimal) of the folder's tokenizer.json: what manifests of token shards store."""
    return hashlib.sha256(_tokenizer_json(path).read_bytes()).hexdigest()


def tokenizer_files(path: Path) -> list[Path]:
    """The files of a folder, maybe a whole model's, that make up its tokenizer."""
    _tokenizer_json(path)
    return [path / name for name in _TOKENIZER_FILES if (path / name).is_file()]


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer's files byte for byte, so that the fingerprint stays."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(source):
        shutil.copyfile(file, destination / file.name)


@contextmanager
def tokenizer_at(place: Path | str) -> Iterator[Path]:
    """A tokenizer's folder on this machine: of one at a URL a copy, which ends with the context.

    Raises:
        FileNotFoundError: there is no tokenizer.json. OSError, ValueError: see ``RemoteFolder``.
    """
    if not is_url(place):
        yield Path(place)
        return
    folder = RemoteFolder(str(place))
    with tempfile.TemporaryDirectory() as copy:
        for name in _TOKENIZER_FILES:
            try:
                Path(copy, name).write_bytes(folder.read(name))
            except FileNotFoundError:
                if name == _TOKENIZER_FILES[0]:
                    raise
        yield Path(copy)


def plain_text_encoder(tokenizer: Any) -> Tokenizer:
    """The backend, or a copy, that reads the text of special tokens as ordinary text, without truncation or padding."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.backend_tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def document_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and behind those of a text: what the tokenizer itself adds (a BOS), and always end-of-text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): set one in its tokenizer_config.json")
    backend = tokenizer.backend_tokenizer
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            before, behind = framed[:start], framed[start + len(bare) :]
            return before, behind if behind[-1:] == [tokenizer.eos_token_id] else [*behind, tokenizer.eos_token_id]
    raise ValueError("the tokenizer changes a text when it adds special tokens, so documents cannot be framed")


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def special_token_texts(tokenizer: Any) -> list[str]:
    """The texts of all special tokens, longest first."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(texts | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def token_byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """UTF-8 bytes that each token stands for, int32 ``[vocabulary]``; special tokens stand for 0.

    Exact for byte-level BPE, and for SentencePiece-like tokenizers (``▁`` for a space, ``<0xNN>`` for a byte) that
    add no space in front of a text. None for any other, where a sum over tokens could not equal the length of the
    text: bits per byte is then undefined. Where a tokenizer normalises to NFC (Qwen), the bytes are those of the
    normalised text.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    added = {int(index): token.content for index, token in tokenizer.added_tokens_decoder.items()}
    steps = [step["type"] for step in _steps(definition["pre_tokenizer"], "pretokenizers")]
    length_of = _byte_level_length if "ByteLevel" in steps else _metaspace_length
    if not _keeps_every_byte(definition, length_of):
        return None
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    for text, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        length = len(added[index].encode()) if index in added else length_of(text)
        if length is None:
            return None
        lengths[index] = length
    # The rules above name what is known; the probe catches what a tokenizer does beside them (a space in front, text
    # dropped).
    probe = "A probe: it's 1,234 naïve façades, 你好 🙂\n\n\tindented  text\r\n#end "
    encoder = plain_text_encoder(tokenizer)
    for text in (probe, " " + probe, "word", "\n"):
        if int(lengths[encoder.encode(text, add_special_tokens=False).ids].sum()) != len(text.encode()):
            return None
    return lengths


def split_patterns(definition: dict[str, Any]) -> list[str]:
    """The regular expressions that split words in a byte-level BPE tokenizer; ValueError for any other tokenizer."""
    model, pre_tokenizer = definition["model"], definition["pre_tokenizer"] or {}
    normalizer = definition["normalizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError("it is not a byte-level BPE tokenizer")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its BPE has dropout, a prefix or a suffix")
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"]):
        raise ValueError("it is not a byte-level BPE tokenizer: not every byte is in its vocabulary")
    if any(step["type"] != "NFC" for step in normalizer.get("normalizers", [normalizer] if normalizer else [])):
        raise ValueError("it changes texts by a normalizer other than NFC")
    *splits, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] is not (not splits):
        raise ValueError("it is not a byte-level BPE tokenizer that leaves spaces as they are")
    for step in splits:
        isolates = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
        if not isolates or "Regex" not in step["pattern"]:
            raise ValueError(f"it splits words in a way that is not supported ({step['type']})")
    return [step["pattern"]["Regex"] for step in splits] or [GPT2_PATTERN]


def _tokenizer_json(path: Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no tokenizer folder {path}")
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a tokenizer folder: it has no tokenizer.json (load it with AutoTokenizer and save it "
            "with save_pretrained)"
        )
    return file


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer definition, a sequence taken apart."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _keeps_every_byte(definition: dict[str, Any], length_of: Any) -> bool:
    model = definition["model"]
    vocabulary = {entry[0] for entry in model["vocab"]} if isinstance(model["vocab"], list) else set(model["vocab"])
    normalizers = _steps(definition["normalizer"], "normalizers")
    if length_of is _byte_level_length:
        complete = model["type"] == "BPE" and set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary
        return complete and all(step["type"] == "NFC" for step in normalizers)
    complete = bool(model.get("byte_fallback")) and {f"<0x{byte:02X}>" for byte in range(BYTES)} <= vocabulary
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return complete and all(step == spaces or step["type"] == "NFC" for step in normalizers)


_BYTE_LEVEL_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())


def _byte_level_length(token: str) -> int | None:
    return len(token) if _BYTE_LEVEL_ALPHABET.issuperset(token) else None


def _metaspace_length(token: str) -> int | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())
