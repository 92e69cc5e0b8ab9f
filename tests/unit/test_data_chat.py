"""Masks of conversations: equal to the template's, derived where it has no markers, else refused."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from chat_samples import (
    PLAIN,
    SEVERAL_CALLS,
    THOUGHTS,
    TOOLS,
    WEATHER,
    Conversation,
    assistant,
    calls,
    embedded_conversations,
    render,
    tool,
    user,
)
from data_samples import CONVERSATION, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.chat import FIXED_DATE, ChatRenderer
from data_pipeline.tokenizer import CHAT_TEMPLATE

TEMPLATES = Path(__file__).with_name("chat_templates")
PLAIN_TEMPLATE = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)


def _with(template: str | None, **tokens: Any) -> PreTrainedTokenizerFast:
    chosen = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": "<|begin|>"} | tokens
    special = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]
    backend = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special, **chosen)
    tokenizer.chat_template = template
    return tokenizer


def _plain_and_marked(name: str) -> tuple[str, str]:
    """A template, and a copy of it whose comments have become the generation markers."""
    plain = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    marked = plain.replace("{#- answer -#}", "{%- generation -%}")
    marked = marked.replace("{#- end of answer -#}", "{%- endgeneration -%}")
    assert marked.count("generation -%}") == 2
    return plain, marked


def _expected(tokenizer: Any, template: str, conversation: Conversation) -> tuple[list[int], list[bool]]:
    messages, tools = conversation
    messages = [{**message, "content": message["content"] or ""} for message in messages]
    rendered = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
        date_string=FIXED_DATE,
    )
    return rendered["input_ids"], [bool(value) for value in rendered["assistant_masks"]]


def _masked_text(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each run of masked tokens."""
    runs: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on and (index == 0 or not mask[index - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def _edit(template: str, old: str, new: str) -> str:
    assert old in template
    return template.replace(old, new)


@pytest.mark.parametrize("name", [*PLAIN, *THOUGHTS, *TOOLS, *SEVERAL_CALLS])
def test_own_template_gives_the_mask_of_apply_chat_template(name: str) -> None:
    tokenizer = small_tokenizer()
    conversation = {**PLAIN, **THOUGHTS, **TOOLS, **SEVERAL_CALLS}[name]
    expected = _expected(tokenizer, CHAT_TEMPLATE, conversation)
    assert render(tokenizer, *conversation) == expected
    assert render(_with(PLAIN_TEMPLATE), *conversation) == expected, "without the markers"


def test_embedded_conversations_have_the_mask_of_apply_chat_template() -> None:
    tokenizer = small_tokenizer()
    marked, plain = ChatRenderer(tokenizer), ChatRenderer(_with(PLAIN_TEMPLATE))
    for messages in embedded_conversations():
        assert (
            marked.render(messages) == plain.render(messages) == _expected(tokenizer, CHAT_TEMPLATE, (messages, None))
        )


@pytest.mark.parametrize(
    ("template", "conversations"),
    [
        ("thoughts_dropped", {**PLAIN, **THOUGHTS, **TOOLS, **SEVERAL_CALLS}),
        ("dated_headers", {**PLAIN, **THOUGHTS, **TOOLS}),
        ("default_system", {**PLAIN, **THOUGHTS}),
        ("brackets", {name: PLAIN[name] for name in PLAIN if name != "system and two answers"}),
    ],
)
def test_derived_mask_equals_that_of_the_same_template_with_markers(
    template: str, conversations: dict[str, Conversation]
) -> None:
    plain, marked = _plain_and_marked(template)
    renderer, with_markers = ChatRenderer(_with(plain)), ChatRenderer(_with(marked))
    for name, (messages, tools) in conversations.items():
        expected = _expected(_with(plain), marked, (messages, tools))
        if template == "default_system":  # does not trim, so the white space belongs to the answers
            messages = [{**message, "content": message["content"].strip()} for message in messages]
            expected = _expected(_with(plain), marked, (messages, tools))
        assert any(expected[1]), name
        assert renderer.render(messages, tools) == expected, name
        assert with_markers.render(messages, tools) == expected, name


def test_history_without_its_thoughts_is_masked_as_it_is_rendered() -> None:
    tokenizer = _with(_plain_and_marked("thoughts_dropped")[0])
    assert _masked_text(tokenizer, *render(tokenizer, *THOUGHTS["thoughts"])) == [
        "It is 2.<|im_end|>",
        "<think>\nFour?\nYes.\n</think>\n\nIt is 4.<|im_end|>",
    ]


def test_a_date_is_fixed_and_said() -> None:
    tokenizer = _with(_plain_and_marked("dated_headers")[0])
    renderer = ChatRenderer(tokenizer)
    ids, _ = renderer.render(CONVERSATION)
    assert "Today: 26 Jul 2024\n" in tokenizer.decode(ids)
    assert len(renderer.remarks) == 1 and "26 Jul 2024" in renderer.remarks[0]
    assert ChatRenderer(small_tokenizer()).remarks == []


def test_the_answer_and_its_closing_token_are_masked_in_and_nothing_else() -> None:
    ids, mask = render(small_tokenizer(), CONVERSATION)
    assert _masked_text(small_tokenizer(), ids, mask) == ["A friend.\nAnd thou?<|im_end|>", "Well met.<|im_end|>"]


def test_own_template_renders_plain_conversations_as_chatml() -> None:
    tokenizer = small_tokenizer()
    for messages in [CONVERSATION, *embedded_conversations()]:
        turns = [f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(turns)


def test_own_template_renders_tools_calls_and_results() -> None:
    messages, tools = SEVERAL_CALLS["two calls at once, with words"]
    text = small_tokenizer().apply_chat_template(messages[:4], tools=tools, tokenize=False)
    system, _, rest = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nThese tools can be called:\n<tools>\n{")
    assert '"description": "The weather of a city."' in system
    assert rest == (
        "<|im_start|>user\nWeather in Bern and Zürich?<|im_end|>\n"
        "<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\ncold<|im_end|>\n<|im_start|>tool\nwarm<|im_end|>\n"
    )
    named = small_tokenizer().apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *messages], tools=tools, tokenize=False
    )
    assert named.startswith("<|im_start|>system\nBe brief.\n\nThese tools can be called:\n")
    assert named.count("<|im_start|>system") == 1


def test_arguments_as_json_text_and_flat_calls_are_the_same_call() -> None:
    expected = render(small_tokenizer(), *TOOLS["a call"])
    messages, tools = copy.deepcopy(TOOLS["a call"])
    messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city":"Bern"}'
    assert render(small_tokenizer(), messages, tools) == expected
    messages[1]["tool_calls"] = [{"name": "weather", "arguments": {"city": "Bern"}}]
    assert render(small_tokenizer(), messages, tools) == expected


def test_generation_starts_from_exactly_what_precedes_the_mask() -> None:
    tokenizer = small_tokenizer()
    ids, mask = render(tokenizer, CONVERSATION[:3])
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: mask.index(True)] == prompt


CLOSE = "{{- '<|im_end|>' -}}\n    {%- endgeneration -%}"


def test_line_end_inside_the_markers_is_taken_out() -> None:
    inside = _edit(CHAT_TEMPLATE, CLOSE, "{{- '<|im_end|>\\n' -}}\n    {%- endgeneration -%}")
    inside = _edit(inside, "  {{- '\\n' -}}\n", "  {{- '' if message['role'] == 'assistant' else '\\n' -}}\n")
    ids, mask = render(_with(inside), CONVERSATION)
    assert _masked_text(small_tokenizer(), ids, mask) == ["A friend.\nAnd thou?<|im_end|>", "Well met.<|im_end|>"]


NO_CLOSING = _edit(CHAT_TEMPLATE, CLOSE, "{%- endgeneration -%}")
CLOSING_OUTSIDE = _edit(CHAT_TEMPLATE, CLOSE, "{%- endgeneration -%}{{- '<|im_end|>' -}}")
ASSISTANT = "{%- if message['role'] == 'assistant' -%}"
ONLY_LAST = _edit(CHAT_TEMPLATE, ASSISTANT, "{%- if message['role'] == 'assistant' and loop.last -%}")
ALL_MARKED = "{% generation %}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{% endgeneration %}"
HEADER = "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
HEADER_MARKED = _edit(
    _edit(CHAT_TEMPLATE, "{%- generation -%}", ""),
    f"{HEADER}\n  {ASSISTANT}",
    "{{- '<|im_start|>' + message['role'] -}}{%- if message['role'] != 'assistant' -%}{{- '\\n' -}}{%- endif -%}"
    f"\n  {ASSISTANT}{{%- generation -%}}{{{{- '\\n' -}}}}",
)
THOUGHT_UNMARKED = _edit(
    _edit(_plain_and_marked("thoughts_dropped")[1], "{%- generation -%}", ""),
    "{{- parts[-1].strip() -}}",
    "{%- generation -%}{{- parts[-1].strip() -}}",
)
USER_MARKED = _edit(
    CHAT_TEMPLATE,
    "{{- message['content'] | trim + '<|im_end|>' -}}",
    "{%- generation -%}{{- message['content'] | trim + '<|im_end|>' -}}{%- endgeneration -%}",
)
SECOND_HALF = _edit(
    CHAT_TEMPLATE,
    "{%- generation -%}",
    "{{- message['content'][:2] -}}{%- generation -%}{%- set message = {'content': message['content'][2:]} -%}",
)
NOTHING_MARKED = _edit(CHAT_TEMPLATE, ASSISTANT, "{%- if message['role'] == 'model' -%}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (NO_CLOSING.replace("<|im_end|>", "\n"), "no special token behind an answer"),
        (CLOSING_OUTSIDE, r"does not mark the token '<\|im_end\|>' that closes"),
        (ONLY_LAST, "marks 1 answers of the assistant in a conversation that has 2"),
        (ALL_MARKED, r"marks 1 answers of the assistant in a conversation that has 2"),
        (NOTHING_MARKED, "marks 0 answers of the assistant in a conversation that has 2"),
        (USER_MARKED, "marks 5 answers of the assistant in a conversation that has 2"),
        (HEADER_MARKED, r"marks '\\nA friend.* as answer 1, but behind the generation prompt stands 'A friend"),
        (SECOND_HALF, r"as answer 1, but behind the generation prompt stands"),
        (THOUGHT_UNMARKED, r"marks 'Well met.* as answer 2, but behind the generation prompt stands '<think>"),
        ("{{ raise_exception('no thanks') }}", r"refuses the conversation: no thanks"),
    ],
)
def test_templates_with_wrong_markers_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(_with(template), CONVERSATION)


