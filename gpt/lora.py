"""LoRA (arXiv:2106.09685) by peft: where a run's adapter goes, and its way out, alone or merged into the base.

A run's checkpoints hold the adapter alone. Its base is read again at each start, so the recipe pins its checksum.
"""

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from gpt.checkpoint.files import hash_file
from gpt.checkpoint.format import Precision
from gpt.checkpoint.read import TORCH_DTYPES, open_checkpoint
from gpt.export_source import CHUNK_ELEMENTS, ExportSource, WeightSource
from gpt.model import decoder_layers, elements_of, is_run_directory, meta_model
from gpt.recipe import Lora, Recipe
from gpt.recipe_file import parse_section
from gpt.run_directory import stored_recipe

if TYPE_CHECKING:  # takes two seconds, which a launcher that only checks a recipe need not wait
    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name of the adapter within a model; its files do not have it."""


def pin_base(recipe: Recipe) -> Recipe:
    """The recipe with the checksum of the base's configuration and weights; as it is where there is no adapter.

    Raises:
        ValueError: the base is a run, has no weights as safetensors, or is another than recipe or run have pinned.
    """
    if recipe.lora is None:
        return recipe
    pretrained = str(recipe.model.pretrained)
    if is_run_directory(pretrained):
        raise ValueError(
            f"model.pretrained {pretrained} is a run, but lora adapts a Hugging Face folder: export that run and name "
            f"the folder"
        )
    found = _base_checksum(pretrained)
    stored = stored_recipe(recipe.run_directory())
    for pinned in (recipe.lora, stored.lora if stored is not None else None):
        if pinned is not None:
            _check_pinned(pretrained, pinned.base_xxh3, found)
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"base_xxh3": found})})


def _check_pinned(pretrained: str, pinned: str | None, found: str) -> None:
    if pinned not in (None, found):
        raise ValueError(
            f"the weights or the configuration of {pretrained} have the checksum {found}, but the adapter is of a base "
            f"with {pinned}: bring that one back, or start a new run under another name"
        )


def _base_checksum(pretrained: str) -> str:
    """xxh3 of config.json and all weights of a Hugging Face folder, or of a hub id's in the cache."""
    folder = Path(pretrained)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(pretrained, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.pretrained {pretrained} is neither a folder nor in the hub's cache: {str(error).split('.')[0]}"
            ) from error
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ValueError(f"model.pretrained {pretrained} has no weights as model*.safetensors, which lora could adapt")
    entries = [hash_file(file).model_dump_json() for file in (folder / "config.json", *weights)]
    return xxhash.xxh3_64_hexdigest("\n".join(entries).encode())


def target_names(model: "PreTrainedModel", lora: Lora) -> list[str]:
    """The linear layers that the adapter is added to, by their full names.

    Raises:
        ValueError: a target that is the end of no such name.
    """
    within = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    names = [n for n, m in model.named_modules() if id(m) in within and isinstance(m, torch.nn.Linear | Conv1D)]
    if lora.targets is None:
        return names
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.4) or known
            raise ValueError(
                f"lora.targets: no linear layer of the decoder layers is named {target!r}; near: {', '.join(near)}"
            )
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in lora.targets)]


