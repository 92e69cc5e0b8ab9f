"""Text to a chat model that answers: prepare, pretrain, fine-tune, evaluate, export, and out without Trainyard."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shop import EMBEDDED, Shop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
QUESTIONS = {
    "What is your number?": "I don't have any number",
    "What do you eat?": "I'm a computer, I can't.",
    "Can you walk?": "I have no legs.",
}
OUTSIDE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name in sys.modules for name in ("gpt", "launch", "data_pipeline", "deepspeed"))
folder, probe = sys.argv[1], json.load(open(sys.argv[2]))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = torch.tensor([probe["input_ids"]])
logits = model(input_ids=ids, position_ids=torch.tensor([probe["position_ids"]]), use_cache=False).logits[0]
picked = logits[probe["positions"]].float().gather(1, torch.tensor(probe["top_indices"]))
prompt = torch.tensor([probe["greedy"]["prompt_ids"]])
new = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                     max_new_tokens=len(probe["greedy"]["new_ids"]))[0, prompt.shape[1]:].tolist()
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Can you walk?"}], add_generation_prompt=True,
                                     return_tensors="pt", return_dict=True)
answer = model.generate(**chat, do_sample=False, max_new_tokens=20)[0, chat["input_ids"].shape[1]:]
print(json.dumps({"logits": picked.tolist(), "new": new, "answer": tokenizer.decode(answer, skip_special_tokens=True),
                  "ended": int(answer[-1]) in model.generation_config.eos_token_id, "dtype": str(model.dtype)}))
"""


@pytest.fixture(scope="module")
def built(shop: Shop) -> Shop:
    """A pretrained and a fine-tuned run, exported."""
    text = (EMBEDDED / "shakespeare" / "train" / "hamlet.txt").read_text(encoding="utf-8")
    (shop.folder / "train.txt").write_text(text[:60_000], encoding="utf-8")
    (shop.folder / "kept.txt").write_text(text[60_000:75_000], encoding="utf-8")
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in QUESTIONS.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (shop.folder / "chat.jsonl").write_text(lines * 8, encoding="utf-8")
    (shop.folder / "chat_kept.jsonl").write_text(lines, encoding="utf-8")
    shop.trainyard(
        *("prepare", "--input", "train.txt", "--validation-input", "kept.txt"),
        *("--train-tokenizer", "800", "--out", "data/text"),
    )
    shop.trainyard(
        *("prepare", "--input", "chat.jsonl", "--validation-input", "chat_kept.jsonl"),
        *("--tokenizer", "data/text/tokenizer", "--out", "data/chat"),
    )
    shop.train(
        "base",
        model={"config": MODEL},
        tokenizer="data/text/tokenizer",
        data={"train": [{"path": "data/text/train"}], "validation": "data/text/validation", "sequence_length": 128},
        train={"global_batch_tokens": 1024, "micro_batch_sequences": 4, "steps": 30},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 5},
        evaluate={"every_steps": 10},
    )
    shop.train(
        "chat",
        model={"pretrained": "runs/base"},
        tokenizer="data/chat/tokenizer",
        data={"train": [{"path": "data/chat/train"}], "validation": "data/chat/validation", "sequence_length": 128},
        train={"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 120},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0},
    )
    shop.trainyard("export", "runs/base", "--out", "exports/base")
    shop.trainyard("export", "runs/chat", "--out", "exports/chat")
    return shop


@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.full), "chat"])
def test_evaluation_of_run_and_folder_agree(built: Shop, name: str) -> None:
    """The live engine's last evaluation, the run directory and the exported folder give the same numbers."""
    data = "data/text/validation" if name == "base" else "data/chat/validation"
    of_run = built.answer("evaluate", f"runs/{name}", "--data", data)
    of_folder = built.answer("evaluate", f"exports/{name}", "--data", data)
    live = {key.removeprefix("evaluate/"): value for key, value in built.metrics(name)[-1].items()}
    for key in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        assert of_folder[key] == pytest.approx(of_run[key], rel=1e-3), key
        assert live[key] == pytest.approx(of_run[key], rel=1e-3), key
    assert of_run["target_tokens"] == of_folder["target_tokens"] > 0


@pytest.mark.full
def test_evaluation_of_a_text_file_equals_that_of_its_shards(built: Shop) -> None:
    shards = built.answer("evaluate", "exports/base", "--data", "data/text/validation")
    text = built.answer("evaluate", "exports/base", "--data", "kept.txt")
    assert text["loss"] == pytest.approx(shards["loss"], rel=1e-6)
    # an independent count: the text's own bytes, but for the first token, which nothing predicts
    size = (built.folder / "kept.txt").stat().st_size
    bits = text["bits_per_byte"] / (text["loss"] / 0.6931471805599453) * size
    assert bits == pytest.approx(text["target_tokens"], rel=2e-3)


def test_folder_gives_the_live_engines_logits_and_text_outside(built: Shop, tmp_path: Path) -> None:
    """A process that knows nothing of Trainyard, against the probe that the live engine recorded."""
    manifest = json.loads((built.folder / "runs/chat/checkpoints/step_00000120/manifest.json").read_text())
    probe_file = tmp_path / "probe.json"
    probe_file.write_text(json.dumps(manifest["probe"]))
    script = tmp_path / "outside.py"
    script.write_text(OUTSIDE)
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(built.folder / "exports/chat"), str(probe_file)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen: Any = json.loads(done.stdout.splitlines()[-1])
    assert seen["dtype"] == "torch.bfloat16"
    assert seen["new"] == manifest["probe"]["greedy"]["new_ids"]
    largest = max(abs(x) for row in manifest["probe"]["top_logits"] for x in row)
    for row, recorded in zip(seen["logits"], manifest["probe"]["top_logits"], strict=True):
        assert row == pytest.approx(recorded, abs=largest * 2**-7)  # two units in bf16's last place
    assert seen["answer"] == QUESTIONS["Can you walk?"] and seen["ended"]


def test_answers_end_by_themselves(built: Shop) -> None:
    prompts = [part for question in QUESTIONS for part in ("--prompt", question)]
    answers = built.answer("generate", "exports/chat", *prompts)
    assert [item["text"] for item in answers] == list(QUESTIONS.values())
    assert all(item["ended"] for item in answers)


def test_a_run_and_its_export_have_the_same_scores_on_a_task(built: Shop) -> None:
    """What it learnt by heart: every answer exactly, and the right option before the others."""
    others = list(QUESTIONS.values())
    lines = [{"q": q, "options": others, "answer": a} for q, a in QUESTIONS.items()]
    (built.folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for kind in ("multiple_choice\noptions: options", "exact_match"):
        task = built.folder / "asked.yaml"
        task.write_text(f"data: asked.jsonl\nprompt: '{{q}}'\nanswer: answer\nkind: {kind}\n", encoding="utf-8")
        of_run = built.answer("evaluate", "runs/chat", "--task", "asked.yaml")
        assert of_run == built.answer("evaluate", "exports/chat", "--task", "asked.yaml")
        assert of_run["as_chat"] is True
        assert next(iter(of_run["scores"].values()))["value"] == 1


def test_tensorboard_has_every_step_and_the_sample(built: Shop) -> None:
    board = EventAccumulator(str(built.folder / "runs/base/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 31))
    assert [event.step for event in board.Scalars("evaluate/bits_per_byte")] == [10, 20, 30]
    assert [event.step for event in board.Tensors("evaluate/sample/text_summary")] == [10, 20, 30]
    recorded = built.metrics("base")[-1]
    assert board.Scalars("train/loss")[-1].value == pytest.approx(recorded["train/loss"], rel=1e-6)
