"""Export after real ZeRO-3 training: every architecture at 1 and 2 ranks, held against the weights of the live engine
and against `save_pretrained`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import Runs, environment
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gpt import export
from gpt.export import export_run
from gpt.export_gate import check_folder

WORKER = Path(__file__).with_name("export_worker.py")
SHAPE = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""Rows of a multiple of 16 bytes: torch multiplies groups of experts only then."""
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": SHAPE | {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "mixtral": SHAPE | {"model_type": "mixtral", "num_local_experts": 4},
    "llama": SHAPE | {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3": SHAPE | {"model_type": "qwen3"},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": 16},
    "olmo2": {key: value for key, value in SHAPE.items() if key != "head_dim"} | {"model_type": "olmo2"},
    "gemma2": SHAPE | {"model_type": "gemma2", "tie_word_embeddings": True},
    "gemma3": SHAPE | {"model_type": "gemma3_text", "tie_word_embeddings": True},
}
PRECISION = {"gpt2": "fp32"}
FROZEN = {"olmo2": ["model.layers.0.*"]}
QUICK = [("llama-tied", 1), ("mixtral", 2)]
EVERY = [(name, ranks) for name in MODELS for ranks in (1, 2) if (name, ranks) not in QUICK]
Case = tuple[str, int]


def train(runs: Runs, cases: list[Case]) -> Runs:
    arguments = []
    for name, ranks in cases:
        run = f"export-{name}-{ranks}"
        recipe = runs.write_recipe(
            run,
            model={"config": MODELS[name], "frozen": FROZEN.get(name, [])},
            precision=PRECISION.get(name, "bf16"),
            train={"global_batch_tokens": 128, "micro_batch_sequences": 1, "steps": 5, "seed": 3},
            optimizer={"learning_rate": 5e-3, "warmup_steps": 2},
            checkpoint={"every_steps": None},
        )
        arguments.append(f"{recipe}:{ranks}")
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        cwd=runs.folder,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def quick(runs: Runs) -> Runs:
    return train(runs, QUICK)


@pytest.fixture(scope="module")
def every(runs: Runs) -> Runs:
    return train(runs, EVERY)


def reference_folder(run: Path, out: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    """What `save_pretrained` writes of a model that was given the live engine's weights one by one."""
    fields = json.loads(next(run.glob("checkpoints/step_*/manifest.json")).read_text())["model_config"]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights
    model.save_pretrained(out)
    return out


def assert_equal_weights(ours: Path, reference: Path) -> None:
    """The same names, shapes, dtypes and bytes."""
    mine, other = load_file(ours / "model.safetensors"), load_file(reference / "model.safetensors")
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check_case(runs: Runs, case: Case, tmp_path: Path) -> None:
    name, ranks = case
    run = runs.directory(f"export-{name}-{ranks}")
    precision = PRECISION.get(name, "bf16")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    result = export_run(run, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["passed"] and report["gated"] and result["dtype"] == precision and result["step"] == 5
    difference = {check["check"]: check["difference"] for check in report["checks"] if "difference" in check}
    assert difference["logits"] == 0 and difference["loss"] < 1e-6, "the engine's own kernels on the same numbers"
    live = load_file(run / "live.safetensors")
    assert_equal_weights(tmp_path / "out", reference_folder(run, tmp_path / "reference", live, dtype))
    if precision != "fp32":
        export_run(run, tmp_path / "masters", dtype="fp32")
        report = json.loads((tmp_path / "masters" / "export_report.json").read_text())
        masters = next(check for check in report["checks"] if check["check"] == "masters")
        assert masters["passed"] and masters["difference"] == 0
        live = load_file(run / "live_fp32.safetensors")
        assert_equal_weights(tmp_path / "masters", reference_folder(run, tmp_path / "fp32", live, torch.float32))


@pytest.fixture(autouse=True)
def in_process_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's checks without the seconds that its process takes; tests/unit/test_export.py runs the real one."""
    monkeypatch.setattr(export, "run_gate", check_folder)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_export_is_the_live_engine(quick: Runs, case: Case, tmp_path: Path) -> None:
    check_case(quick, case, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_architecture_at_one_and_two_ranks(every: Runs, case: Case, tmp_path: Path) -> None:
    check_case(every, case, tmp_path)