def test_markers_alone_decide_where_nothing_can_be_derived() -> None:
    """Each answer is rendered with its number from the end, so no rendering is the beginning of another."""
    numbered = _edit(
        CHAT_TEMPLATE, "    {{- content -}}\n", "    {{- loop.revindex | string + ' left: ' + content -}}\n"
    )
    ids, mask = render(_with(numbered), CONVERSATION)
    texts = _masked_text(_with(numbered), ids, mask)
    assert texts == ["3 left: A friend.\nAnd thou?<|im_end|>", "1 left: Well met.<|im_end|>"]
    with pytest.raises(ValueError, match="message 5 as something other"):
        render(_with(re.sub(r"\{%- (end)?generation -%\}", "", numbered)), CONVERSATION)


PLAIN_ANSWER = "    {{- content -}}\n"
LOOP = "{%- for message in messages -%}"
SYSTEM_DROPPED = "{%- set messages = messages[1:] if messages[0]['role'] == 'system' else messages -%}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            _edit(PLAIN_TEMPLATE, PLAIN_ANSWER, "    {{- ('' if loop.last else '(earlier)') + content -}}\n"),
            "renders answer 1 differently when more follow",
        ),
        (
            _edit(PLAIN_TEMPLATE, PLAIN_ANSWER, "    {{- content if loop.last else content[:-3] -}}\n"),
            "not only the beginnings of earlier answers",
        ),
        (
            _edit(PLAIN_TEMPLATE, "'<|im_start|>assistant\\n'", "'<|im_start|>assistant: '"),
            "message 3 as something other",
        ),
        ("{{- 'Turns: ' + messages | length | string -}}" + PLAIN_TEMPLATE, "message 3 as something other"),
        (_edit(PLAIN_TEMPLATE, PLAIN_ANSWER, "    {{- content | upper -}}\n"), r"content of message 3 \(assistant\)"),
        (_edit(PLAIN_TEMPLATE, LOOP, SYSTEM_DROPPED + LOOP), r"content of message 1 \(system\)"),
        (PLAIN_TEMPLATE + "{{- strftime_now('%Y') -}}", "prints today's date"),
    ],
)
def test_templates_whose_answers_cannot_be_told_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(_with(template), CONVERSATION)


