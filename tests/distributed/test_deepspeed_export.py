"""Folders of DeepSpeed's own `save_checkpoint`: what export writes equals what the live engine held, bit for bit."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpt.checkpoint.read import TORCH_DTYPES, empty_model
from gpt.deepspeed_checkpoint import DeepSpeedWeights, is_deepspeed_checkpoint, source_of_deepspeed, tag_folder
from gpt.export import export_deepspeed
from gpt.export_weights import plan_tensors, write_weights
from launch.cli import app
from launch.environment import worker_environment

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from small_checkpoint import make_tokenizer

FEW = ["1-bf16-2-untied", "2-fp16-2-tied", "3-bf16-2-tied"]
MATRIX = [f"{s}-{p}-{r}-{m}" for s in (1, 2, 3) for p in TORCH_DTYPES for r in (1, 2) for m in ("tied", "untied")]
UNEVEN = [f"{s}-{p}-3-tied" for s, p in ((1, "bf16"), (2, "fp32"), (3, "fp16"), (3, "bf16"))]
VARIANTS = ["1-bf16-2-tied-accumulate", "2-bf16-2-tied-robin", "2-bf16-3-untied-aligned", "3-bf16-2-untied-offload"]
REST = [case for case in [*MATRIX, *UNEVEN, *VARIANTS] if case not in FEW]


def write_folders(out: Path, cases: list[str]) -> Path:
    """Have DeepSpeed write the cases; a tokenizer lies above them all."""
    words = [sys.executable, str(Path(__file__).with_name("deepspeed_folders.py")), str(out), *cases]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | worker_environment(1))
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases:
        make_tokenizer(out / case)
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("rest"), REST)


@pytest.fixture
def folder(few: Path, tmp_path: Path) -> Path:
    """A copy of a stage 3 folder, to be damaged."""
    return Path(shutil.copytree(few / "3-bf16-2-tied", tmp_path / "trained"))


def tag_of(folder: Path) -> Path:
    return folder / "global_step2"


def refused(folder: Path, tmp_path: Path, kind: type[Exception], message: str, **given: Any) -> None:
    with pytest.raises(kind, match=message):
        export_deepspeed(folder, tmp_path / "out", ungated=True, **given)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def differences_from_live(folder: Path, out: Path) -> list[str]:
    """Tensors that export writes otherwise than the live engine has them: names, dtypes, shapes and bits."""
    differing = []
    stage, precision, ranks, kind, *_ = folder.name.split("-")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = DeepSpeedWeights(tag_folder(folder), fields)
    assert (weights.stage, weights.precision, weights.world_size) == (int(stage), precision, int(ranks))
    assert weights.buffers == ([] if kind == "tied" else ["model.step_sizes"])
    for dtype, live in ((TORCH_DTYPES[precision], "16bit"), (torch.float32, "fp32")):
        with torch.device("meta"):
            model = empty_model(weights.config, weights.shapes, dtype)
        out.mkdir()
        write_weights(out, plan_tensors(weights, model, dtype), 10**9, None)
        written, expected = load_file(out / "model.safetensors"), load_file(folder / f"live_{live}.safetensors")
        assert written.keys() == expected.keys()
        if "robin" in folder.name:  # DeepSpeed 0.19.8 then reads other masters than these parameters'
            written = {name: value.to(TORCH_DTYPES[precision]) for name, value in written.items()}
            expected = load_file(folder / "live_16bit.safetensors")
        for name, value in written.items():
            if value.dtype != expected[name].dtype or not torch.equal(value, expected[name]):
                differing.append(f"{name} ({live})")
        shutil.rmtree(out)
    return differing


@pytest.mark.parametrize("case", FEW)
def test_tensors_equal_the_live_engines(few: Path, tmp_path: Path, case: str) -> None:
    assert differences_from_live(few / case, tmp_path / "out") == []


@pytest.mark.full
def test_tensors_equal_the_live_engines_in_every_case(rest: Path, tmp_path: Path) -> None:
    for case in REST:
        assert differences_from_live(rest / case, tmp_path / "out") == [], case


def test_command_finds_config_and_tokenizer_and_marks_the_folder(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = few / "2-fp16-2-tied", tmp_path / "out"
    with pytest.raises(ValueError, match=r"no probe of the live engine.*; --ungated"):
        app(["export", str(source), "--out", str(out)], standalone_mode=False)
    assert not out.exists()
    words = ["export", str(source / "global_step2"), "--out", str(out), "--dtype", "fp32", "--ungated", "--json"]
    app(words, standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    about = report["deepspeed"]
    assert (about["zero_stage"], about["world_size"], report["step"], report["gated"]) == (2, 2, 2, False)
    assert Path(about["config"]) == source / "config.json" and Path(about["tokenizer"]) == source
    assert json.loads((out / "export_report.json").read_text("utf-8"))["gated"] is False
    live = load_file(source / "live_fp32.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, value in model.named_parameters():
        assert torch.equal(value, live[name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_given_config_and_tokenizer_are_taken(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "model.json")
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, tmp_path, FileNotFoundError, r"has the model's config\.json; give it with --config")
    model = tmp_path / "model.json"
    refused(folder, tmp_path, FileNotFoundError, "give its folder with --tokenizer", config=model)
    refused(folder, tmp_path, FileNotFoundError, r"no model configuration .*none\.json", config=tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    refused(folder, tmp_path, FileNotFoundError, "empty has no tokenizer", config=model, tokenizer=tmp_path / "empty")
    make_tokenizer(tmp_path / "tokenizer")
    given: dict[str, Any] = {"config": tmp_path / "model.json", "tokenizer": tmp_path / "tokenizer"}
    source = source_of_deepspeed(folder, **given)
    assert source.weights.config["hidden_size"] == 24
    assert source.facts["deepspeed"]["tokenizer"] == str(tmp_path / "tokenizer")


def test_options_of_the_other_kind_of_source_are_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for words, message in (
        ([str(folder), "--step", "2"], "--step, --best and --adapter are for runs"),
        ([str(folder), "--best"], "--step, --best and --adapter are for runs"),
        ([str(folder), "--adapter"], "--step, --best and --adapter are for runs"),
        ([str(run), "--trust-pickle"], "are for DeepSpeed checkpoints"),
    ):
        with pytest.raises(Exception, match=message):
            app(["export", *words, "--out", str(tmp_path / "out")], standalone_mode=False)


class Evil:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker, out = tmp_path / "it-ran", tmp_path / "out"
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    torch.save(content | {"client": Evil(marker)}, file)
    with pytest.raises(ValueError, match=r"would load posix\.system, which DeepSpeed .* add --trust-pickle"):
        export_deepspeed(folder, out, ungated=True)
    assert not marker.exists() and not out.exists()
    assert source_of_deepspeed(folder, trust_pickle=True).facts["deepspeed"]["world_size"] == 2
    assert marker.exists()  # so the test's pickle is one that runs


def test_a_plain_pickle_does_not_run_either(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    file = next(tag_of(folder).glob("*rank_0*optim_states.pt"))
    file.write_bytes(pickle.dumps({"optimizer_state_dict": Evil(marker)}))
    with pytest.raises(ValueError, match=r"cannot be read: .* no file of torch.save"):
        export_deepspeed(folder, tmp_path / "out", ungated=True)
    assert not marker.exists()


def test_missing_file_of_a_rank(folder: Path, tmp_path: Path) -> None:
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    file.unlink()
    refused(folder, tmp_path, FileNotFoundError, f"was written by 2 ranks, but lacks {file.name}; use a whole copy")


def test_missing_model_states(few: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(few / "1-bf16-2-untied", tmp_path / "trained"))
    (tag_of(folder) / "mp_rank_00_model_states.pt").unlink()
    refused(folder, tmp_path, FileNotFoundError, r"lacks the files .*mp_rank_00_model_states\.pt")


def test_file_of_a_rank_too_many(folder: Path, tmp_path: Path) -> None:
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    shutil.copy(file, file.with_name(file.name.replace("rank_1", "rank_2")))
    refused(folder, tmp_path, ValueError, r"written by 2 ranks, but also holds .*rank_2.*: of another save")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_file_cut_short(folder: Path, tmp_path: Path, share: float) -> None:
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    refused(folder, tmp_path, ValueError, f"{file.name} cannot be read: it is cut short or damaged")


def test_config_of_another_model(folder: Path, tmp_path: Path) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(fields | {"intermediate_size": 48, "tie_word_embeddings": False}), "utf-8")
    listed = r"lm_head\.weight none and \(260, 24\).*mlp\.down_proj\.weight \(24, 37\) and \(24, 48\).* and 1 more"
    refused(folder, tmp_path, ValueError, listed)
    file.write_text(json.dumps(fields | {"model_type": "martian"}), "utf-8")
    refused(folder, tmp_path, ValueError, "model type 'martian' .* is unknown to this version of transformers")
    file.write_text("{", "utf-8")
    refused(folder, tmp_path, ValueError, "config.json is not JSON")
    file.write_text("{}", "utf-8")
    refused(folder, tmp_path, ValueError, "has no model_type")


def test_no_latest_and_no_such_tag(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tag_of(folder), folder / "global_step10")
    (folder / "latest").write_text("global_step7", "utf-8")
    names = "global_step2, global_step10"
    refused(folder, tmp_path, FileNotFoundError, f"latest names 'global_step7', which is not there; .*: {names}")
    refused(folder / "global_step3", tmp_path, FileNotFoundError, f"There is no checkpoint .*global_step3; .* {names}")
    (folder / "latest").unlink()
    refused(folder, tmp_path, FileNotFoundError, f"has no file latest that names a checkpoint; .*: {names}")
    assert all(map(is_deepspeed_checkpoint, (folder, folder / "global_step2", folder / "global_step3")))
    assert not is_deepspeed_checkpoint(tmp_path) and not is_deepspeed_checkpoint(tmp_path / "none")


def test_tokenizer_too_large(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "large")
    tokenizer.add_tokens(["one-more"])
    tokenizer.save_pretrained(tmp_path / "large")
    refused(folder, tmp_path, ValueError, "has 261 tokens, but the model only 260", tokenizer=tmp_path / "large")


def test_weights_that_differ_from_the_models_own(few: Path, tmp_path: Path) -> None:
    """At stages 1 and 2 a rank's optimizer file of another save is noticed by the weights themselves."""
    folder = Path(shutil.copytree(few / "2-fp16-2-tied", tmp_path / "trained"))
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[5] += 0.25
    torch.save(content, file)
    refused(folder, tmp_path, ValueError, r"holds model\.layers.* twice, and the two differ")


