"""Rules on one document: what is repaired in its text, and the first bound that it breaks."""

import functools
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import ftfy
import numpy as np
from ftfy.badness import is_bad

from data_pipeline.documents import Document, text_bytes, texts_of
from data_pipeline.languages import language_of
from data_pipeline.n_grams import MIX, has_spaces
from data_pipeline.personal_data import REPLACEMENTS, placeholder
from data_pipeline.rules import Bounds, Rules

EXAMPLES_KEPT = 3
EXCERPT_CHARACTERS = 120
SHORT_LINE_CHARACTERS = 30

_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]+")
_IS_CONTROL = bytes((code < 0x20 and code not in b"\t\n") or code == 0x7F for code in range(256))
_OTHER_CONTROL = tuple(
    map(re.compile, (rb"\xc2[\x80-\x9f]", rb"\xe2\x80[\xa8\xa9]", rb"\xef(?:\xbb\xbf|\xbf[\xbe\xbf])"))
)
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha() and chr(code) != " ")
_NOT_ASCII = re.compile(rb"[\x80-\xff](?<![^ ].)[\x80-\xff]*(?![^ ])")  # whole words of it
_PARAGRAPH = re.compile(r"\n\s*\n")
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_SENTENCE_END_WITHOUT_SPACES = "。\uff01\uff1f"  # Chinese and Japanese
_BULLETS = frozenset("•‣*-")
_ELLIPSES = ("...", "…")
# Latin; then Hindi and Bengali, Urdu and Arabic, Amharic, Armenian, Chinese and Japanese
_PUNCTUATION = frozenset(".!?\"'…”\u2019।॥\u06d4؟።\u0589。\uff01\uff1f")

# Why a document is dropped: the bound's name, and the value with it
Reason = tuple[str, str]
Measure = tuple[str, float]  # its name, as in min_NAME and max_NAME, and its value


def no_tally(rules: Rules) -> dict[str, Any]:
    """The counts of no document. Every declared rule is there, so that one that never applied is seen to be 0."""
    changed = [name for name, _ in _repairs(rules)]
    dropped = ["language"] if rules.language and rules.language.keep else []
    dropped += [f"{section}.{name}" for section, bounds in _bounds(rules) for name in _bound_names(bounds)]
    dropped += ["decontamination"] if rules.decontamination else []
    dropped += ["duplicates.exact"] if rules.duplicates else []
    dropped += ["duplicates.near"] if rules.duplicates == "near" else []
    declared: dict[str, Any] = {"languages": {}} if rules.language else {}
    if rules.augmentation:
        counts = dict.fromkeys(("documents", "bytes", "repeated", "held_back", "refused"), 0)
        kinds = [name for name, section in rules.augmentation if section is not None]
        declared["augmented"] = {name: counts | {"examples": []} for name in kinds}
    return {
        "documents_in": 0,
        "bytes_in": 0,
        "documents_without_spaces": 0,
        "changed": {
            name: {"documents": 0} | ({"replaced": 0} if "." in name else {}) | {"examples": []} for name in changed
        },
        "dropped": {name: {"documents": 0, "bytes": 0, "examples": []} for name in dropped},
    } | declared