LONG = [user("A?"), assistant("a"), user("B?"), assistant("b"), user("C?"), assistant("c")]
FIRST_LINE = "{%- if messages | length > 4 -%}{{- 'long ' -}}{%- endif -%}"


def test_a_history_rewritten_outside_the_answers_keeps_exact_masks() -> None:
    """From five messages on there is another first line, whatever the answers are."""
    tokenizer = _with(FIRST_LINE + PLAIN_TEMPLATE)
    assert _masked_text(tokenizer, *render(tokenizer, LONG)) == ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>"]
    assert tokenizer.decode(render(tokenizer, LONG)[0]).startswith("long <|im_start|>user")


@pytest.mark.parametrize(
    "template",
    [
        FIRST_LINE.replace("'long '", "messages[1]['content'] | length") + PLAIN_TEMPLATE,
        FIRST_LINE + PLAIN_TEMPLATE + "{%- if messages[-1]['content'] == 'c' -%}{{- 'PS' -}}{%- endif -%}",
        FIRST_LINE + _edit(PLAIN_TEMPLATE, LOOP, "{%- for message in (messages[2:] if messages[4] else messages) -%}"),
        FIRST_LINE + _edit(PLAIN_TEMPLATE, PLAIN_ANSWER, "    {{- '' if messages[4] and loop.last else content -}}\n"),
    ],
)
def test_a_history_that_depends_on_answers_elsewhere_is_refused(template: str) -> None:
    """The first line has the length of an answer; the end a word for one; the first or the last answer is left out."""
    assert render(_with(template), LONG[:2]) == render(_with(PLAIN_TEMPLATE), LONG[:2])
    with pytest.raises(ValueError, match="not only the beginnings of earlier answers"):
        render(_with(template), LONG)


