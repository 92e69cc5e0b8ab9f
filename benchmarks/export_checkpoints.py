"""One model in two checkpoints of 2 ranks, with the same random numbers: Trainyard's format and DeepSpeed's.

    python benchmarks/export_checkpoints.py MODEL FOLDER

FOLDER gets `run/` (a run directory with one checkpoint, by the product's own writer, with a probe), `deepspeed/` (the
layout that DeepSpeed 0.19.8's `save_checkpoint` gives ZeRO stage 3) and `tokenizer/`. The moments are zeros.
"""

import math
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.export import MODELS, VOCABULARY_SIZE  # noqa: E402
from gpt.batch import MicroBatch  # noqa: E402
from gpt.checkpoint.format import (  # noqa: E402
    OptimizerEntry,
    ParameterEntry,
    ParameterGroup,
    checkpoint_directory,
    read_manifest,
    temporary_checkpoint_directory,
    write_manifest,
)
from gpt.checkpoint.probe import make_probe  # noqa: E402
from gpt.checkpoint.read import load_plain_model  # noqa: E402
from gpt.checkpoint.write import collect, commit, write_rank  # noqa: E402

RANKS, STEP = 2, 10
COMMON = {"model_type": "llama", "vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 2048,
          "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}  # fmt: skip
SMALL_STATES = ("exp_avg", "exp_avg_sq")
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
DECAYS = (0.1, 0.0)


def main(model: str, folder: Path) -> None:
    config = AutoConfig.for_model(**COMMON, **MODELS[model])
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer")
    config.save_pretrained(folder / "deepspeed")
    shares = [{name: share_of(name, shape, rank) for name, shape in shapes.items()} for rank in range(RANKS)]
    for rank in range(RANKS):
        write_deepspeed_rank(folder / "deepspeed" / f"global_step{STEP}", rank, shapes, shares[rank])
    (folder / "deepspeed" / "latest").write_text(f"global_step{STEP}", encoding="utf-8")
    directory = write_run(folder, config.to_dict(), shapes, shares)
    shares.clear()
    add_probe(folder / "run", directory)


def write_tokenizer(folder: Path) -> None:
    """Of bytes, with VOCABULARY_SIZE entries."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<unused {i}>" for i in range(VOCABULARY_SIZE - 258))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>").save_pretrained(
        folder
    )


def share_of(name: str, shape: tuple[int, ...], rank: int) -> torch.Tensor:
    """A rank's equal share of a parameter's fp32 values, the last one's end padded with zeros."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{rank}".encode()))
    elements = math.prod(shape)
    share = -(-elements // RANKS)
    values = torch.randn(share, generator=generator).mul_(0.02)
    values[max(0, elements - rank * share) :] = 0
    return values if len(shape) > 1 else values.add_(1)


def groups_of(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Parameters with and without weight decay."""
    return [[n for n, s in shapes.items() if len(s) > 1], [n for n, s in shapes.items() if len(s) == 1]]


def write_deepspeed_rank(
    folder: Path, rank: int, shapes: dict[str, tuple[int, ...]], share: dict[str, torch.Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flats = [torch.cat([share[name] for name in group]) for group in groups_of(shapes)]
    states = {
        i: {"step": torch.tensor(float(STEP))} | {state: torch.zeros_like(flat) for state in SMALL_STATES}
        for i, flat in enumerate(flats)
    }
    groups = [SETTINGS | {"weight_decay": decay, "params": [i]} for i, decay in enumerate(DECAYS)]
    about: dict[str, Any] = {"ds_config": {"bf16": {"enabled": True}}, "ds_version": "0.19.8"}
    optimizer = {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": RANKS,
        "optimizer_state_dict": {"state": states, "param_groups": groups},
        "fp32_flat_groups": flats,
    }
    torch.save(
        {"optimizer_state_dict": optimizer} | about, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    )
    model = {
        "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in shapes),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((n, torch.Size(shapes[n])) for n in group) for group in groups_of(shapes)],
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"} if rank == 0 else {},
        "frozen_param_fragments": OrderedDict(),
        "global_steps": STEP,
        "dp_world_size": RANKS,
        "mp_world_size": 1,
    }
    torch.save(model | about, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def write_run(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], shares: list[dict[str, torch.Tensor]]
) -> Path:
    """The checkpoint as `trainyard train` writes it; returns its folder."""
    temporary = temporary_checkpoint_directory(folder / "run", STEP, 1)
    temporary.parent.mkdir(parents=True)
    for rank, share in enumerate(shares):
        tensors, ranges = {"rng/torch_cpu": torch.get_rng_state()}, []
        for name, shape in shapes.items():
            start = min(math.prod(shape), rank * share[name].numel())
            count = min(share[name].numel(), math.prod(shape) - start)
            ranges.append((start, count))
            tensors[f"fp32/{name}"] = share[name][:count]
            tensors |= {f"{state}/{name}": torch.zeros(count) for state in SMALL_STATES}
        write_rank(temporary, rank, 1, tensors, ranges, lambda: False)
    entries = [
        ParameterEntry(name=name, shape=list(shape), dtype="bf16", group=int(len(shape) == 1))
        for name, shape in shapes.items()
    ]
    settings = [ParameterGroup(settings=SETTINGS | {"weight_decay": d}, scalars={"step": float(STEP)}) for d in DECAYS]
    fields = {
        "step": STEP,
        "tokens": 1000,
        "samples_consumed": 1000,
        "data_fingerprint": "none",
        "data_kind": "text",
        "world_size": RANKS,
        "zero_stage": 3,
        "generation": 1,
        "precision": "bf16",
        "parameters": entries,
        "buffers": [],
        "tied": {"lm_head.weight": "model.embed_tokens.weight"},
        "optimizer": OptimizerEntry(type="adamw", states=["fp32", *SMALL_STATES], groups=settings),
        "model_config_dict": config,
        "recipe": {"name": "benchmark", "tokenizer": str(folder / "tokenizer")},
        "versions": {},
        "probe": None,
    }
    sidecars = collect(temporary, RANKS, 1, 60.0, lambda: False)
    commit(folder / "run", temporary, fields, sidecars, lambda: None)
    return checkpoint_directory(folder / "run", STEP)


def add_probe(run: Path, directory: Path) -> None:
    """What the live engine would have recorded: a row of 256 tokens through the model in bf16."""
    model = load_plain_model(run)
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(256)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    batch = MicroBatch(ids, ids.roll(-1, 1), positions, torch.ones_like(ids, dtype=torch.bool))
    probe = make_probe(logits, batch, None)
    write_manifest(directory, read_manifest(directory).model_copy(update={"probe": probe}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
