"""What a model scores on the questions of a task: options and labels by likelihood, greedy answers by metrics."""

import copy
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gpt.generate import PromptEncoder, Sampling, answer_batch, input_device
from gpt.task import (
    NONE,
    Answered,
    AnyTask,
    Classification,
    ExactMatch,
    Generation,
    MultipleChoice,
    Question,
    normalized,
)

TOKENS_PER_FORWARD = 1024
"""Of padded rows: their logits, with a vocabulary of 50,000, are 200 MB in fp32."""
ROWS_PER_FORWARD = 8
KEYS_AND_VALUES = {DynamicLayer, DynamicSlidingWindowLayer}
"""What a cache is made of that holds nothing else. Subclasses of these, and of the cache itself, hold states, too."""
RESAMPLES = 1000
LEAD_SENTENCES = 3
LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge1": "rouge_score", "rouge2": "rouge_score"}
LIBRARIES |= {"rougeL": "rouge_score"}
NO_LABEL = -1
"""The number of an answer that is none of the labels."""
Progress = Callable[[int, int], None]
Statistic = Callable[[np.ndarray], float]
"""A score of the questions with these numbers; a number may stand there more than once."""


@dataclass
class Scored:
    """What came out: each score's name and statistic, and those of answers that no model made, under their name."""

    statistics: dict[str, Statistic]
    predictions: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Statistic]] = field(default_factory=dict)

    def scores(self) -> dict[str, dict[str, float]]:
        """Each score, and the ends of its 95 % bootstrap interval over the questions."""
        return self._with_intervals(self.statistics)

    def baseline_scores(self) -> dict[str, dict[str, dict[str, float]]]:
        return {name: self._with_intervals(statistics) for name, statistics in self.baselines.items()}

    def _with_intervals(self, statistics: dict[str, Statistic]) -> dict[str, dict[str, float]]:
        return {name: _with_interval(statistic, len(self.predictions)) for name, statistic in statistics.items()}