def test_all_tokens_marked_is_refused() -> None:
    with pytest.raises(ValueError, match="every token as the assistant's"):
        render(_with(ALL_MARKED), CONVERSATION[1:3])


def test_an_answer_that_the_tokenizer_joins_with_its_header_is_refused() -> None:
    """Two line ends are one token, which a model that is asked with the header and its line end never produces."""
    tokenizer = _with(_plain_and_marked("default_system")[0])
    joined = "\nWho?"
    assert len(tokenizer.encode("\n" + joined)) < len(tokenizer.encode("\n") + tokenizer.encode(joined))
    with pytest.raises(ValueError, match=r"the tokenizer joins .*assistant\\n' and '\\nWho"):
        render(tokenizer, [user("Q?"), assistant(joined)])
    with_markers = _with(_plain_and_marked("default_system")[1])
    with pytest.raises(ValueError, match="the tokenizer joins"):
        render(with_markers, [user("Q?"), assistant(joined)])


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    lossy = _with(PLAIN_TEMPLATE)
    backend = Tokenizer.from_str(lossy.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=PLAIN_TEMPLATE
    )
    with pytest.raises(ValueError, match=r"makes 'a friend.*does not keep the text"):
        render(tokenizer, CONVERSATION)


def test_a_tokenizer_that_puts_a_space_in_front_of_texts_keeps_exact_masks() -> None:
    """As Llama 2's: pieces of a text have other tokens than the text, so beginnings of it are compared instead."""
    characters = sorted({*"".join(m["content"] + m["role"] for m in CONVERSATION), *"[Q]/ \n▁<unk>"})
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(characters)}, merges=[], unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    plain, marked = _plain_and_marked("brackets")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=plain
    )
    conversation = (CONVERSATION[1:], None)
    ids, mask = render(tokenizer, *conversation)
    assert (ids, mask) == _expected(tokenizer, marked, conversation)
    assert any(mask)


