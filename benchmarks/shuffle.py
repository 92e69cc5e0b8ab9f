"""What the order in blocks costs: the loss after one epoch, next to that after a full shuffle of the same rows.

    python benchmarks/shuffle.py [--seeds 3] [--out benchmarks/results/shuffle.json]

All sizes but the documents' are 128 times smaller than in use: windows of 64 KiB for 8 MiB, batches of 4,096 tokens for
half a million, 2.3 million tokens for 300 million. So a window holds 20 documents, in use 2,800. The text is a part
of build/corpus/corpus.jsonl: in the order of its packages, each about one subject, which is the worst case for windows,
and with its documents shuffled before they were prepared. Both are held against the same validation documents, drawn
from all packages.
"""

import argparse
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import build_corpus  # noqa: E402
from benchmarks.facts import describe, judge, write_and_show  # noqa: E402

WORK = ROOT / "build" / "shuffle"
SMALLER = 128
TEXT_BYTES, VALIDATION_BYTES = 6_000_000, 600_000
VOCABULARY, ROW_TOKENS, BATCH_ROWS = 2048, 256, 16
LEARNING_RATE, WARMUP_STEPS = 2e-3, 40
MODEL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}  # fmt: skip
ORDERS = ("full", "block")
DOCUMENTS = {"sorted": "by package", "shuffled": "shuffled before"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss of the order in blocks next to a full shuffle.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "shuffle.json")
    options = parser.parse_args()
    facts = describe(("torch", "transformers", "numpy"))
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    prepare_all()
    cases = [(seed, documents, order) for seed in range(options.seeds) for documents in DOCUMENTS for order in ORDERS]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        facts["runs"] = list(pool.map(train, cases))
    shutil.rmtree(WORK)
    facts["summary"] = summarize(facts["runs"])
    facts["targets"] = judge([])  # numbers without a bar
    rows = [
        (DOCUMENTS[row["documents"]], row["order"], f"{row['loss']:.4f}", f"{row['spread']:.4f}",
         f"{row['over_full']:+.4f}") for row in facts["summary"]
    ]  # fmt: skip
    write_and_show(facts, options.out, ("documents", "order", "validation loss", "spread of seeds", "over full"), rows)


def prepare_all() -> None:
    """Shards of the same documents in both orders, with one tokenizer and one validation set."""
    lines = build_corpus().read_bytes().splitlines()
    drawn = random.Random(0).sample(range(len(lines)), len(lines))
    chosen = {"validation": VALIDATION_BYTES, "sorted": TEXT_BYTES}
    taken: dict[str, list[int]] = {}
    for name, size in chosen.items():
        taken[name] = []
        while size > 0:
            taken[name].append(drawn.pop())
            size -= len(lines[taken[name][-1]])
    taken["shuffled"] = taken["sorted"].copy()
    taken["sorted"].sort()  # the corpus is by package
    for name, numbers in taken.items():
        (WORK / f"{name}.jsonl").write_bytes(b"\n".join(lines[number] for number in numbers) + b"\n")
    tokenizer = ["--train-tokenizer", str(VOCABULARY)]
    for name in DOCUMENTS:
        command = ["-m", "launch.cli", "prepare", "--input", f"{name}.jsonl", "--validation-input", "validation.jsonl"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, *command, *tokenizer, "--out", name], cwd=WORK, env=environment, check=True,
            stdout=sys.stderr,
        )  # fmt: skip
        tokenizer = ["--tokenizer", "sorted/tokenizer"]


def train(case: tuple[int, str, str]) -> dict[str, Any]:
    """One epoch; the loss on all of validation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data_pipeline import stream
    from data_pipeline.token_shards import BLOCK_BYTES

    seed, documents, order = case
    stream.BLOCK_BYTES = BLOCK_BYTES // SMALLER  # of a window, in rows; what is read stays as it is
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    data = stream.TrainingStream([(WORK / documents / "train", 1.0)], ROW_TOKENS, seed, order=order)
    assert any("windows" in line for line in data.describe()) == (order == "block")
    steps = data.samples_per_epoch // BATCH_ROWS
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        loss = loss_of(model, data.rows(range(step * BATCH_ROWS, (step + 1) * BATCH_ROWS)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    validation = stream.ValidationStream(WORK / documents / "validation", ROW_TOKENS)
    return {"seed": seed, "documents": documents, "order": order, "steps": steps,
            "validation_loss": validation_loss(model, validation)}  # fmt: skip


def loss_of(model: Any, rows: Any) -> Any:
    """Mean loss of the targets; rows are joined documents, which see one another here, in every case alike."""
    import torch

    tokens = torch.from_numpy(rows.tokens)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    targets = tokens[:, 1:].masked_fill(~torch.from_numpy(rows.target_mask), -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def validation_loss(model: Any, data: Any) -> float:
    import torch

    total, targets = 0.0, 0
    with torch.no_grad():
        for start in range(0, data.number_of_samples, BATCH_ROWS):
            rows = data.rows(range(start, min(start + BATCH_ROWS, data.number_of_samples)))
            count = int(rows.target_mask.sum())
            total, targets = total + loss_of(model, rows).item() * count, targets + count
    return total / targets


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds; what a seed's run lost by its order is taken seed by seed."""

    def of(documents: str, order: str) -> list[float]:
        return [r["validation_loss"] for r in runs if (r["documents"], r["order"]) == (documents, order)]

    return [
        {
            "documents": documents,
            "order": order,
            "loss": statistics.mean(of(documents, order)),
            "spread": max(of(documents, order)) - min(of(documents, order)),
            "over_full": statistics.mean(
                a - b for a, b in zip(of(documents, order), of(documents, "full"), strict=True)
            ),
        }
        for documents in DOCUMENTS
        for order in ORDERS
    ]


if __name__ == "__main__":
    main()
