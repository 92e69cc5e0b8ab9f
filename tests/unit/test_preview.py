"""`trainyard preview`: tokens, what is learnt, where documents begin, padding."""

import io
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from data_samples import save_tokenizer, write_shards
from ranged_server import RangedServer
from recipe_samples import PreparedData, recipe_content
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.preview import open_tokenizer, preview_rows, print_preview
from data_pipeline.remote_blocks import open_cache
from data_pipeline.stream import TrainingStream
from data_pipeline.tokenizer import tokenizer_fingerprint
from launch.cli import app


def chat_stream(folder: Path, texts: list[tuple[str, str]], length: int) -> tuple[TrainingStream, Path]:
    """Documents of a context part and a learnt part each."""
    tokenizer_path = save_tokenizer(folder / "tokenizer")
    from data_samples import small_tokenizer

    pad = small_tokenizer().pad_token_id
    encoded = [[small_tokenizer().encode(part, add_special_tokens=False) for part in pair] for pair in texts]
    write_shards(
        folder / "train",
        [context + learnt for context, learnt in encoded],
        [[False] * len(context) + [True] * len(learnt) for context, learnt in encoded],
        tokenizer_sha256=tokenizer_fingerprint(tokenizer_path),
        pad=pad,
    )
    return TrainingStream([(folder / "train", 1.0)], length, 0), tokenizer_path


def rendered(stream: TrainingStream, tokenizer_path: Path, **console: object) -> str:
    out = io.StringIO()
    rows = preview_rows(stream, 1, 1, 1)
    print_preview(rows, open_tokenizer(stream, tokenizer_path), Console(file=out, width=200, **console))  # type: ignore[arg-type]
    return out.getvalue()


def test_without_colour_marks_show_what_is_learnt(tmp_path: Path) -> None:
    stream, tokenizer = chat_stream(tmp_path, [("Who art thou? ", "A friend."), ("And ", "thou?\x1b[2J")], 60)
    text = rendered(stream, tokenizer)
    assert "Who art thou? «A friend.»" in text and "And «thou?␛[2J»" in text
    assert text.count("▐document▌") == 1
    [row] = preview_rows(stream, 1, 1, 1)
    assert f"▐padding: {row.padding_tokens:,} tokens▌" in text and row.padding_tokens > 0
    assert "\x1b" not in text
    assert "documents: 2" in text


def test_in_colour_learnt_tokens_are_green(tmp_path: Path) -> None:
    stream, tokenizer = chat_stream(tmp_path, [("Who art thou? ", "A friend.")], 60)
    text = rendered(stream, tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[32mA friend.\x1b[0m" in text and "\x1b[2mWho art thou? \x1b[0m" in text
    assert "«" not in text
    text = rendered(stream, tokenizer, force_terminal=True, no_color=True)
    assert "«A friend.»" in text


def test_rows_are_those_of_the_stream(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[10, 11, 0], [20, 21, 22, 0], [30, 0, 31, 32, 33]])
    stream = TrainingStream([(tmp_path / "d", 1.0)], 4, 0)
    rows = preview_rows(stream, 2, 2, 5)  # no more rows than a batch has
    assert [(row.batch, row.position) for row in rows] == [(1, 0), (1, 1), (2, 2), (2, 3)]
    first = next(row for row in rows if row.sample == 0)
    assert first.token_ids == [10, 11, 0, 20, 21]
    assert first.learnt == [False, True, True, False, True]
    assert first.document_starts == [0, 3]
    assert first.padding_tokens == 0
    assert [row.sample for row in rows] == (stream.sample_ids(0, 4)).tolist()


def test_the_command_with_a_recipe(prepared_data: PreparedData, tmp_path: Path) -> None:
    text = prepared_data.text
    places = {"tokenizer": str(text / "tokenizer"), "data.train": [{"path": str(text / "train")}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content(places)), encoding="utf-8")
    run = CliRunner().invoke
    done = run(app, ["preview", "--recipe", str(recipe), "--rows", "3", "--batches", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.count("learnt") == 6 and "position 8:" in done.output  # batches of 8 sequences
    chat = run(app, ["preview", str(prepared_data.chat / "train"), "--recipe", str(recipe)])
    assert chat.exit_code == 1 and "not one sample" in str(chat.exception)  # conversations longer than its 32 tokens
    alone = run(app, ["preview", str(prepared_data.chat / "train"), "--sequence-length", "100"])
    assert alone.exit_code == 0 and "«" in alone.output and "▐document▌<|im_start|>" in alone.output
    assert run(app, ["preview"]).exit_code == 2


def test_the_command_without_a_recipe_as_json(
    prepared_data: PreparedData, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared_data.text / "train"
    monkeypatch.setattr("sys.argv", ["trainyard", "preview", str(data), "--rows", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["position"] for row in rows] == [0, 1]
    for row in rows:
        assert len(row["token_ids"]) == len(row["learnt"]) == 257
        assert row["learnt"][0] is False and sum(row["learnt"]) > 200
        assert row["document_starts"][0] == 0


def test_data_at_a_url_with_the_tokenizer_beside_it(
    prepared_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the cache is by default
    open_cache.cache_clear()
    run = CliRunner().invoke
    with RangedServer(prepared_data.text).serving() as server:
        shown = run(app, ["preview", f"{server.url}/train/", "--rows", "1"])
        assert shown.exit_code == 0 and f"{server.url}/train sample" in shown.output, shown.output
    recipe_order = TrainingStream([(prepared_data.text / "train", 1.0)], 256, 0, order="block")
    tokenizer = open_tokenizer(recipe_order, prepared_data.text / "tokenizer")
    [row] = preview_rows(recipe_order, 1, 1, 1)
    assert tokenizer.decode(row.token_ids[1:20]) in shown.output
    (tmp_path / "sets").symlink_to(prepared_data.text / "train")
    with RangedServer(tmp_path).serving() as server:
        refused = run(app, ["preview", f"{server.url}/sets"])
        assert refused.exit_code == 1 and "/tokenizer/tokenizer.json does not exist" in str(refused.exception)
    with RangedServer(tmp_path / "sets").serving() as server:
        refused = run(app, ["preview", server.url])
        assert refused.exit_code == 1 and "name it in a recipe" in str(refused.exception)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[5] * 40])
    stream = TrainingStream([(tmp_path / "d", 1.0)], 4, 0)
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        open_tokenizer(stream, save_tokenizer(tmp_path / "tokenizer"))
