"""Chat data sets of every common layout become messages."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_samples import write_jsonl
from source_samples import read

from data_pipeline.sources import Document, Ledger, ReadOptions, content_kind, find_files, read_documents

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
TOOL_MESSAGES = [
    {"role": "user", "content": "Weather in Ulm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    {"role": "assistant", "content": "It rains."},
]
TOOL_EXPECTED = [message | {"content": message["content"] or ""} for message in TOOL_MESSAGES]


def _documents(path: Path, **options: Any) -> list[Document]:
    chosen = ReadOptions(**options)
    files, _ = find_files([str(path)], chosen)
    assert content_kind(files[0], chosen) == "chat"
    return list(read_documents(files[0], chosen))


@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bing"])
@pytest.mark.parametrize("user", ["human", "user"])
def test_sharegpt(tmp_path: Path, user: str, assistant: str) -> None:
    turns = [{"from": user, "value": "Hi"}, {"from": assistant, "value": "Ho"}]
    with_system = [{"from": "system", "value": "Be brief."}, *turns]
    tool = [*turns, {"from": "tool", "value": "12"}, {"from": "function", "value": "13"}]
    rows: list[dict[str, Any]] = [
        {"id": "a", "conversations": turns},
        {"conversations": with_system, "system": "ignored, for the turns have one"},
        {"conversations": turns, "system": "Be kind."},
        {"conversations": tool, "system": ""},
        {"conversations": [USER, ASSISTANT]},
    ]
    assert read(write_jsonl(tmp_path / "a.jsonl", rows)) == [
        [USER, ASSISTANT],
        [{"role": "system", "content": "Be brief."}, USER, ASSISTANT],
        [{"role": "system", "content": "Be kind."}, USER, ASSISTANT],
        [USER, ASSISTANT, {"role": "tool", "content": "12"}, {"role": "tool", "content": "13"}],
        [USER, ASSISTANT],
    ]


def test_alpaca(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Hi", "input": "", "output": "Ho", "text": "a rendering of it"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be exact."},
        {"instruction": "Hi", "output": "Ho", "history": [["Add 1.", "2"], ["Again.", "3"]]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(path) == [
        [USER, ASSISTANT],
        [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "Add.\n1 and 2"},
            {"role": "assistant", "content": "3"},
        ],
        [
            {"role": "user", "content": "Add 1."},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "3"},
            USER,
            ASSISTANT,
        ],
    ]
    assert read(write_jsonl(tmp_path / "b.jsonl", rows[:1]), format="jsonl") == ["a rendering of it"]
    with pytest.raises(ValueError, match="'history' is not a list of pairs"):
        read(write_jsonl(tmp_path / "c.jsonl", [{"instruction": "x", "output": "y", "history": ["z"]}]))
    with pytest.raises(ValueError, match="the field 'output' is null"):
        read(write_jsonl(tmp_path / "c.jsonl", [{"instruction": "x", "output": None}]))


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL])])
def test_tool_calls_and_tools_travel_through(tmp_path: Path, tools: Any, calls: Any) -> None:
    messages = [message | ({"tool_calls": calls} if "tool_calls" in message else {}) for message in TOOL_MESSAGES]
    rows = [{"messages": messages, "tools": tools}, {"messages": [USER, ASSISTANT], "tools": None}]
    documents = _documents(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [document.messages for document in documents] == [TOOL_EXPECTED, [USER, ASSISTANT]]
    assert [document.tools for document in documents] == [TOOLS, None]


def test_tool_calls_in_parquet_come_without_the_nulls_that_its_columns_need(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([{"messages": TOOL_MESSAGES}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [TOOL_EXPECTED]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER | {"content": None, "tool_calls": [CALL]}]}, "message 1: the field 'content' is null"),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, "message 2: the field 'content' is null"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": "x"}]}, "message 2: the field 'tool_calls' is not JSON"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": {"a": 1}}]}, "the field 'tool_calls' is not a list"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "x"}]}, "'reasoning_content' is not supported"),
        ({"messages": [USER, ASSISTANT | {"function_call": {"a": 1}}]}, "'function_call' is not supported"),
        ({"messages": [USER, {"role": "tool", "content": "x", "name": 3}]}, "message 2: the field 'name' is a int"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "a.jsonl:1: the field 'tools' is not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "the field 'tools' is not a list"),
        ({"messages": "[1"}, "the field 'messages' is not JSON"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "the field 'messages' is not JSON"),
        ({"conversations": [{"from": "human"}]}, "message 1: there is no field 'content'"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "'narrator' is unknown; known are system, user, human",
        ),
        ({"messages": [USER, ASSISTANT], "system": 3}, "the field 'system' is a int"),
    ],
)
def test_bad_conversations(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        read(path)
    write_jsonl(path, [row, {"messages": [USER, ASSISTANT]}])
    ledger = Ledger()
    assert read(path, ledger=ledger, skip_bad_rows=True) == [[USER, ASSISTANT]]
    (entry,) = ledger.skipped.values()
    assert entry["locations"][0].startswith(f"{path}:1")


def test_lone_surrogates_inside_messages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "\\udc00"}]}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the field 'messages' holds half of a surrogate pair"):
        read(tmp_path / "a.jsonl")
