"""Answers to a file of prompts: order, ids, batches, kills, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import make_model, make_tokenizer
from transformers import GenerationConfig

from gpt import generate_file as module
from gpt.generate import Sampling, generate
from gpt.generate_file import generate_file

SAMPLED = Sampling(10, temperature=0.9, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_model().save_pretrained(folder)
    make_tokenizer(folder)
    GenerationConfig(eos_token_id=[256, 259], pad_token_id=257).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(tmp_path: Path) -> Path:
    """21 prompts of many lengths, most without an id."""
    rows: list[dict[str, Any]] = [{"prompt": "ab" * (n * 7 % 20 + 1)} for n in range(19)]
    rows.append({"id": "turns", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "é"}]})
    rows.append({"prompt": "last", "source": {"page": 3}})
    return write(tmp_path / "prompts.jsonl", rows)


def test_each_line_comes_back_in_order_with_the_answer_that_it_gets_alone(folder: Path, tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path)
    seen: list[tuple[int, int]] = []
    report = generate_file(
        folder,
        prompts,
        tmp_path / "new" / "out.jsonl",
        Sampling(10),
        batch_size=2,
        progress=lambda *counts: seen.append(counts),
    )
    assert report == {"out": str(tmp_path / "new" / "out.jsonl"), "prompts": 21, "answered_before": 0}
    answers = read(tmp_path / "new" / "out.jsonl")
    assert [row["id"] for row in answers] == [*range(1, 20), "turns", 21]
    assert [{k: row[k] for k in row if k not in ("id", *module.ANSWER_FIELDS)} for row in answers[:19]] == read(
        prompts
    )[:19]
    assert answers[20]["source"] == {"page": 3}
    [alone] = generate(folder, ["é"], Sampling(10), system="S")
    assert {name: answers[19][name] for name in module.ANSWER_FIELDS} == {n: alone[n] for n in module.ANSWER_FIELDS}
    for row in (*answers[:19], answers[20]):
        [alone] = generate(folder, [row["prompt"]], Sampling(10)) if row["id"] in (1, 7, 21) else [row]
        assert row["text"] == alone["text"]
    assert seen[-1] == (21, 21) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not list((tmp_path / "new").glob("*.partial"))


def test_a_sample_depends_on_seed_and_id_and_not_on_the_batch(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": "same"} for name in ("a", "b", "c")]
    write(tmp_path / "p.jsonl", rows)
    generate_file(folder, tmp_path / "p.jsonl", tmp_path / "3.jsonl", SAMPLED, batch_size=3)
    write(tmp_path / "q.jsonl", rows[::-1])
    generate_file(folder, tmp_path / "q.jsonl", tmp_path / "1.jsonl", SAMPLED, batch_size=1)
    assert read(tmp_path / "3.jsonl") == read(tmp_path / "1.jsonl")[::-1]
    assert len({row["text"] for row in read(tmp_path / "3.jsonl")}) == 3, "the same prompt again is another sample"


def test_a_killed_call_goes_on_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = prompts_of(tmp_path), tmp_path / "out.jsonl"
    how: dict[str, Any] = {"batch_size": 1}
    generate_file(folder, prompts, tmp_path / "whole.jsonl", SAMPLED, **how)
    real, calls = module.answer_batch, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 12:  # 8 lines are written together
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "answer_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_file(folder, prompts, out, SAMPLED, **how)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(partial.read_bytes().splitlines()) == 1 + 8
    with partial.open("ab") as file:
        file.write(
            partial.read_bytes().splitlines(keepends=True)[1] + b'{"id": 10, "te'
        )  # what a kill in a write leaves
    calls.clear()
    calls += [()] * 20
    report = generate_file(folder, prompts, out, SAMPLED, **how)
    assert report["answered_before"] == 8 and len(calls) == 20 + 13
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_a_call_finished_but_did_not_rename_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_publish", lambda *_: None)
        generate_file(folder, prompts, out, Sampling(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "answer_batch", None)
        assert generate_file(folder, prompts, out, Sampling(4))["answered_before"] == 2
    assert len(read(out)) == 2


def test_other_answers_are_never_mixed_or_overwritten(folder: Path, tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_publish", lambda *_: None)
        generate_file(folder, prompts, out, Sampling(4))
    with pytest.raises(ValueError, match=r"out.jsonl.partial was begun by a call with other settings; repeat that"):
        generate_file(folder, prompts, out, Sampling(5))
    write(prompts, [{"prompt": "b"}])
    with pytest.raises(ValueError, match="with other prompts and settings"):
        generate_file(folder, prompts, out, Sampling(5))
    partial = tmp_path / "out.jsonl.partial"
    for content in ("mine\n", "[1]\n", "3\n"):
        partial.write_text(content)
        with pytest.raises(ValueError, match=r"out.jsonl.partial holds no answers that a call had begun; move it away"):
            generate_file(folder, prompts, out, Sampling(5))
        assert partial.read_text() == content
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"out.jsonl exists; give another file, or remove this one"):
        generate_file(folder, prompts, out, Sampling(4))
    assert out.read_text() == "mine"


def test_two_calls_at_once_do_not_write_into_one_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    real, began = module.answer_batch, []

    def other_call_meanwhile(*arguments: Any) -> Any:
        began.append((tmp_path / "out.jsonl.partial").read_bytes())
        with pytest.raises(ValueError, match=r"Another call is at work on .*out.jsonl; wait for it or end it"):
            generate_file(folder, prompts, out, Sampling(4))
        assert (tmp_path / "out.jsonl.partial").read_bytes() == began[-1]
        return real(*arguments)

    monkeypatch.setattr(module, "answer_batch", other_call_meanwhile)
    generate_file(folder, prompts, out, Sampling(4))
    assert len(began) == 1 and len(read(out)) == 2

    late, real_encode = tmp_path / "late.jsonl", module._encode

    def other_call_ends_first(*arguments: Any) -> Any:
        late.write_text("of another call")
        return real_encode(*arguments)

    monkeypatch.setattr(module, "_encode", other_call_ends_first)
    with pytest.raises(ValueError, match=r"late.jsonl exists; give another file, or remove this one"):
        generate_file(folder, prompts, late, Sampling(4))
    assert late.read_text() == "of another call"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{prompt: x}", "the line is not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("", "the line is empty; each line must be a JSON object"),
        ('"x"', "the line holds a str, not an object with fields"),
        ('{"prompt": "\\ud83d"}', "the line is not UTF-8, or has half a surrogate pair"),
        ('{"id": 1}', "exactly one of the fields prompt and messages"),
        ('{"prompt": "x", "messages": []}', "exactly one of the fields prompt and messages"),
        ('{"prompt": " "}', "prompt must be a text that is not empty"),
        ('{"prompt": ["x"]}', "prompt must be a text that is not empty"),
        ('{"prompt": "x", "text": "y"}', "the line has the field text, which the answer is written to"),
        ('{"prompt": "x", "id": 1}', "the id 1 is that of line 1, too"),
        ('{"prompt": "x", "id": true}', "id is True; it must be a text or a whole number"),
        ('{"messages": []}', "messages must be a list of messages that is not empty"),
        ('{"messages": [{"role": "user"}]}', "message 1 must be an object with role and content"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1 has the role 'bot'; the roles are system"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is from 'assistant'"),
        (json.dumps({"prompt": "x" * 100}), "The prompt has 119 tokens and up to 10 new ones are asked for"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, problem: str
) -> None:
    monkeypatch.setattr(module, "answer_batch", None)
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n{{"prompt": "fine"}}\n', encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        generate_file(folder, file, tmp_path / "out.jsonl", Sampling(10))
    assert str(refused.value).startswith(f"{file}:2: ") and problem in str(refused.value)
    assert not list(tmp_path.glob("out*"))


def test_missing_and_empty_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl does not exist; give a JSONL file"):
        generate_file(folder, tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty; it must hold a JSON object a line"):
        generate_file(folder, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