def test_files_of_two_saves(folder: Path, tmp_path: Path) -> None:
    """What a kill within a save into a used tag leaves: each rank's file is whole, one is older."""
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    for state in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        state["step"] -= 1
    torch.save(content, file)
    refused(folder, tmp_path, ValueError, r"not of one save: .* after \(1\.0,\) and \(2\.0,\) updates")


def test_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["fp32_flat_groups"][0].data[3] = float("nan")
    torch.save(content, file)
    refused(folder, tmp_path, ValueError, "has 1 values that are not finite")


def test_group_of_another_size(folder: Path, tmp_path: Path) -> None:
    file = next(tag_of(folder).glob("*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    flats = content["optimizer_state_dict"]["fp32_flat_groups"]
    size = flats[0].numel()
    flats[0].data = torch.cat([flats[0].data, torch.zeros(1)])
    torch.save(content, file)
    refused(folder, tmp_path, ValueError, rf"hold {size}, {size + 1} elements of group 0, not {size} each")
    flats.pop()
    torch.save(content, file)
    refused(folder, tmp_path, ValueError, rf"has {len(flats)} fp32_flat_groups, but the model {len(flats) + 1} groups")


def test_stage_0_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in tag_of(folder).iterdir():
        file.unlink()
    state = {"module": {}, "param_shapes": None, "dp_world_size": 1, "global_steps": 2}
    torch.save(state, tag_of(folder) / "mp_rank_00_model_states.pt")
    refused(folder, tmp_path, ValueError, "not of ZeRO stage 1, 2 or 3")
    torch.save([1], tag_of(folder) / "mp_rank_00_model_states.pt")
    refused(folder, tmp_path, ValueError, "save_checkpoint did not write it")
