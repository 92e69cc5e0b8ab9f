"""Conversations with everything that templates treat in ways of their own, for the tests of masks."""

import json
from typing import Any

from data_samples import CONVERSATION, EMBEDDED

from data_pipeline.chat import ChatRenderer

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages and tools."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def tool(content: str, identity: str = "1") -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": "weather", "tool_call_id": identity}


def calls(*cities: str) -> list[dict[str, Any]]:
    return [
        {"id": str(n), "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for n, city in enumerate(cities, start=1)
    ]


PLAIN: dict[str, Conversation] = {
    "system and two answers": (CONVERSATION, None),
    "one answer": ([user("Who?"), assistant("I.")], None),
    "many scripts": (
        [user("你好 🙂"), assistant("naïve façades\n\n\tindented 🙂"), user("?"), assistant("1,234")],
        None,
    ),
    "repeated": ([user("Same."), assistant("Same."), user("Same."), assistant("Same.")], None),
    "ends with a question": ([user("Who?"), assistant("I."), user("Who else?")], None),
    "prompt quoted": (
        [user("Say assistant\n"), assistant("assistant\nassistant\n."), user("More"), assistant("No")],
        None,
    ),
}
THOUGHTS: dict[str, Conversation] = {
    "thoughts": (
        [
            user("1 + 1?"),
            assistant("<think>\nTwo.\n</think>\n\nIt is 2."),
            user("And 2 + 2?"),
            assistant("<think>\nFour?\nYes.\n</think>\n\nIt is 4."),
        ],
        None,
    ),
    "a thought in history only": (
        [user("1 + 1?"), assistant("<think>\nTwo.\n</think>\n\n2"), user("Sure?"), assistant("Yes.")],
        None,
    ),
}
TOOLS: dict[str, Conversation] = {
    "a call": ([user("Weather in Bern?"), assistant(None, tool_calls=calls("Bern")), tool("cold")], [WEATHER]),
    "a call and answers": (
        [
            {"role": "system", "content": "Be brief."},
            user("Weather in Bern?"),
            assistant("", tool_calls=calls("Bern")),
            tool('{"celsius": -3, "note": "\\"cold\\""}'),
            assistant("Cold."),
            user("Thanks."),
            assistant("Welcome."),
        ],
        [WEATHER],
    ),
    "a call after a call": (
        [
            user("Weather in Bern and Basel?"),
            assistant(None, tool_calls=calls("Bern")),
            tool("cold"),
            assistant(None, tool_calls=calls("Basel")),
            tool("warm"),
            assistant("Cold and warm."),
        ],
        [WEATHER],
    ),
}
SEVERAL_CALLS: dict[str, Conversation] = {
    "two calls at once, with words": (
        [
            user("Weather in Bern and Zürich?"),
            assistant("I look.", tool_calls=calls("Bern", "Zürich")),
            tool("cold", "1"),
            tool("warm", "2"),
            assistant("Cold and warm."),
            user("Thanks."),
            assistant("Welcome."),
        ],
        [WEATHER],
    ),
    "a thought before a call": (
        [
            user("Weather in Bern?"),
            assistant("<think>\nI must look.\n</think>\n\n", tool_calls=calls("Bern")),
            tool("cold"),
            assistant("<think>\nBrr.\n</think>\n\nCold."),
            user("Thanks."),
            assistant("Welcome."),
        ],
        [WEATHER],
    ),
}


def embedded_conversations(every: int = 20) -> list[list[dict[str, str]]]:
    files = sorted((EMBEDDED / "chat" / "english").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["messages"] for line in lines[::every]]


def render(tokenizer: Any, messages: Any, tools: Any = None) -> tuple[list[int], list[bool]]:
    """One conversation by a renderer of its own."""
    return ChatRenderer(tokenizer).render(messages, tools)
