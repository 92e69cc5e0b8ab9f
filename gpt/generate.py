"""Text and chat from a Hugging Face folder, with transformers alone: nothing here knows of Trainyard's runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

REPLACEMENT = "�"
"""What decoding gives for bytes that are not yet a whole character."""

Message = dict[str, str]


def generate(
    model_dir: Path | str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    as_chat: bool | None = None,
) -> list[dict[str, Any]]:
    """Continue or answer each prompt; a list of {"prompt", "text", "ended", "new_tokens"}.

    `as_chat` None: a prompt is a user's message when the folder has a chat template, else the beginning of a text.
    `temperature` 0 takes the most likely token each time; above it sampling starts from `seed` anew for each prompt, so
    that an answer does not depend on the prompts before it. `ended` says whether the model itself came to an end;
    otherwise `max_new_tokens` cut it off. Runs on the GPUs when there are some, else on the CPU.

    Raises ValueError for a folder that is not a model, settings outside their range, or a prompt that is too long.
    """
    settings = _sampling(max_new_tokens, temperature, top_p)
    model, tokenizer = load(model_dir)
    as_chat = tokenizer.chat_template is not None if as_chat is None else as_chat
    results = []
    for prompt in prompts:
        if as_chat:
            ids = _render(tokenizer, [{"role": "user", "content": prompt}])
        else:
            ids = list(tokenizer(prompt)["input_ids"])
            if not ids:
                raise ValueError("The prompt is empty; give at least one character to continue from.")
        _check_length(model, len(ids), max_new_tokens)
        transformers.set_seed(seed)
        new = _continue(model, ids, settings)
        ended = bool(new) and new[-1] in _end_tokens(model)
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        results.append(
            {
                "prompt": prompt,
                "text": text if ended else text.rstrip(REPLACEMENT),
                "ended": ended,
                "new_tokens": len(new),
            }
        )
    return results


def chat(
    model_dir: Path | str,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk with the model on the terminal: answers appear as they are made, earlier turns are remembered.

    `/reset` forgets them, `/exit` or the end of input leaves. When the model's positions no longer hold the whole
    conversation, the oldest turns are dropped with a notice. Raises as `generate` does.
    """
    settings = _sampling(max_new_tokens, temperature, top_p)
    model, tokenizer = load(model_dir)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_dir} has no chat template; continue texts with `trainyard generate` instead.")
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    _render(tokenizer, [*beginning, {"role": "user", "content": "x"}])  # refused now, not after the first message
    transformers.set_seed(seed)
    turns: list[Message] = []
    print("Type a message; /reset forgets the conversation, /exit leaves.")
    while (line := _read_line()) is not None:
        if line == "/reset":
            turns = []
            print("The conversation is forgotten.")
        elif line:
            turns.append({"role": "user", "content": line})
            fitting = _fit(model, tokenizer, beginning, turns, max_new_tokens)
            if fitting is None:
                turns.pop()
                continue
            ids, turns = fitting
            new = _continue(model, ids, settings, _WholeCharacters(tokenizer))
            turns.append({"role": "assistant", "content": str(tokenizer.decode(new, skip_special_tokens=True)).strip()})


def load(model_dir: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in its stored dtype, evaluation mode) and tokenizer of a Hugging Face folder.

    Spread over the GPUs and the memory of the host when there is a GPU. Raises ValueError when it is no model.
    """
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        hint = "; it is a run directory, which `trainyard export` makes a model of" * (folder / "checkpoints").is_dir()
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json{hint}.")
    transformers.utils.logging.disable_progress_bar()  # standard error is for sentences
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="auto" if torch.cuda.is_available() else None
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be loaded as a language model: {' '.join(str(error).split())}") from error
    return model.eval(), tokenizer


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the most likely token each time) or above.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie above 0 and at most at 1.")
    # top_k is set against transformers' own default of 50, which nobody asked for here.
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens} | (sampled if temperature > 0 else {"do_sample": False})


def _continue(model: Any, ids: list[int], settings: dict[str, Any], streamer: BaseStreamer | None = None) -> list[int]:
    """The new token ids after `ids`, the end token included."""
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **settings)
    return list(output[0, len(ids) :].tolist())


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The model has no chat template, so a prompt cannot be a message; generate plain text instead."
        )
    try:
        rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"The model's chat template refuses the roles {roles}: {error}") from error
    return list(rendered)


def _positions(model: PreTrainedModel) -> int | None:
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = _positions(model)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and up to {max_new_tokens} new ones are asked for, but the model "
            f"has {positions} positions; shorten the prompt or ask for fewer tokens."
        )


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginning: list[Message],
    turns: list[Message],
    max_new_tokens: int,
) -> tuple[list[int], list[Message]] | None:
    """The token ids of as many of the latest turns as leave room for an answer, and these turns.

    None, with a sentence printed, when the last message alone is too long.
    """
    for dropped in range(0, len(turns), 2):  # a message and its answer, so that roles go on alternating
        ids = _render(tokenizer, [*beginning, *turns[dropped:]])
        try:
            _check_length(model, len(ids), max_new_tokens)
        except ValueError as error:
            problem = error
            continue
        if dropped:
            print(f"(The {dropped} oldest turns are dropped: the model has {_positions(model)} positions.)")
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
        print(flush=True)

    def _print(self) -> None:
        text = str(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))
        # Bytes of a character that has only begun decode to replacement characters at the end: they wait, or, when the
        # answer was cut off there, go unprinted.
        end = len(text.rstrip(REPLACEMENT))
        if end > self._printed:
            print(text[self._printed : end], end="", flush=True)
            self._printed = end
