"""`trainyard serve`: transformers' server around one model; who may ask what, and what it refuses."""

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
import uvicorn
from small_checkpoint import make_model, make_tokenizer
from transformers import GenerationConfig

from gpt import serve as module
from gpt.generate import Sampling, generate, load
from gpt.serve import serve
from gpt.served_app import LONGEST_ANSWER_TOKENS, _bound, build_app
from launch.cli import main

TOKEN = "a-token"
END = 259  # <|im_end|>


def save_folder(folder: Path, *, chat: bool = True) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer(folder, chat=chat)
    GenerationConfig(eos_token_id=[256, END], pad_token_id=257).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The app behind a real HTTP server in a thread."""
    yield from _running(folder)


def _running(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app("tiny", *load(folder), TOKEN), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0)


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_are_those_of_generate(client: openai.OpenAI, folder: Path) -> None:
    expected = generate(folder, ["Who?"], Sampling(12))[0]
    asked = {"model": "tiny", "messages": question("Who?"), "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content.rstrip("�") == expected["text"]
    assert answer.choices[0].finish_reason == ("stop" if expected["ended"] else "length")
    assert answer.usage.completion_tokens == expected["new_tokens"] > 3
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert len([part for part in parts if part.choices[0].delta.content]) > 1
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed == expected["text"] and parts[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    text = generate(folder, ["So"], Sampling(8), as_chat=False)[0]["text"]
    plain = client.completions.create(model="tiny", prompt="So", max_tokens=8, temperature=0)
    assert plain.choices[0].text.rstrip("�") == text


def test_the_temperature_of_a_request_counts(client: openai.OpenAI) -> None:
    """transformers alone would take the most likely token, since an exported folder does not ask for sampling."""

    def ask(**settings: float) -> str:
        answer = client.completions.create(model="tiny", prompt="So", max_tokens=24, **settings)
        return answer.choices[0].text

    greedy = ask(temperature=0)
    assert ask(temperature=0) == greedy
    assert ask(temperature=5, seed=1) == ask(temperature=5, seed=1) != greedy
    assert ask(temperature=5, seed=1) != ask(temperature=5, seed=2)
    assert ask(seed=1) == ask(temperature=1, seed=1)


def test_only_who_has_the_token_may_ask(url: str) -> None:
    for key in ("another-token", "a-toke", "a-token-"):
        stranger = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Give the token that `trainyard serve` printed"):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="tiny", messages=question("Who?"))
    for headers in ({}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}):
        answer = stranger._client.get(f"{url}/models", headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_websocket_needs_the_token_too(folder: Path) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "extensions": {"websocket.http.response": {}}}
    asyncio.run(build_app("tiny", *load(folder), TOKEN)(scope, None, send))
    assert sent[0]["type"] == "websocket.http.response.start" and sent[0]["status"] == 401


def test_it_knows_one_model(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert [model.id for model in client.models.list()] == ["tiny"]
    for name in ("gpt2", "tiny@main", "../tiny", "/etc"):
        with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'"):
            client.chat.completions.create(model=name, messages=question("Who?"))
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions", "/docs"):
        with pytest.raises(openai.NotFoundError, match="There is no"):
            client.post(str(client.base_url).removesuffix("/v1/") + path, body={"model": "gpt2"}, cast_to=object)


def test_a_prompt_beyond_the_positions_is_refused_and_answers_end_there(client: openai.OpenAI) -> None:
    """The model has 128 positions, and a character is a token."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="has 200 tokens, but the model has 128 positions"):
            client.completions.create(model="tiny", prompt="x" * 200, stream=stream)
    answer = client.completions.create(model="tiny", prompt="x" * 100, temperature=0)
    assert answer.usage.total_tokens <= 128
    assert answer.choices[0].finish_reason == ("length" if answer.usage.total_tokens == 128 else "stop")
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        client.completions.create(model="tiny", prompt="")


def test_a_request_that_cannot_be_rendered_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="KeyError: 'role'"):
        client.chat.completions.create(model="tiny", messages=[{"content": "Who?"}])
    with pytest.raises(openai.BadRequestError, match="The request cannot be answered: TypeError"):
        client.chat.completions.create(model="tiny", messages="Who?")


def test_settings_that_are_not_the_requests_are_refused(client: openai.OpenAI) -> None:
    def refused(words: str, **body: Any) -> None:
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="tiny", messages=question("Who?"), extra_body=body)

    refused("generation_config is not taken", generation_config='{"num_beams": 1000}')
    refused("not for chat_template, tools", chat_template_kwargs={"chat_template": "x", "tools": []})
    refused("must be an object", chat_template_kwargs=["x"])
    refused("max_tokens is 0; it must be at least 1", max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="generation_config is not taken"):
        client.completions.create(model="tiny", prompt="So", extra_body={"generation_config": "{}"})
    asked = {"max_tokens": 2, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    answer = client.chat.completions.create(model="tiny", messages=question("Who?"), **asked)
    assert answer.usage.completion_tokens <= 2


def test_a_model_without_an_end_of_positions_ends_its_answers_too() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    config = GenerationConfig(max_new_tokens=10**9)
    _bound(model, {"input_ids": torch.zeros(1, 3)}, config)
    assert config.max_new_tokens == LONGEST_ANSWER_TOKENS


def test_a_folder_without_a_template_continues_texts_only(tmp_path: Path) -> None:
    for url in _running(save_folder(tmp_path / "text", chat=False)):
        client = openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="chat_template"):
            client.chat.completions.create(model="tiny", messages=question("Who?"))
        assert client.completions.create(model="tiny", prompt="So", max_tokens=2).usage.completion_tokens == 2


def test_what_it_prints_is_what_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A free port, the folder's name, and a token that is another one each time; none with --no-auth."""
    ran: list[tuple[int, bytes | None]] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        ran.append((sockets[0].getsockname()[1], server.config.app._expected))
        raise KeyboardInterrupt  # as a Ctrl-C ends it

    monkeypatch.setattr(uvicorn.Server, "run", run)
    for options in ([], [], ["--no-auth"]):
        monkeypatch.setattr(sys, "argv", ["trainyard", "serve", str(folder), "--port", "0", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        port, expected = ran[-1]
        assert printed["url"] == f"http://127.0.0.1:{port}/v1" and printed["model"] == "tiny"
        if options:
            assert expected is None and printed["token"].startswith("none")
        else:
            assert expected == f"Bearer {printed['token']}".encode() and len(printed["token"]) > 40
    assert ran[0][1] != ran[1][1]


def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainyard", "serve", str(tmp_path / "missing"), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trainyard: error: ") and "is not a Hugging Face model folder" in error


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Cannot listen on 127.0.0.1 port {port}: Address already in use"):
            serve(tmp_path / "no such folder", port=port)
    with pytest.raises(ValueError, match=r"Cannot listen on no\.such\.host\.invalid port 0"):
        serve(tmp_path, host="no.such.host.invalid", port=0)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a Hugging Face model folder"):
        serve(tmp_path / "no such folder", port=0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a language model"):
        serve(tmp_path, port=0)


def test_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_serve_available", lambda: False)
    with pytest.raises(ValueError, match="needs the packages of the extra serve: pip install"):
        serve(tmp_path)