def test_padding_with_the_closing_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pads with '<\|im_end\|>'"):
        render(_with(CHAT_TEMPLATE, pad_token="<|im_end|>"), CONVERSATION)


def test_a_tokenizer_without_padding_is_fine() -> None:
    tokenizer = _with(CHAT_TEMPLATE, pad_token=None)
    assert tokenizer.pad_token_id is None
    assert render(tokenizer, CONVERSATION) == render(small_tokenizer(), CONVERSATION)


def test_templates_that_ignore_tools_are_refused() -> None:
    tokenizer = _with(_plain_and_marked("default_system")[0])
    messages, tools = TOOLS["a call"]
    with pytest.raises(ValueError, match="leaves out the call of the tool 'weather' in message 2"):
        render(tokenizer, messages)
    with pytest.raises(ValueError, match="leaves out the tool 'weather'"):
        render(tokenizer, [user("Who?"), assistant("I.")], tools)


def test_a_template_that_shows_one_call_of_two_is_refused() -> None:
    messages = [user("Q?"), assistant(None, tool_calls=[*calls("Bern"), {"name": "time", "arguments": {}}])]
    with pytest.raises(ValueError, match="leaves out the call of the tool 'time' in message 2"):
        render(_with(_plain_and_marked("dated_headers")[0]), messages, [WEATHER])


def _turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "words"} for role in roles]


CALLING = assistant(None, tool_calls=calls("Bern"))


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
        ([*_turns("user"), assistant(None)], r"message 2 \(assistant\) has no content"),
        ([*_turns("user"), assistant("", tool_calls=[])], r"message 2 \(assistant\) has no content"),
        ([*_turns("user"), {"role": "assistant", "content": ["a"]}], r"message 2 .* not text but list"),
        ([*_turns("user"), {"role": "assistant", "content": "a<|im_end|>b"}], r"message 2 .*'<\|im_end\|>'"),
        ([{"role": "user", "content": "<|endoftext|>"}, *_turns("assistant")], r"message 1 .*'<\|endoftext\|>'"),
        (_turns("user", "assistant", "tool"), "message 3 is from 'tool' where 'user'"),
        (_turns("user", "tool"), "message 2 is from 'tool' where 'assistant'"),
        ([*_turns("user"), CALLING, *_turns("user")], "message 3 is from 'user' where 'tool'"),
        ([*_turns("user"), CALLING, *_turns("tool", "user")], "message 4 is from 'user' where 'tool' or 'assistant'"),
        ([*_turns("user"), CALLING, {"role": "tool", "content": ""}], r"message 3 \(tool\) has no content"),
        ([{**_turns("user")[0], "tool_calls": calls("Bern")}], r"message 1 \(user\) has tool_calls"),
        ([*_turns("user"), assistant(None, tool_calls={"name": "f"})], "message 2 has tool_calls that are not a list"),
        ([*_turns("user"), assistant(None, tool_calls=["f"])], "message 2 has a tool call without a function's name"),
        ([*_turns("user"), assistant(None, tool_calls=[{"name": "f"}])], "message 2 calls the tool 'f' with arguments"),
        (
            [*_turns("user"), assistant(None, tool_calls=[{"name": "f", "arguments": '{"a":'}])],
            "message 2 calls the tool 'f' with arguments that are no JSON object",
        ),
        (
            [*_turns("user"), assistant(None, tool_calls=[{"name": "f", "arguments": {"a": ["<|im_end|>"]}}])],
            r"message 2 \(assistant\) contains the text '<\|im_end\|>'",
        ),
        ([*_turns("user"), CALLING, tool("<|im_end|>")], r"message 3 \(tool\) contains the text '<\|im_end\|>'"),
    ],
)
def test_conversations_that_are_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(small_tokenizer(), messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "function"}], "must be a JSON object that has a function's name"),
        (["weather"], "must be a JSON object that has a function's name"),
        ([{"name": "f", "description": "<|im_end|>"}], r"a tool's description contains the text '<\|im_end\|>'"),
    ],
)
def test_tools_that_are_refused(tools: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(small_tokenizer(), CONVERSATION, tools)
