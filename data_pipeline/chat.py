"""Conversations into token ids and the verified mask of what the assistant produces."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.tokenizer import special_token_texts

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


def validate_conversation(messages: Sequence[Message]) -> None:
    """Refuse anything but: at most one system message first, then user and assistant in turn, nothing empty."""
    if not messages:
        raise ValueError("the conversation is empty")
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) has no content")
        if role == "system" and number == 1:
            continue
        if role != expected:
            raise ValueError(f"message {number} is from {role!r} where {expected!r} should speak: turns must alternate")
        expected = "assistant" if role == "user" else "user"
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message, so there is nothing to learn from")


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    The mask comes from the template's generation markers; without them, from rendering a growing list of messages,
    each of which must be an exact token prefix of the whole. Raises ValueError where neither can be exact.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so conversations cannot be rendered: add a "
                "chat_template.jinja to it"
            )
        template = tokenizer.get_chat_template()
        self._has_markers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None
        special = special_token_texts(tokenizer)
        self._special_text = re.compile("|".join(map(re.escape, special))) if special else None
        self._special_ids = set(tokenizer.convert_tokens_to_ids(special))
        self.end_of_turn_id = self._find_end_of_turn()
        if tokenizer.pad_token_id == self.end_of_turn_id:
            raise ValueError(
                f"the tokenizer pads with {tokenizer.pad_token!r}, the token that closes the assistant's turn: a "
                "model trained by tools "
                "that ignore padding would never learn to stop. Give the tokenizer another pad_token"
            )

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of the whole conversation and, of the same length, which of them the assistant produces."""
        validate_conversation(messages)
        self._refuse_special_text(messages)
        if self._has_markers:
            rendered = self._apply(messages, return_assistant_tokens_mask=True)
            ids, raw = rendered["input_ids"], np.array(rendered["assistant_masks"], dtype=bool)
        else:
            ids, raw = self._mask_from_prefixes(messages)
        mask = self._close_turns(ids, raw, sum(message["role"] == "assistant" for message in messages))
        if mask.all():
            raise ValueError("the chat template marks every token as the assistant's")
        return ids, mask.tolist()

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
        except Exception as error:  # Jinja's errors, and whatever a template raises on purpose
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _ids(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        return self._apply(messages, add_generation_prompt=add_generation_prompt)["input_ids"]

    def _find_end_of_turn(self) -> int:
        """The special token that the template puts behind an answer."""
        question: list[Message] = [{"role": "user", "content": "question"}]
        whole = self._ids([*question, {"role": "assistant", "content": "answer"}])
        other = self._ids([*question, {"role": "assistant", "content": "reply"}])
        common = 0
        while common < min(len(whole), len(other)) and whole[-1 - common] == other[-1 - common]:
            common += 1
        for token in whole[len(whole) - common :]:
            if token in self._special_ids:
                return token
        raise ValueError("the chat template puts no special token behind an answer: a model could not learn to stop")

    def _refuse_special_text(self, messages: Sequence[Message]) -> None:
        if self._special_text is None:
            return
        for number, message in enumerate(messages, start=1):
            found = self._special_text.search(message["content"])
            if found:
                raise ValueError(
                    f"message {number} ({message['role']}) contains the text {found.group()!r}, which is a special "
                    "token of the tokenizer "
                    "and could end the turn: remove or rewrite it"
                )

    def _mask_from_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        whole = self._ids(messages)
        mask = np.zeros(len(whole), dtype=bool)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._ids(messages[:index], add_generation_prompt=True)
            upto = self._ids(messages[: index + 1])
            if whole[: len(before)] != before or whole[: len(upto)] != upto:
                raise ValueError(
                    f"the chat template renders the messages before and with answer {index + 1} differently when "
                    "more follow, so which "
                    "tokens the assistant produces is not defined: add {% generation %} markers to the template"
                )
            mask[len(before) : len(upto)] = True
        return whole, mask

    def _close_turns(self, ids: list[int], mask: np.ndarray, answers: int) -> np.ndarray:
        """Check that each answer is one run that holds its closing token; unmask what stands behind that."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        if len(runs) != answers:
            raise ValueError(
                f"the chat template marks {len(runs)} answers of the assistant in a conversation that has {answers}"
            )
        closed = np.zeros_like(mask)
        for start, stop in runs:
            ends = [position for position in range(start, stop) if ids[position] == self.end_of_turn_id]
            if not ends:
                raise ValueError(
                    "the chat template does not mark the token "
                    f"{self._tokenizer.convert_ids_to_tokens(self.end_of_turn_id)!r} that closes "
                    "an answer as the assistant's, so a model would not learn to stop: move it inside the "
                    "{% generation %} markers"
                )
            closed[start : ends[-1] + 1] = True
        return closed


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Render one conversation (``[{"role", "content"}, ...]``); for many, keep a ``ChatRenderer``."""
    return ChatRenderer(tokenizer).render(messages)