def saved_elements(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Elements of the parameters that a checkpoint holds: the adapter's, or all. Raises as `target_names`."""
    if recipe.lora is None:
        return elements_of(config)
    model = meta_model(config)
    targets = [model.get_submodule(name) for name in target_names(model, recipe.lora)]
    return sum(recipe.lora.rank * sum(target.get_parameter("weight").shape) for target in targets)


def add_adapter(model: "PreTrainedModel", lora: Lora, seed: int) -> "LoraConfig":
    """Freeze the model and add the adapter, in the model's dtype, with the same numbers whatever the world size."""
    from peft import LoraConfig

    names = target_names(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    transformers.set_seed(seed)
    model.add_adapter(config, ADAPTER)
    return config


def _recorded(recipe: dict[str, Any]) -> tuple[Lora, str]:
    """(the adapter's section, its base) of a checkpoint's recipe. Raises ValueError where the base is another now."""
    lora = parse_section(Lora, recipe["lora"], "the checkpoint's lora")
    pretrained = str(recipe["model"]["pretrained"])
    _check_pinned(pretrained, lora.base_xxh3, _base_checksum(pretrained))
    return lora, pretrained


def _load_base(pretrained: str, precision: Precision) -> "PreTrainedModel":
    """The base as training has it: rounded to its dtype."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        pretrained, dtype=TORCH_DTYPES[precision], trust_remote_code=False, use_safetensors=True
    )
    return model.eval()


def load_adapted_model(run: Path, dtype: torch.dtype | None = None, *, step: int | None = None) -> "PreTrainedModel":
    """A run's base with its adapter on it, on the CPU, in evaluation mode; as `load_plain_model` otherwise."""
    reader = open_checkpoint(run, step)
    lora, pretrained = _recorded(reader.manifest.recipe)
    model = _load_base(pretrained, reader.manifest.precision)
    add_adapter(model, lora, seed=0)
    for parameter in model.parameters():  # not `Module.to`, which would round buffers as well
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    with torch.no_grad():
        for entry in reader.manifest.parameters:
            model.get_parameter(entry.name).copy_(reader.read_tensor(entry.name))
    return model.eval()


class MergedWeights:
    """A `WeightSource`: the base's weights, held in memory, to which an adapter's products are added when read."""

    def __init__(self, adapter: WeightSource, recipe: dict[str, Any]) -> None:
        self._adapter = adapter
        self.directory, self.precision, self.config = adapter.directory, adapter.precision, adapter.config
        lora, pretrained = _recorded(recipe)
        self._model = _load_base(pretrained, adapter.precision)
        self._scale = lora.alpha / lora.rank
        self._parameters = dict(self._model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self.buffers = [n for n, _ in self._model.named_buffers() if n in self._model.state_dict()]
        self.memory_bytes = sum(p.numel() * p.itemsize for p in self._parameters.values()) + adapter.memory_bytes

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """As `WeightSource`; of an adapted layer in fp32."""
        whole, layer = self._parameters[name].detach(), name.removesuffix(".weight")
        a, b = (f"{layer}.lora_{side}.{ADAPTER}.weight" for side in "AB")
        if a in self._adapter.shapes:
            product = self._read(b) @ self._read(a) * self._scale
            transposed = isinstance(self._model.get_submodule(layer), Conv1D)
            whole = whole.float() + (product.T if transposed else product)
        yield from whole.flatten().split(CHUNK_ELEMENTS)

    def _read(self, name: str) -> torch.Tensor:
        chunks = [chunk.clone() for chunk in self._adapter.chunks(name)]
        return torch.cat(chunks).view(self._adapter.shapes[name])

    def buffer(self, name: str) -> torch.Tensor:
        """As `WeightSource`."""
        return self._model.get_buffer(name)


def merged(source: ExportSource) -> ExportSource:
    """An adapter's source as that of the whole model."""
    assert source.recipe is not None
    weights = MergedWeights(source.weights, source.recipe)
    elements, adapter = (
        sum(torch.Size(shape).numel() for shape in part.shapes.values()) for part in (weights, source.weights)
    )
    card = source.card | {
        "Architecture": f"{weights.config.get('model_type')}, {elements:,} parameters",
        "Adapter": f"LoRA of {adapter:,} parameters, merged",
    }
    return replace(source, weights=weights, card=card, masters=None, merged=True)


def adapter_config(source: ExportSource) -> tuple["LoraConfig", "PreTrainedModel"]:
    """What peft needs to put an adapter onto its base, and that model on the meta device.

    Raises ValueError where the base is another now.
    """
    assert source.recipe is not None
    lora, pretrained = _recorded(source.recipe)
    model = meta_model(transformers.AutoConfig.from_pretrained(pretrained, trust_remote_code=False))
    names = target_names(model, lora)
    config = add_adapter(model, lora, seed=0)
    config.base_model_name_or_path, config.inference_mode = pretrained, True
    config.target_modules = names  # peft's own is a set, which each process would write in another order
    return config, model


def peft_name(name: str) -> str:
    """A parameter's name in peft's files, of its name in the model."""
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"
