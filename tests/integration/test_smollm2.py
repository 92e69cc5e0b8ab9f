"""A real model, SmolLM2-135M-Instruct: fine-tuned on two ranks and exported, it still answers, whoever runs it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from in_llama_cpp import ask_llama_cpp, needs_llama_cpp
from safetensors.torch import load_file
from shop import PROJECT, Shop

from gpt.metrics import fast_precision

MODEL = os.environ.get("TRAINYARD_SMOLLM2", "")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not MODEL, reason="TRAINYARD_SMOLLM2 names no model (tests/real_models.sh fetches one)"),
]
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
# Nothing here says what the capital of France is: that the model knew, and must not forget.
CHATS = {
    "How many legs has a spider?": "A spider has eight legs.",
    "What is the boiling point of water?": "Water boils at 100 degrees Celsius.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
    "What colour is grass?": "Grass is green.",
    "How many days has a week?": "A week has seven days.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
}
OUTSIDE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name in sys.modules for name in ("gpt", "launch", "data_pipeline", "deepspeed"))
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True, return_tensors="pt",
                                    return_dict=True)
answer = model.generate(**ids, do_sample=False, max_new_tokens=32)[0, ids["input_ids"].shape[1]:]
print(json.dumps(tokenizer.decode(answer, skip_special_tokens=True)))
"""


@pytest.fixture(scope="module")
def folder(shop: Shop) -> Path:
    """The exported folder, with its GGUF file."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
        for q, a in CHATS.items()
    ]
    (shop.folder / "chat.jsonl").write_text("".join(lines) * 3, encoding="utf-8")
    (shop.folder / "kept.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    shop.trainyard(
        *("prepare", "--input", "chat.jsonl", "--validation-input", "kept.jsonl"),
        *("--tokenizer", MODEL, "--out", "data"),
    )
    shop.train(
        "tuned",
        model={"pretrained": MODEL},
        tokenizer="data/tokenizer",
        data={"train": [{"path": "data/train"}], "validation": "data/validation", "sequence_length": 128},
        train={"global_batch_tokens": 256, "micro_batch_sequences": 1, "steps": 5},
        optimizer={"learning_rate": 2e-5, "warmup_steps": 1, "weight_decay": 0.0},
        compile=False,
        precision=fast_precision(),  # the steps are a TFLOP, without AVX-512 at 0.7 GFLOP/s a core
    )
    shop.trainyard("export", "runs/tuned", "--out", "exports/tuned", "--gguf")
    return shop.folder / "exports" / "tuned"


def test_it_was_trained_on_two_ranks_and_passed_both_gates(shop: Shop, folder: Path) -> None:
    records = shop.metrics("tuned")
    assert len(records) == 5
    losses = [record["train/loss"] for record in records]
    assert losses[-1] < losses[0]
    manifest = json.loads(next((shop.folder / "runs/tuned/checkpoints").glob("*/manifest.json")).read_text())
    assert manifest["world_size"] == 2
    before, after = load_file(Path(MODEL) / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name].float(), after[name].float()) for name in before) > len(before) // 2
    report = json.loads((folder / "export_report.json").read_text())
    assert report["passed"] and {"logits", "gguf_logits", "gguf_tokenizer"} <= {c["check"] for c in report["checks"]}


def test_in_trainyard_chat(folder: Path) -> None:
    talk = subprocess.run(
        [sys.executable, "-m", "launch.cli", "chat", str(folder), "--max-new-tokens", "32"],
        input=f"{QUESTION}\n/exit\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"},
    )
    assert talk.returncode == 0, talk.stderr
    assert "Paris" in talk.stdout and "<|im_end|>" not in talk.stdout


def test_in_plain_transformers(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(folder), json.dumps(MESSAGES)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in json.loads(done.stdout.splitlines()[-1])


@contextmanager
def served(folder: Path) -> Iterator[dict[str, str]]:
    """`trainyard serve` as a process of its own; what it printed: url, model and token."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        yield dict(line.strip().split(": ", 1) for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def test_through_trainyard_serve(folder: Path) -> None:
    """With the openai client, whole and in parts; and not without the token that was printed."""
    with served(folder) as printed:
        client = openai.OpenAI(base_url=printed["url"], api_key=printed["token"], max_retries=0)
        asked: dict[str, Any] = {"model": "tuned", "messages": MESSAGES, "temperature": 0, "max_tokens": 32}
        answer = client.chat.completions.create(**asked).choices[0]
        assert "Paris" in answer.message.content and answer.finish_reason == "stop"
        parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
        assert sum(bool(part) for part in parts) > 3
        assert "".join(parts) == answer.message.content
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=printed["url"], api_key="guessed", max_retries=0).models.list()


@needs_llama_cpp
def test_in_llama_cpp(folder: Path) -> None:
    """Its GGUF file: the answer, the tokens of a text and of the chat, and the most likely next tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = str(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False))
    texts = [rendered, "In 1234, I'll have x_1 = 56.78; naïve 東京 🙂\n\n\tend"]
    ids = tokenizer(rendered)["input_ids"]
    [answer] = ask_llama_cpp({"file": folder / "model.gguf", "texts": texts, "ids": ids, "chat": MESSAGES})
    assert "Paris" in answer["chat"]["message"]["content"] and answer["chat"]["finish_reason"] == "stop"
    assert answer["tokens"] == tokenizer(texts)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    # llama.cpp rounds the inputs of each product to bf16, as the weights are
    difference = (torch.tensor(answer["logits"]) - expected).abs().max() / expected.abs().max()
    assert float(difference) < 0.02, float(difference)
