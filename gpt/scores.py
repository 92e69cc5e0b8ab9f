"""What a model scores on the questions of a task: multiple choice by likelihood, exact match by greedy answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gpt.generate import PromptEncoder, Sampling, answer_batch, input_device
from gpt.task import ExactMatch, MultipleChoice, Question, normalized

TOKENS_PER_FORWARD = 1024
"""Of padded rows: their logits, with a vocabulary of 50,000, are 200 MB in fp32."""
ROWS_PER_FORWARD = 8
RESAMPLES = 1000
Progress = Callable[[int, int], None]


@dataclass
class Scored:
    """What came out: `credits` has, under each score's name, what every question earned, 0 to 1."""

    credits: dict[str, list[float]]
    predictions: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self) -> dict[str, dict[str, float]]:
        """Each score's mean, and the ends of its 95 % bootstrap interval over the questions."""
        return {name: _with_interval(np.array(values)) for name, values in self.credits.items()}


def _with_interval(values: np.ndarray) -> dict[str, float]:
    """The percentile bootstrap (Efron 1979), always with the same draws."""
    draws = np.random.default_rng(0)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def score_multiple_choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: MultipleChoice,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """Compare the options' log-likelihoods, as they are (accuracy) and divided by the option's UTF-8 bytes
    (length_normalized_accuracy). Where several options share the first place, a right one among them earns its part.

    Raises ValueError for a question that the model has no positions for, that its template refuses, or to which it has
    no finite answer.
    """
    encoder = _encoder(model, tokenizer, task)
    encoded = [_encode_options(encoder, tokenizer, task, question) for question in questions]
    rows = [(ids, begin) for options, begin in encoded for ids in options]
    likelihoods = iter(_log_likelihoods(model, rows, progress))
    plain, per_byte, predictions, ties = [], [], [], 0
    for question in questions:
        sums = np.array([next(likelihoods) for _ in question.options])
        if np.isnan(sums).any():
            raise ValueError(
                f"{question.place}: the model's logits are not numbers (NaN): its weights are damaged or too large for "
                "its dtype; try --dtype fp32"
            )
        right = question.options.index(question.answers[0])
        sizes = np.array([len(option.encode()) for option in question.options])
        plain.append(_credit(sums, right))
        per_byte.append(_credit(sums / sizes, right))
        ties += int((sums == sums.max()).sum() > 1)
        predictions.append(
            {
                "place": question.place,
                "prompt": question.prompt,
                "answer": question.answers[0],
                "prediction": question.options[int(sums.argmax())],
                "log_likelihoods": dict(zip(question.options, sums.tolist(), strict=True)),
            }
        )
    chance = float(np.mean([1 / len(question.options) for question in questions]))
    facts = {"as_chat": encoder.as_chat, "chance": chance, "ties": ties}
    return Scored({"accuracy": plain, "length_normalized_accuracy": per_byte}, predictions, facts)


def score_exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: ExactMatch,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """Compare greedy answers with the right ones, both normalised. Raises as `score_multiple_choice`."""
    encoder = _encoder(model, tokenizer, task, task.max_new_tokens)
    encoded = [_at(question, encoder.encode, _prompt(encoder, question)) for question in questions]
    sampling = Sampling(task.max_new_tokens)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: dict[int, str] = {}
    for start in range(0, len(by_length), ROWS_PER_FORWARD):
        batch = by_length[start : start + ROWS_PER_FORWARD]
        ids = [encoded[i] for i in batch]
        made = answer_batch(model, tokenizer, ids, encoder.end_tokens, sampling, [0] * len(batch))
        answers |= {i: _cut(answer["text"], task.stop) for i, answer in zip(batch, made, strict=True)}
        if progress is not None:
            progress(len(answers), len(questions))
    credits, predictions = [], []
    for number, question in enumerate(questions):
        right = {normalized(answer, task.normalize) for answer in question.answers}
        credits.append(float(normalized(answers[number], task.normalize) in right))
        predictions.append(
            {
                "place": question.place,
                "prompt": question.prompt,
                "answers": question.answers,
                "prediction": answers[number],
                "right": credits[-1] == 1,
            }
        )
    return Scored({"exact_match": credits}, predictions, {"as_chat": encoder.as_chat})


