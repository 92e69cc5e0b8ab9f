"""generate and chat on exported-like folders: greedy and sampled text, ends, streaming, history, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoint import CHATML, make_model, make_tokenizer
from transformers import GenerationConfig, PreTrainedModel

from gpt import generate as module
from gpt.generate import chat, generate

END = 259  # <|im_end|>


class Scripted:
    """Makes a model answer with given texts, one after the other, whatever it is asked; keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, answers: list[str]) -> None:
        self.prompts: list[str] = []
        self.seen: list[torch.Tensor] = []
        model, tokenizer = module.load(folder)
        remaining = [tokenizer(answer)["input_ids"] for answer in answers]

        def run(self_model: PreTrainedModel, input_ids: torch.Tensor, streamer=None, **settings) -> torch.Tensor:
            self.prompts.append(tokenizer.decode(input_ids[0]))
            new = torch.tensor(remaining.pop(0)[: settings["max_new_tokens"]])
            if streamer is not None:
                streamer.put(input_ids)
                for token in new:
                    streamer.put(token[None])
                streamer.end()
            return torch.cat([input_ids, new[None]], dim=1)

        monkeypatch.setattr(type(model), "generate", run)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("text"), chat=False)


def save_folder(folder: Path, *, chat: bool) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer(folder, chat=chat)
    GenerationConfig(eos_token_id=[256, END] if chat else 256, pad_token_id=257).save_pretrained(folder)
    return folder


def greedy_by_hand(folder: Path, ids: list[int], count: int) -> list[int]:
    model, _ = module.load(folder)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


def test_temperature_zero_takes_the_most_likely_tokens(text_folder: Path) -> None:
    _, tokenizer = module.load(text_folder)
    result = generate(text_folder, ["To be", "or not"], max_new_tokens=8)
    assert [r["prompt"] for r in result] == ["To be", "or not"]
    for r in result:
        ids = greedy_by_hand(text_folder, tokenizer(r["prompt"])["input_ids"], 8)
        assert (
            r["text"] == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
            and r["new_tokens"] == 8
            and not r["ended"]
        )


def test_sampling_depends_on_the_seed_and_on_no_other_prompt(text_folder: Path) -> None:
    once = generate(text_folder, ["a", "b"], temperature=1.0, seed=3, max_new_tokens=16)
    assert generate(text_folder, ["b"], temperature=1.0, seed=3, max_new_tokens=16) == once[1:]
    assert generate(text_folder, ["b"], temperature=1.0, seed=4, max_new_tokens=16) != once[1:]
    narrow = generate(text_folder, ["b"], temperature=1.0, top_p=1e-6, seed=3, max_new_tokens=16)
    assert narrow[0]["text"] == generate(text_folder, ["b"], max_new_tokens=16)[0]["text"]


def test_sampling_can_reach_every_token(text_folder: Path) -> None:
    """At a huge temperature the first token is uniform over 260; by default transformers takes one of the 50 best."""
    model, tokenizer = module.load(text_folder)
    settings = module._sampling(1, 1e6, 1.0)
    torch.manual_seed(0)
    seen = {module._continue(model, tokenizer("x")["input_ids"], settings)[0] for _ in range(150)}
    assert len(seen) > 80


def test_a_chat_folder_gets_the_prompt_as_a_message(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, chat_folder, ["Fine.<|im_end|>", " it is", "cut at caf" + "é"])
    answered, continued, cut = (
        generate(chat_folder, ["How are you?"])[0],
        generate(chat_folder, ["So"], as_chat=False)[0],
        generate(chat_folder, ["x"], max_new_tokens=11)[0],
    )
    assert script.prompts[0] == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert answered["text"] == "Fine." and answered["ended"] and answered["new_tokens"] == 6
    assert script.prompts[1] == "So"
    assert continued["text"] == " it is" and not continued["ended"]
    assert cut["text"] == "cut at caf", "half a character must not be shown"


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, lines: list[str], **settings
) -> str:
    """What `chat` prints when the user types `lines` and then ends the input."""
    waiting = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat(folder, **settings)
    return capsys.readouterr().out


