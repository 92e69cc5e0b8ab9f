"""Answers to a file of prompts, in batches; what a killed call has finished is not done again."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from gpt.generate import Loading, Message, PromptEncoder, Sampling, answer_batch, load, read_rows

ROLES = ("system", "user", "assistant", "tool")
ANSWER_FIELDS = ("text", "ended", "new_tokens")
BATCHES_PER_WRITE = 8
"""So many batches are sorted by length together, which saves padding, and written together."""


def generate_file(
    model_dir: Path,
    prompts: Path,
    out: Path,
    sampling: Sampling | None = None,
    *,
    loading: Loading | None = None,
    as_chat: bool | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer each line of a JSONL file; `out` gets the same lines in the same order with `text`, `ended`, `new_tokens`.

    A line has `prompt` (text) or `messages` (a conversation that waits for an answer); a missing `id` becomes its line
    number. All lines are checked before the first is answered. Answers grow in `out` + `.partial`, which the same call
    goes on with, and which becomes `out` at the end. Each line is sampled from the seed and its id, so that neither the
    batch nor an interruption changes what is drawn.

    Raises:
        FileNotFoundError, ValueError: a line that is bad or too long, with file and line; an `out` that exists; a
            partial one of another call, or of one that is still at work.
    """
    sampling, loading = sampling or Sampling(), loading or Loading()
    rows = _read_prompts(prompts)
    _refuse_existing(out)
    model, tokenizer = load(model_dir, loading)
    call = {
        "model": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(model_dir.iterdir()) if f.is_file()},
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "settings": asdict(sampling) | {"as_chat": as_chat, "system": system, "batch_size": batch_size},
        "dtype": loading.dtype,
    }
    encoder = PromptEncoder(model, tokenizer, sampling.max_new_tokens, as_chat=as_chat, system=system)
    encoded = list(_encode(encoder, rows, prompts))
    partial, at_once = out.with_name(out.name + ".partial"), batch_size * BATCHES_PER_WRITE
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file:
        _lock(file, out)
        done = _finished(partial, call, at_once, len(rows))
        for start in range(done, len(rows), at_once):
            chunk = range(start, min(start + at_once, len(rows)))
            answers: dict[int, dict[str, Any]] = {}
            by_length = sorted(chunk, key=lambda i: len(encoded[i]))
            for first in range(0, len(by_length), batch_size):
                batch = by_length[first : first + batch_size]
                seeds = [_seed(sampling.seed, rows[i]["id"]) for i in batch]
                ids = [encoded[i] for i in batch]
                answered = answer_batch(model, tokenizer, ids, encoder.end_tokens, sampling, seeds)
                answers |= zip(batch, answered, strict=True)
                if progress is not None:
                    progress(start + len(answers), len(rows))
            file.writelines(json.dumps(rows[i] | answers[i], ensure_ascii=False) + "\n" for i in chunk)
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, out)
    return {"out": str(out), "prompts": len(rows), "answered_before": done}


def _read_prompts(file: Path) -> list[dict[str, Any]]:
    """The lines of a prompts file, each with an `id` that no other has."""
    seen: dict[Any, int] = {}

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        number = len(seen) + 1
        if taken := [name for name in ANSWER_FIELDS if name in row]:
            raise ValueError(f"the line has the field {taken[0]}, which the answer is written to; rename it")
        if ("prompt" in row) == ("messages" in row):
            raise ValueError("the line must have exactly one of the fields prompt and messages")
        if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
            raise ValueError("prompt must be a text that is not empty")
        if "messages" in row:
            _check_messages(row["messages"])
        name = row.get("id", number)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"id is {name!r}; it must be a text or a whole number")
        if name in seen:
            raise ValueError(f"the id {name!r} is that of line {seen[name]}, too; each line needs its own")
        seen[name] = number
        return {"id": name, **row}

    return read_rows(file, parse)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of messages that is not empty")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} must be an object with role and content, both texts")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} has the role {message.get('role')!r}; the roles are {', '.join(ROLES)}")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the last message is from {messages[-1]['role']!r}, so there is nothing to answer")


def _encode(encoder: PromptEncoder, rows: list[dict[str, Any]], file: Path) -> Iterator[list[int]]:
    for number, row in enumerate(rows, start=1):
        prompt: str | list[Message] = row["prompt"] if "prompt" in row else row["messages"]
        try:
            yield encoder.encode(prompt)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from error


def _seed(seed: int, name: str | int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name!r}".encode()).digest()[:7])


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists; give another file, or remove this one.")


def _lock(partial: TextIO, out: Path) -> None:
    """Keep other calls from the partial file while this one has it open. Raises ValueError where another is at work."""
    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"Another call is at work on {out}; wait for it or end it, or give another file.") from None
    except OSError:
        pass  # no locks on this file system
    _refuse_existing(out)  # another call may have ended since, and have removed the file that is open here


def _finished(partial: Path, call: dict[str, Any], at_once: int, rows: int) -> int:
    """How many answers the partial file holds; an empty one gets its first line.

    Its first line tells the call that began it. What a kill left of answers that are written together is cut off, so
    that the rest is answered in the batches of an uninterrupted call. Raises ValueError when another call began it, or
    it is something else.
    """
    lines = partial.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if not lines:
        partial.write_text(json.dumps(call) + "\n", encoding="utf-8")
        return 0
    try:
        began = dict(json.loads(lines[0]))
    except (ValueError, TypeError):
        raise ValueError(f"{partial} holds no answers that a call had begun; move it away.") from None
    if differing := [name for name in call if began.get(name) != call[name]]:
        raise ValueError(
            f"{partial} was begun by a call with other {' and '.join(differing)}; repeat that call, or remove the file."
        )
    done = len(lines) - 1 if len(lines) > rows else (len(lines) - 1) // at_once * at_once
    os.truncate(partial, sum(map(len, lines[: 1 + done])))
    return done


def _publish(partial: Path, out: Path) -> None:
    """The answers without the line about the call, under their own name."""
    ready = out.with_name(out.name + ".tmp")
    with partial.open("rb") as source, ready.open("wb") as target:
        source.readline()
        while block := source.read(2**20):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    ready.replace(out)
    partial.unlink()