def _encoder(model: Any, tokenizer: PreTrainedTokenizerBase, task: Any, new_tokens: int = 0) -> PromptEncoder:
    encoder = PromptEncoder(model, tokenizer, new_tokens, as_chat=task.as_chat)
    if task.system is not None and not encoder.as_chat:
        raise ValueError("the task has a system message, but its prompts are texts: take one of the two away")
    return encoder


def _prompt(encoder: PromptEncoder, question: Question) -> str | list[dict[str, str]]:
    if not encoder.as_chat:
        return question.prompt
    beginning = [] if question.system is None else [{"role": "system", "content": question.system}]
    return [*beginning, {"role": "user", "content": question.prompt}]


def _at(question: Question, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives; its ValueErrors name the question's place."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{question.place}: {error}") from error


def _encode_options(
    encoder: PromptEncoder, tokenizer: Any, task: MultipleChoice, question: Question
) -> tuple[list[list[int]], int]:
    """The token ids of the prompt with each option behind it, and how many at their beginning are not scored.

    Prompt and option are tokenised as one text, since that is how such a text is trained on: the token at the border
    may belong to both. Not scored are the tokens that all these texts share and that lie wholly within the prompt, so
    the likelihoods of all options have the same condition, whichever of them merge with the prompt's end.
    """
    separator = task.separator if task.separator is not None else "" if encoder.as_chat else " "
    prompt = _prompt(encoder, question)
    text = prompt if isinstance(prompt, str) else _at(question, lambda: encoder.render(prompt, tokens=False))
    options, within = [], []
    for option in question.options:
        found = tokenizer(
            text + separator + option, add_special_tokens=not encoder.as_chat, return_offsets_mapping=True
        )
        ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
        if encoder.positions is not None and len(ids) > encoder.positions:
            raise ValueError(
                f"{question.place}: prompt and option have {len(ids)} tokens, but the model has {encoder.positions} "
                "positions; shorten them"
            )
        options.append(ids)
        within.append(next((i for i, end in enumerate(ends) if end > len(text)), len(ids)))
    columns = enumerate(zip(*options, strict=False))
    begin = min(*within, next((i for i, tokens in columns if len(set(tokens)) > 1), min(map(len, options))))
    if begin == 0:
        raise ValueError(
            f"{question.place}: no token of the prompt stands before all options, so nothing could be compared; give a "
            "longer prompt"
        )
    return options, begin


@torch.no_grad()
def _log_likelihoods(model: Any, rows: Sequence[tuple[list[int], int]], progress: Progress | None) -> list[float]:
    """Of each row (token ids, how many are not scored): the log-likelihood of its scored tokens, in nats."""
    device = input_device(model)
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = [0.0] * len(rows)
    while waiting:
        width = len(rows[waiting[-1]][0])
        batch = [waiting.pop() for _ in range(min(len(waiting), max(1, TOKENS_PER_FORWARD // width)))]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            length = len(rows[index][0])
            ids[row, :length], mask[row, :length] = torch.tensor(rows[index][0]), 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for row, index in enumerate(batch):
            tokens, begin = rows[index]
            scored = logits[row, begin - 1 : len(tokens) - 1].float().log_softmax(-1).cpu()
            sums[index] = float(scored.gather(1, ids[row, begin : len(tokens), None]).sum())
        if progress is not None:
            progress(len(rows) - len(waiting), len(rows))
    return sums


def _credit(scores: np.ndarray, right: int) -> float:
    best = scores == scores.max()
    return float(best[right] / best.sum())


def _cut(text: str, stop: list[str]) -> str:
    return text[: min([place for s in stop if (place := text.find(s)) >= 0], default=len(text))]
