"""Prepared data for the tests of gpt: made once, by the same code that users call."""

import json
import random

import pytest
from recipe_samples import PreparedData


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    from data_pipeline.prepare import PrepareOptions, prepare
    from data_pipeline.sources import ReadOptions

    folder = tmp_path_factory.mktemp("prepared")
    dice = random.Random(0)
    words = ["the", "king", "and", "queen", "of", "many", "lands", "were", "walking", "slowly", "through", "gardens"]

    def sentence() -> str:
        return " ".join(dice.choices(words, k=dice.randint(4, 12))).capitalize() + "."

    train = [folder / f"train_{i}.txt" for i in range(20)]
    for file in train:
        file.write_text("\n".join(sentence() for _ in range(12)), encoding="utf-8")
    validation = folder / "validation.txt"
    validation.write_text("\n".join(sentence() for _ in range(40)), encoding="utf-8")
    for name, vocabulary in (("text", 300), ("other", 310)):
        prepare(
            PrepareOptions(
                inputs=[str(file) for file in train],
                output=folder / name,
                train_vocabulary=vocabulary,
                validation_inputs=[str(validation)],
            )
        )
    chats = folder / "chats.jsonl"
    rows = [{"prompt": f"{sentence()} {i}?", "response": sentence()} for i in range(60)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(
        PrepareOptions(
            inputs=[str(chats)],
            output=folder / "chat",
            tokenizer=folder / "text" / "tokenizer",
            read=ReadOptions(format="chat"),
            validation_fraction=0.3,
        )
    )
    return PreparedData(folder / "text", folder / "chat", folder / "other")
