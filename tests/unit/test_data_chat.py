"""Masks of conversations: equal to the template's, derived where it has no markers, else refused."""

import re
from typing import Any

import pytest
from data_samples import CONVERSATION, EMBEDDED, small_tokenizer
from transformers import PreTrainedTokenizerFast

from data_pipeline.chat import ChatRenderer, render
from data_pipeline.tokenizer import CHAT_TEMPLATE

PLAIN_TEMPLATE = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)


def _with(template: str | None, **tokens: Any) -> PreTrainedTokenizerFast:
    chosen = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"} | tokens
    special = ["<|im_start|>", "<|im_end|>"]
    backend = small_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special, **chosen)
    tokenizer.chat_template = template
    return tokenizer


def _masked_text(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each run of masked tokens."""
    runs: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on and (index == 0 or not mask[index - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def _embedded_conversations() -> list[list[dict[str, str]]]:
    import json

    files = sorted((EMBEDDED / "chat" / "english").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["messages"] for line in lines[::20]]


def test_ids_and_mask_equal_those_of_apply_chat_template() -> None:
    tokenizer = small_tokenizer()
    for messages in [CONVERSATION, *_embedded_conversations()]:
        ids, mask = render(tokenizer, messages)
        expected = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert ids == expected["input_ids"]
        assert mask == [bool(value) for value in expected["assistant_masks"]]


def test_the_answer_and_its_closing_token_are_masked_in_and_nothing_else() -> None:
    ids, mask = render(small_tokenizer(), CONVERSATION)
    assert _masked_text(small_tokenizer(), ids, mask) == ["A friend.\nAnd thou?<|im_end|>", "Well met.<|im_end|>"]


def test_prefixes_give_the_same_as_markers() -> None:
    plain, marked = ChatRenderer(_with(PLAIN_TEMPLATE)), ChatRenderer(small_tokenizer())
    for messages in [CONVERSATION, *_embedded_conversations()]:
        assert plain.render(messages) == marked.render(messages)


def test_generation_starts_from_exactly_what_precedes_the_mask() -> None:
    tokenizer = small_tokenizer()
    ids, mask = render(tokenizer, CONVERSATION[:3])
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: mask.index(True)] == prompt


def test_line_end_inside_the_markers_is_taken_out() -> None:
    inside = CHAT_TEMPLATE.replace("'<|im_end|>' -}}{%- endgeneration", "'<|im_end|>\\n' -}}{%- endgeneration")
    ids, mask = render(_with(inside), CONVERSATION[:3])
    assert _masked_text(small_tokenizer(), ids, mask) == ["A friend.\nAnd thou?<|im_end|>"]


NO_CLOSING = CHAT_TEMPLATE.replace("| trim + '<|im_end|>' -}}{%- endg", "| trim -}}{%- endg")
CLOSING_OUTSIDE = NO_CLOSING.replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|im_end|>' -}}")
ONLY_LAST = CHAT_TEMPLATE.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
REWRITES_HISTORY = PLAIN_TEMPLATE.replace(
    "message['content'] | trim + '<|im_end|>' -}}\n  {%- else",
    "('' if loop.last else '(earlier)') + message['content'] | trim + '<|im_end|>' -}}\n  {%- else",
)
OTHER_PROMPT = PLAIN_TEMPLATE.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant: '")
ALL_MARKED = "{% generation %}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{% endgeneration %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (NO_CLOSING.replace("<|im_end|>", "\n"), "no special token behind an answer"),
        (CLOSING_OUTSIDE, r"does not mark the token '<\|im_end\|>' that closes"),
        (ONLY_LAST, "marks 1 answers of the assistant in a conversation that has 2"),
        (REWRITES_HISTORY, "differently when more follow"),
        (OTHER_PROMPT, "differently when more follow"),
        (ALL_MARKED, r"marks 1 answers of the assistant in a conversation that has 2"),
        ("{{ raise_exception('no thanks') }}", r"refuses the conversation: no thanks"),
    ],
)
def test_templates_without_an_exact_mask_are_refused(template: str | None, message: str) -> None:
    assert template != PLAIN_TEMPLATE
    with pytest.raises(ValueError, match=message):
        render(_with(template), CONVERSATION)


def test_all_tokens_marked_is_refused() -> None:
    with pytest.raises(ValueError, match="every token as the assistant's"):
        render(_with(ALL_MARKED), CONVERSATION[1:3])


def test_padding_with_the_closing_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pads with '<\|im_end\|>'"):
        render(_with(CHAT_TEMPLATE, pad_token="<|im_end|>"), CONVERSATION)


def _turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "words"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        (_turns("user", "user", "assistant"), "message 2 is from 'user' where 'assistant'"),
        (_turns("user", "assistant", "assistant"), "message 3 is from 'assistant' where 'user'"),
        (_turns("assistant", "user"), "message 1 is from 'assistant'"),
        (_turns("user", "system", "assistant"), "message 2 is from 'system'"),
        (_turns("user", "bot"), "the role 'bot'"),
        (_turns("system", "user"), "no assistant message"),
        ([{"role": "user", "content": "  "}, *_turns("assistant")], r"message 1 \(user\) has no content"),
        ([*_turns("user"), {"role": "assistant", "content": "a<|im_end|>b"}], r"message 2 .*'<\|im_end\|>'"),
        ([{"role": "user", "content": "<|endoftext|>"}, *_turns("assistant")], r"message 1 .*'<\|endoftext\|>'"),
    ],
)
def test_conversations_that_are_refused(messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(small_tokenizer(), messages)
