"""What a run refuses before any process group exists, and what it plans: data, tokenizer, lengths, prompts."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from recipe_samples import PreparedData, make_recipe
from transformers import AutoTokenizer

from data_pipeline import remote_blocks
from gpt import distributed, preflight, train
from gpt.evaluate import end_token_ids
from gpt.heartbeat import Heartbeat, read_beat
from gpt.model import tied_names
from gpt.optimizer import total_steps
from gpt.recipe import Recipe
from gpt.run_directory import RunDirectory, tokenizer_checksums
from gpt.train import (
    _build_evaluation,
    _build_saver,
    _describe_run,
    check,
    plan_run,
    sample_prompt,
)


def recipe_for(data: Path, runs: Path, changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> Recipe:
    places = {
        "tokenizer": str(data / "tokenizer"),
        "data.train": [{"path": str(data / "train")}],
        "data.validation": str(data / "validation"),
        "runs_directory": str(runs),
        "deepspeed": str(Path(__file__).parents[2] / "ds_configs" / "zero3.json"),
    }
    return make_recipe(places | (changes or {}), without)


def refusal(recipe: Recipe, world_size: int = 2) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check(recipe, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_recipe_is_planned_and_described(prepared_data: PreparedData, tmp_path: Path) -> None:
    plan = plan_run(recipe_for(prepared_data.text, tmp_path), world_size=2)
    assert (plan.batch.accumulation_steps, plan.batch.rows_per_forward) == (2, 2)
    assert plan.schedule.total_steps == 10
    assert plan.deepspeed["train_batch_size"] == 8
    assert plan.config.vocab_size == 300
    assert plan.changes == []
    text = "\n".join(plan.describe())
    assert f"run: {tmp_path / 'small'}" in text
    epochs = 10 * 8 / plan.training.samples_per_epoch
    assert f"length: 10 steps of 256 tokens = 2,560 tokens, {epochs:.2f} epochs" in text
    assert "last step" in text
    assert not (tmp_path / "small").exists()  # a plan writes nothing


def test_a_metric_that_the_tokenizer_never_gives_is_refused(
    prepared_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(prepared_data.text, tmp_path, {"evaluate": {"metric": "bits_per_byte"}})
    plan_run(recipe, world_size=2)
    monkeypatch.setattr(train, "token_byte_lengths", lambda tokenizer: None)
    assert "evaluate.metric bits_per_byte is never computed with" in refusal(recipe)


def test_a_launcher_starts_ranks_without_importing_transformers(prepared_data: PreparedData, tmp_path: Path) -> None:
    """Each start waits for it, and it takes two seconds."""
    recipe = recipe_for(prepared_data.text, tmp_path).model_dump_json()
    program = (
        "import json, sys, launch.log_folder; from launch import hub, local; from gpt.recipe_file import parse_recipe\n"
        "hub.fetch(parse_recipe(json.loads(sys.argv[1]), 'here')); local.default_processes()\n"
        "sys.exit(', '.join(sys.modules.keys() & {'transformers', 'deepspeed'}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program, recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_engine_does_not_import_the_compiler_for_muon() -> None:
    program = (
        "import os, sys; from gpt import distributed; distributed._import_muon_uncompiled()\n"
        "assert 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules and 'TORCHDYNAMO_DISABLE' not in os.environ"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_recipe_is_checked_without_importing_models(prepared_data: PreparedData, tmp_path: Path) -> None:
    """Submitting waits for it, and it takes two seconds."""
    recipe = recipe_for(prepared_data.text, tmp_path).model_dump_json()
    program = (
        "import json, sys, launch.local, launch.hub; from gpt.train import check; from gpt.recipe_file import "
        "parse_recipe; check(parse_recipe(json.loads(sys.argv[1]), 'here'), 2)\n"
        "sys.exit(', '.join(sys.modules.keys() & {'transformers.modeling_utils', 'deepspeed'}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program, recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", ["train", "validation"])
def test_waiting_for_data_is_no_hang(
    prepared_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    changes = {"data.remote": {"deadline_seconds": 60}, "faults": {"hang_seconds": 60}}
    recipe = recipe_for(prepared_data.text, tmp_path, changes)
    plan_run(recipe, world_size=2)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"host:/share {prepared_data.text / which} nfs4 rw 0 0\n", encoding="utf-8")
    monkeypatch.setattr(remote_blocks, "MOUNTS", str(mounts))
    assert "deadline_seconds is 60, but a run that waits faults.hang_seconds, 60, is taken for hung" in refusal(recipe)


@pytest.mark.parametrize("which", ["data.train", "data.validation"])
def test_missing_and_empty_data_are_named(prepared_data: PreparedData, tmp_path: Path, which: str) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        value: Any = [{"path": str(folder)}] if which == "data.train" else str(folder)
        assert str(folder) in refusal(recipe_for(prepared_data.text, tmp_path, {which: value}))


def test_a_missing_tokenizer_is_named(prepared_data: PreparedData, tmp_path: Path) -> None:
    message = refusal(recipe_for(prepared_data.text, tmp_path, {"tokenizer": "organisation/name"}))
    assert "there is no tokenizer folder organisation/name" in message


@pytest.mark.parametrize("which", ["tokenizer", "data.validation"])
def test_data_of_another_tokenizer_is_refused(prepared_data: PreparedData, tmp_path: Path, which: str) -> None:
    value = prepared_data.other / ("tokenizer" if which == "tokenizer" else "validation")
    recipe = recipe_for(prepared_data.text, tmp_path, {which: str(value)})
    message = refusal(recipe)
    named = "data.train" if which == "tokenizer" else "data.validation"
    assert f"{named} was prepared with another tokenizer than {recipe.tokenizer}" in message


def test_a_tokenizer_that_changed_since_is_refused(prepared_data: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(prepared_data.text / "tokenizer", tmp_path / "tokenizer")
    recipe = recipe_for(prepared_data.text, tmp_path, {"tokenizer": str(tmp_path / "tokenizer")})
    check(recipe, 2)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert "or that one changed since" in refusal(recipe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.sequence_length": 128}, "data.sequence_length is 128, but the model has only 64 positions"),
        ({"model.config.vocab_size": 1000}, "model.config.vocab_size is 1000, but the tokenizer has 300 tokens"),
        ({"optimizer.warmup_steps": 10}, "optimizer.warmup_steps is 10, but the whole run has 10 steps"),
        ({"deepspeed": "nowhere.json"}, "DeepSpeed file nowhere.json does not exist"),
        ({"checkpoint.budget_bytes": 1000}, "but checkpoint.budget_bytes is 1,000: keep fewer"),
        ({"evaluate.sample_prompt": "the king " * 40}, "tokens, but data.sequence_length is 32: shorten the prompt"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    prepared_data: PreparedData, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refusal(recipe_for(prepared_data.text, tmp_path, changes))


def test_more_processes_than_sequences_are_refused(prepared_data: PreparedData, tmp_path: Path) -> None:
    recipe = recipe_for(prepared_data.text, tmp_path)
    check(recipe, 8)
    assert "9 processes but only 8 sequences in a global batch" in refusal(recipe, 9)


def test_repeated_data_is_printed_and_refused_beyond_its_max_epochs(
    prepared_data: PreparedData, tmp_path: Path
) -> None:
    source = {"path": str(prepared_data.text / "train")}
    changes = {"data.train": [source], "train.epochs": 6}
    plan = plan_run(recipe_for(prepared_data.text, tmp_path, changes, without=("train.steps",)), 1)
    assert any(line.startswith("warning: the run repeats") for line in plan.describe())
    changes["data.train"] = [source | {"max_epochs": 5}]
    with pytest.raises(ValueError, match="but its max_epochs is 5"):
        plan_run(recipe_for(prepared_data.text, tmp_path, changes, without=("train.steps",)), 1)


def test_steps_to_be_traced_are_steps_of_the_run(prepared_data: PreparedData, tmp_path: Path) -> None:
    plan_run(recipe_for(prepared_data.text, tmp_path, {"profile": {"steps": [2, 10]}}), 1)
    with pytest.raises(ValueError, match=r"profile.steps is \[2, 11\], but the run has 10 steps"):
        plan_run(recipe_for(prepared_data.text, tmp_path, {"profile": {"steps": [2, 11]}}), 1)


def test_stages_and_packing_reach_the_stream(prepared_data: PreparedData, tmp_path: Path) -> None:
    paths = [str(getattr(prepared_data, kind) / "train") for kind in ("text", "chat")]
    stages = [{"until_tokens": 1024, "weights": [1, 0]}, {"weights": [0, 1]}]
    changes = {"data.train": [{"path": path} for path in paths], "data.stages": stages, "data.packing": "best_fit"}
    wide = {"data.sequence_length": 64, "data.workers": 3}
    plan = plan_run(recipe_for(prepared_data.text, tmp_path, changes | wide), 1)
    source_of = (plan.training.sample_ids(0, 32) >> np.uint64(48)).tolist()
    assert source_of == [0] * 16 + [1] * 16  # 1024 tokens are 16 sequences
    assert all("% filled" in line for line in plan.training.describe() if "samples of" in line)


def test_the_number_of_workers_may_change_when_a_run_goes_on(prepared_data: PreparedData, tmp_path: Path) -> None:
    stored = recipe_for(prepared_data.text, tmp_path)
    stored.run_directory().mkdir()
    (stored.run_directory() / "recipe.yaml").write_text(yaml.safe_dump(stored.model_dump()), encoding="utf-8")
    assert plan_run(recipe_for(prepared_data.text, tmp_path, {"data.workers": 0}), 2).changes == []


@pytest.mark.parametrize(("documents", "checked"), [(1, False), (2, True)])
def test_isolation_is_tried_only_where_rows_may_join_documents(
    prepared_data: PreparedData, tmp_path: Path, documents: int, checked: bool, capsys: pytest.CaptureFixture[str]
) -> None:

    from types import SimpleNamespace

    from data_samples import write_shards
    from small_checkpoint import make_model

    from data_pipeline.tokenizer import tokenizer_fingerprint
    from gpt.train import _check_isolation

    tokenizer = tokenizer_fingerprint(prepared_data.text / "tokenizer")
    write_shards(tmp_path / "d", [[5] * 400] * documents, tokenizer_sha256=tokenizer)
    changes = {"data.train": [{"path": str(tmp_path / "d")}], "data.validation": None}
    plan = plan_run(recipe_for(prepared_data.text, tmp_path, changes), 1)
    model = make_model(vocab_size=300)
    seen: list[int] = []

    def forward(input_ids: Any, position_ids: Any) -> Any:
        seen.append(len(input_ids))
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=True).logits

    trainer = SimpleNamespace(
        engine=SimpleNamespace(module=model, eval=model.eval),
        forward=forward,
        uncompiled=nullcontext,
        ranks=SimpleNamespace(device="cpu"),
        owner=object(),
    )
    if checked:
        with pytest.raises(ValueError, match="LlamaForCausalLM with sdpa attention does not keep documents apart"):
            _check_isolation(plan, trainer)
        assert seen == [plan.batch.rows_per_forward] * 3
    else:
        _check_isolation(plan, trainer)
        assert seen == [] and capsys.readouterr().out == ""


def test_a_start_that_was_killed_before_its_first_event_is_no_start(
    prepared_data: PreparedData, tmp_path: Path
) -> None:
    plan = plan_run(recipe_for(prepared_data.text, tmp_path), 2)
    owner = RunDirectory(plan.recipe.run_directory())
    owner.claim()
    owner.write_file("recipe.yaml", yaml.safe_dump(plan.recipe.model_dump()))
    _describe_run(plan, owner, 2)
    _describe_run(plan, owner, 2)
    assert [event["event"] for event in owner.events("start", "continue")] == ["start", "continue"]
    [kept] = owner.events("tokenizer kept")
    assert kept["xxh3"] == tokenizer_checksums(prepared_data.text / "tokenizer") != {}


def test_a_run_was_last_seen_in_the_last_start_that_wrote_events(prepared_data: PreparedData, tmp_path: Path) -> None:
    plan = plan_run(recipe_for(prepared_data.text, tmp_path), 2)
    run = plan.recipe.run_directory()
    beats: list[float] = []
    for describes in (True, False, True):  # the second start is killed between its first heartbeat and its event
        owner = RunDirectory(run)
        owner.claim()
        Heartbeat(run, owner.generation, 0, 60.0).end()
        beat = read_beat(run, owner.generation, 0)
        assert beat is not None
        beats.append(beat.time)
        if describes:
            _describe_run(plan, owner, 2)
            os.utime(run / "events.jsonl", (0, 0))
        assert read_beat(run, 1, 0) is not None or owner.generation == 3
    assert owner.events("continue")[-1]["last_seen"] == beats[0] < beats[1]
    kept = {folder.name for folder in (run / "heartbeats").iterdir()}
    assert kept == {"generation_000002", "generation_000003"}, "of the start before, which says how it ended"


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (OSError(errno.EIO, "Input/output error"), "traceback"),
        (ConnectionResetError("away"), "traceback"),
        (FileNotFoundError("data/train/00000.bin is gone: prepare it again"), "refusal"),
        (ValueError("the run has diverged"), "refusal"),
    ],
)
def test_what_the_system_does_to_a_run_that_has_begun_is_no_refusal(
    prepared_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, left: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    recipe = recipe_for(prepared_data.text, tmp_path)
    plan = plan_run(recipe, 1)
    monkeypatch.setattr(train, "_look_before", lambda *_, **options: (plan, []))
    monkeypatch.setattr(preflight, "check_collectives", lambda *_, **options: [])
    monkeypatch.setattr(distributed, "start", lambda timeout: distributed.Ranks(0, 1, torch.device("cpu")))
    monkeypatch.setattr(distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(train, "_run_claimed", fail)
    monkeypatch.setattr(train, "StopRequests", lambda errors: SimpleNamespace(requested=lambda: False))
    monkeypatch.setattr(train, "answer_with_stacks", lambda file: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TRAINYARD_ERROR_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("TRAINYARD_RECIPE", json.dumps(recipe.model_dump(mode="json")))
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 1
    found = tmp_path / ("rank_0.txt" if left == "refusal" else "rank_0.traceback.txt")
    assert str(error) in found.read_text()
    assert (tmp_path / "rank_0.txt").exists() == (left == "refusal")


def test_a_run_directory_of_another_recipe_is_refused(prepared_data: PreparedData, tmp_path: Path) -> None:
    stored = recipe_for(prepared_data.text, tmp_path)
    stored.run_directory().mkdir()
    (stored.run_directory() / "recipe.yaml").write_text(yaml.safe_dump(stored.model_dump()), encoding="utf-8")
    assert plan_run(stored, 2).changes == []
    message = refusal(recipe_for(prepared_data.text, tmp_path, {"train.seed": 3}))
    assert f"run directory {tmp_path / 'small'} belongs to another recipe: train.seed: 0 -> 3" in message
    longer = plan_run(recipe_for(prepared_data.text, tmp_path, {"train.steps": 20}), 2)
    assert longer.changes == ["train.steps: 10 -> 20"]
    assert longer.describe()[-1] == "changed since the run began: train.steps: 10 -> 20"


@pytest.mark.parametrize(
    ("length", "samples", "expected"),
    [
        ({"tokens": 2560}, 1, 10),
        ({"tokens": 2561}, 1, 11),
        ({"tokens": 1}, 1, 1),
        ({"epochs": 1}, 80, 10),
        ({"epochs": 1}, 81, 11),
        ({"epochs": 1.5}, 80, 15),
        ({"epochs": 0.01}, 80, 1),
        ({"epochs": 1.1}, 400, 55),  # 55.00000000000001 in floating point
        ({"steps": 7}, 1, 7),
    ],
)
def test_lengths_become_whole_steps_rounded_up(length: dict[str, Any], samples: int, expected: int) -> None:
    """Of 8 sequences of 32 tokens each."""
    recipe = make_recipe({f"train.{k}": v for k, v in length.items()}, () if "steps" in length else ("train.steps",))
    assert total_steps(recipe, samples) == expected


# The text sample


def test_the_default_prompt_of_text_is_its_first_16_tokens(prepared_data: PreparedData, tmp_path: Path) -> None:
    plan = plan_run(recipe_for(prepared_data.text, tmp_path), 1)
    prompt = sample_prompt(plan)
    assert len(prompt) == 16
    kept = (prepared_data.text.parent / "validation.txt").read_text(encoding="utf-8")
    assert kept.startswith(plan.tokenizer.decode(prompt))


def test_a_given_prompt_is_encoded_as_text(prepared_data: PreparedData, tmp_path: Path) -> None:
    plan = plan_run(recipe_for(prepared_data.text, tmp_path, {"evaluate.sample_prompt": "The king and"}), 1)
    assert plan.tokenizer.decode(sample_prompt(plan)) == "The king and"


def test_a_prompt_for_chat_data_is_a_users_message(prepared_data: PreparedData, tmp_path: Path) -> None:
    wide = {"data.sequence_length": 64, "evaluate.sample_prompt": "Who?"}
    plan = plan_run(recipe_for(prepared_data.chat, tmp_path, wide), 1)
    asked = plan.tokenizer.decode(sample_prompt(plan))
    assert asked == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("trained_on", ["chat", "text"])
def test_the_default_prompt_of_chat_data_is_its_first_message(
    prepared_data: PreparedData, tmp_path: Path, trained_on: str
) -> None:
    train = getattr(prepared_data, trained_on) / "train"
    changes = {"data.sequence_length": 64, "data.train": [{"path": str(train)}]}
    plan = plan_run(recipe_for(prepared_data.chat, tmp_path, changes), 1)
    asked = plan.tokenizer.decode(sample_prompt(plan))
    assert asked.startswith("<|im_start|>user\n")
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert asked.count("<|im_start|>") == 2


@pytest.mark.parametrize(("wanted", "expected"), [(5, 5), (0, 0), (64, 17), (17, 17), (18, 17)])
def test_prompt_and_sample_stay_within_a_sequence(
    prepared_data: PreparedData, tmp_path: Path, wanted: int, expected: int
) -> None:
    """16 tokens of prompt and 17 new ones, of which the last is not read again: 32 positions."""
    evaluation: Any = _build_evaluation(
        plan_run(recipe_for(prepared_data.text, tmp_path, {"evaluate.sample_tokens": wanted}), 1)
    )
    assert len(evaluation.sample_prompt_ids) == 16
    assert evaluation.sample_tokens == expected
    assert isinstance(evaluation.byte_lengths, np.ndarray)


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [({}, [2, 2, 2, 2]), ({"micro_batch_sequences": 5}, [5, 5]), ({"micro_batch_sequences": 64}, [8])],
)
def test_an_evaluation_has_its_own_batch_size_and_the_same_sums(
    prepared_data: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    shapes: list[int],
) -> None:
    from small_checkpoint import make_model

    monkeypatch.setattr(distributed, "gather_floats", lambda values, ranks: np.array([values]))
    changes = {"evaluate": {"batches": 1, "sample_tokens": 0, **settings}}
    plan = plan_run(recipe_for(prepared_data.text, tmp_path, changes), 1)
    evaluation: Any = _build_evaluation(plan)
    model, seen = make_model(vocab_size=300).eval(), []

    def forward(input_ids: Any, position_ids: Any) -> Any:
        seen.append(len(input_ids))
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    trainer = SimpleNamespace(engine=model, forward=forward, batch=plan.batch, ranks=ranks, heartbeat=None)
    measured = evaluation(trainer)
    assert seen == shapes
    rows = evaluation.stream.rows(np.arange(8, dtype=np.uint64))
    logits = forward(torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids))
    targets = torch.from_numpy(np.where(rows.target_mask, rows.targets, -100))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert measured.loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"train.label_smoothing": 0.1}, True), ({"train.neftune_noise_alpha": 5}, False)],
)
def test_a_training_forward_with_noise_is_no_probe(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: bool
) -> None:
    from small_checkpoint import make_model

    monkeypatch.setattr("gpt.saver.Saver", lambda *arguments: arguments[-1])
    plan: Any = SimpleNamespace(recipe=make_recipe(changes))
    model = make_model()
    assert _build_saver(plan, None, None, None, 1, model, None, nullcontext) == expected


def test_without_validation_data_there_is_no_evaluation(prepared_data: PreparedData, tmp_path: Path) -> None:
    assert _build_evaluation(plan_run(recipe_for(prepared_data.text, tmp_path, {"data.validation": None}), 1)) is None


def test_a_text_ends_with_the_end_token_and_a_turn_where_the_template_has_one(prepared_data: PreparedData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared_data.text / "tokenizer")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>", "<|pad|>")}
    assert end_token_ids(tokenizer) == {ids["<|endoftext|>"], ids["<|im_end|>"]}
    tokenizer.chat_template = None
    assert end_token_ids(tokenizer) == {ids["<|endoftext|>"]}
    tokenizer.eos_token = None
    assert end_token_ids(tokenizer) == frozenset()


def test_tied_parameters_are_named_after_the_one_that_is_kept() -> None:
    from small_checkpoint import make_model

    assert tied_names(make_model()) == {}
    assert tied_names(make_model(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
