"""Rows of chat data sets as lists of messages: messages, ShareGPT, Alpaca, and tables of prompts and responses."""

from typing import Any

import orjson

from data_pipeline.documents import BadRow, Message, ReadOptions, string_field
from data_pipeline.templates import template_columns, template_messages

MESSAGES_FIELDS = ("messages", "conversations")
ALPACA_FIELDS = ("instruction", "output")
OTHER_FIELDS = ("input", "history", "system", "tools")
ROLES = dict(system="system", user="user", human="user", assistant="assistant", gpt="assistant", chatgpt="assistant")
ROLES |= dict(bing="assistant", tool="tool", function="tool")
# These change what a turn means; other keys (ids, weights) say something about a message only.
UNSUPPORTED_MESSAGE_KEYS = ("function_call", "reasoning_content", "thinking")


def conversation_fields(options: ReadOptions) -> tuple[str, ...]:
    """All columns that a conversation may be in."""
    if options.template is not None:
        return template_columns(options.template)
    return (*MESSAGES_FIELDS, options.prompt_field, options.response_field, *ALPACA_FIELDS, *OTHER_FIELDS)


def holds_conversations(columns: list[str], options: ReadOptions) -> bool:
    """Whether a table with these columns is one of conversations."""
    present = set(columns)
    pairs = ({options.prompt_field, options.response_field}, set(ALPACA_FIELDS))
    return bool(present & set(MESSAGES_FIELDS)) or any(pair <= present for pair in pairs)


def conversation(row: dict[str, Any], options: ReadOptions) -> tuple[list[Message], list[Any] | None]:
    """The messages of a row, and the tools that it offers (None: none).

    Messages have ``role`` (system, user, assistant or tool) and ``content``, and of ``tool_calls``, ``tool_call_id``
    and ``name`` what the row gives. Alpaca's input follows the instruction on a new line. Whether the turns make sense
    is not looked at here.

    Raises:
        BadRow: a field is missing, or holds something else.
    """
    if options.template is not None:
        return template_messages(options.template, row), None
    tools = _list_field(row, "tools") if row.get("tools") else None
    for field in MESSAGES_FIELDS:
        if field in row:
            turns = _list_field(row, field)
            if not all(isinstance(turn, dict) for turn in turns):
                raise _no_messages(field)
            messages = [_message(turn, f", message {number}") for number, turn in enumerate(turns, start=1)]
            return _with_system(row, messages), tools or None
    if options.prompt_field in row or not set(ALPACA_FIELDS) <= set(row):
        messages = _pair(string_field(row, options.prompt_field), string_field(row, options.response_field))
    else:
        messages = _alpaca(row)
    return _with_system(row, messages), tools or None


def _no_messages(field: str) -> BadRow:
    return BadRow("no list of messages", f"the field {field!r} is not a list of objects with role and content")


def _list_field(row: dict[str, Any], field: str, inside: str = "") -> list[Any]:
    """A list, or the JSON of one: tables of plain columns hold it so."""
    value = row[field]
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise BadRow("not JSON", f"the field {field!r} is not JSON", inside) from None
    if not isinstance(value, list):
        if field in MESSAGES_FIELDS:
            raise _no_messages(field)
        raise BadRow("field that is not a list", f"the field {field!r} is not a list", inside)
    return value


def _message(turn: dict[str, Any], inside: str) -> Message:
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if turn.get(key):
            wrong = f"the key {key!r} is not supported; messages have role and content"
            raise BadRow("unsupported key of a message", wrong, inside)
    role = string_field(turn, "from" if "from" in turn and "role" not in turn else "role", inside)
    if role not in ROLES:
        raise BadRow("unknown role", f"the role {role!r} is unknown; known are {', '.join(ROLES)}", inside)
    message: Message = {"role": ROLES[role]}
    key = "value" if "value" in turn and "content" not in turn else "content"
    calls = _list_field(turn, "tool_calls", inside) if turn.get("tool_calls") else []
    may_be_silent = calls and message["role"] == "assistant" and turn.get(key) is None
    message["content"] = "" if may_be_silent else string_field(turn, key, inside)
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow("field that is not a list", "the field 'tool_calls' is not a list of objects", inside)
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if turn.get(key) is not None:
            message[key] = string_field(turn, key, inside)
    return message


def _pair(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in _list_field(row, "history") if row.get("history") else []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            wrong = "the field 'history' is not a list of pairs of instruction and output"
            raise BadRow("field that is not a list", wrong)
        messages += _pair(*turn)
    prompt = string_field(row, "instruction")
    if row.get("input"):
        prompt += "\n" + string_field(row, "input")
    return messages + _pair(prompt, string_field(row, "output"))


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Put the row's own ``system`` text in front, where the messages do not begin with one."""
    if not row.get("system") or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": string_field(row, "system")}, *messages]
