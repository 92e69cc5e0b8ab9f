"""Text and chat from a Hugging Face folder, with transformers alone: nothing here knows of Trainyard's runs."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

REPLACEMENT = "�"
"""What decoding gives for bytes that are not yet a whole character."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How an answer is made, and how long it may be.

    `temperature` 0 takes the most likely token each time; above it one is drawn, from the most likely ones that
    together have the probability `top_p`. Raises ValueError for a value outside its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (the most likely token each time) or above."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be a whole number from 0 to 2^63 - 1.")


@dataclass(frozen=True)
class Loading:
    """How a model's weights are placed.

    Attributes:
        dtype: bf16, fp16 or fp32; None: as they are stored.
        device_map: `auto` and its kin spread them over the GPUs, host memory and, where these are too small, the disk;
            else one device, such as `cpu` or `cuda:1`. None: `auto` where there is a GPU, else `cpu`.
        host_memory_gib: what they may take of the host's memory; None: 90 % of what is free. Needs a map like `auto`.
        offload_folder: for weights on disk that cannot be read where they are; None: a temporary one.
    """

    dtype: str | None = None
    device_map: str | None = None
    host_memory_gib: float | None = None
    offload_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}; it must be one of {', '.join(DTYPES)}.")
        if self.host_memory_gib is not None and not (self.host_memory_gib > 0 and self.device_map in DEVICE_MAPS):
            raise ValueError(
                f"host_memory_gib is {self.host_memory_gib:g} with the device map {self.device_map}; it must be above "
                f"0 and needs one of the device maps {', '.join(DEVICE_MAPS)}."
            )

    def placement(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`. Raises ValueError for a device that this host has not."""
        if self.device_map not in DEVICE_MAPS and (self.device_map or not torch.cuda.is_available()):
            return {"device_map": {"": self.device()}}
        memory: dict[Any, Any] | None = None
        if self.host_memory_gib is not None:
            from accelerate.utils import get_max_memory

            memory = get_max_memory() | {"cpu": int(self.host_memory_gib * 2**30)}
        return {"device_map": self.device_map or "auto", "max_memory": memory}

    def device(self) -> torch.device:
        """The one device of a map that names one, or the default one. Raises ValueError where this host has it not."""
        place = self.device_map or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(1, device=place).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"The device map {place} is neither one of {', '.join(DEVICE_MAPS)} nor a device of this host "
                f"({str(error).splitlines()[0]})"
            ) from None


def generate(
    model_dir: Path | str,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    loading: Loading | None = None,
    as_chat: bool | None = None,
    system: str | None = None,
    stream: bool = False,
) -> list[dict[str, Any]]:
    """Continue or answer each prompt by itself; a list of {"prompt", "text", "ended", "new_tokens"}.

    `as_chat` None: a prompt is a user's message when the folder has a chat template, else the beginning of a text.
    Sampling starts from the seed anew for each prompt, so that an answer does not depend on the prompts before it.
    `ended` says whether the model itself came to an end; otherwise `max_new_tokens` cut it off. `stream` prints each
    prompt and, as they are made, the characters of its answer.

    Raises ValueError for a folder that is not a model, a prompt that is too long, or a system message without chat.
    """
    sampling = sampling or Sampling()
    model, tokenizer = load(model_dir, loading)
    encoder = PromptEncoder(model, tokenizer, sampling.max_new_tokens, as_chat=as_chat, system=system)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    results = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        streamer = None
        if stream:
            print(prompt, end="\n  ", flush=True)
            streamer = _WholeCharacters(tokenizer)
        [answer] = answer_batch(model, tokenizer, [ids], encoder.end_tokens, sampling, [sampling.seed], streamer)
        if stream:
            print("" if answer["ended"] else " …", flush=True)
        results.append({"prompt": prompt, **answer})
    return results


def chat(
    model_dir: Path | str,
    sampling: Sampling | None = None,
    *,
    loading: Loading | None = None,
    system: str | None = None,
) -> None:
    """Talk with the model on the terminal: answers appear as they are made, earlier turns are remembered.

    `/reset` forgets them, `/exit` or the end of input leaves. When the model's positions no longer hold the whole
    conversation, the oldest turns are dropped with a notice. Raises as `generate` does.
    """
    sampling = sampling or Sampling(max_new_tokens=256)
    model, tokenizer = load(model_dir, loading)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_dir} has no chat template; continue texts with `trainyard generate` instead.")
    encoder = PromptEncoder(model, tokenizer, sampling.max_new_tokens, as_chat=True, system=system)
    encoder.render([{"role": "user", "content": "x"}])  # refused now, not after the first message
    turns: list[Message] = []
    answers = 0
    print("Type a message; /reset forgets the conversation, /exit leaves.")
    while (line := _read_line()) is not None:
        if line == "/reset":
            turns = []
            print("The conversation is forgotten.")
        elif line:
            turns.append({"role": "user", "content": line})
            fitting = _fit(encoder, turns)
            if fitting is None:
                turns.pop()
                continue
            ids, turns = fitting
            seed = (sampling.seed + answers) % 2**63  # the same question twice may be answered in two ways
            streamer = _WholeCharacters(tokenizer)
            [answer] = answer_batch(model, tokenizer, [ids], encoder.end_tokens, sampling, [seed], streamer)
            print(flush=True)
            answers += 1
            turns.append({"role": "assistant", "content": answer["text"].strip()})


def load(model_dir: Path | str, loading: Loading | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in evaluation mode) and tokenizer of a Hugging Face folder. Raises ValueError when it is no model."""
    folder = Path(model_dir)
    model = load_model(folder, loading)
    try:
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, a bare Exception out of Rust among them
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {' '.join(str(error).split())}") from error


def load_model(folder: Path, loading: Loading | None = None) -> PreTrainedModel:
    """As `load`, without the tokenizer. Code that the folder brings along is never run."""
    loading = loading or Loading()
    if not (folder / "config.json").is_file():
        hint = "; it is a run directory, which `trainyard export` makes a model of" * (folder / "checkpoints").is_dir()
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json{hint}.")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights as safetensors; pickles (*.bin) can run code and are not read.")
    transformers.utils.logging.disable_progress_bar()  # standard error is for sentences
    placement = loading.placement()
    scratch = None if loading.offload_folder else tempfile.TemporaryDirectory(prefix="trainyard-offload-")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[loading.dtype] if loading.dtype else "auto",
            offload_folder=loading.offload_folder or (scratch and scratch.name),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **placement,
        )
    except Exception as error:  # as above; of a damaged file it is safetensors' own
        raise ValueError(f"{folder} cannot be loaded as a language model: {' '.join(str(error).split())}") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        shown = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors ({shown}); use a whole copy of it.")
    model.trainyard_offload = scratch  # removed when the model is, at the latest when Python ends
    return model.eval()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go. A model whose first weights wait on the disk takes them from the host."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


class PromptEncoder:
    """Prompts and conversations as the token ids that one model is given.

    Attributes:
        as_chat: whether a prompt is a user's message; otherwise it is the beginning of a text.
        end_tokens: what ends an answer: the model's end tokens and, in a chat, the token with which the template closes
            an answer.
        closing: that token alone, where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        *,
        as_chat: bool | None = None,
        system: str | None = None,
    ) -> None:
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.as_chat = tokenizer.chat_template is not None if as_chat is None else as_chat
        if system is not None and not self.as_chat:
            raise ValueError("A system message needs prompts that are messages, but here they are texts.")
        self._beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.end_tokens = [ends] if isinstance(ends, int) else list(ends or [])
        self.closing: list[int] = []
        if self.as_chat:
            self._require_template()
            self.closing = self._template_ends()
            self.end_tokens += [end for end in self.closing if end not in self.end_tokens]

    def encode(self, prompt: str | list[Message]) -> list[int]:
        """The token ids of a prompt, or of a conversation that waits for an answer.

        Raises ValueError when it is empty, refused by the chat template, or leaves no room for the answer.
        """
        if self.as_chat or not isinstance(prompt, str):
            ids = self.render([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        else:
            ids = list(self._tokenizer(prompt)["input_ids"])
            if not ids:
                raise ValueError("The prompt is empty; give at least one character to continue from.")
        self.check_length(len(ids))
        return ids

    def render(self, messages: list[Message], *, tokens: bool = True) -> Any:
        """Messages, behind the system message, as token ids (or text) that end where the answer begins."""
        self._require_template()
        first_is_system = bool(messages) and messages[0]["role"] == "system"
        whole = messages if first_is_system else [*self._beginning, *messages]
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                whole, add_generation_prompt=True, tokenize=tokens, return_dict=False
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in whole)
            raise ValueError(f"The model's chat template refuses the roles {roles}: {error}") from error
        return list(rendered) if tokens else str(rendered)

    def check_length(self, prompt_tokens: int) -> None:
        if self.positions is not None and prompt_tokens + self._max_new_tokens > self.positions:
            raise ValueError(
                f"The prompt has {prompt_tokens} tokens and up to {self._max_new_tokens} new ones are asked for, but "
                f"the model has {self.positions} positions; shorten the prompt or ask for fewer tokens."
            )

    def _require_template(self) -> None:
        if self._tokenizer.chat_template is None:
            raise ValueError(
                "The model has no chat template, so a prompt cannot be a message; generate plain text instead."
            )

    def _template_ends(self) -> list[int]:
        """The special token that the template puts right behind an answer, where it does."""
        example = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = str(self._tokenizer.apply_chat_template(example, tokenize=False))
        except TemplateError:
            return []
        behind = text.rpartition("answer")[2]
        ids = list(self._tokenizer(behind, add_special_tokens=False)["input_ids"])
        return [i for i in ids[:1] if i in self._tokenizer.all_special_ids]


def answer_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    end_tokens: list[int],
    sampling: Sampling,
    seeds: Sequence[int],
    streamer: BaseStreamer | None = None,
) -> list[dict[str, Any]]:
    """An answer {"text", "ended", "new_tokens"} to each prompt's token ids; row i draws from `seeds[i]`.

    The prompts are padded on the left, which the attention mask hides and positions do not count.
    """
    width = max(map(len, prompts))
    pad = end_tokens[0] if end_tokens else 0  # whatever the model knows: it is masked, or behind the end
    device = input_device(model)
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([_OwnNoise(sampling, seeds)] if sampling.temperature > 0 else []),
        eos_token_id=end_tokens or None,
        pad_token_id=pad,
        streamer=streamer,
    )
    answers = []
    for new in output[:, width:].tolist():
        length = next((i + 1 for i, token in enumerate(new) if token in end_tokens), None)
        text = str(tokenizer.decode(new[:length], skip_special_tokens=True))
        answers.append(
            {
                "text": text.rstrip(REPLACEMENT) if length is None else text,
                "ended": length is not None,
                "new_tokens": length or len(new),
            }
        )
    return answers


class _OwnNoise(LogitsProcessor):
    """Makes the most likely token of each row a sample, drawn with that row's own random numbers.

    The arg max of logits plus Gumbel noise is a sample of their softmax (Gumbel 1954; arXiv:1411.0030, section 3). So
    what a row draws does not depend on the rows beside it, as it would in transformers' own sampling of a batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        return scores - torch.stack(draws).log().to(scores.device)


def read_rows(file: Path, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """`parse` of each line of a JSONL file, a JSON object each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not such an object or that `parse` refuses, with file and line; an empty file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.absolute()} does not exist; give a JSONL file.")
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"the line holds a {type(row).__name__}, not an object with fields")
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be
                rows.append(parse(row))
            except json.JSONDecodeError as error:
                what = f"is not JSON ({error.msg} at column {error.colno})" if line.strip() else "is empty"
                raise ValueError(f"{file}:{number}: the line {what}; each line must be a JSON object.") from None
            except UnicodeError:
                raise ValueError(f"{file}:{number}: the line is not UTF-8, or has half a surrogate pair.") from None
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from error
    if not rows:
        raise ValueError(f"{file} is empty; it must hold a JSON object a line.")
    return rows


def _fit(encoder: PromptEncoder, turns: list[Message]) -> tuple[list[int], list[Message]] | None:
    """The token ids of as many of the latest turns as leave room for an answer, and these turns.

    None, with a sentence printed, when the last message alone is too long.
    """
    for dropped in range(0, len(turns), 2):  # a message and its answer, so that roles go on alternating
        ids = encoder.render(turns[dropped:])
        try:
            encoder.check_length(len(ids))
        except ValueError as error:
            problem = error
            continue
        if dropped:
            print(f"(The {dropped} oldest turns are dropped: the model has {encoder.positions} positions.)")
        return ids, turns[dropped:]
    print(problem)
    return None


def _read_line() -> str | None:
    """What the user typed, or None when the talk is over."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/exit" else line


class _WholeCharacters(BaseStreamer):
    """Prints an answer token by token, and never a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None
        self._printed = 0

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:  # the first call brings the prompt
            self._ids = []
            return
        self._ids += value.reshape(-1).tolist()
        self._print()

    def end(self) -> None:
        self._print()

    def _print(self) -> None:
        text = str(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))
        # Bytes of a character that has only begun decode to replacement characters at the end: they wait, or, when the
        # answer was cut off there, go unprinted.
        end = len(text.rstrip(REPLACEMENT))
        if end > self._printed:
            print(text[self._printed : end], end="", flush=True)
            self._printed = end
