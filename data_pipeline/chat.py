"""Conversations into token ids and the verified mask of what the assistant produces."""

import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.tokenizer import special_token_texts

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
"""``role`` and ``content``; an assistant's may have ``tool_calls``, a tool's ``tool_call_id`` and ``name``."""
Span = tuple[int, int]

# Llama 3.1's own default. Templates that print today's date would give other tokens tomorrow.
FIXED_DATE = "26 Jul 2024"
_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def validate_conversation(messages: Sequence[Message]) -> None:
    """Refuse anything but: at most one system message first, then user and assistant in turn, nothing empty.

    An assistant's message with ``tool_calls`` may have no content; one or more tool messages follow it, and then an
    assistant's. Raises ValueError.
    """
    if not messages:
        raise ValueError("the conversation is empty")
    expected: tuple[str, ...] = ("user",)
    for number, message in enumerate(messages, start=1):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
        if calls and role != "assistant":
            raise ValueError(f"message {number} ({role}) has tool_calls; only the assistant calls tools")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {number} ({role}) has a content that is not text but {type(content).__name__}")
        if not calls and not (content or "").strip():
            raise ValueError(f"message {number} ({role}) has no content")
        if role == "system" and number == 1:
            continue
        if role not in expected:
            raise ValueError(
                f"message {number} is from {role!r} where {' or '.join(map(repr, expected))} should speak: turns "
                "must alternate, and tools answer an assistant's tool_calls"
            )
        after_answer = ("tool",) if calls else ("user",)
        expected = {"assistant": after_answer, "tool": ("tool", "assistant")}.get(role, ("assistant",))
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message, so there is nothing to learn from")


def _canonical_call(number: int, call: Any) -> dict[str, Any]:
    """One tool call as ``{"type": "function", "function": {"name", "arguments": object}}``, other keys kept.

    Arguments given as JSON text become an object: a template that writes JSON would quote the text once more.
    """
    function, name = _function(call)
    if not name:
        raise ValueError(
            f"message {number} has a tool call without a function's name: "
            '{"type": "function", "function": {"name": "…", "arguments": {…}}} is expected'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"message {number} calls the tool {name!r} with arguments that are no JSON object ({{}} stands for none)"
        )
    rest = {} if function is call else {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **rest, "function": {"name": name, "arguments": arguments}}


def _canonical(messages: Sequence[Message]) -> list[Message]:
    """Copies as templates expect them: no key without a value, ``content`` always there."""
    result = []
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls")
        if calls and not isinstance(calls, list | tuple):
            raise ValueError(f"message {number} has tool_calls that are not a list but {type(calls).__name__}")
        plain = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
        plain["content"] = message.get("content") or ""
        if calls:
            plain["tool_calls"] = [_canonical_call(number, call) for call in calls]
        result.append(plain)
    return result


