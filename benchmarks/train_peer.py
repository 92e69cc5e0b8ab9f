"""One rank of `train.py`'s other side, on the same rows: `transformers.Trainer` or accelerate with DeepSpeed ZeRO, or
torch's DDP.

python -m torch.distributed.run … train_peer.py PEER SETTINGS.json

Each rank leaves rank_N.json beside the settings: when each step ended (seconds of the epoch), losses and peak memory.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gpt.metrics import peak_memory_gib


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of tokens; transformers shifts the labels by itself."""

    def __init__(self, file: str) -> None:
        self._ids = torch.from_numpy(np.load(file))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


def deepspeed_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The file of "auto"s in transformers' documentation of DeepSpeed."""
    zero = {
        "stage": settings["stage"],
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if settings["stage"] == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        }
    return {
        "bf16": {"enabled": "auto"}, "zero_optimization": zero, "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip


def build_model(settings: dict[str, Any]) -> Any:
    fields = dict(settings["model"])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def run_hf_trainer(settings: dict[str, Any]) -> list[float]:
    """transformers' documentation of DeepSpeed; nothing is evaluated or saved."""
    # on a CPU the Trainer joins torch's process group only, and DeepSpeed would take the run for one of a single rank
    deepspeed.init_distributed("gloo")
    arguments = TrainingArguments(
        output_dir=str(Path(settings["folder"]) / "trainer"),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["micro_batch"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        gradient_checkpointing=settings["checkpointing"],
        bf16=True,
        deepspeed=deepspeed_config(settings),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = Clock()
    dataset = Rows(settings["rows"])
    Trainer(model=build_model(settings), args=arguments, train_dataset=dataset, callbacks=[clock]).train()
    return clock.ends


def run_accelerate(settings: dict[str, Any]) -> list[float]:
    """accelerate's documentation of DeepSpeed: `prepare`, then a plain loop."""
    deepspeed.init_distributed("gloo")
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(settings), zero3_init_flag=settings["stage"] == 3)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=1, deepspeed_plugin=plugin)
    model = build_model(settings).train()
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    loader = torch.utils.data.DataLoader(Rows(settings["rows"]), batch_size=settings["micro_batch"])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ends: list[float] = []
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), settings["steps"]):
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.time())
    return ends


def run_ddp(settings: dict[str, Any]) -> list[float]:
    """A plain loop: fp32 weights, bf16 autocast, DistributedDataParallel and fused AdamW."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), settings["micro_batch"]
    torch.manual_seed(0)
    model = build_model(settings).train()
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True
    )
    rows, ends = Rows(settings["rows"]), []
    for step in range(settings["steps"]):
        first = (step * torch.distributed.get_world_size() + rank) * size
        ids = torch.stack([rows[index % len(rows)]["input_ids"] for index in range(first, first + size)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.time())
    return ends


PEERS = {"hf_trainer": run_hf_trainer, "accelerate": run_accelerate, "ddp": run_ddp}


def main() -> None:
    peer, place = sys.argv[1], Path(sys.argv[2])
    ends = PEERS[peer](json.loads(place.read_text(encoding="utf-8")))
    result = {"step_ends": ends, "peak_gib": peak_memory_gib(torch.device("cpu"))}
    (place.parent / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # as our ranks: native threads that outlive the interpreter now and then abort


if __name__ == "__main__":
    main()