def test_chat_remembers_until_reset(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, chat_folder, ["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"])
    printed = talk(
        monkeypatch, capsys, chat_folder, ["a", "", "b", "/reset", "c", "/exit", "d"], system="S", max_new_tokens=16
    )
    system, ask = "<|im_start|>system\nS<|im_end|>\n", "<|im_start|>{}\n{}<|im_end|>\n"
    end = "<|im_start|>assistant\n"
    assert script.prompts == [
        system + ask.format("user", "a") + end,
        system + ask.format("user", "a") + ask.format("assistant", "One.") + ask.format("user", "b") + end,
        system + ask.format("user", "c") + end,
    ]
    assert "One.\n" in printed and "Two.\n" in printed and "Three.\n" in printed and "<|im_end|>" not in printed
    assert "The conversation is forgotten." in printed


def test_chat_drops_the_oldest_turns_when_positions_run_out(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, chat_folder, ["x", "y" * 20, "z" * 20, "w"])
    printed = talk(monkeypatch, capsys, chat_folder, ["first", "q" * 200, "2nd", "third", "fourth"], max_new_tokens=40)
    assert "model has 128 positions; shorten the prompt" in printed, "the message that cannot fit is refused"
    assert printed.count("(The 2 oldest turns are dropped: the model has 128 positions.)") == 2, "not those of before"
    assert "first" in script.prompts[1] and "qqq" not in script.prompts[1]
    assert "first" not in script.prompts[2] and "2nd" in script.prompts[2] and "third" in script.prompts[2]


def test_streaming_never_prints_half_a_character(chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer = module.load(chat_folder)
    text = "né 東京🙂!"
    streamer = module._WholeCharacters(tokenizer)
    streamer.put(torch.tensor([[1, 2, 3]]))
    shown = []
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    streamer.end()
    assert "".join(shown) == text and capsys.readouterr().out == "\n"
    assert [s for s in shown if s] == list(text), "each character as soon as it is whole"
    cut = module._WholeCharacters(tokenizer)
    cut.put(torch.tensor([[1]]))
    for token in tokenizer("a🙂")["input_ids"][:-1]:
        cut.put(torch.tensor([token]))
    cut.end()
    assert capsys.readouterr().out == "a\n"


def test_refusals(tmp_path: Path, chat_folder: Path, text_folder: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run is not a Hugging Face model folder.*it is a run directory"):
        generate(tmp_path / "run", ["x"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="bare cannot be loaded as a language model"):
        generate(tmp_path / "bare", ["x"])
    with pytest.raises(ValueError, match="has no chat template; continue texts"):
        chat(text_folder)
    with pytest.raises(ValueError, match="no chat template, so a prompt cannot be a message"):
        generate(text_folder, ["x"], as_chat=True)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(text_folder, [""])
    with pytest.raises(ValueError, match=r"The prompt has 100 tokens and up to 29 new ones .* model has 128 positions"):
        generate(text_folder, ["x" * 100], max_new_tokens=29)
    for wrong in ({"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; it must"):
            generate(text_folder, ["x"], **wrong)


def test_a_template_that_refuses_the_system_role_is_said_in_one_sentence(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, chat=True)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    (folder / "chat_template.jinja").write_text(refusing)
    with pytest.raises(ValueError, match="chat template refuses the roles system, user: No system role"):
        chat(folder, system="S")


def test_it_runs_where_no_other_module_of_the_project_is(text_folder: Path) -> None:
    """The file alone, in an isolated Python."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('alone', sys.argv[1])\n"
        "alone = importlib.util.module_from_spec(spec); spec.loader.exec_module(alone)\n"
        "print(alone.generate(sys.argv[2], ['To be'], max_new_tokens=8)[0]['text'])\n"
        "assert not {'gpt', 'launch', 'data_pipeline', 'deepspeed'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, module.__file__, str(text_folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "LC_ALL": "C.UTF-8"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == generate(text_folder, ["To be"], max_new_tokens=8)[0]["text"].rstrip("\n")
