"""Masks with the tokenizers and templates of Qwen-3, Llama-3 and SmolLM2, which tests/real_tokenizers.sh fetches.

The expected masks are those of `apply_chat_template` with a copy of each template into which generation markers are
edited; that the copy still renders the same is checked every time.
"""

import copy
import functools
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from chat_samples import (
    PLAIN,
    SEVERAL_CALLS,
    THOUGHTS,
    TOOLS,
    Conversation,
    assistant,
    embedded_conversations,
    render,
    user,
)
from data_samples import CONVERSATION
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.chat import FIXED_DATE, ChatRenderer
from data_pipeline.tokenizer import CHAT_TEMPLATE, load_tokenizer

FOLDER = os.environ.get("TRAINYARD_TOKENIZERS")
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="TRAINYARD_TOKENIZERS names no folder of real tokenizers (tests/real_tokenizers.sh makes one)",
)


def _value(file: BinaryIO, kind: int) -> Any:
    """One value of GGUF metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    if kind == 8:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode()
    if kind == 9:
        inner, count = struct.unpack("<IQ", file.read(12))
        return [_value(file, inner) for _ in range(count)]
    layout = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}[
        kind
    ]
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _smollm2(path: Path) -> PreTrainedTokenizerFast:
    """As shipped; its pre-tokenizer is the one that llama.cpp calls "smollm": digits one by one, then GPT-2's."""
    with path.open("rb") as file:
        magic, version, _, entries = struct.unpack("<4sIQQ", file.read(24))
        assert (magic, version) == (b"GGUF", 3)
        metadata = {}
        for _ in range(entries):
            name = _value(file, 8)
            (kind,) = struct.unpack("<I", file.read(4))
            metadata[name.removeprefix("tokenizer.ggml.")] = _value(file, kind)
    assert metadata["pre"] == "smollm"
    tokens = metadata["tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["token_type"], strict=True) if kind == 3]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=control,
        bos_token=tokens[metadata["bos_token_id"]],
        eos_token=tokens[metadata["eos_token_id"]],
        pad_token=tokens[metadata["padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
    )


@functools.cache
def _shipped(model: str) -> tuple[Any, str]:
    """The tokenizer and the template that came with it."""
    assert FOLDER is not None
    folder = Path(FOLDER) / model
    tokenizer = _smollm2(folder / "metadata.gguf") if model == "smollm2" else load_tokenizer(folder)
    return tokenizer, tokenizer.chat_template


def _set_up(model: str, template: str) -> Any:
    """The model's tokenizer with its own template, or with one of those that come with TRL. One at a time."""
    assert FOLDER is not None
    tokenizer, shipped = _shipped(model)
    own = Path(FOLDER) / "trl" / f"{template}.jinja"
    tokenizer.chat_template = shipped if template == "shipped" else own.read_text(encoding="utf-8")
    if model == "smollm2":
        tokenizer.pad_token = "<|endoftext|>"  # shipped with the closing token, which is refused
    return tokenizer


BEGIN, END = "{%- generation -%}", "{%- endgeneration -%}"
QWEN_HEADER = "'<|im_start|>' + message.role + '\\n"
LLAMA_TURN = "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
LLAMA_HEADER = "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'"
EDITS: dict[str, list[tuple[str, int, str]]] = {
    # (what stands in the template, how often, what comes in its place)
    "qwen3": [
        (
            "{%- if loop.index0 > ns.last_query_index %}",
            1,
            f"{{{{- {QWEN_HEADER}' }}}}{BEGIN}{{%- if loop.index0 > ns.last_query_index %}}",
        ),
        (f"{{{{- {QWEN_HEADER}<think>", 1, "{{- '<think>"),
        (f"{{{{- {QWEN_HEADER}' + content }}}}", 2, "{{- content }}"),
        (
            "{%- endif %}\n        {{- '<|im_end|>\\n' }}\n    {%- elif",
            1,
            f"{{%- endif %}}{{{{- '<|im_end|>' }}}}{END}{{{{- '\\n' }}}}{{%- elif",
        ),
    ],
    "llama3": [
        (
            "{{ content }}",
            1,
            "{% if message['role'] == 'assistant' %}{% set cut = content.partition('<|end_header_id|>\\n\\n') %}"
            f"{{{{- cut[0] + cut[1] -}}}}{BEGIN}{{{{- cut[2] -}}}}{END}{{%- else %}}{{{{ content }}}}{{% endif %}}",
        ),
    ],
    "llama3_1": [
        (
            f"{LLAMA_TURN}+ message['content'] | trim + '<|eot_id|>' }}}}",
            1,
            f"{LLAMA_TURN} }}}}{{%- if message['role'] == 'assistant' -%}}"
            f"{BEGIN}{{{{- message['content'] | trim + '<|eot_id|>' }}}}{END}"
            "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif -%}",
        ),
        (f'{LLAMA_HEADER} -}}}}\n            {{{{- \'{{"name"', 1, f'{LLAMA_HEADER} -}}}}{BEGIN}{{{{- \'{{"name"'),
        ('{{- "}" }}', 1, f'{{{{- "}}<|eot_id|>" }}}}{END}'),
        ('{%- else %}\n            {{- "<|eot_id|>" }}', 1, "{%- else %}"),
    ],
    "smollm2": [
        (
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            1,
            "{{'<|im_start|>' + message['role'] + '\\n' -}}{%- if message['role'] == 'assistant' -%}"
            f"{BEGIN}{{{{- message['content'] + '<|im_end|>' -}}}}{END}"
            "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' }}",
        ),
    ],
}
EDITS["llama3_2"] = [
    EDITS["llama3_1"][0],
    (f'{LLAMA_HEADER} -}}}}\n        {{{{- \'{{"name"', 1, f'{LLAMA_HEADER} -}}}}{BEGIN}{{{{- \'{{"name"'),
    ('{{- "}" }}\n        {{- "<|eot_id|>" }}', 1, f'{{{{- "}}<|eot_id|>" }}}}{END}'),
]
ALL = {**PLAIN, **THOUGHTS, **TOOLS, **SEVERAL_CALLS}
CASES = [
    # (model, template, edits, conversations)
    ("qwen3", "shipped", "qwen3", ALL),
    ("qwen3", "qwen3", "qwen3", ALL),
    ("llama3", "shipped", "llama3", {**PLAIN, **THOUGHTS}),
    ("llama3", "llama3_1", "llama3_1", {**PLAIN, **THOUGHTS, **TOOLS}),
    ("llama3", "llama3_2", "llama3_2", {**PLAIN, **THOUGHTS, **TOOLS}),
    ("smollm2", "shipped", "smollm2", {**PLAIN, **THOUGHTS}),
]


def _stripped(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": (message["content"] or "").strip()} for message in messages]


@pytest.mark.parametrize(("model", "template", "edits", "conversations"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_masks_equal_apply_chat_template(
    model: str, template: str, edits: str, conversations: dict[str, Conversation]
) -> None:
    tokenizer = _set_up(model, template)
    plain = marked = tokenizer.chat_template
    for old, count, new in EDITS[edits]:
        assert marked.count(old) == count, old
        marked = marked.replace(old, new)
    renderer = ChatRenderer(tokenizer)
    embedded = {f"embedded {n}": (messages, None) for n, messages in enumerate(embedded_conversations(40))}
    for name, (messages, tools) in {**conversations, **embedded}.items():
        messages = _stripped(messages)  # Qwen-3 and SmolLM2 keep white space, which then merges with the header's
        options = {"tools": tools, "date_string": FIXED_DATE}
        text = tokenizer.apply_chat_template(messages, chat_template=plain, tokenize=False, **options)
        assert tokenizer.apply_chat_template(messages, chat_template=marked, tokenize=False, **options) == text
        expected = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True, **options
        )
        ids, mask = renderer.render(messages, tools)
        assert ids == expected["input_ids"], name
        assert ids == tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"], name
        assert mask == [bool(value) for value in expected["assistant_masks"]], name
        assert any(mask), name


@pytest.mark.parametrize("model", ["qwen3", "llama3", "smollm2"])
def test_own_template_on_real_vocabularies(model: str) -> None:
    tokenizer = copy.deepcopy(_set_up(model, "shipped"))
    if model == "llama3":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    renderer = ChatRenderer(tokenizer)
    for name, (messages, tools) in ALL.items():
        messages = [{**message, "content": message["content"] or ""} for message in messages]
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = renderer.render(messages, tools)
        assert (ids, mask) == (expected["input_ids"], [bool(value) for value in expected["assistant_masks"]]), name


def test_marked_templates_by_others_agree_or_are_refused() -> None:
    """TRL's Llama-3 copy marks what is derived without marks; its Qwen-2.5 copy takes in the header's line end."""
    derived = render(_set_up("llama3", "llama3"), CONVERSATION)
    assert render(_set_up("llama3", "llama3_training"), CONVERSATION) == derived
    for messages, tools in ALL.values():
        assert any(render(_set_up("qwen3", "qwen3_training"), messages, tools)[1])
    with pytest.raises(ValueError, match=r"marks '\\nI.<\|im_end\|>' as answer 1, but behind the generation prompt"):
        render(_set_up("qwen3", "qwen2_5_training"), [user("Who?"), assistant("I.")])


def test_what_the_real_ones_cannot_show_exactly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer joins .*assistant\\n' and '\\n\\nI"):
        render(_set_up("qwen3", "shipped"), [user("Who?"), assistant("\n\nI."), user("You?"), assistant("I.")])
    messages, tools = TOOLS["a call"]
    for model in ("llama3", "smollm2"):
        with pytest.raises(ValueError, match="leaves out the call of the tool 'weather' in message 2"):
            render(_set_up(model, "shipped"), messages, tools)
    several, tools = SEVERAL_CALLS["two calls at once, with words"]
    with pytest.raises(ValueError, match="only supports single tool-calls at once"):
        render(_set_up("llama3", "llama3_1"), several, tools)


def test_smollm2_as_shipped_pads_with_the_closing_token() -> None:
    assert FOLDER is not None
    tokenizer = _smollm2(Path(FOLDER) / "smollm2" / "metadata.gguf")
    with pytest.raises(ValueError, match=r"pads with '<\|im_end\|>'"):
        ChatRenderer(tokenizer)
