"""The same rows as CSV, JSONL and Parquet: the same tokens, the same training; and a Chinese CSV in GB18030."""

import csv
import json
import random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from shop import EMBEDDED, Shop
from transformers import AutoTokenizer

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CHINESE = ["天地玄黄,宇宙洪荒", "日月盈昃,辰宿列张", "寒来暑往,秋收冬藏", "闰馀成岁\n律吕调阳", "云腾致雨,露结为霜"]


def english_rows(count: int) -> list[str]:
    """Rows of words, some with quotes, delimiters and newlines inside."""
    words = (EMBEDDED / "shakespeare" / "train" / "hamlet.txt").read_text(encoding="utf-8").split()
    generator = random.Random(0)
    rows = []
    for index in range(count):
        start, length = generator.randrange(len(words) - 30), generator.randint(3, 25)
        row = " ".join(words[start : start + length])
        rows.append(row.replace(" ", "\n", 1) if index % 7 == 0 else f'"{row}", said he; {index}')
    return rows


def train_three_steps(shop: Shop, name: str) -> list[float]:
    shop.train(
        name,
        model={"config": MODEL},
        tokenizer=f"data/{name}/tokenizer",
        data={
            "train": [{"path": f"data/{name}/train"}],
            "validation": f"data/{name}/validation",
            "sequence_length": 32,
        },
        train={"global_batch_tokens": 256, "micro_batch_sequences": 4, "steps": 3},
        optimizer={"learning_rate": 1e-3},
        evaluate={"batches": 1},
    )
    return [record["train/loss"] for record in shop.metrics(name)]


def expected_tokens(shop: Shop, name: str, rows: list[str]) -> int:
    """What the tokenizer gives on the rows, and one end token a document."""
    tokenizer = AutoTokenizer.from_pretrained(shop.folder / "data" / name / "tokenizer")
    return sum(len(ids) + 1 for ids in tokenizer(rows)["input_ids"])


def prepared_tokens(report: dict[str, Any]) -> int:
    return sum(split["tokens"] for split in report["splits"].values())


@pytest.mark.parametrize(
    "count", [pytest.param(2_000, marks=pytest.mark.few), pytest.param(100_000, marks=pytest.mark.full)]
)
def test_csv_jsonl_and_parquet_are_the_same(shop: Shop, count: int) -> None:
    rows = english_rows(count)
    with (shop.folder / f"rows{count}.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["number", "text"])
        writer.writerows(enumerate(rows))
    lines = "".join(json.dumps({"number": i, "text": row}) + "\n" for i, row in enumerate(rows))
    (shop.folder / f"rows{count}.jsonl").write_text(lines, encoding="utf-8")
    table = pyarrow.table({"number": range(count), "text": rows})
    pyarrow.parquet.write_table(table, shop.folder / f"rows{count}.parquet")
    shards, losses = {}, {}
    for kind in ("csv", "jsonl", "parquet"):
        name = f"{kind}{count}"
        report = shop.answer(
            *("prepare", "--input", f"rows{count}.{kind}", "--out", f"data/{name}", "--train-tokenizer", "500"),
            *("--validation-fraction", "0.05"),
        )
        assert prepared_tokens(report) == expected_tokens(shop, name, rows)
        files = sorted((shop.folder / "data" / name).glob("*/*.bin"))
        assert len(files) >= 2
        shards[kind] = [file.read_bytes() for file in files]
        if kind != "jsonl" or count == 100_000:
            losses[kind] = train_three_steps(shop, name)
    assert shards["csv"] == shards["jsonl"] == shards["parquet"]
    assert all(loss == losses["csv"] for loss in losses.values())


@pytest.mark.parametrize(
    "count", [pytest.param(1_000, marks=pytest.mark.few), pytest.param(100_000, marks=pytest.mark.full)]
)
def test_chinese_csv_in_gb18030(shop: Shop, count: int) -> None:
    generator = random.Random(1)
    rows = ["".join(generator.choices(CHINESE, k=3)) + str(index) for index in range(count)]
    with (shop.folder / f"chinese{count}.csv").open("w", encoding="gb18030", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["编号", "正文"])
        writer.writerows(enumerate(rows))
    command = ["prepare", "--input", f"chinese{count}.csv", "--text-field", "正文", "--train-tokenizer", "350"]
    out = ["--out", f"data/chinese{count}", "--validation-fraction", "0.05"]
    refused = shop.trainyard(*command, *out, check=False)
    assert refused.returncode == 1
    assert "--encoding gb18030" in refused.stderr.lower() and "Traceback" not in refused.stderr
    report = shop.answer(*command, *out, "--encoding", "gb18030")
    assert prepared_tokens(report) == expected_tokens(shop, f"chinese{count}", rows)
    tokenizer = AutoTokenizer.from_pretrained(shop.folder / "data" / f"chinese{count}" / "tokenizer")
    assert tokenizer.decode(tokenizer.encode(rows[0])) == rows[0]
    assert train_three_steps(shop, f"chinese{count}")[0] > 0
