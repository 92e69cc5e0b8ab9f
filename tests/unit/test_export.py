"""Export: bytes equal to `save_pretrained`'s, the gate's verdict on tampered folders, and every refusal."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipe_samples import make_recipe
from safetensors.torch import load_file, save_file
from small_checkpoint import change_manifest, in_dtype, make_model, make_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt import export, export_check
from gpt.checkpoint.files import VerifiedFile, hash_file
from gpt.checkpoint.format import FileEntry, read_manifest, write_manifest
from gpt.checkpoint.read import CheckpointReader, empty_model
from gpt.evaluate import evaluate_path
from gpt.export import export_run
from gpt.export_check import end_tokens, expected_of
from gpt.export_gate import _check_logits, check_folder, logit_tolerance
from gpt.export_source import CheckpointWeights, run_tokenizer, source_of_run
from gpt.export_weights import plan_tensors
from gpt.run_directory import RunDirectory, tokenizer_checksums

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "bf16", {}),
    "llama-tied": ("llama", "bf16", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", "fp32", {}),
    "qwen3": ("qwen3", "bf16", {}),
    "olmo2": ("olmo2", "fp16", {}),
    "gemma2": ("gemma2", "bf16", {}),
    "mixtral": ("mixtral", "bf16", {"num_local_experts": 4}),
}


@pytest.fixture
def in_process_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's checks without the seconds that a fresh process takes; `test_gate_process_*` run the real one."""
    monkeypatch.setattr(export, "run_gate", check_folder)


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For refusals before the gate, which must not be reached."""

    def fail(*_: object) -> None:
        raise AssertionError("the gate must not be reached")

    monkeypatch.setattr(export, "run_gate", fail)


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "export_report.json").read_text(encoding="utf-8"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("in_process_gate")
def test_the_folder_is_what_save_pretrained_writes(tmp_path: Path, name: str) -> None:
    model_type, precision, fields = MODELS[name]
    model = make_model(model_type, **fields)
    write_checkpoint(tmp_path / "run", model, precision=precision, ranks=3)
    result = export_run(tmp_path / "run", tmp_path / "out")
    assert report_of(tmp_path / "out")["passed"] and result["dtype"] == precision and result["step"] == 10
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    in_dtype(model, dtype).save_pretrained(tmp_path / "reference")
    ours, reference = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "reference"))
    assert ours.keys() == reference.keys()
    for key, tensor in reference.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["use_cache"] is True
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("in_process_gate")
def test_other_dtypes_are_checked_in_the_training_dtype(tmp_path: Path) -> None:
    model = make_model(initializer_range=0.1)  # the usual 0.02 to 0.1: larger weights blow rounding errors up
    write_checkpoint(tmp_path / "run", model, precision="bf16")
    export_run(tmp_path / "run", tmp_path / "masters", dtype="fp32")
    report = report_of(tmp_path / "masters")
    assert report["computed_in"] == "bf16" and report["exported_in"] == "fp32"
    masters = next(check for check in report["checks"] if check["check"] == "masters")
    assert masters["passed"] and masters["difference"] == 0
    stored = load_file(tmp_path / "masters" / "model.safetensors")
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    rounded = {name: values.to(torch.bfloat16).float() for name, values in stored.items()}
    save_file(rounded, tmp_path / "masters" / "model.safetensors", metadata={"format": "pt"})
    expected = expected_of(source_of_run(tmp_path / "run"), "fp32")
    assert failed_checks(tmp_path / "masters", expected) == {"masters"}, "right in bf16, not in fp32"
    write_checkpoint(tmp_path / "run32", model, precision="fp32")
    export_run(tmp_path / "run32", tmp_path / "rounded", dtype="bf16")
    report = report_of(tmp_path / "rounded")
    logits = next(check for check in report["checks"] if check["check"] == "logits")
    assert report["computed_in"] == "fp32" and 0 < logits["difference"] <= logits["tolerance"]
    with pytest.raises(ValueError, match="dtype int4 is unknown; give bf16, fp16, fp32"):
        export_run(tmp_path / "run", tmp_path / "x", dtype="int4")


@pytest.mark.usefixtures("in_process_gate")
def test_shards_index_and_progress(tmp_path: Path) -> None:
    model = make_model()
    write_checkpoint(tmp_path / "run", model)
    calls: list[tuple[int, int]] = []
    result = export_run(
        tmp_path / "run",
        tmp_path / "out",
        max_shard_size="20KB",
        progress=lambda done, total: calls.append((done, total)),
    )
    files = result["weight_files"]
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result["bytes"] == 2 * sum(p.numel() for p in model.parameters())
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == tensors.keys()
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
    assert calls[-1] == (result["bytes"], result["bytes"]) and calls == sorted(calls)


@pytest.mark.usefixtures("in_process_gate")
def test_a_chat_folder_ends_at_both_tokens_and_its_checksums_hold(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = write_checkpoint(run, make_model(), data_kind="chat")
    lines = [{"step": s, "train/loss": 1.0} | ({"evaluate/loss": float(s)} if s % 5 == 0 else {}) for s in range(1, 16)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    recipe = {"name": "talk", "model": {}, "data": {"train": [{"path": "/d/speeches/train", "weight": 1.0}]}}
    change_manifest(directory, recipe=recipe | {"tokenizer": str(run / "tokenizer")})
    options: dict[str, Any] = {
        "licence": "apache-2.0",
        "describe_data": lambda path: f"of {path.parent.name}/{path.name}",
    }
    assert export_run(run, out, **options)["end_tokens"] == [256, 259]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [256, 259]
    assert AutoTokenizer.from_pretrained(out).chat_template is not None
    checksums = json.loads((out / "checksums.json").read_text())["files"]
    assert checksums.keys() == {p.name for p in out.iterdir()} - {"checksums.json"}
    for name, entry in checksums.items():
        VerifiedFile(out / name, FileEntry.model_validate(entry)).verify()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\nlicense: apache-2.0\n" in card
    assert "| Data set 1 | speeches/train, weight 1: of speeches/train |" in card and "mixture 0123456789abcdef" in card
    assert "found equal to the training engine's" in card and "is not stated" not in card
    assert "| Validation loss | 10.0000 |" in card, "the evaluation of the exported step, not a later one"
    assert "10,000 tokens in 10 steps" in card
    report = report_of(out)
    assert report["passed"] and report["step"] == 10 and report["data_kind"] == "chat"
    assert {c["check"] for c in report["checks"]} == {
        "tensors", "logits", "loss", "greedy", "tokenizer", "chat_template", "end_tokens",
    }  # fmt: skip


@pytest.mark.usefixtures("in_process_gate")
def test_only_a_model_that_saw_chats_keeps_the_template(tmp_path: Path) -> None:
    run = tmp_path / "text"
    write_checkpoint(run, make_model(), data_kind="text")
    export_run(run, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 256

    def kept(data_kind: str, pretrained: Path | None) -> bool:
        directory = write_checkpoint(tmp_path / "next", make_model(), data_kind=data_kind, probe=False)
        recipe = {"model": {"pretrained": None if pretrained is None else str(pretrained)}}
        change_manifest(directory, recipe=recipe)
        found = run_tokenizer(tmp_path / "next", read_manifest(directory)).chat_template is not None
        shutil.rmtree(tmp_path / "next")
        return found

    write_checkpoint(tmp_path / "chat", make_model(), data_kind="mixed", probe=False)
    assert kept("chat", None) and kept("mixed", run)
    assert not kept("text", None) and not kept("text", run)
    assert kept("text", tmp_path / "chat"), "text after chat"
    assert kept("text", tmp_path / "some-hugging-face-folder"), "its own template is the base's"


@pytest.mark.usefixtures("in_process_gate")
def test_an_empty_folder_may_be_a_link_or_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "run", make_model())
    (tmp_path / "behind").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("behind")
    export_run(tmp_path / "run", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    export_run(tmp_path / "run", Path("."))
    assert report_of(tmp_path / "behind")["passed"] and report_of(tmp_path / "here")["passed"]
    assert (tmp_path / "link").is_symlink() and leftovers(tmp_path) == []


@pytest.mark.usefixtures("in_process_gate")
def test_newest_or_given_step(tmp_path: Path) -> None:
    for step, seed in ((5, 1), (10, 2)):
        write_checkpoint(tmp_path / "run", make_model(seed=seed), step=step)
    assert export_run(tmp_path / "run", tmp_path / "a")["step"] == 10
    assert export_run(tmp_path / "run", tmp_path / "b", step=5)["step"] == 5
    stored = load_file(tmp_path / "b" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, make_model(seed=1).lm_head.weight.to(torch.bfloat16))


@pytest.mark.usefixtures("in_process_gate")
def test_a_checkpoint_without_probe_is_exported_only_where_ungated_allows_it_and_marked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", make_model(), probe=False)
    with pytest.raises(ValueError, match=r"has no probe of the live engine, .* --ungated exports it all the same"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines: list[str] = []
    result = export_run(tmp_path / "run", tmp_path / "out", ungated=True, say=lines.append)
    assert result["gated"] is False and "out was not checked against the training engine" in lines[-1]
    report = report_of(tmp_path / "out")
    assert report["gated"] is False and report["passed"], "its names, tokens and end tokens are right"
    assert {check["check"] for check in report["checks"]} == {"tensors", "tokenizer", "end_tokens", "runs"}
    assert "**Not checked against the training engine**" in (tmp_path / "out" / "README.md").read_text()
    write_checkpoint(tmp_path / "with", make_model())
    result = export_run(tmp_path / "with", tmp_path / "gated", ungated=True)
    assert result["gated"] is True and "logits" in result["gate"], "where there is a probe it is always compared"


def test_gate_process_passes_and_loads_with_transformers_alone(tmp_path: Path) -> None:
    model = make_model()
    write_checkpoint(tmp_path / "run", model, data_kind="chat")
    (tmp_path / "out").mkdir()
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "of-a-killed-export").touch()
    result = export_run(tmp_path / "run", tmp_path / "out")
    assert report_of(tmp_path / "out")["passed"] and "at most 0 from the live engine's" in result["gate"]["logits"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and leftovers(tmp_path) == []
    assert not (tmp_path / "out" / "of-a-killed-export").exists()


def test_gate_process_fails_on_a_probe_of_other_weights_and_the_folder_says_so(tmp_path: Path) -> None:
    """As though export had read the wrong step's tensors: norms are right, the live engine's logits are not."""
    other = write_checkpoint(tmp_path / "other", make_model(seed=7))
    directory = write_checkpoint(tmp_path / "run", make_model())
    change_manifest(directory, probe=read_manifest(other).probe.model_dump())  # type: ignore[union-attr]
    (tmp_path / "out.failed").mkdir()
    with pytest.raises(ValueError, match=r"not what the run trained: .* differ by at most .*out\.failed-1; do not use"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    report = report_of(tmp_path / "out.failed-1")
    assert not report["passed"]
    failed = {check["check"] for check in report["checks"] if not check["passed"]}
    assert failed == {"logits", "loss", "greedy"}


def test_a_gate_process_that_dies_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "run", make_model())
    monkeypatch.setattr(export_check.sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"the folder could not be loaded and run: exit code 1\. .*out\.failed"):
        export_run(tmp_path / "run", tmp_path / "out")


@pytest.fixture(scope="module")
def good_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that passes the gate, and what the gate expects of it."""
    base = tmp_path_factory.mktemp("good")
    write_checkpoint(base / "run", make_model(), data_kind="chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "run_gate", check_folder)
        export_run(base / "run", base / "out")
    return base / "out", expected_of(source_of_run(base / "run"), "bf16")


def failed_checks(folder: Path, expected: dict[str, Any]) -> set[str]:
    return {check["check"] for check in check_folder(folder, expected)["checks"] if not check["passed"]}


def test_tampered_weights_fail_the_gate(tmp_path: Path, good_export: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = good_export
    assert failed_checks(folder, expected) == set()
    good = load_file(folder / "model.safetensors")
    q, k = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    other_row = good["lm_head.weight"].clone()
    other_row[7] = other_row[7] * 10  # a token that is hardly among the largest 32 becomes the largest
    changes: dict[str, tuple[dict[str, Any], set[str]]] = {
        "scaled": ({q: good[q] * 1.05}, {"logits"}),
        "swapped": ({q: good[k], k: good[q]}, {"logits", "loss"}),
        "one row": ({"lm_head.weight": other_row}, {"logits"}),
        "not finite": ({q: good[q] * float("nan")}, {"logits", "loss", "greedy"}),
        "missing": ({q: None}, {"tensors", "logits", "loss"}),
        "unknown": ({"model.layers.0.extra": good[q].clone()}, {"tensors"}),
    }
    for name, (change, least) in changes.items():
        target = tmp_path / name
        shutil.copytree(folder, target)
        tensors = {key: value for key, value in (good | change).items() if value is not None}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        assert failed_checks(target, expected) >= least, name
    nothing = expected["probe"] | {"targets": [-1] * len(expected["probe"]["targets"])}  # counts in this row
    for loss, failed in ((0.0, set()), (5.0, {"loss"})):
        assert failed_checks(folder, expected | {"probe": nothing | {"loss": loss}}) == failed


def test_tampered_texts_fail_the_gate(tmp_path: Path, good_export: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = good_export

    def tampered(name: str, file: str, old: str, new: str) -> set[str]:
        shutil.copytree(folder, tmp_path / name)
        text = (tmp_path / name / file).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / name / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        return failed_checks(tmp_path / name, expected)

    assert tampered("end", "generation_config.json", "259", "258") == {"end_tokens"}
    both = expected | {"tokenizer": expected["tokenizer"] | {"end_tokens": [256]}}
    text = (tmp_path / "end" / "generation_config.json").read_text()
    (tmp_path / "end" / "generation_config.json").write_text(re.sub(r"\[[^]]*\]", "256", text))
    assert failed_checks(tmp_path / "end", both) == {"end_tokens"}, "an answer's end, though export forgot it, too"
    assert tampered("template", "chat_template.jinja", "<|im_start|>", "<|im_end|>") == {"chat_template"}
    assert tampered("tokenizer", "tokenizer.json", '"r": 81', '"r": 0') == {"tokenizer", "chat_template"}
    (tmp_path / "template" / "chat_template.jinja").unlink()
    assert failed_checks(tmp_path / "template", expected) == {"chat_template"}


def test_greedy_text_may_differ_only_at_a_tie(good_export: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = good_export
    greedy = expected["probe"]["greedy"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([greedy["prompt_ids"]])
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=False).logits[0, -1]
    none = check_folder(folder, expected | {"probe": expected["probe"] | {"greedy": None}})
    assert none["passed"] and "not compared" in next(c for c in none["checks"] if c["check"] == "greedy")["sentence"]
    worst = int(first.argmin())
    wrong = expected | {"probe": expected["probe"] | {"greedy": greedy | {"new_ids": [worst]}}}
    assert failed_checks(folder, wrong) == {"greedy"}
    # The second best, as the live engine's choice, passes exactly when it is a tie within the tolerance.
    second = int(first.topk(2).indices[1])
    gap = float(first.max() - first[second])
    tolerance = logit_tolerance(max(abs(v) for row in expected["probe"]["top_logits"] for v in row), "bf16", "bf16", 2)
    tied = expected | {"probe": expected["probe"] | {"greedy": greedy | {"new_ids": [second]}}}
    assert ("greedy" in failed_checks(folder, tied)) == (gap > tolerance)


def test_every_recorded_logit_must_be_met_and_no_other_may_lie_above() -> None:
    """Each of the three ways to be wrong alone, so that one cannot hide behind another."""
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 5.0, 4.0, 0.0]])
    probe = {"positions": [0, 1], "top_indices": [[0, 1], [1, 2]], "top_logits": [[5.0, 4.0], [5.0, 4.0]]}

    def passes(row: int, token: int, change: float) -> bool:
        changed = logits.clone()
        changed[row, token] += change
        return bool(_check_logits(changed, probe, 0.5)["passed"])

    assert passes(0, 0, 0.0) and passes(0, 0, 0.5)
    assert not passes(0, 0, 0.6), "a recorded one, the order unchanged"
    assert passes(1, 0, 3.4) and not passes(1, 0, 3.6), "one outside the recorded, at 4.6 above the lowest of 4"
    assert not passes(0, 3, float("nan"))


def test_tolerances() -> None:
    assert logit_tolerance(9.0, "bf16", "bf16", 3) == 2 * 8 / 128  # 8 <= 9 < 16: one place is 8 / 2**7
    assert logit_tolerance(9.0, "bf16", "fp32", 3) == 2 * 8 / 128
    assert logit_tolerance(9.0, "fp32", "bf16", 3) == 2 * 8 / 128 * 2
    assert logit_tolerance(7.9, "fp16", "fp16", 3) == 2 * 4 / 1024
    assert logit_tolerance(9.0, "fp32", "fp32", 3) == pytest.approx(9e-4)


@pytest.mark.usefixtures("no_gate")
def test_refusals_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="run is not a run directory"):
        export_run(run, tmp_path / "out")
    interrupted = run / "checkpoints" / ".tmp-step_00000010-g000001"
    interrupted.mkdir(parents=True)
    (interrupted / "rank_00000.safetensors").write_bytes(b"the first half")
    with pytest.raises(ValueError, match="has no committed checkpoint"):
        export_run(run, tmp_path / "out")
    for step in (5, 10):
        directory = write_checkpoint(run, make_model(), step=step)
    with pytest.raises(ValueError, match="has no checkpoint of step 7; there are 5, 10"):
        export_run(run, tmp_path / "out", step=7)
    lost = run / "checkpoints" / "step_00000015"
    lost.mkdir()
    with pytest.raises(
        ValueError, match=r"step_00000015, the newest checkpoint, has lost its manifest\.json; .* \(5, 10\)"
    ):
        export_run(run, tmp_path / "out")
    lost.rmdir()
    with pytest.raises(ValueError, match="licence 'Apache 2' is no identifier of the hub"):
        export_run(run, tmp_path / "out", licence="Apache 2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        export_run(run, tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "disk")
        with pytest.raises(ValueError, match=r"disk is a mount point, .*; give a folder in it"):
            export_run(run, tmp_path / "disk")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        with pytest.raises(ValueError, match=r"needs 0\.06 GiB of disk, but .* has 0\.00 GiB free"):
            export_run(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(export, "available_memory_bytes", lambda: 500 * 2**20)
        with pytest.raises(ValueError, match=r"needs 0\.50 GiB of memory even where .*, but 0\.49 GiB are available"):
            export_run(run, tmp_path / "out")
    for size in ("5 apples", "5", "0GB", "-1GB", "8Gb", ""):
        with pytest.raises(ValueError, match=f"shard size '{size}' is no size; give one as 5GB"):
            export_run(run, tmp_path / "out", max_shard_size=size)
    write_manifest(directory, read_manifest(directory).model_copy(update={"version": "checkpoint/7"}))
    with pytest.raises(ValueError, match="has the format 'checkpoint/7'"):
        export_run(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]


@pytest.mark.usefixtures("no_gate")
def test_damaged_or_wrong_checkpoints_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    def refused(sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            export_run(tmp_path / "run", tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
        shutil.rmtree(tmp_path / "run")

    run = tmp_path / "run"
    file = write_checkpoint(run, make_model()) / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    refused(r"rank_00001\.safetensors is damaged: block 0")

    file = write_checkpoint(run, make_model()) / "rank_00000.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    refused("has .* bytes, but the manifest says")

    (write_checkpoint(run, make_model()) / "rank_00001.safetensors").unlink()
    refused("is missing")

    directory = write_checkpoint(run, make_model(), probe=False)
    refused("has no probe of the live engine")

    probe = read_manifest(write_checkpoint(run, make_model())).probe
    shutil.rmtree(run)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("inf")
    directory = write_checkpoint(run, model, probe=False)
    write_manifest(directory, read_manifest(directory).model_copy(update={"probe": probe}))
    refused(r"lm_head\.weight has 1 values that are not finite")

    directory = write_checkpoint(run, make_model())
    norms = read_manifest(directory).norms
    norms["model.norm.weight"]["fp32"] *= 1.001
    change_manifest(directory, norms=norms)
    refused(r"model\.norm\.weight in .* has the L2 norm 5\.65685425, but the live engine recorded 5\.662")

    write_checkpoint(run, make_model(), data_kind="chat")
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ raise_exception('Never') }}")
    refused("chat template of .*tokenizer refuses a question with its answer: Never")
    write_checkpoint(run, make_model(), data_kind="chat")
    RunDirectory(run).write_event("tokenizer kept", xxh3=tokenizer_checksums(run / "tokenizer"))
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (run / "recipe.yaml").write_text(yaml.safe_dump(make_recipe().model_dump()))
    with pytest.raises(ValueError, match=r"chat_template.jinja in .*tokenizer changed since the run began"):
        evaluate_path(run, tmp_path / "any.txt")
    refused(r"chat_template.jinja in .*tokenizer changed since the run began")
    write_checkpoint(run, make_model(vocab_size=258))
    refused("has 260 tokens, but the model only 258")

    directory = write_checkpoint(run, make_model())
    (run / "tokenizer").rename(run / "elsewhere")
    change_manifest(directory, recipe={"tokenizer": str(run / "gone"), "model": {}})
    with pytest.raises(FileNotFoundError, match=r"tokenizer cannot be loaded from .*gone"):
        export_run(run, tmp_path / "out")
    shutil.rmtree(run)

    directory = write_checkpoint(run, make_model())
    config = read_manifest(directory).model_config_dict
    change_manifest(directory, model_config=config | {"model_type": "perceptron"})
    refused("model type 'perceptron' of the checkpoint is unknown")
    change_manifest(write_checkpoint(run, make_model()), model_config=config | {"hidden_size": "large"})
    refused(r"configuration of a llama model: .* expected int, got str")


def test_buffers_are_exported_in_their_own_dtype(tmp_path: Path) -> None:
    """No current causal model stores a persistent buffer, so one is planted in the checkpoint."""
    model = make_model()
    model.register_buffer("seen", torch.tensor([3, 1, 4]))
    directory = write_checkpoint(tmp_path / "run", model, probe=False)
    weights = CheckpointWeights(CheckpointReader(directory))
    with torch.device("meta"):
        empty = empty_model(weights.config, weights.shapes, torch.bfloat16)
    tensor = plan_tensors(weights, empty, torch.bfloat16)[-1]
    assert (tensor.name, tensor.dtype, tensor.shape) == ("seen", "I64", (3,))
    assert torch.equal(tensor.read(), torch.tensor([3, 1, 4]))  # type: ignore[arg-type]


def test_end_tokens_of_templates(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert end_tokens(tokenizer) == [256, 259]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>"
        "{% endif %}{% endfor %}"
    )
    assert end_tokens(tokenizer) == [256], "the text's own end, once"
    tokenizer.chat_template = None
    assert end_tokens(tokenizer) == [256]
    assert hash_file(tmp_path / "tokenizer.json").size_bytes == (tmp_path / "tokenizer.json").stat().st_size


@pytest.mark.usefixtures("in_process_gate")
def test_two_exports_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", make_model())
    second: list[str] = []

    def export_again(done: int, total: int) -> None:
        if not second:
            with pytest.raises(ValueError, match=r"Another export to .*out is at work") as caught:
                export_run(tmp_path / "run", tmp_path / "out")
            second.append(str(caught.value))

    export_run(tmp_path / "run", tmp_path / "out", progress=export_again)
    assert second and report_of(tmp_path / "out")["passed"] and leftovers(tmp_path) == []


def test_an_export_that_ends_just_before_another_one_begins_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "run", make_model())
    plan = export.plan_tensors

    def plan_while_another_ends(*arguments: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
        return plan(*arguments)

    monkeypatch.setattr(export, "plan_tensors", plan_while_another_ends)
    monkeypatch.setattr(export, "write_weights", lambda *_: pytest.fail("it would be written for nothing"))
    with pytest.raises(ValueError, match="out is not empty"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
