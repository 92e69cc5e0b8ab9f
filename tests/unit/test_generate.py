"""generate and chat on exported-like folders: greedy and sampled text, ends, streaming, history, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import CHATML, make_model, make_tokenizer
from transformers import GenerationConfig, PreTrainedModel

from gpt import generate as module
from gpt.generate import Loading, PromptEncoder, Sampling, answer_batch, chat, generate

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
            assert settings["eos_token_id"] == [256, END]
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
    result = generate(text_folder, ["To be", "or not"], Sampling(8))
    assert [r["prompt"] for r in result] == ["To be", "or not"]
    for r in result:
        ids = greedy_by_hand(text_folder, tokenizer(r["prompt"])["input_ids"], 8)
        assert (
            r["text"] == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
            and r["new_tokens"] == 8
            and not r["ended"]
        )


def test_sampling_depends_on_the_seed_and_on_no_other_prompt(text_folder: Path) -> None:
    sampling = Sampling(16, temperature=1.0, seed=3)
    once = generate(text_folder, ["a", "b"], sampling)
    assert generate(text_folder, ["b"], sampling) == once[1:]
    assert generate(text_folder, ["b"], Sampling(16, temperature=1.0, seed=4)) != once[1:]
    narrow = generate(text_folder, ["b"], Sampling(16, temperature=1.0, top_p=1e-6, seed=3))
    assert narrow[0]["text"] == generate(text_folder, ["b"], Sampling(16))[0]["text"]


def test_what_is_drawn_has_the_models_probabilities() -> None:
    """20,000 rows with the same logits, each with noise of its own, against the softmax, and against its top 70 %."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -1e4])
    rows = logits.expand(20_000, -1)
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.7)):
        noise = module._OwnNoise(Sampling(1, temperature, top_p), range(len(rows)))
        drawn = torch.bincount(noise(rows, rows).argmax(1), minlength=5) / len(rows)
        expected = (logits / temperature).softmax(0)
        if top_p < 1:
            expected = torch.where(torch.arange(5) < 2, expected, 0.0) / expected[:2].sum()
        assert torch.allclose(drawn, expected, atol=0.015), (temperature, top_p)


def test_sampling_can_reach_every_token(text_folder: Path) -> None:
    """At a huge temperature the first token is uniform over 260; by default transformers takes one of the 50 best."""
    prompts = [""] * 200
    model, tokenizer = module.load(text_folder)
    seen: set[str] = set()
    ids = [tokenizer("x")["input_ids"]] * len(prompts)
    for answer in answer_batch(model, tokenizer, ids, [], Sampling(1, 1e6), range(len(prompts))):
        seen.add(answer["text"])
    assert len(seen) > 55, "more than 50, though half of the tokens are half characters, which have no text"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, temperature=0.8, top_p=0.9)])
def test_a_batch_gives_what_its_prompts_give_alone(tmp_path: Path, model_type: str, sampling: Sampling) -> None:
    """Left padding changes no answer, with rotary and with learnt positions; rows end at different places."""
    make_model(model_type).save_pretrained(tmp_path)
    make_tokenizer(tmp_path, chat=False)
    model, tokenizer = module.load(tmp_path)
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "To be or not to be, that is", "it", "éé" * 20, "b c")]
    common = answer_batch(model, tokenizer, prompts, [], sampling, range(5))
    letter = next(c for c in common[0]["text"] if c.isascii() and c.isprintable())
    ends = [256, tokenizer(letter)["input_ids"][0]]  # a token that comes, so that some rows end early
    together = answer_batch(model, tokenizer, prompts, ends, sampling, range(5))
    alone = [answer_batch(model, tokenizer, [ids], ends, sampling, [i])[0] for i, ids in enumerate(prompts)]
    assert together == alone
    assert len({answer["new_tokens"] for answer in alone}) > 1
    assert any(answer["ended"] for answer in alone) and not all(answer["ended"] for answer in alone)


def test_the_templates_end_token_ends_an_answer_even_when_the_folder_does_not_say_so(chat_folder: Path) -> None:
    model, tokenizer = module.load(chat_folder)
    model.generation_config.eos_token_id = 256
    assert PromptEncoder(model, tokenizer, 8).end_tokens == [256, END]
    assert PromptEncoder(model, tokenizer, 8, as_chat=False).end_tokens == [256]
    model.generation_config.eos_token_id = None
    assert PromptEncoder(model, tokenizer, 8).end_tokens == [END]


