"""Variants of training documents (`augmentation` of the rules file), made of what the rules keep.

A variant depends on its document's content and the seed alone, so that it is the same for any number of workers. Only
documents of training have some, and they stand there; one that stands in the inputs already, or is like a validation or
evaluation text as the rules tell it, is counted and left out.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.clean import EXAMPLES_KEPT, EXCERPT_CHARACTERS, Cleaner, first_difference
from data_pipeline.decontamination import Contamination
from data_pipeline.documents import Document, Message, ReadOptions, TaskTemplate, text_bytes, texts_of
from data_pipeline.n_grams import band_hashes, has_spaces
from data_pipeline.plan import Plan
from data_pipeline.rules import Noise, Paraphrases, Rules, Turns
from data_pipeline.sources import find_files, read_documents
from data_pipeline.unit_documents import NEAR_HASHES, document_content, judged_path

COLUMNS = {"paraphrases": ("phrase", "paraphrase"), "parallel": ("text", "parallel")}
SPACES = (" ", "  ", "\n", "\t")

Pairs = list[tuple[str, str]]
Kind = Callable[[Document, random.Random], Iterator[Document]]


class Variant(NamedTuple):
    """A document made of another one."""

    kind: str
    document: Document
    content: bytes
    content_hash: int


def read_pairs(rules: Rules) -> dict[str, Pairs]:
    """The pairs of the files that the rules name, by kind, with the rules' repairs.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is no table, lacks a column or holds no pairs; one sentence.
    """
    cleaner = Cleaner(rules)
    pairs: dict[str, Pairs] = {}
    for kind, columns in COLUMNS.items():
        section = getattr(rules.augmentation, kind)
        if section is None:
            continue
        prompt, response = (f"{{{name}}}" for name in columns)
        options = ReadOptions(template=TaskTemplate(f"augmentation.{kind}", prompt, response))
        pairs[kind] = []
        for file in find_files(section.files, options)[0]:
            before = len(pairs[kind])
            for document in read_documents(file, options):
                one, other = texts_of(cleaner.repair(document))
                if not one.strip() or not other.strip():
                    raise ValueError(f"{document.location}: a text of the pair is blank: correct or remove the row")
                pairs[kind].append((one, other))
            if len(pairs[kind]) == before:
                raise ValueError(f"{file.label} holds no pairs (augmentation.{kind}.files): leave it out")
    return pairs


class Augmenter:
    """Makes the variants of one plan, all of whose units are judged."""

    def __init__(self, plan: Plan) -> None:
        assert plan.rules is not None and plan.rules.augmentation is not None
        declared = plan.rules.augmentation
        self._seed = plan.seed
        self._kinds: dict[str, Kind] = {}
        if declared.paraphrases:
            self._kinds["paraphrases"] = _paraphrases(declared.paraphrases, plan.pairs["paraphrases"])
        if declared.parallel:
            self._kinds["parallel"] = _parallel(plan.pairs["parallel"])
        if declared.noise:
            self._kinds["noise"] = _noise(declared.noise)
        if declared.turns:
            self._kinds["turns"] = _turns(declared.turns)
        self._inputs = np.concatenate(
            [
                np.fromfile(judged_path(plan, u.number, f"{split}.hashes"), "<u8")
                for u in plan.units
                for split in plan.splits
            ]
        )
        self._inputs.sort()
        near = plan.rules.duplicates == "near" and len(plan.splits) > 1
        self._near_validation = _bands_of_validation(plan) if near else None
        self._contamination = Contamination(plan) if plan.evaluation_files else None

    def variants(self, document: Document, content_hash: int, tally: dict[str, Any]) -> Iterator[Variant]:
        """The variants of a training document; those left out are counted in ``tally``, by kind."""
        made = {content_hash}  # in which the seed is
        for kind, make in self._kinds.items():
            for variant in make(document, random.Random(f"{content_hash} {kind}")):
                content = document_content(variant)
                variant_hash = xxhash.xxh3_64_intdigest(content, seed=self._seed)
                if variant_hash in made or _holds(self._inputs, variant_hash):
                    tally[kind]["repeated"] += 1
                elif self._is_held_back("\n".join(texts_of(variant))):
                    tally[kind]["held_back"] += 1
                else:
                    made.add(variant_hash)
                    yield Variant(kind, variant, content, variant_hash)

    def _is_held_back(self, text: str) -> bool:
        """Whether it is near a validation document, or holds text of the evaluation files."""
        bands = self._near_validation
        if bands is not None and any(_holds(bands, value) for value in band_hashes(text)):
            return True
        return self._contamination is not None and self._contamination.find(text) is not None


def count_variant(entry: dict[str, Any], document: Document, variant: Document, file: str) -> None:
    """Count a variant that went to training, and keep the first as examples."""
    entry["documents"] += 1
    entry["bytes"] += text_bytes(variant)
    if len(entry["examples"]) < EXAMPLES_KEPT:
        before, after = ("\n".join(texts_of(one)) for one in (document, variant))
        begin = max(0, first_difference(before, after) - EXCERPT_CHARACTERS // 2)
        window = slice(begin, begin + EXCERPT_CHARACTERS)
        entry["examples"].append({"file": file, "before": before[window], "after": after[window]})


def _bands_of_validation(plan: Plan) -> np.ndarray:
    """The sorted near-duplicate hashes of the documents in validation."""
    found = []
    for unit in plan.units:
        hashes, places, validation = (
            np.fromfile(judged_path(plan, unit.number, what), kind)
            for what, kind in (
                (f"{NEAR_HASHES}.hashes", "<u8"),
                (f"{NEAR_HASHES}.places", "<u4"),
                ("validation.places", "<u4"),
            )
        )
        found.append(hashes[np.isin(places, validation)])
    return np.unique(np.concatenate(found))


def _holds(hashes: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(hashes, np.uint64(value)))
    return place < hashes.size and int(hashes[place]) == value


# Kinds


def _changed(document: Document, change: Callable[[str], str]) -> Document:
    """With its text changed; of a conversation only what the user says, as answers and tools must stay right."""
    if document.messages is None:
        return document._replace(text=change(document.text))
    return document._replace(
        messages=[
            message | {"content": change(message["content"])} if message["role"] == "user" else message
            for message in document.messages
        ]
    )


def _paraphrases(options: Paraphrases, pairs: Pairs) -> Kind:
    """Every phrase of the table becomes one of its paraphrases; of those that begin at one place the longest."""
    table: dict[str, list[str]] = defaultdict(list)
    for phrase, paraphrase in pairs:
        table[phrase].append(paraphrase)
    phrases = [
        rf"(?<!\w){re.escape(phrase)}(?!\w)" if has_spaces(phrase) else re.escape(phrase)
        for phrase in sorted(table, key=len, reverse=True)
    ]
    pattern = re.compile("|".join(phrases))

    def make(document: Document, dice: random.Random) -> Iterator[Document]:
        for _ in range(options.copies):
            variant = _changed(document, lambda text: pattern.sub(lambda found: dice.choice(table[found[0]]), text))
            if variant != document:  # else no phrase of the table is there
                yield variant

    return make


def _parallel(pairs: Pairs) -> Kind:
    """A text, or message of the user, that is one side of a pair, whatever the white space at its ends, becomes the
    other side: one variant for each other side."""
    others: dict[str, list[str]] = defaultdict(list)
    for one, other in pairs:
        others[one.strip()].append(other)
        others[other.strip()].append(one)

    def make(document: Document, dice: random.Random) -> Iterator[Document]:
        if document.messages is None:
            for other in others.get(document.text.strip(), []):
                yield document._replace(text=other)
            return
        for place, message in enumerate(document.messages):
            for other in others.get(message["content"].strip(), []) if message["role"] == "user" else []:
                messages = list(document.messages)
                messages[place] = message | {"content": other}
                yield document._replace(messages=messages)

    return make


def _noise(options: Noise) -> Kind:
    """Words in other case, and other white space between them; words are never joined."""

    def change(part: re.Match[str], dice: random.Random) -> str:
        text = part[0]
        is_space = text.isspace()
        if dice.random() >= (options.white_space if is_space else options.case):
            return text
        forms = SPACES if is_space else (text.lower(), text.upper(), text.capitalize())
        return dice.choice([form for form in forms if form != text] or [text])

    def make(document: Document, dice: random.Random) -> Iterator[Document]:
        for _ in range(options.copies):
            yield _changed(document, lambda text: re.sub(r"\s+|\S+", lambda part: change(part, dice), text))

    return make


def _turns(options: Turns) -> Kind:
    """Some exchanges in a row of a conversation that has several, behind what stands before the first."""

    def make(document: Document, dice: random.Random) -> Iterator[Document]:
        head, exchanges = _exchanges(document.messages or [])
        for _ in range(options.copies if len(exchanges) > 1 else 0):
            count = dice.randint(1, len(exchanges) - 1)
            begin = dice.randint(0, len(exchanges) - count)
            kept = [message for exchange in exchanges[begin : begin + count] for message in exchange]
            yield document._replace(messages=head + kept)

    return make


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first message of the user, and the rest, cut before each such message that comes after an
    answer. A question at the end without an answer belongs to the exchange before it."""
    begin = next((place for place, message in enumerate(messages) if message["role"] == "user"), len(messages))
    exchanges: list[list[Message]] = []
    answered = True
    for message in messages[begin:]:
        if answered and message["role"] == "user":
            exchanges.append([])
            answered = False
        exchanges[-1].append(message)
        answered = answered or message["role"] == "assistant"
    if len(exchanges) > 1 and not answered:
        question = exchanges.pop()
        exchanges[-1] += question
    return messages[:begin], exchanges
