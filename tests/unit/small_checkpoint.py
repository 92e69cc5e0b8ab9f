"""A `checkpoint/1` of a tiny transformers model, as ranks would write it, with a probe from a real forward."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, write_safetensors
from gpt.checkpoint.format import (
    Manifest,
    checkpoint_directory,
    fsync_directory,
    rank_file_name,
    read_manifest,
    write_manifest,
)
from gpt.checkpoint.read import TORCH_DTYPES
from gpt.model import tied_names

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # logits far enough apart for the greedy text to mean something
}


def make_tokenizer(directory: Path, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 tokens: the 256 bytes and the four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat:
        fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return fast


def make_model(model_type: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(SHAPE)
    if model_type == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 260, "eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None} | shape | fields,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with its parameters in `dtype`; buffers keep theirs, as transformers builds it (`Module.to` would not)."""
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.data = parameter.data.to(dtype)
    return result


def forward(model: PreTrainedModel, ids: list[int], positions: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] in the model's dtype, with documents kept apart by their positions."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False).logits[0]


def make_probe(model: PreTrainedModel, *, greedy_tokens: int = 12) -> dict[str, Any]:
    """The probe of `model` (in the training dtype): two packed documents of 24 and 16 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (40,), generator=generator).tolist()
    positions = [*range(24), *range(16)]
    targets = [*ids[1:], -1]
    targets[23] = -1
    logits = forward(model, ids, positions)
    counted = torch.tensor(targets)
    loss = torch.nn.functional.cross_entropy(logits.float(), counted, ignore_index=-1).item()
    chosen = list(range(0, 40, 2))
    top = logits[chosen].topk(32)
    prompt, new = ids[:6], []
    for _ in range(greedy_tokens):
        row = [*prompt, *new]
        new.append(int(forward(model, row, list(range(len(row))))[-1].argmax()))
        if new[-1] in (256, 259):
            break
    return {
        "input_ids": ids,
        "position_ids": positions,
        "targets": targets,
        "loss": loss,
        "positions": chosen,
        "top_indices": top.indices.tolist(),
        "top_logits": top.values.float().tolist(),
        "greedy": {"prompt_ids": prompt, "new_ids": new},
    }


def write_checkpoint(
    run: Path,
    model: PreTrainedModel,
    *,
    step: int = 10,
    ranks: int = 2,
    precision: str = "bf16",
    data_kind: str = "text",
    probe: bool = True,
    tokenizer: bool = True,
    trained_only: bool = False,
) -> Path:
    """Write the checkpoint that `ranks` ranks training `model` (fp32 masters) in `precision` would; its folder.

    Parameters that need no gradient are frozen: stored in `precision`, or not at all with `trained_only`.
    """
    run.mkdir(parents=True, exist_ok=True)
    if tokenizer and not (run / "tokenizer").exists():
        make_tokenizer(run / "tokenizer")
    directory = checkpoint_directory(run, step)
    directory.mkdir(parents=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or not trained_only}
    states = {"fp32": 1.0, "exp_avg": 0.01, "exp_avg_sq": 0.0001}
    dtype = TORCH_DTYPES[precision]
    stored = {
        n: {s: p.detach() * k for s, k in states.items()} if p.requires_grad else {"frozen": p.detach().to(dtype)}
        for n, p in parameters.items()
    }
    persistent = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    files, fragments = {}, {}
    for rank in range(ranks):
        tensors = [rng_tensor()]
        ranges = []
        for name, parameter in parameters.items():
            flat = parameter.detach().reshape(-1)
            share = -(-flat.numel() // ranks)
            start, stop = min(flat.numel(), rank * share), min(flat.numel(), (rank + 1) * share)
            ranges.append((start, stop - start))
            for state, values in stored[name].items():
                if stop > start:
                    part = values.reshape(-1)[start:stop]
                    code = DTYPE_CODES[part.dtype]
                    tensors.append(TensorToWrite(f"{state}/{name}", code, (stop - start,), lambda part=part: part))
        if rank == 0:
            for name, buffer in persistent.items():
                code = DTYPE_CODES[buffer.dtype]
                tensors.append(TensorToWrite(f"buffer/{name}", code, tuple(buffer.shape), lambda buffer=buffer: buffer))
        file = rank_file_name(rank)
        files[file] = write_safetensors(directory / file, tensors)
        fragments[file] = ranges
    fsync_directory(directory)
    trained = in_dtype(model, TORCH_DTYPES[precision])
    write_manifest(
        directory,
        Manifest(
            step=step,
            tokens=step * 1000,
            samples_consumed=step * 8,
            data_fingerprint="0123456789abcdef",
            data_kind=data_kind,
            world_size=ranks,
            zero_stage=3,
            generation=1,
            precision=precision,
            parameters=[
                {
                    "name": n,
                    "shape": list(p.shape),
                    "dtype": precision,
                    "group": int(p.dim() == 1) if p.requires_grad else None,
                }
                for n, p in parameters.items()
            ],
            buffers=list(persistent),
            tied=tied_names(model),
            optimizer={
                "type": "adamw",
                "states": list(states),
                "groups": [
                    {
                        "settings": {"lr": 1e-3, "weight_decay": w, "betas": (0.9, 0.95), "eps": 1e-8},
                        "scalars": {"step": step},
                    }
                    for w in (0.1, 0.0)
                ],
            },
            model_config_dict=model.config.to_dict(),
            recipe={
                "name": run.name,
                "tokenizer": str(run / "tokenizer"),
                "model": {"pretrained": None},
                "data": {"sequence_length": 40},
            },
            versions={"trainyard": "0.1.0", "transformers": "5.23.0"},
            norms={n: {s: float(v.double().norm()) for s, v in values.items()} for n, values in stored.items()},
            probe=make_probe(trained) if probe else None,
            files=files,
            fragments=fragments,
        ),
    )
    return directory


def rng_tensor() -> TensorToWrite:
    state = torch.get_rng_state()
    return TensorToWrite("rng/torch_cpu", "U8", tuple(state.shape), lambda: state)


def change_manifest(directory: Path, **changes: Any) -> None:
    """Rewrite the manifest with other values, its own checksum right."""
    content = read_manifest(directory).model_dump(by_alias=True)
    write_manifest(directory, Manifest.model_validate(json.loads(json.dumps(content)) | changes))
