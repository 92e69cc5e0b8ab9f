"""A task: a YAML file that declares how the rows of a table are questions, and how answers to them are counted.

Every field has its documentation as the string below it; the README's reference is made from these strings.
"""

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gpt.recipe import PositiveInt, Section
from gpt.recipe_file import parse_section, read_mapping


def _template(text: str) -> str:
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ValueError("{…} must hold the name of a field and nothing else; write {{ and }} for braces")
    return text


Template = Annotated[str, AfterValidator(_template)]
NONE = "(none)"
"""How an answer that is none of the labels is named."""
Metric = Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"]


class Task(Section):
    """What every kind of task has."""

    kind: str
    """How answers are made and counted."""
    data: str
    """A table, an example a row: CSV, JSONL, Parquet or what else `prepare` reads as one, or a folder of them. Relative
    paths are relative to the working directory."""
    prompt: Template
    """What the model is given: a text in which `{name}` stands for the field `name` of the row."""
    system: Template | None = None
    """A system message, likewise; only with messages."""
    as_chat: bool | None = None
    """Whether the prompt is a user's message; otherwise it is the beginning of a text. null: a message where the model
    has a chat template."""


class MultipleChoice(Task):
    """The options' likelihoods given the prompt are compared."""

    kind: Literal["multiple_choice"]
    """The likelihoods of the options, given the prompt, are compared; the largest is the model's choice."""
    options: str | Annotated[list[Template], Field(min_length=2)]
    """The name of the field that holds the list of options, or the options themselves as templates, for example
    `["{wrong}", "{right}"]` or `["no", "yes"]`."""
    answer: str
    """The field that holds the right option: its text, or its number, counted from 0."""
    separator: str | None = None
    """What stands between prompt and option. null: a space, or nothing where the prompt is a message."""


