"""A transformers causal language model, from scratch or pretrained, with the same weights whatever the world size.

What is added to the model is set from outside: gradient checkpointing, ZeRO-3 leaf modules and compiled layers.
"""

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from gpt.checkpoint.read import newest_manifest
from gpt.recipe import Model

if TYPE_CHECKING:  # takes two seconds, which a launcher that only checks a recipe need not wait
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARY_PADDING = 128
"""A from-scratch vocabulary may exceed the tokenizer's only up to the next multiple of this (for fast kernels)."""


def is_run_directory(path: str) -> bool:
    """Whether `model.pretrained` names another Trainyard run."""
    return (Path(path) / "recipe.yaml").is_file() and (Path(path) / "checkpoints").is_dir()


def build_config(model: Model, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> PreTrainedConfig:
    """The transformers configuration of the recipe's model, checked against the tokenizer and the sequence length.

    Raises:
        ValueError: an unknown model type or field, weights that cannot be read, a vocabulary that does not fit the
            tokenizer, or sequences longer than the model's positions.
    """
    if model.config is not None:
        config = _config_from_scratch(dict(model.config), tokenizer)
    else:
        assert model.pretrained is not None
        config = _config_of_weights(model.pretrained)
    text = config.get_text_config()  # of a model that reads more than text
    size = _vocabulary_size(tokenizer)
    if text.vocab_size < size:
        raise ValueError(
            f"the model's vocab_size is {text.vocab_size}, but the tokenizer has {size} tokens: "
            f"use at least {size}, or leave vocab_size out to take the tokenizer's"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"data.sequence_length is {sequence_length}, but the model has only {positions} positions "
            f"(max_position_embeddings): shorten the sequences or enlarge the model"
        )
    return config


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: `len(tokenizer)` is too small where a vocabulary has gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _config_from_scratch(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    model_type = fields.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(transformers.CONFIG_MAPPING), n=3)
        raise ValueError(
            f"model.config.model_type {model_type!r} is unknown to transformers; near: {', '.join(near) or '-'}"
        )
    default = transformers.CONFIG_MAPPING[model_type]()
    known = set(default.to_dict()) | set(default.attribute_map)
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' documentation of its configuration"
            raise ValueError(f"model.config.{key} is no field of transformers' {model_type} configuration: {hint}")
    size = _vocabulary_size(tokenizer)
    fields.setdefault("vocab_size", size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # transformers raises its own validation errors of many types
        raise ValueError(f"model.config is refused by transformers: {' '.join(str(error).split())}") from error
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers has no causal language model of type {model_type!r}")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    limit, given = -(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING, config.get_text_config().vocab_size
    if given > limit:
        raise ValueError(
            f"model.config.vocab_size is {given}, but the tokenizer has {size} tokens: use {size}, or at most {limit} "
            f"(the next multiple of {VOCABULARY_PADDING})"
        )
    return config


def _config_of_weights(pretrained: str) -> PreTrainedConfig:
    if is_run_directory(pretrained):
        manifest = newest_manifest(Path(pretrained))
        if manifest is None:
            raise ValueError(f"model.pretrained {pretrained} is a run without any checkpoint: train it first")
        if manifest.recipe.get("lora"):
            raise ValueError(
                f"model.pretrained {pretrained} is a run with lora, whose checkpoints hold an adapter only: export it "
                f"and name the folder"
            )
        fields = dict(manifest.model_config_dict)
        architectures = fields.pop("architectures", None)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config.architectures = architectures
        return config
    if (Path(pretrained) / "adapter_config.json").is_file():
        raise ValueError(
            f"model.pretrained {pretrained} is an adapter, not a model: export its run without --adapter, and name "
            f"that folder"
        )
    if any(Path(pretrained).glob("*.bin")) and not any(Path(pretrained).glob("*.safetensors")):
        raise ValueError(f"model.pretrained {pretrained} has no weights as safetensors; pickles are not read")
    try:
        return AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.pretrained {pretrained} is neither a Trainyard run, nor a Hugging Face folder, nor a hub id that "
            f"can be reached: {str(error).splitlines()[0]}"
        ) from error


def choose_attention(config: PreTrainedConfig, attention: str) -> None:
    """Make the recipe's `attention` that of models of this configuration.

    Raises:
        ValueError: this host cannot compute it.
    """
    if attention == "flash_attention_2" and not (torch.cuda.is_available() and is_flash_attn_2_available()):
        lacks = "the package flash-attn" if torch.cuda.is_available() else "a CUDA device"
        raise ValueError(f"attention is flash_attention_2, but this host has not {lacks} that it needs: use auto")
    if attention != "auto":
        config._attn_implementation = attention


def build_model(
    model: Model, config: PreTrainedConfig, precision: str, seed: int, zero_config: Any
) -> "PreTrainedModel":
    """The model with its initial weights, in the training dtype; they depend on neither world size nor ZeRO stage.

    Must run while `zero_config` (transformers' HfDeepSpeedConfig) is alive: at stage 3 transformers then partitions
    each module as it is made, initialises on rank 0 and broadcasts. Wrapping the model in `deepspeed.zero.Init` by
    hand would leave torch's default initialisation. At other stages the layers' constructors must not draw random
    numbers first, as they do not at stage 3.
    A run directory's weights are not read here: the checkpoint reader sets them once the engine exists.
    """
    transformers.set_seed(seed)
    dtype = DTYPES[precision]
    if model.pretrained is not None and not is_run_directory(model.pretrained):
        result = _load_weights(model.pretrained, config, dtype)
    elif zero_config.is_zero3():
        result = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        with no_init_weights():
            result = AutoModelForCausalLM.from_config(config, dtype=dtype)
        result.initialize_weights()
        result.tie_weights()
    for name in frozen_names(result, model.frozen):
        result.get_parameter(name).requires_grad_(False)
    if model.frozen and zero_config.is_zero3():
        # below frozen embeddings a layer's input needs no gradient, and DeepSpeed frees its weights before its backward
        result.enable_input_require_grads()
    result.config.use_cache = False
    return result


def _load_weights(pretrained: str, config: PreTrainedConfig, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of a Hugging Face folder or hub id.

    Raises:
        ValueError: it lacks tensors; transformers would go on with random numbers in their place.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        pretrained, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, use_safetensors=True
    )
    if missing := sorted(loaded[1]["missing_keys"]):
        shown = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise ValueError(f"model.pretrained {pretrained} lacks {len(missing)} of the model's tensors ({shown})")
    result: PreTrainedModel = loaded[0]
    return result


def frozen_names(model: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of parameters that `model.frozen` matches (a tied one by any of its names).

    Raises:
        ValueError: a pattern that matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(f"model.frozen: no parameter matches {pattern!r}; near: {', '.join(near)}")
    frozen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    identities = {id(model.get_parameter(name)) for name in frozen}
    if all(id(parameter) in identities for parameter in model.parameters()):
        raise ValueError(f"model.frozen {list(patterns)} matches every parameter: nothing is left to train")
    return frozen


def check_weights(model: Model, config: PreTrainedConfig, precision: str) -> None:
    """What a model of this configuration cannot be trained with, found without its weights.

    Raises:
        ValueError: as `frozen_names`; experts whose rows torch's grouped matrix product does not take.
    """
    if not (model.frozen or any("expert" in name for name in config.get_text_config().to_dict())):
        return  # to make a model takes its time
    made = meta_model(config)
    if model.frozen:
        frozen_names(made, model.frozen)
    size = DTYPES[precision].itemsize
    for name, parameter in made.named_parameters():
        grouped = ".experts." in name and parameter.dim() == 3
        if grouped and parameter.shape[-1] * size % 16 and made.config._experts_implementation == "grouped_mm":
            raise ValueError(
                f"{name} has rows of {parameter.shape[-1]} numbers, {parameter.shape[-1] * size} bytes in {precision}, "
                f"but torch multiplies experts only where rows are a multiple of 16 bytes: make hidden_size and the "
                f"experts' intermediate size multiples of {16 // size}"
            )


def decoder_layers(model: "PreTrainedModel") -> list[torch.nn.Module]:
    """The model's decoder layers, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[torch.nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that transformers can checkpoint")
    return layers


def checkpoint_gradients(model: "PreTrainedModel", every_layers: int) -> None:
    """Recompute every n-th decoder layer in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_layers)


class CompiledLayers:
    """Decoder layers whose forward is compiled, with the plain forward at hand.

    The layers must be ZeRO-3 leaf modules, so that DeepSpeed's hooks stay outside the compiled graph: traced, they make
    dynamo recompile for every module.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._layers = decoder_layers(model)
        self._plain = [layer.forward for layer in self._layers]
        self._compiled = [torch.compile(layer.forward, dynamic=False) for layer in self._layers]
        self._set(self._compiled)

    def _set(self, forwards: list[Any]) -> None:
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Run uncompiled inside: text generation has a new shape at each token."""
        self._set(self._plain)
        try:
            yield
        finally:
            self._set(self._compiled)


def draws_random_numbers(model: "PreTrainedModel") -> bool:
    """Whether training may compute something else than evaluation: a dropout or a router's jitter that is not 0."""
    unused = ("summary_", "classifier_")  # of other heads than a language model's
    fields = {k: v for k, v in model.config.get_text_config().to_dict().items() if not k.startswith(unused)}
    configured = any(value for name, value in fields.items() if "drop" in name or "jitter" in name)
    return configured or any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())


def meta_model(config: PreTrainedConfig) -> "PreTrainedModel":
    """A model of this configuration without its weights."""
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def elements_of(config: PreTrainedConfig) -> int:
    """Number of parameters of a model of this configuration, without making it."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def count_parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """(all parameters, those of a token's matrix products: without the input embedding, the output layer counted).

    Under ZeRO-3 a parameter's size is in `ds_numel`; a tied embedding counts once in the first and as the output layer
    in the second.
    """
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    embedding: Any = model.get_input_embeddings().weight
    output: Any = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    return total, total - (0 if tied else getattr(embedding, "ds_numel", embedding.numel()))


def frozen_elements(model: "PreTrainedModel") -> int:
    """Number of parameters that are not trained."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if not p.requires_grad)


def describe_model(model: "PreTrainedModel", precision: str) -> str:
    """Size, class and precision, for the console."""
    frozen = frozen_elements(model)
    of_them = f" ({frozen:,} of them frozen)" if frozen else ""
    return f"{count_parameters(model)[0]:,} parameters{of_them}, {type(model).__name__}, {precision}"


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Names under which a parameter appears again -> the name that `named_parameters` gives it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in everywhere if first[id(parameter)] != name}
