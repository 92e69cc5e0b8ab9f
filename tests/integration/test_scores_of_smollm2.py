"""`trainyard evaluate` on SmolLM2 against a script of plain transformers that knows nothing of Trainyard."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shop import EMBEDDED, Shop

QUESTIONS = Path(__file__).with_name("commonsense.jsonl")
MODEL = os.environ.get("TRAINYARD_SMOLLM2")
LENGTH = 256
INDEPENDENT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text_file, questions, length = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

@torch.no_grad()
def losses(ids):  # of every token but the first
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

def loss_of_text(text):  # windows that share one token, so that each token but the first is predicted once
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    parts = [losses(ids[start : start + length + 1]) for start in range(0, len(ids) - 1, length)]
    return torch.cat(parts).mean()

right = per_byte = 0
for row in map(json.loads, open(questions, encoding="utf-8")):
    given = tokenizer(f"Question: {row['question']}\\nAnswer:")["input_ids"]
    sums = []
    for option in row["options"]:
        ids = tokenizer(f"Question: {row['question']}\\nAnswer: {option}")["input_ids"]
        assert ids[: len(given)] == given
        sums.append(-float(losses(ids)[len(given) - 1 :].sum()))
    normalised = [s / len(option.encode()) for s, option in zip(sums, row["options"])]
    right += row["options"][sums.index(max(sums))] == row["answer"]
    per_byte += row["options"][normalised.index(max(normalised))] == row["answer"]
print(json.dumps({
    "perplexity": float(loss_of_text(open(text_file, encoding="utf-8").read()).exp()),
    "accuracy": right / 40,
    "length_normalized_accuracy": per_byte / 40,
}))
"""


@pytest.mark.full
@pytest.mark.skipif(MODEL is None, reason="TRAINYARD_SMOLLM2 is not set; tests/real_models.sh fetches the model")
def test_scores_of_a_real_model_are_those_of_plain_transformers(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MODEL is not None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    text = (EMBEDDED / "shakespeare" / "validation" / "macbeth.txt").read_text(encoding="utf-8")[4000:7000]
    (shop.folder / "play.txt").write_text(text, encoding="utf-8")
    (shop.folder / "independent.py").write_text(INDEPENDENT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "independent.py", MODEL, "play.txt", str(QUESTIONS), str(LENGTH)],
        cwd=shop.folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    expected: Any = json.loads(done.stdout.splitlines()[-1])
    found = shop.answer("evaluate", MODEL, "--data", "play.txt", "--sequence-length", str(LENGTH), "--dtype", "fp32")
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
    task = {"kind": "multiple_choice", "data": str(QUESTIONS), "options": "options", "answer": "answer"}
    text_task = task | {"prompt": "Question: {question}\nAnswer:", "as_chat": False}
    (shop.folder / "task.yaml").write_text(yaml.safe_dump(text_task), encoding="utf-8")
    scores = shop.answer("evaluate", MODEL, "--task", "task.yaml", "--dtype", "fp32")["scores"]
    for name in ("accuracy", "length_normalized_accuracy"):
        assert scores[name]["value"] == pytest.approx(expected[name], abs=1e-3), name
        assert 0.3 < expected[name] < 1, "far from chance, 0.25, and not everything is right"