class Answered(Task):
    """What the kinds have in which the model answers, always with the most likely token."""

    answer: str
    """The field that holds the right answer, or a list of right answers."""
    max_new_tokens: PositiveInt = 32
    """Where an answer is cut off, in tokens."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """An answer ends before the first of these texts, for example `["\\n"]`."""
    normalize: Literal["whitespace", "squad"] = "whitespace"
    """What is done to both sides first. whitespace: none at the ends, one space for each run within. squad: also lower
    case, no ASCII punctuation, none of the words a, an and the (as SQuAD's own script, arXiv:1606.05250)."""


class ExactMatch(Answered):
    """The greedy answer is compared with the right ones."""

    kind: Literal["exact_match"]
    """The model answers, always with the most likely token; the answer must equal a right one."""


class Generation(Answered):
    """The greedy answer is measured against the right ones: translation, summaries, chat."""

    kind: Literal["generation"]
    """The model answers, always with the most likely token; metrics say how near the answer is to the right ones."""
    metrics: Annotated[list[Metric], Field(min_length=1)]
    """bleu and chrf (sacrebleu, of all answers together, 0 to 100), rouge1, rouge2 and rougeL (rouge-score, F1, mean of
    the best against a right answer), exact_match (as that kind)."""
    lead: str | None = None
    """The field of whose text the first three sentences are measured beside the model, as summaries are."""


class Classification(Answered):
    """Each row has one of the same labels."""

    kind: Literal["classification"]
    """Each row has one of the same labels; accuracy, macro F1 and confusion matrix are counted."""
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    """All labels, as the model is to say them."""
    answer: str
    """The field that holds the right label: its text, else its number, counted from 0, where no label is a number."""
    by: Literal["likelihood", "generation"] = "likelihood"
    """likelihood: the label that is most likely as the whole answer. generation: what the model says, which must equal
    a label."""
    separator: str | None = None
    """As of multiple_choice, for likelihood."""

    @model_validator(mode="after")
    def _labels_differ(self) -> "Classification":
        seen = [normalized(label, self.normalize) for label in self.labels]
        if "" in seen or len(set(seen)) < len(seen):
            raise ValueError(f"labels must not be empty, nor equal after normalize; they are {self.labels}")
        if NONE in self.labels:
            raise ValueError(f"the label {NONE!r} is the name of answers that are none of the labels: rename it")
        return self


AnyTask = MultipleChoice | ExactMatch | Generation | Classification
KINDS: dict[str, type[AnyTask]] = {
    "multiple_choice": MultipleChoice,
    "exact_match": ExactMatch,
    "generation": Generation,
    "classification": Classification,
}


@dataclass(frozen=True)
class Question:
    """One row of the data. Where the model chooses, `options` are all and `answers` the right one; else no options."""

    place: str
    prompt: str
    system: str | None
    answers: list[str]
    options: list[str]
    lead: str = ""


def read_task(file: Path) -> AnyTask:
    """Raises FileNotFoundError or ValueError with all problems of the file."""
    if not file.is_file():
        raise FileNotFoundError(f"task {file} does not exist")
    content = read_mapping(file, "task")
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"task {file}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return parse_section(KINDS[kind], content, f"task {file}")


def read_question(task: AnyTask, place: str, row: dict[str, Any]) -> Question:
    """Raises ValueError, with the place, for a row that is no question of the task."""
    try:
        prompt = _fill(task.prompt, row)
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if isinstance(task, MultipleChoice | Classification):
            options, answers = _choices(task, row)
        else:
            options, answers = [], _answers(task, row)
        system = None if task.system is None else _fill(task.system, row)
        lead = getattr(task, "lead", None)
        return Question(place, prompt, system, answers, options, _text(lead, _value(lead, row)) if lead else "")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _value(name: str, row: dict[str, Any]) -> Any:
    if name not in row:
        raise ValueError(f"the field {name} is missing; the row has {', '.join(row) or 'none'}")
    return row[name]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the field {name} holds {'null' if value is None else type(value).__name__}, not a text")
    return str(value)


def _fill(template: str, row: dict[str, Any]) -> str:
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts += [text, "" if name is None else _text(name, _value(name, row))]
    return "".join(parts)


def _choices(task: MultipleChoice | Classification, row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(options, the right one)"""
    if isinstance(task, Classification):
        options = task.labels
        if (label := _text(task.answer, _value(task.answer, row))) in options:
            return options, [label]
        if any(map(_is_number, options)):
            raise ValueError(
                f"{task.answer} is {row[task.answer]!r}, which is none of the labels {', '.join(map(repr, options))}; "
                "labels that are numbers themselves are not counted from 0"
            )
    elif isinstance(task.options, str):
        found = _value(task.options, row)
        if not isinstance(found, list):
            raise ValueError(f"the field {task.options} holds {type(found).__name__}, not a list of options")
        options = [_text(task.options, option) for option in found]
    else:
        options = [_fill(option, row) for option in task.options]
    if len(options) < 2:
        raise ValueError(f"there are {len(options)} options; a choice needs at least 2")
    if not all(option.strip() for option in options):
        raise ValueError(f"option {[bool(option.strip()) for option in options].index(False)} is empty")
    if len(set(options)) < len(options):
        raise ValueError(f"the option {max(options, key=options.count)!r} is there twice")
    answer = _value(task.answer, row)
    if isinstance(answer, str) and re.fullmatch(r"\d+", answer) and not any(map(_is_number, options)):
        answer = int(answer)  # a CSV file has texts only
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(options):
            raise ValueError(f"{task.answer} is {answer}, but the options are numbered from 0 to {len(options) - 1}")
        return options, [options[answer]]
    if _text(task.answer, answer) not in options:
        raise ValueError(f"{task.answer} is {answer!r}, which is none of the options {', '.join(map(repr, options))}")
    return options, [str(answer)]


def _is_number(option: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", option.strip()) is not None


def _answers(task: Answered, row: dict[str, Any]) -> list[str]:
    found = _value(task.answer, row)
    answers = [_text(task.answer, value) for value in (found if isinstance(found, list) else [found])]
    if not answers or not all(normalized(answer, task.normalize) for answer in answers):
        raise ValueError(f"the field {task.answer} holds an answer of which nothing is left to compare: {found!r}")
    if isinstance(task, Generation) and any(metric.startswith("rouge") for metric in task.metrics):
        letters = [letter for letter in "".join(answers) if letter.isalpha()]
        if 2 * sum(letter.isascii() for letter in letters) < len(letters):
            raise ValueError(
                f"the field {task.answer} holds {answers[0]!r}, but ROUGE keeps a-z and 0-9 only: use chrf"
            )
    return answers


def normalized(text: str, how: Literal["whitespace", "squad"]) -> str:
    """As `ExactMatch.normalize` says."""
    if how == "squad":
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())
