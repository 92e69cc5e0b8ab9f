"""Task templates: rows of ordinary tables as a prompt and the response to it, and what is counted of them."""

import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from data_pipeline.documents import BadRow, Message, TaskTemplate, string_field

MOST_CLASSES = 1000


def parse_template(file: str, content: dict[str, Any]) -> TaskTemplate:
    """The template that a YAML file holds; `file` names it. Raises ValueError, a sentence."""
    known = [field.name for field in fields(TaskTemplate) if field.name != "file"]
    if not set(content) <= set(known):
        raise ValueError(f"the template {file} holds {', '.join(map(str, content))}; its keys are {', '.join(known)}")
    for name, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the template {file}: {name} must be a text, not {text!r}")
        if name != "label":
            try:
                columns = _columns(text)
            except ValueError as error:
                raise ValueError(f"the template {file}: {name}: {error}") from None
            if name != "system" and not columns:
                raise ValueError(f"the template {file}: {name} names no column, so all rows would give the same text")
    if "prompt" not in content or ("response" in content) == ("label" in content):
        raise ValueError(
            f"the template {file} needs prompt, and either response (a text with {{columns}}) or label (the column of "
            "the class)"
        )
    return TaskTemplate(file, **content)


def template_columns(template: TaskTemplate) -> tuple[str, ...]:
    """The columns that it names, each once."""
    texts = [text for text in (template.prompt, template.response, template.system) if text is not None]
    label = [] if template.label is None else [template.label]
    return tuple(dict.fromkeys([*(name for text in texts for name in _columns(text)), *label]))


def template_messages(template: TaskTemplate, row: dict[str, Any]) -> list[Message]:
    """The conversation of a row. BadRow where a column is missing, or holds nothing where a text should be."""
    texts = [("system", "system message", template.system), ("user", "prompt", template.prompt)]
    texts.append(("assistant", "response", template.response))
    messages = [{"role": role, "content": _fill(text, row, what)} for role, what, text in texts if text is not None]
    if template.label is not None:
        label = _text(row, template.label).strip()  # " spam" is no class of its own
        if not label:
            raise BadRow("empty response", f"the response is empty: {template.label!r} holds no text")
        messages.append({"role": "assistant", "content": label})
    return messages


def _columns(text: str) -> list[str]:
    names = []
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is not None and (not name or form or conversion):
            raise ValueError("{…} must hold the name of a column and nothing else; write {{ and }} for braces")
        names += [] if name is None else [name]
    return names


def _fill(text: str, row: dict[str, Any], what: str) -> str:
    parts, values = [], []
    for before, name, _, _ in string.Formatter().parse(text):
        parts.append(before)
        if name is not None:
            values.append(_text(row, name))
            parts.append(values[-1])
    if values and not any(value.strip() for value in values):
        raise BadRow(f"empty {what}", f"the {what} is empty: {_listed(_columns(text))} holds no text")
    return "".join(parts)


def _text(row: dict[str, Any], name: str) -> str:
    """Of a text or a number; pandas writes a missing value as NaN."""
    value = row.get(name)
    if isinstance(value, float) and value != value:
        raise BadRow("null field", f"the field {name!r} is NaN, not a text: correct or remove the row")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else string_field(row, name)


class Tally:
    """What is counted of the rows of a template: classes, and lengths in tokens. Plain counts, so that units add up."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)

    def add(self, template: TaskTemplate, response: str, tokens: int, response_tokens: int) -> None:
        """Raises ValueError where there are more classes than a task of classification can have."""
        self.counts["document_tokens"][tokens] += 1
        self.counts["response_tokens"][response_tokens] += 1
        if template.label is not None:
            classes = self.counts["classes"]
            classes[response] += 1
            if len(classes) > MOST_CLASSES:
                raise ValueError(
                    f"the column {template.label!r} has more than {MOST_CLASSES:,} different values, so it is no "
                    "class: use response instead of label"
                )

    def as_json(self) -> dict[str, list[list[Any]]]:
        """Pairs of value and count, since keys of JSON objects are texts."""
        return {name: sorted(map(list, counter.items())) for name, counter in self.counts.items()}

    def merge(self, counts: dict[str, list[list[Any]]]) -> None:
        for name, pairs in counts.items():
            self.counts[name].update(dict(pairs))

    def report(self) -> dict[str, Any]:
        """For the data report: quantiles of the lengths, and how many examples each class has."""
        found: dict[str, Any] = {name: _quantiles(self.counts[name]) for name in ("document_tokens", "response_tokens")}
        classes = self.counts.get("classes")
        return found | ({"classes": dict(sorted(classes.items()))} if classes else {})


def _quantiles(counter: Counter[int]) -> dict[str, int]:
    lengths = np.array(sorted(counter))
    ends = np.cumsum([counter[length] for length in lengths.tolist()])
    shares = {"shortest": 0.0, "median": 0.5, "percentile_95": 0.95, "longest": 1.0}
    return {name: int(lengths[np.searchsorted(ends, share * ends[-1])]) for name, share in shares.items()}


def check_classes(tallies: dict[str, Tally], tokenizer: Any) -> list[list[str]]:
    """Refuse classes that cannot be learnt; return groups of labels whose first token is the same.

    Raises:
        ValueError: fewer than two classes, one with a single example, one that training never sees, or two that are
            the same tokens.
    """
    train = tallies["train"].counts["classes"]
    if len(train) < 2:
        raise ValueError(f"all examples to train on have the label {next(iter(train))!r}: two classes are the least")
    if alone := sorted(label for label, count in train.items() if count == 1):
        raise ValueError(
            f"to train on there is one example only of {_listed(alone)}: give more of each class, or leave it out"
        )
    for name, tally in tallies.items():
        if unseen := sorted(set(tally.counts["classes"]) - set(train)):
            raise ValueError(f"the {name} split has labels that are never seen in training: {_listed(unseen)}")
    first = defaultdict(list)
    same: dict[tuple[int, ...], str] = {}
    for label in sorted(train):
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if (other := same.setdefault(tuple(ids), label)) != label:
            raise ValueError(
                f"the tokenizer makes the same tokens of the labels {other!a} and {label!a}: write them alike"
            )
        first[ids[0]].append(label)
    return [labels for labels in first.values() if len(labels) > 1]


def _listed(labels: Iterable[str]) -> str:
    names = [repr(label) for label in labels]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