def _with_interval(statistic: Statistic, questions: int) -> dict[str, float]:
    """The percentile bootstrap (Efron 1979), always with the same draws."""
    draws = np.random.default_rng(0)
    values = [statistic(draws.integers(0, questions, questions)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": statistic(np.arange(questions)), "low": float(low), "high": float(high)}


def _mean(values: Sequence[float] | np.ndarray) -> Statistic:
    earned = np.array(values, dtype=np.float64)
    return lambda chosen: float(earned[chosen].mean())


def require_libraries(task: AnyTask) -> None:
    """Raises ValueError where a library that the task's metrics need is not installed."""
    metrics = task.metrics if isinstance(task, Generation) else []
    wanted = {LIBRARIES[metric] for metric in metrics if metric in LIBRARIES}
    wanted |= {"sklearn"} if isinstance(task, Classification) else set()
    if missing := [name for name in sorted(wanted) if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the task's metrics need {' and '.join(missing)}: install the extra tasks")


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: AnyTask,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """What the model earns on all questions.

    Raises ValueError for a question that the model has no positions for, or that its template refuses.
    """
    if isinstance(task, MultipleChoice):
        return score_multiple_choice(model, tokenizer, task, questions, progress)
    if isinstance(task, Classification):
        return score_classification(model, tokenizer, task, questions, progress)
    return score_answers(model, tokenizer, task, questions, progress)


def score_multiple_choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: MultipleChoice,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """Compare the options' log-likelihoods, as they are (accuracy) and divided by the option's UTF-8 bytes
    (length_normalized_accuracy). Where several options share the first place, a right one among them earns its part.
    Raises as `score`.
    """
    encoder = _encoder(model, tokenizer, task)
    encoded = [_encode_options(encoder, tokenizer, task, question) for question in questions]
    likelihoods = _log_likelihoods(model, encoded, progress)
    plain, per_byte, predictions, ties = [], [], [], 0
    for question, found in zip(questions, likelihoods, strict=True):
        sums = np.array(found)
        _require_numbers(question, sums)
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
    statistics = {"accuracy": _mean(plain), "length_normalized_accuracy": _mean(per_byte)}
    return Scored(statistics, predictions, facts)


def score_classification(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Classification,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """Accuracy, macro F1 and confusion matrix, beside those of the commonest label. Raises as `score`.

    By likelihood a label is the whole answer, its closing token included where a chat template has one: a label that
    goes on from another one would else never be the likelier.
    """
    generates = task.by == "generation"
    encoder = _encoder(model, tokenizer, task, task.max_new_tokens if generates else 0)
    details: list[dict[str, Any]]
    if generates:
        said = _greedy(model, tokenizer, task, encoder, questions, progress)
        numbers = {normalized(label, task.normalize): number for number, label in enumerate(task.labels)}
        found = [numbers.get(normalized(text, task.normalize), NO_LABEL) for text in said]
        details = [{"said": text} for text in said]
    else:
        encoded = [_encode_options(encoder, tokenizer, task, question, encoder.closing) for question in questions]
        _refuse_beginnings(task, encoded[0][0])
        sums = np.array(_log_likelihoods(model, encoded, progress))
        for question, row in zip(questions, sums, strict=True):
            _require_numbers(question, row)
        found = sums.argmax(axis=1).tolist()
        details = [{"log_likelihoods": dict(zip(task.labels, row, strict=True))} for row in sums.tolist()]
    right = [task.labels.index(question.answers[0]) for question in questions]
    named = {NO_LABEL: None} | dict(enumerate(task.labels))
    predictions = [
        {
            "place": question.place,
            "prompt": question.prompt,
            "answer": question.answers[0],
            "prediction": named[number],
            **detail,
        }
        for question, number, detail in zip(questions, found, details, strict=True)
    ]
    majority = Counter(right).most_common(1)[0][0]
    facts = {
        "as_chat": encoder.as_chat,
        "by": task.by,
        "majority_label": task.labels[majority],
        "confusion_matrix": _confusion(task.labels, right, found),
    }
    commonest = {"majority_label": _class_statistics(right, [majority] * len(right))}
    return Scored(_class_statistics(right, found), predictions, facts, commonest)


def _require_numbers(question: Question, sums: np.ndarray) -> None:
    if np.isnan(sums).any():
        raise ValueError(
            f"{question.place}: the model's logits are not numbers (NaN): its weights are damaged or too large for its "
            "dtype; try --dtype fp32"
        )


def _refuse_beginnings(task: Classification, rows: Sequence[Sequence[int]]) -> None:
    for label, row in zip(task.labels, rows, strict=True):
        for other, longer in zip(task.labels, rows, strict=True):
            if row is not longer and longer[: len(row)] == row:
                raise ValueError(
                    f"the label {label!r} is the beginning of {other!r}, and nothing closes an answer in a text, so "
                    "the longer one could never be the likelier: rename one, or score by generation"
                )


def _class_statistics(right: Sequence[int], found: Sequence[int]) -> dict[str, Statistic]:
    """Macro F1 is the mean over the labels that are a right answer or a prediction (scikit-learn's default)."""
    from sklearn.metrics import f1_score

    answers, predictions = np.array(right), np.array(found)

    def macro_f1(chosen: np.ndarray) -> float:
        labels = np.union1d(answers[chosen], predictions[chosen])
        labels = labels[labels != NO_LABEL]
        return float(f1_score(answers[chosen], predictions[chosen], labels=labels, average="macro", zero_division=0))

    return {"accuracy": _mean(answers == predictions), "macro_f1": macro_f1}


def _confusion(labels: Sequence[str], right: Sequence[int], found: Sequence[int]) -> dict[str, dict[str, int]]:
    """Of each right label, how often each label was the prediction, or none of them."""
    from sklearn.metrics import confusion_matrix

    numbers, names = list(range(len(labels))), list(labels)
    if NO_LABEL in found:
        numbers, names = [*numbers, NO_LABEL], [*names, NONE]
    counts = confusion_matrix(right, found, labels=numbers).tolist()
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(labels, counts, strict=False)}


def score_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: ExactMatch | Generation,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> Scored:
    """Greedy answers by the task's metrics, and the lead where the task has one. Raises as `score`."""
    encoder = _encoder(model, tokenizer, task, task.max_new_tokens)
    answers = _greedy(model, tokenizer, task, encoder, questions, progress)
    predictions: list[dict[str, Any]] = []
    for question, answer in zip(questions, answers, strict=True):
        predictions.append(
            {
                "place": question.place,
                "prompt": question.prompt,
                "answers": question.answers,
                "prediction": answer,
                "right": _is_right(task, question, answer),
            }
        )
    baselines = {}
    if isinstance(task, Generation) and task.lead is not None:
        leads = [" ".join(re.split(r"(?<=[.!?])\s+", q.lead.strip())[:LEAD_SENTENCES]) for q in questions]
        baselines["lead"] = _answer_statistics(task, questions, leads)
    return Scored(
        _answer_statistics(task, questions, answers), predictions, {"as_chat": encoder.as_chat}, baselines=baselines
    )


def _greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Answered,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    progress: Progress | None,
) -> list[str]:
    """The most likely answer to each question, cut off at `stop`."""
    encoded = [_at(question, encoder.encode, _prompt(encoder, question)) for question in questions]
    first = encoded[0]
    _require_numbers(questions[0], np.array(_log_likelihoods(model, [([first + first[-1:]], len(first))], None)))
    # else transformers adds the folder's own repetition_penalty and the like, and not the likeliest token is taken
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
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
    return [answers[number] for number in range(len(questions))]


def _is_right(task: Answered, question: Question, answer: str) -> bool:
    return normalized(answer, task.normalize) in {normalized(right, task.normalize) for right in question.answers}


def _answer_statistics(
    task: ExactMatch | Generation, questions: Sequence[Question], answers: Sequence[str]
) -> dict[str, Statistic]:
    found: dict[str, Statistic] = {}
    for metric in task.metrics if isinstance(task, Generation) else ["exact_match"]:
        if metric == "exact_match":
            found[metric] = _mean([_is_right(task, q, answer) for q, answer in zip(questions, answers, strict=True)])
        elif metric in ("bleu", "chrf"):
            found[metric] = _corpus_statistic(metric, questions, answers)
        else:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer([metric])
            found[metric] = _mean(
                [
                    scorer.score_multi(question.answers, answer)[metric].fmeasure
                    for question, answer in zip(questions, answers, strict=True)
                ]
            )
    return found


def _corpus_statistic(metric: str, questions: Sequence[Question], answers: Sequence[str]) -> Statistic:
    """Of a metric whose counts are added up over the questions before it is computed; sacrebleu resamples alike."""
    from sacrebleu.metrics import BLEU, CHRF

    scorer = BLEU() if metric == "bleu" else CHRF()
    references = list(zip_longest(*(question.answers for question in questions)))  # as many as any question has
    counts = np.array(scorer._extract_corpus_statistics(answers, references))
    return lambda chosen: float(scorer._compute_score_from_stats(counts[chosen].sum(axis=0).tolist()).score)


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
    encoder: PromptEncoder,
    tokenizer: Any,
    task: MultipleChoice | Classification,
    question: Question,
    closing: Sequence[int] = (),
) -> tuple[list[list[int]], int]:
    """The token ids of the prompt with each option and `closing` behind it, and how many of the first are not scored.

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
        ids, ends = [*found["input_ids"], *closing], [end for _, end in found["offset_mapping"]]
        if encoder.positions is not None and len(ids) > encoder.positions:
            raise ValueError(
                f"{question.place}: prompt and option have {len(ids)} tokens, but the model has {encoder.positions} "
                "positions; shorten them"
            )
        options.append(ids)
        within.append(next((i for i, end in enumerate(ends) if end > len(text)), len(ends)))
    columns = enumerate(zip(*options, strict=False))
    begin = min(*within, next((i for i, tokens in columns if len(set(tokens)) > 1), min(map(len, options))))
    if begin == 0:
        raise ValueError(
            f"{question.place}: no token of the prompt stands before all options, so nothing could be compared; give a "
            "longer prompt"
        )
    return options, begin


@torch.no_grad()
def _log_likelihoods(
    model: Any, encoded: Sequence[tuple[list[list[int]], int]], progress: Progress | None
) -> list[list[float]]:
    """Of each question (its rows of token ids, and how many of their first tokens these share, which are not scored):
    the log-likelihood of the scored tokens of each row, in nats.

    What the rows share goes through the model once, which is most of them where prompts are long; its keys and values
    then stand before what is left of each row. Questions that share equally many are taken together, so that nothing
    comes between the two.
    """
    sums = [[0.0] * len(rows) for rows, _ in encoded]
    waiting = sorted(range(len(encoded)), key=lambda i: encoded[i][1])
    goes_on = _goes_on_from_keys(model, encoded[0][0][0][0])
    done, total = 0, sum(map(len, sums))
    while waiting:
        begin = encoded[waiting[-1]][1]
        batch: list[int] = []
        while waiting and encoded[waiting[-1]][1] == begin and len(batch) < max(1, TOKENS_PER_FORWARD // begin):
            batch.append(waiting.pop())
        questions = [encoded[i][0] for i in batch]
        shared = None
        if goes_on:
            ids = torch.tensor([rows[0][:begin] for rows in questions], device=input_device(model))
            shared = model(input_ids=ids, use_cache=True)
        for i, found in zip(batch, _likelihoods_behind(model, questions, begin, shared), strict=True):
            sums[i] = found
        done += sum(map(len, questions))
        if progress is not None:
            progress(done, total)
    return sums


def _goes_on_from_keys(model: Any, token: int) -> bool:
    """Whether all that the model keeps of a text are keys and values. From the state of a recurrent or convolutional
    layer transformers does not go on with several tokens, without a word, and some models keep nothing."""
    given = model(input_ids=torch.tensor([[token]], device=input_device(model)), use_cache=True)
    kept = getattr(given, "past_key_values", None)
    return type(kept) is DynamicCache and {type(layer) for layer in kept.layers} <= KEYS_AND_VALUES


def _likelihoods_behind(model: Any, questions: list[list[list[int]]], begin: int, shared: Any) -> list[list[float]]:
    """`_log_likelihoods` of questions whose rows share their first `begin` tokens; `shared` is what the model gave for
    these, a row a question, or None, where it takes each row whole."""
    device, kept = input_device(model), 0 if shared is None else begin
    sums = [[0.0] * len(rows) for rows in questions]
    if shared is not None:  # its last logits are of the first token that is scored
        last = shared.logits[:, -1].float().log_softmax(-1).cpu()
        sums = [
            [float(logs[row[begin]]) if len(row) > begin else 0.0 for row in rows]
            for rows, logs in zip(questions, last, strict=True)
        ]
    next_scored = begin if shared is None else begin + 1
    places = [(q, r) for q, rows in enumerate(questions) for r, row in enumerate(rows) if len(row) > next_scored]
    waiting = sorted(places, key=lambda place: len(questions[place[0]][place[1]]))
    while waiting:
        longest = len(questions[waiting[-1][0]][waiting[-1][1]])
        chunk = [waiting.pop() for _ in range(min(len(waiting), max(1, TOKENS_PER_FORWARD // longest)))]
        ids = torch.zeros(len(chunk), longest, dtype=torch.int64)
        for row, (q, r) in enumerate(chunk):
            ids[row, : len(questions[q][r])] = torch.tensor(questions[q][r])
        cache: dict[str, Any] = {"use_cache": False}
        if shared is not None:
            known = copy.deepcopy(shared.past_key_values)
            known.reorder_cache(torch.tensor([q for q, _ in chunk], device=device))
            cache = {"use_cache": True, "past_key_values": known}
        # no token looks at one behind it, so what fills a row up needs no mask
        logits = model(input_ids=ids[:, kept:].to(device), **cache).logits
        for row, (q, r) in enumerate(chunk):
            end = len(questions[q][r])
            logs = logits[row, next_scored - 1 - kept : end - 1 - kept].float().log_softmax(-1).cpu()
            sums[q][r] += float(logs.gather(1, ids[row, next_scored:end, None]).sum())
    return sums


def _credit(scores: np.ndarray, right: int) -> float:
    best = scores == scores.max()
    return float(best[right] / best.sum())


def _cut(text: str, stop: list[str]) -> str:
    return text[: min([place for s in stop if (place := text.find(s)) >= 0], default=len(text))]