def test_weights_that_do_not_fit_into_memory_are_read_from_the_disk(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few KiB of host memory: layers stay on the disk (`meta`), and the answers are the same."""
    expected = generate(text_folder, ["To be"], Sampling(8))
    (tmp_path / "offload").mkdir()
    small = Loading(device_map="auto", host_memory_gib=60 / 2**20, offload_folder=tmp_path / "offload")
    model = module.load_model(text_folder, small)
    places = set(model.hf_device_map.values())
    assert "disk" in places, model.hf_device_map
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    monkeypatch.setattr(module, "load_model", lambda folder, loading: model)
    assert generate(text_folder, ["To be"], Sampling(8), loading=small) == expected


def test_weights_that_cannot_be_read_in_place_are_offloaded_to_a_folder(tmp_path: Path) -> None:
    """Mixtral's experts are held in another layout than the hub's, so they are written anew."""
    make_model("mixtral", num_local_experts=2).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model", chat=False)
    whole = generate(tmp_path / "model", ["To be"], Sampling(8))
    small = Loading(device_map="auto", host_memory_gib=60 / 2**20, offload_folder=tmp_path / "offload")
    assert generate(tmp_path / "model", ["To be"], Sampling(8), loading=small) == whole
    assert list((tmp_path / "offload").glob("*.safetensors"))
    assert generate(tmp_path / "model", ["To be"], Sampling(8), loading=Loading(None, "auto", 60 / 2**20)) == whole


def test_dtype(text_folder: Path) -> None:
    assert module.load_model(text_folder).dtype == torch.float32
    assert module.load_model(text_folder, Loading("bf16", "cpu")).dtype == torch.bfloat16


def test_a_chat_folder_gets_the_prompt_as_a_message(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, chat_folder, ["Fine.<|im_end|>", " it is", "cut at caf" + "é"])
    answered, continued, cut = (
        generate(chat_folder, ["How are you?"])[0],
        generate(chat_folder, ["So"], as_chat=False)[0],
        generate(chat_folder, ["x"], Sampling(11))[0],
    )
    assert script.prompts[0] == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert answered["text"] == "Fine." and answered["ended"] and answered["new_tokens"] == 6
    assert script.prompts[1] == "So"
    assert continued["text"] == " it is" and not continued["ended"]
    assert cut["text"] == "cut at caf", "half a character must not be shown"


def talk(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    lines: list[str],
    *settings,
    **more,
) -> str:
    """What `chat` prints when the user types `lines` and then ends the input."""
    waiting = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat(folder, *settings, **more)
    return capsys.readouterr().out


def test_chat_remembers_until_reset(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, chat_folder, ["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"])
    printed = talk(
        monkeypatch, capsys, chat_folder, ["a", "", "b", "/reset", "c", "/exit", "d"], Sampling(16), system="S"
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
    printed = talk(monkeypatch, capsys, chat_folder, ["first", "q" * 200, "2nd", "third", "fourth"], Sampling(40))
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
    assert "".join(shown) == text and capsys.readouterr().out == ""
    assert [s for s in shown if s] == list(text), "each character as soon as it is whole"
    cut = module._WholeCharacters(tokenizer)
    cut.put(torch.tensor([[1]]))
    for token in tokenizer("a🙂")["input_ids"][:-1]:
        cut.put(torch.tensor([token]))
    cut.end()
    assert capsys.readouterr().out == "a"


def test_answers_are_shown_as_they_are_made(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Scripted(monkeypatch, chat_folder, ["Fine.<|im_end|>", "cut at é"])
    generate(chat_folder, ["How are you?", "And"], stream=True)
    assert capsys.readouterr().out == "How are you?\n  Fine.\nAnd\n  cut at é …\n"


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
        generate(text_folder, ["x" * 100], Sampling(29))
    with pytest.raises(ValueError, match="A system message needs prompts that are messages"):
        generate(text_folder, ["x"], system="S")
    sampling: dict[str, list[float]] = {"temperature": [-0.1, float("inf")], "top_p": [0.0, 1.5], "seed": [-1, 2**63]}
    for name, values in ({"max_new_tokens": [0]} | sampling).items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
                Sampling(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype is int8; it must be one of bf16, fp16, fp32"):
        Loading("int8")
    with pytest.raises(ValueError, match=r"host_memory_gib is 2 with the device map cpu; .* auto, balanced"):
        Loading(None, "cpu", 2.0)
    for place in ("gpu9", "cuda:99"):
        with pytest.raises(ValueError, match=f"The device map {place} is neither one of auto, .* of this host"):
            generate(text_folder, ["x"], loading=Loading(device_map=place))


def test_damaged_folders_are_one_sentence(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", chat=False)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(lost, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(model\.norm\.weight\); use a whole copy"):
        module.load(folder)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model cannot be loaded as a language model: .* incomplete metadata"):
        module.load(folder)
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="model has no tokenizer that can be loaded"):
        module.load(folder)


def test_code_of_a_folder_is_never_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers alone asks on the terminal, and takes a line of standard input for the answer."""
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"cannot be loaded as a language model: .* custom code"):
        module.load(tmp_path)
    assert not (tmp_path / "ran").exists()


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
        "print(alone.generate(sys.argv[2], ['To be'], alone.Sampling(8))[0]['text'])\n"
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
    assert result.stdout.rstrip("\n") == generate(text_folder, ["To be"], Sampling(8))[0]["text"].rstrip("\n")
