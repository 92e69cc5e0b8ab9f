"""Folders that plain DeepSpeed writes with `save_checkpoint`, and beside each what the live engine held.

    python deepspeed_folders.py OUT CASE…      a case is STAGE-PRECISION-RANKS-MODEL[-VARIANT], e.g. 3-bf16-2-tied

Trainyard is not imported. The parent imports DeepSpeed once and forks the ranks of each world size; these build one
engine after another. What is compared afterwards are an engine's weights with its own folder, whatever came before it.
OUT/CASE/ gets DeepSpeed's files, config.json, and live_16bit.safetensors and live_fp32.safetensors.
"""

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": None,
}
"""Few of its sizes are multiples of 2 or 3 ranks: shares are uneven and padded."""
FROZEN = "model.layers.0.mlp.up_proj.weight"
VARIANTS: dict[str, dict[str, Any]] = {
    "accumulate": {"data_types": {"grad_accum_dtype": "fp32"}},
    "robin": {"zero_optimization": {"round_robin_gradients": True}},
    "aligned": {"zero_optimization": {"parameter_alignment": True}},
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}},
}


def build(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama: `tied` has tied embeddings and a frozen parameter, `untied` has biases and a persistent buffer."""
    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=kind == "tied", attention_bias=kind == "untied")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind == "tied":
        model.get_parameter(FROZEN).requires_grad_(False)
    else:
        model.model.register_buffer("step_sizes", torch.rand(5))
    return model


def settings(stage: int, precision: str, variant: str | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 100, "sub_group_size": 4000}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    changes = VARIANTS.get(variant or "", {})
    return config | changes | {"zero_optimization": zero | changes.get("zero_optimization", {})}


def write(case: str, out: Path, rank: int) -> None:
    stage, precision, _, kind, *variant = case.split("-")
    model = build(kind, DTYPES[precision])
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    config = settings(int(stage), precision, variant[0] if variant else None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    if precision == "fp16":
        engine.optimizer.loss_scaler.cur_scale = 256.0
    torch.manual_seed(rank)
    for _ in range(2):
        ids = torch.randint(0, 256, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    assert engine.skipped_steps == 0
    folder = out / case
    engine.save_checkpoint(str(folder), client_state={"samples": 32})
    live = {name: value.detach().clone() for name, value in model.named_buffers() if name == "model.step_sizes"}
    masters = dict(live)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            live[name] = parameter.detach().clone()
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else live[name].float()
        masters[name] = master.detach().float().clone()
    if rank == 0:
        assert any(not torch.equal(masters[n], live[n].float()) for n in live) or precision == "fp32"
        save_file({n: v.contiguous() for n, v in live.items()}, folder / "live_16bit.safetensors")
        save_file({n: v.contiguous() for n, v in masters.items()}, folder / "live_fp32.safetensors")
        model.config.save_pretrained(folder)
    engine.destroy()


def run_rank(rank: int, world_size: int, cases: list[str], out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses fp16 on a CPU for its speed
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    for case in cases:
        write(case, out, rank)


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    for world_size in sorted({int(case.split("-")[2]) for case in cases}):
        mine = [case for case in cases if int(case.split("-")[2]) == world_size]
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(rank, world_size, mine, out)
                    os._exit(0)  # native threads that outlive the interpreter now and then abort
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{world_size} ranks ended with {codes}")
    (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