def add_tally(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add counts to counts: numbers are summed, the first examples stay."""
    for name, value in more.items():
        if isinstance(value, dict):
            add_tally(total[name], value)
        elif isinstance(value, list):
            total[name] = (total[name] + value)[:EXAMPLES_KEPT]
        else:
            total[name] = total.get(name, 0) + value


def drop(tally: dict[str, Any], reason: Reason, document: Document, file: str) -> None:
    """Count a dropped document and keep the first as examples."""
    entry = tally["dropped"][reason[0]]
    entry["documents"] += 1
    entry["bytes"] += text_bytes(document)
    if len(entry["examples"]) < EXAMPLES_KEPT:
        excerpt = "\n".join(texts_of(document))[:EXCERPT_CHARACTERS]
        entry["examples"].append({"file": file, "why": reason[1], "text": excerpt})


def first_difference(one: str, other: str) -> int:
    """Where two texts begin to differ; the length of the shorter one where they do not."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


class Cleaner:
    """The rules of one file, applied to one document after another."""

    def __init__(self, rules: Rules) -> None:
        self._repairs = _repairs(rules)
        self._language = rules.language
        self._bounds = [(section, bounds, dict(bounds)) for section, bounds in _bounds(rules)]

    def repair(self, document: Document, tally: dict[str, Any] | None = None, file: str = "") -> Document:
        """The document with its texts repaired, also those in tools and their calls; what changed is counted in
        ``tally``."""
        messages = document.messages or []
        repaired_keys = [{key: m[key] for key in ("content", "tool_calls") if m.get(key)} for m in messages]
        parts = [document.text, repaired_keys, document.tools]
        texts: list[str] = []
        _map_texts(parts, texts.append)
        for name, apply in self._repairs:
            after = [apply(text) for text in texts]
            if tally is not None and after != texts:
                self._count_change(tally["changed"][name], name, texts, after, file)
            texts = after
        left = iter(texts)
        text, repaired_values, tools = _map_texts(parts, lambda _: next(left))
        if document.messages is None:
            return document._replace(text=text)
        repaired = [message | values for message, values in zip(messages, repaired_values, strict=True)]
        return document._replace(messages=repaired, tools=tools)

    def broken_bound(self, document: Document, tally: dict[str, Any]) -> Reason | None:
        """The first bound that the document breaks. Of a conversation only its language and whether it is too long.

        A text in a script without spaces between words passes the bounds on words, lines and n-grams.
        """
        text = _Text("\n".join(texts_of(document)))
        if self._language is not None:
            code = language_of(text.text)
            tally["languages"][code] = tally["languages"].get(code, 0) + 1
            if self._language.keep is not None and code not in self._language.keep:
                return "language", f"{code}, kept: {', '.join(self._language.keep)}"
        spaced: bool | None = None
        for section, bounds, limits in self._bounds:
            if section != "length":
                if document.messages is not None:
                    continue
                if spaced is None:
                    spaced = _has_words(text.text)
                    tally["documents_without_spaces"] += not spaced
                if not spaced:
                    continue
            for name, value in _MEASURES[section](text, bounds):
                least, most = limits.get(f"min_{name}"), limits.get(f"max_{name}")
                if document.messages is not None:
                    least = None  # a greeting and its answer are a whole conversation
                if least is not None and value < least:
                    return f"{section}.min_{name}", f"{value:.4g}, bound {least:g}"
                if most is not None and value > most:
                    return f"{section}.max_{name}", f"{value:.4g}, bound {most:g}"
        return None

    def _count_change(self, entry: dict[str, Any], name: str, before: list[str], after: list[str], file: str) -> None:
        """Of personal data the report shows only what stands in its place, in the examples of every rule."""
        entry["documents"] += 1
        kind = name.partition(".")[2]
        mark = placeholder(kind)
        if kind:
            entry["replaced"] += sum(text.count(mark) for text in after) - sum(text.count(mark) for text in before)
        if len(entry["examples"]) >= EXAMPLES_KEPT:
            return
        old, new = next((old, new) for old, new in zip(before, after, strict=True) if old != new)
        (old, replaced_before), (new, replaced) = self._without_personal_data(old), self._without_personal_data(new)
        place = new.index(mark) if kind else first_difference(old, new)
        window = slice(max(0, place - EXCERPT_CHARACTERS // 2), place + EXCERPT_CHARACTERS // 2)
        # what was found only after the repair stands in the text before it
        shown = {} if kind or replaced_before != replaced else {"before": old[window]}
        entry["examples"].append({"file": file, **shown, "after": new[window]})

    def _without_personal_data(self, text: str) -> tuple[str, int]:
        """The text with all declared kinds replaced, and how many replacements stand in it."""
        kinds = [(name.partition(".")[2], apply) for name, apply in self._repairs if "." in name]
        for _, apply in kinds:
            text = apply(text)
        return text, sum(text.count(placeholder(kind)) for kind, _ in kinds)


def _map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """The JSON value with each text changed, but for the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return value


# Repairs


def _repairs(rules: Rules) -> list[tuple[str, Callable[[str], str]]]:
    """Names and functions of the declared repairs, in the order in which they are applied."""
    steps: list[tuple[str, Callable[[str], str]]] = []
    if rules.encoding:
        steps.append(("encoding", _repair_encoding))
    if rules.control_characters:
        steps.append(("control_characters", _remove_control_characters))
    if form := rules.unicode:
        steps.append(("unicode", lambda text: text if text.isascii() else unicodedata.normalize(form, text)))
    steps += [(f"personal_data.{kind}", apply) for kind, apply in REPLACEMENTS.items() if kind in rules.personal_data]
    return steps


def _repair_encoding(text: str) -> str:
    """ftfy's repair of each line for itself, as one wrong line among right ones is the common case.

    Only a line feed ends a line: other line ends may be bytes of a character that was decoded wrongly.
    """
    if text.isascii():
        return text
    lines = text.split("\n")
    bad = [place for place, line in enumerate(lines) if not line.isascii() and is_bad(line)]
    for place in bad:
        lines[place] = ftfy.fix_encoding(lines[place])
    return "\n".join(lines) if bad else text


def _remove_control_characters(text: str) -> str:
    data = text.encode()
    if 1 not in data.translate(_IS_CONTROL) and not any(pattern.search(data) for pattern in _OTHER_CONTROL):
        return text
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


# Measures


def _bounds(rules: Rules) -> list[tuple[str, Bounds]]:
    return [(name, value) for name, value in rules if isinstance(value, Bounds)]


def _bound_names(bounds: Bounds) -> list[str]:
    return [name for name, value in bounds if name.startswith(("min_", "max_")) and value is not None]


def _has_words(text: str) -> bool:
    """Whether spaces separate words: in most of the text, and in its sentences.

    The sentences of a page that is a table of numbers or of English names for the rest tell what language it is in.
    """
    others = sum(map(text.count, _SENTENCE_END_WITHOUT_SPACES))
    return has_spaces(text) and (not others or len(_SENTENCE_END.findall(text)) >= others)


class _Text:
    """A text with what several measures need, made when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @functools.cached_property
    def line_of_words(self) -> str:
        return " ".join(self.words)

    @functools.cached_property
    def numbered(self) -> tuple[dict[str, int], np.ndarray]:
        """The different words, numbered as they come, and the numbers of all words."""
        numbers: dict[str, int] = defaultdict(itertools.count().__next__)
        return numbers, np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without white space at their ends."""
        return list(filter(None, map(str.strip, self.text.split("\n"))))

    @functools.cached_property
    def repeated_lines(self) -> tuple[float, float]:
        return _repeated(self.lines)


def _length(text: _Text, bounds: Any) -> Iterator[Measure]:
    yield "characters", len(text.text)


def _lettered_words(text: _Text) -> int:
    """Words with a letter: all is deleted but letters and what is not ASCII, and of that the words are counted."""
    left = text.line_of_words.encode().translate(None, _NO_LETTERS)
    others = [] if left.isascii() else _NOT_ASCII.findall(left)
    unlettered = [word for word in others if not _LETTER.search(word.decode())]
    return len(left.split()) - len(unlettered)


def _gopher_quality(text: _Text, bounds: Any) -> Iterator[Measure]:
    count = len(text.words)
    yield "words", count
    if not count:
        return
    yield "mean_word_length", (len(text.line_of_words) - count + 1) / count
    ellipses = text.text.count("...") + text.text.count("…")
    yield "symbols_per_word", max(text.text.count("#"), ellipses) / count
    lines = text.lines
    yield "bullet_lines", sum(map(_BULLETS.__contains__, map(itemgetter(0), lines))) / len(lines)
    yield "ellipsis_lines", sum(map(str.endswith, lines, itertools.repeat(_ELLIPSES))) / len(lines)
    yield "alphabetic_words", _lettered_words(text) / count
    if bounds.min_stop_words is not None:
        yield "stop_words", sum(word in text.numbered[0] for word in set(bounds.stop_words))


def _fineweb_quality(text: _Text, bounds: Any) -> Iterator[Measure]:
    lines = text.lines
    if not lines:
        return
    yield "punctuated_lines", sum(map(_PUNCTUATION.__contains__, map(itemgetter(-1), lines))) / len(lines)
    yield "short_lines", sum(map(SHORT_LINE_CHARACTERS.__gt__, map(len, lines))) / len(lines)
    yield "repeated_line_characters", text.repeated_lines[1]


def _gopher_repetition(text: _Text, bounds: Any) -> Iterator[Measure]:
    if not text.words:
        return
    paragraphs = [stripped for part in _PARAGRAPH.split(text.text) if (stripped := part.strip())]
    for name, (share, characters) in (("line", text.repeated_lines), ("paragraph", _repeated(paragraphs))):
        yield f"repeated_{name}s", share
        yield f"repeated_{name}_characters", characters
    longer = [getattr(bounds, f"max_repeated_{n}_grams") for n in range(5, 11)]
    yield from _n_grams(text, min((bound for bound in longer if bound is not None), default=1.0))


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Share of the parts that stood before, and of the characters in them."""
    first = set(parts)
    if len(first) == len(parts):
        return 0.0, 0.0
    characters = sum(map(len, parts))
    return 1 - len(first) / len(parts), 1 - sum(map(len, first)) / characters


def _n_grams(text: _Text, enough: float) -> Iterator[Measure]:
    """Shares of characters: of the most frequent n-gram (2 to 4), and in n-grams that stood before (5 to 10).

    An n-gram is told by a 64-bit hash. Where n words are repeated, n - 1 are: ever fewer places are looked at, and none
    where the share is not above ``enough``, as it only falls with n.
    """
    words = text.words
    numbers, ids = text.numbered
    lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
    starts = np.concatenate([[0], np.cumsum(lengths[ids])])
    more = (np.bincount(ids) > 1)[ids]
    places = np.flatnonzero(more[:-1] & more[1:])
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * MIX
    mixed ^= mixed >> np.uint64(29)
    keys = mixed[places]
    for n in range(2, 11):
        if places.size and places[-1] > len(words) - n:
            fits = places <= len(words) - n
            places, keys = places[fits], keys[fits]
        if not places.size:
            return
        keys = keys * MIX + mixed[places + n - 1]
        order = np.argsort(keys, kind="stable" if n >= 4 else None)
        ordered, sorted_places = keys[order], places[order]
        again = np.zeros(keys.size + 1, dtype=bool)  # equal to the one before, in sorted order
        again[1:-1] = ordered[1:] == ordered[:-1]
        if n <= 4:
            yield f"top_{n}_gram", _most_frequent(sorted_places, again, starts, n) / int(starts[-1])
        if n >= 4:
            share = _covered(sorted_places[again[:-1]], starts, n) / int(starts[-1])
            if n > 4:
                yield f"repeated_{n}_grams", share
            if share <= enough:
                return
        repeated = np.empty(keys.size, dtype=bool)
        repeated[order] = again[:-1] | again[1:]
        places, keys = places[repeated], keys[repeated]


def _most_frequent(places: np.ndarray, again: np.ndarray, starts: np.ndarray, n: int) -> int:
    """Characters in all occurrences of the most frequent n-gram; 0 where none is there twice."""
    runs = np.flatnonzero(~again)
    counts = np.diff(runs)
    most = int(counts.max())
    first = places[runs[:-1][counts == most]]
    return most * int((starts[first + n] - starts[first]).max()) if most > 1 else 0


def _covered(places: np.ndarray, starts: np.ndarray, n: int) -> int:
    """Characters in the n-grams that begin at ``places``, none counted twice."""
    if not places.size:
        return 0
    edges = np.zeros(starts.size, dtype=np.int64)
    edges[places] += 1
    edges[places + n] -= 1  # no place stands there twice
    return int(np.diff(starts)[np.cumsum(edges)[:-1] > 0].sum())


_MEASURES: dict[str, Callable[[_Text, Any], Iterator[Measure]]] = {
    "length": _length,
    "gopher_quality": _gopher_quality,
    "fineweb_quality": _fineweb_quality,
    "gopher_repetition": _gopher_repetition,
}