def _function(value: Any) -> tuple[dict[str, Any], str]:
    """The function of a tool or a call, which may itself be it, and its name; the name is empty where there is none."""
    function = value.get("function", value) if isinstance(value, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return (function, name) if isinstance(name, str) and name.strip() else ({}, "")


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    The assistant produces what follows the generation prompt, up to and including the token that closes the turn. The
    mask comes from the template's generation markers and from comparing renderings of the conversation; where both
    work they must agree. The renderings are, for each answer, the messages before it with the generation prompt and
    the messages up to it: prefixes of the whole. Where a template renders history otherwise than the last turn
    (Qwen-3 drops thoughts), the answers are instead what differs when other answers stand in their place, and each
    must be the end of what it is as the last message. Raises ValueError where no way is exact.

    Attributes:
        end_of_turn_id: the token that closes an answer.
        remarks: what the reader of a report should know about this template, a sentence each.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so conversations cannot be rendered: add a "
                "chat_template.jinja to it"
            )
        self._fixed, self.remarks = self._fix_date()
        special = special_token_texts(tokenizer)
        self._special_text = re.compile("|".join(map(re.escape, special))) if special else None
        self._special_ids = set(tokenizer.convert_tokens_to_ids(special))
        self.end_of_turn_id = self._find_end_of_turn()
        self._end_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn_id))
        if tokenizer.pad_token_id == self.end_of_turn_id:
            raise ValueError(
                f"the tokenizer pads with {tokenizer.pad_token!r}, the token that closes the assistant's turn: a "
                "model trained by tools that ignore padding would never learn to stop. Give the tokenizer another "
                "pad_token"
            )
        question: list[Message] = [{"role": "user", "content": "question"}]
        asked, prompted = self._text(question, None), self._text(question, None, prompt=True)
        self._prompt = prompted[len(asked) :] if prompted.startswith(asked) else ""

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of the whole conversation and, of the same length, which of them the assistant produces.

        ``tools`` are the JSON schemas of the functions that the assistant may call.
        """
        validate_conversation(messages)
        messages = _canonical(messages)
        tools = list(tools) if tools else None
        names = [_function(tool)[1] for tool in tools or []]
        if not all(names):
            bad = str((tools or [])[names.index("")])[:60]
            raise ValueError(f"a tool must be a JSON object that has a function's name, not {bad!r}")
        self._refuse_special_text(messages, tools)
        whole = self._text(messages, tools)
        if _MARKERS.search(self._tokenizer.get_chat_template(tools=tools)):
            ids, runs = self._marked(whole, messages, tools)
        else:
            ids = self._encode(whole)
            runs = self._token_spans(whole, ids, self._answers(whole, messages, tools))
        self._require_everything(whole, messages, names, [self._decode(ids[start:stop]) for start, stop in runs])
        mask = np.zeros(len(ids), dtype=bool)
        for start, stop in runs:
            mask[start:stop] = True
        return ids, mask.tolist()

    def _fix_date(self) -> tuple[dict[str, Any], list[str]]:
        template = self._tokenizer.chat_template
        text = template if isinstance(template, str) else "\n".join(template.values())
        # None is not callable, so a template that asks for the date all the same fails.
        fixed: dict[str, Any] = {"strftime_now": None} if "strftime_now" in text else {}
        if not re.search(r"\bdate_string\b", text):
            return fixed, []
        remark = f"the chat template prints a date, which is always {FIXED_DATE} here, so that tokens never change"
        return {**fixed, "date_string": FIXED_DATE}, [remark]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), **self._fixed, **options)
        except Exception as error:  # Jinja's errors, and whatever a template raises on purpose
            if "strftime_now" in self._fixed and "not callable" in str(error):
                raise ValueError(
                    "the chat template prints today's date, so the same conversation would give other tokens "
                    "tomorrow: write a date into the template in place of strftime_now(…)"
                ) from error
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _text(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str:
        return self._apply(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _find_end_of_turn(self) -> int:
        """The special token that the template puts behind an answer."""
        question: Message = {"role": "user", "content": "question"}
        answers = ("answer", "reply")
        whole, other = (
            self._encode(self._text([question, {"role": "assistant", "content": answer}], None)) for answer in answers
        )
        common = 0
        while common < min(len(whole), len(other)) and whole[-1 - common] == other[-1 - common]:
            common += 1
        for token in whole[len(whole) - common :]:
            if token in self._special_ids:
                return token
        raise ValueError("the chat template puts no special token behind an answer: a model could not learn to stop")

    def _refuse_special_text(self, messages: Sequence[Message], tools: Any) -> None:
        if self._special_text is None:
            return
        # JSON leaves the text of special tokens as it is, and holds whatever a template may print of a message.
        texts = [(f"message {n} ({m['role']})", m) for n, m in enumerate(messages, start=1)]
        for name, value in [*texts, *(("a tool's description", tool) for tool in tools or [])]:
            found = self._special_text.search(value["content"] if set(value) == {"role", "content"} else _json(value))
            if found:
                raise ValueError(
                    f"{name} contains the text {found.group()!r}, which is a special token of the tokenizer and could "
                    "end the turn: remove or rewrite it"
                )

    def _marked(self, whole: str, messages: Sequence[Message], tools: Any) -> tuple[list[int], list[Span]]:
        """Ids and the answers' tokens by the template's markers, held against the derivation where that works."""
        rendered = self._apply(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = rendered["input_ids"]
        mask = np.array(rendered["assistant_masks"], dtype=bool)
        runs = self._close_turns(ids, mask, sum(message["role"] == "assistant" for message in messages))
        if sum(stop - start for start, stop in runs) == len(ids):
            raise ValueError("the chat template marks every token as the assistant's")
        try:
            answers = self._answers(whole, messages, tools)
        except ValueError:
            return ids, runs  # the markers alone say it: they exist for templates where nothing else can
        derived = self._token_spans(whole, ids, answers)
        for number, (marked, own) in enumerate(zip(runs, derived, strict=True), start=1):
            if marked != own:
                raise ValueError(
                    f"the chat template marks {self._decode(ids[slice(*marked)])!r} as answer {number}, but behind "
                    f"the generation prompt stands {self._decode(ids[slice(*own)])!r}: put {{% generation %}} right "
                    "behind the prompt and {% endgeneration %} behind the token that closes the turn"
                )
        return ids, runs

    def _answers(self, whole: str, messages: Sequence[Message], tools: Any) -> list[Span]:
        """The characters of the whole that are each answer with its closing token."""
        spans: list[Span] = []
        as_last: list[str] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], tools, prompt=True)
            upto = self._text(messages[: index + 1], tools)
            end = upto.find(self._end_text, len(before))
            if not upto.startswith(before) or end < 0:
                raise ValueError(
                    f"the chat template renders message {index + 1} as something other than its generation prompt "
                    f"({self._prompt!r}), an answer and {self._end_text!r}, so which tokens the assistant produces "
                    "is not defined: add {% generation %} markers to the template"
                )
            upto = upto[: end + len(self._end_text)]
            as_last.append(upto[len(before) :])
            if whole.startswith(upto):
                spans.append((len(before), len(upto)))
        if len(spans) == len(as_last):
            return spans
        spans = self._answers_by_substitution(whole, messages, tools)
        for number, ((start, end), last) in enumerate(zip(spans, as_last, strict=True), start=1):
            if not last.endswith(whole[start:end]):
                raise ValueError(
                    f"the chat template renders answer {number} differently when more follow ({whole[start:end]!r} in "
                    f"place of {last!r}), so which tokens the assistant produces is not defined: add "
                    "{% generation %} markers to the template"
                )
        return spans

    def _answers_by_substitution(self, whole: str, messages: Sequence[Message], tools: Any) -> list[Span]:
        """As ``_answers``, for a template that rewrites history: what differs when other answers stand there.

        Everything from a closing token to the next generation prompt must be the same for both, so an answer is what
        stands between: special tokens cannot be within one.
        """
        stand_ins = [f"stand-in-{n}-for-an-answer" for n, m in enumerate(messages) if m["role"] == "assistant"]
        remaining = iter(stand_ins)
        others = [
            {"role": "assistant", "content": next(remaining)} if message["role"] == "assistant" else message
            for message in messages
        ]
        other, pattern = self._text(others, tools), re.compile("|".join(stand_ins))
        pieces = pattern.split(other)
        exact = pattern.findall(other) == stand_ins and bool(
            self._special_text and self._special_text.search(self._prompt)
        )
        spans: list[Span] = []
        position = 0
        for number, piece in enumerate(pieces):
            if number:
                end = whole.find(self._end_text, position)
                exact &= end >= 0 and piece.startswith(self._end_text)
                spans.append((position, end + len(self._end_text)))
                position = end
            if number < len(stand_ins):
                cut = piece.rfind(self._prompt)
                exact &= cut >= 0
                piece = piece[: cut + len(self._prompt)]
            else:
                exact &= len(whole) == position + len(piece)
            exact &= whole.startswith(piece, position)
            if not exact:
                raise ValueError(
                    "the chat template renders messages differently when more follow, and not only the beginnings of "
                    "earlier answers, so which tokens the assistant produces is not defined: add "
                    "{% generation %} markers to the template"
                )
            position += len(piece)
        return spans

    def _token_spans(self, text: str, ids: list[int], spans: Sequence[Span]) -> list[Span]:
        """The tokens of characters: no token may reach over an edge, also where the text ends there."""
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        pieces = [self._encode(text[start:stop]) for start, stop in pairwise(edges)]
        if [token for piece in pieces for token in piece] == ids:
            places = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
        else:  # a tokenizer that treats the beginning of a text in a way of its own
            beginnings = [self._encode(text[:edge]) for edge in edges[1:-1]]
            for edge, beginning in zip(edges[1:-1], beginnings, strict=True):
                if ids[: len(beginning)] != beginning:
                    raise ValueError(
                        f"the tokenizer joins {text[:edge][-12:]!r} and {text[edge:][:12]!r}, where an answer begins "
                        "or ends, so a model would never be asked for these tokens: strip the white space there"
                    )
            places = [len(beginning) for beginning in beginnings]
        result = list(zip(places[::2], places[1::2], strict=True))
        for (start, stop), (first, last) in zip(result, spans, strict=True):
            if _plain(self._decode(ids[start:stop])) != _plain(text[first:last]):
                raise ValueError(
                    f"the tokenizer makes {self._decode(ids[start:stop])[:60]!r} of the answer "
                    f"{text[first:last][:60]!r}: it does not keep the text"
                )
        return result

    def _require_everything(
        self, whole: str, messages: Sequence[Message], tool_names: Sequence[str], answers: Sequence[str]
    ) -> None:
        """Refuse a template that leaves out a message, a tool or a tool call (many ignore the last two)."""
        remaining = iter(answers)
        text = _plain(whole)
        for number, message in enumerate(messages, start=1):
            content = _plain(message["content"])
            if message["role"] == "assistant":
                answer = _plain(next(remaining))
                # Thoughts may be left out of history; what follows them may not.
                shown = content.rpartition("</think>")[2].strip() in answer
                called = [call["function"]["name"] for call in message.get("tool_calls", [])]
                missing = [name for name in called if name not in answer]
                if missing:
                    raise ValueError(
                        f"the chat template leaves out the call of the tool {missing[0]!r} in message {number}: use a "
                        "template that takes tool_calls"
                    )
            else:
                shown = content in text or _json(content)[1:-1] in text
            if not shown:
                raise ValueError(
                    f"the chat template leaves out or changes the content of message {number} ({message['role']})"
                )
        for name in tool_names:
            if name not in text:
                raise ValueError(f"the chat template leaves out the tool {name!r}: use a template that takes tools")

    def _close_turns(self, ids: list[int], mask: np.ndarray, answers: int) -> list[Span]:
        """The marked runs up to their closing token, which each must hold; what stands behind it is taken out."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        if len(runs) != answers:
            raise ValueError(
                f"the chat template marks {len(runs)} answers of the assistant in a conversation that has {answers}"
            )
        closed = []
        for start, stop in runs:
            ends = [position for position in range(start, stop) if ids[position] == self.end_of_turn_id]
            if not ends:
                raise ValueError(
                    f"the chat template does not mark the token {self._end_text!r} that closes an answer as the "
                    "assistant's, so a model would not learn to stop: move it inside the {% generation %} markers"
                )
            closed.append((start, ends[-1] + 1))
        return closed


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """As tokenizers may give a text back (Qwen's normalise to NFC), without the white space that templates trim."""
    return unicodedata.normalize("NFC", text).strip()
