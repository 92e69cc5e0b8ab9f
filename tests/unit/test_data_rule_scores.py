"""Precision and recall of every cleaning rule on planted faults; README.md shows what is measured here.

Each rule is measured alone, with the papers' bounds. Good texts are documents of three speeches of the embedded plays,
each a paragraph. A planted document is one of them with a fault of random strength beyond the bound; look-alikes have
the same fault, but within it. A repair counts as found only where it gives back the text from before the fault.
"""

import itertools
import random
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_samples import EMBEDDED, save_tokenizer, small_tokenizer, write_jsonl
from test_data_decontamination import QUESTIONS
from test_data_decontamination import _others as other_questions
from test_data_decontamination import _planted as contaminated
from test_data_languages import TEXTS
from test_data_near_duplicates import ORIGINALS, _similarity
from test_data_near_duplicates import _others as half_equal
from test_data_personal_data import LOOK_ALIKES, PLANTED

from data_pipeline.clean import Cleaner, no_tally
from data_pipeline.documents import Document, Place
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.rules import FinewebQuality, GopherQuality, GopherRepetition, Rules
from data_pipeline.token_shards import TokenShards

README = EMBEDDED.parents[1] / "README.md"
EACH = 40  # planted documents of a bound, and look-alikes
Dice = random.Random


def _good_texts() -> list[str]:
    plays = [path.read_text(encoding="utf-8") for path in sorted(EMBEDDED.glob("shakespeare/*/*.txt"))]
    speeches = [" ".join(part.split()) for play in plays for part in play.split("\n\n") if len(part.split()) >= 60]
    return ["\n\n".join(speeches[begin : begin + 3]) for begin in range(0, 900, 3)]


GOOD = _good_texts()


class Score(NamedTuple):
    rule: str
    planted: int
    others: int
    found: int  # of the planted
    wrong: int  # of the others

    def row(self) -> str:
        precision, recall = self.found / max(1, self.found + self.wrong), self.found / self.planted
        return f"| `{self.rule}` | {self.planted:,} | {self.others:,} | {precision:.3f} | {recall:.3f} |"


# Bounds: each makes of a good text one whose measure is about ``amount``


def _lines(text: str, words: int = 7) -> list[str]:
    """Lines that are all different, without marks at their ends."""
    parts = text.replace(".", "").replace("!", "").replace("?", "").split()
    lines = dict.fromkeys(" ".join(parts[begin : begin + words]) for begin in range(0, len(parts), words))
    return [line.strip(" ,;:-'\"") for line in lines]


def _some(dice: Dice, parts: list[str], share: float, change: Callable[[str], str]) -> list[str]:
    """The parts, that share of them changed."""
    chosen = set(dice.sample(range(len(parts)), round(share * len(parts))))
    return [change(part) if place in chosen else part for place, part in enumerate(parts)]


def _spelled(dice: Dice, text: str, amount: float) -> str:
    """Letters with spaces between them, in as many words as make the mean word that long."""
    words = text.split()
    mean = sum(map(len, words)) / len(words)
    return " ".join(_some(dice, words, min(1.0, (mean / amount - 1) / (mean - 1)), " ".join))


def _run_together(dice: Dice, text: str, amount: float) -> str:
    words = text.split()
    characters = sum(map(len, words))
    while characters / len(words) < amount:
        place = dice.randrange(len(words) - 1)
        words[place : place + 2] = ["".join(words[place : place + 2])]
    return " ".join(words)


def _symbols(dice: Dice, text: str, amount: float) -> str:
    sign = dice.choice(["#{}", "{}...", "{}…"])
    return " ".join(_some(dice, text.split(), amount, sign.format))


def _repeated(separator: str, by_characters: bool) -> Callable[[Dice, str, float], str]:
    """A line of navigation that comes back until it is that share of all parts, or of their characters."""

    def plant(dice: Dice, text: str, amount: float) -> str:
        parts = [*_lines(text), "Next"]
        times = sum(map(len, parts)) / len("Next") if by_characters else len(parts)
        return separator.join(parts + ["Next"] * round(times * amount / (1 - amount)))

    return plant


def _phrase(count: int) -> Callable[[Dice, str, float], str]:
    """A phrase of so many words that comes back until it makes that share of the characters."""

    def plant(dice: Dice, text: str, amount: float) -> str:
        words = text.split()
        phrase = ["Click", "here", "now", "please"][:count]
        size, total = sum(map(len, phrase)), sum(map(len, words))
        times = round(amount * total / (1 - amount) / size)
        gaps = Counter(dice.sample(range(len(words)), min(times, len(words))))
        return " ".join(word for place, own in enumerate(words) for word in ([*phrase, own] if gaps[place] else [own]))

    return plant


def _passage(dice: Dice, text: str, amount: float) -> str:
    """A passage that stands there a second time, as long as makes it that share of the characters."""
    words = text.split()
    begin = dice.randrange(len(words))
    turned = words[begin:] + words[:begin]
    left = amount / (1 - amount) * sum(map(len, words))
    lengths = itertools.accumulate(map(len, turned))
    return " ".join([*turned, *(word for word, length in zip(turned, lengths, strict=True) if length <= left)])


def _stop_words(dice: Dice, text: str, amount: float) -> str:
    """A list of key words, and that many different stop words."""
    kept = dice.sample(GopherQuality().stop_words, round(amount))
    words = [word for word in text.split() if word not in GopherQuality().stop_words]
    return " ".join([*words, *kept])


def _first_words(dice: Dice, text: str, amount: float) -> str:
    words = text.split()
    return " ".join((words * (1 + int(amount) // len(words)))[: round(amount)])


def _number(word: str) -> str:
    return str(sum(word.encode()))


SHORT = ("Home", "Next page", "Read more", "Sign in", "All rights reserved", "Back to top")
FAULTS: dict[str, Callable[[Dice, str, float], str]] = {
    "length.min_characters": lambda dice, text, amount: text[: round(amount)],
    "length.max_characters": lambda dice, text, amount: (text * 9)[: round(amount)],
    "gopher_quality.min_words": _first_words,
    "gopher_quality.max_words": _first_words,
    "gopher_quality.min_mean_word_length": _spelled,
    "gopher_quality.max_mean_word_length": _run_together,
    "gopher_quality.max_symbols_per_word": _symbols,
    "gopher_quality.max_bullet_lines": lambda dice, text, amount: "\n".join(
        _some(dice, _lines(text), amount, "- {}".format)
    ),
    "gopher_quality.max_ellipsis_lines": lambda dice, text, amount: "\n".join(
        _some(dice, _lines(text), amount, "{}...".format)
    ),
    "gopher_quality.min_alphabetic_words": lambda dice, text, amount: " ".join(
        _some(dice, text.split(), 1 - amount, _number)
    ),
    "gopher_quality.min_stop_words": _stop_words,
    "fineweb_quality.min_punctuated_lines": lambda dice, text, amount: "\n".join(
        _some(dice, _lines(text), amount, "{}.".format)
    ),
    "fineweb_quality.max_short_lines": lambda dice, text, amount: "\n".join(
        _some(dice, _lines(text, words=12), amount, lambda line: dice.choice(SHORT))
    ),
    "fineweb_quality.max_repeated_line_characters": _repeated("\n", by_characters=True),
    "gopher_repetition.max_repeated_lines": _repeated("\n", by_characters=False),
    "gopher_repetition.max_repeated_paragraphs": _repeated("\n\n", by_characters=False),
    "gopher_repetition.max_repeated_line_characters": _repeated("\n", by_characters=True),
    "gopher_repetition.max_repeated_paragraph_characters": _repeated("\n\n", by_characters=True),
    **{f"gopher_repetition.max_top_{count}_gram": _phrase(count) for count in (2, 3, 4)},
    **{f"gopher_repetition.max_repeated_{count}_grams": _passage for count in range(5, 11)},
}
FARTHEST = {  # the weakest and the strongest amount that is planted, where they are not 0 and 1
    "length.min_characters": (1, 200),
    "length.max_characters": (1000, 4000),
    "gopher_quality.min_words": (1, 90),
    "gopher_quality.max_words": (99_990, 100_011),
    "gopher_quality.min_mean_word_length": (1.5, 4.0),
    "gopher_quality.max_mean_word_length": (5.0, 25.0),
    "gopher_quality.max_symbols_per_word": (0.0, 0.5),
    "gopher_quality.min_stop_words": (0, 6),
    "gopher_quality.max_bullet_lines": (0.0, 1.0),
    **{f"gopher_repetition.max_repeated_{count}_grams": (0.0, 0.45) for count in range(5, 11)},
}
WHOLE = {rule for rule, (_, most) in FARTHEST.items() if isinstance(most, int)}  # and shares are fractions
SECTIONS: dict[str, dict[str, Any]] = {
    "length": {"min_characters": 100, "max_characters": 2000},
    "gopher_quality": dict(GopherQuality()),
    "fineweb_quality": dict(FinewebQuality()),
    "gopher_repetition": dict(GopherRepetition()),
}


def _document(text: str) -> Document:
    return Document(Place("x.txt"), 0, text, None, None, None, 0)


def _dropped(rules: Rules, texts: list[str]) -> int:
    cleaner, tally = Cleaner(rules), no_tally(rules)
    return sum(cleaner.broken_bound(_document(text), tally) is not None for text in texts)


def _bound_score(rule: str) -> Score:
    section, _, name = rule.partition(".")
    declared = {other: value for other, value in SECTIONS[section].items() if other != "stop_words"}
    bound = declared[name]
    dice, whole = Dice(rule), rule in WHOLE
    least, most = FARTHEST.get(rule, (0.0, 0.9))
    count = 5 if name == "max_words" else EACH
    low = name.startswith("min_")

    def made(below: bool) -> list[str]:
        """Amounts of whole things go up to the bound, shares to a twentieth of it: no text has a tenth of a word."""
        texts = []
        for _ in range(count):
            text = "\n\n".join(dice.sample(GOOD, 3))
            if whole:
                amount: float = dice.randint(least, bound - low) if below else dice.randint(bound + (not low), most)
            else:
                amount = dice.uniform(least, 0.95 * bound) if below else dice.uniform(1.05 * bound, most)
            texts.append(FAULTS[rule](dice, text, amount))
        return texts

    planted, alike = made(below=low), made(below=not low)
    rules = Rules(**{section: dict.fromkeys(declared) | {name: bound}})
    others = alike if section == "length" else GOOD + alike
    return Score(rule, len(planted), len(others), _dropped(rules, planted), _dropped(rules, others))


# Repairs


def _repair_score(rule: str, rules: Rules, planted: list[tuple[str, str]], others: list[str]) -> Score:
    """``planted``: (text with the fault, text that the repair must give)."""
    cleaner = Cleaner(rules)
    found = sum(cleaner.repair(_document(fault)).text == right for fault, right in planted)
    wrong = sum(cleaner.repair(_document(text)).text != text for text in others)
    return Score(rule, len(planted), len(others), found, wrong)


def _encoding(names: str, codecs: list[str]) -> Score:
    """UTF-8 that was read in one of these encodings, once or twice, as one paragraph among right ones."""
    foreign = [text for code, texts in TEXTS.items() if code != "en" for text in texts]
    planted = []
    for (place, text), codec, times in itertools.product(enumerate(foreign), codecs, (1, 2)):
        fault = text
        for _ in range(times):
            fault = fault.encode().decode(codec)
        around = "{}\n\n{}\n\nÄrger, naïve, x² ≥ 1"
        if fault != text:
            planted.append((around.format(GOOD[place], fault), around.format(GOOD[place], text)))
    odd = ["VOILÀ « ÇA »", "São Paulo, Ångström, Æ", "½ ± 3 °C", "Ã is a letter", "\u201cquoted\u201d \u2013 text"]
    return _repair_score(f"encoding: {names}", Rules(encoding=True), planted, [*GOOD, *foreign, *odd])


def _unicode() -> Score:
    foreign = [text for texts in TEXTS.values() for text in texts]
    planted = [(unicodedata.normalize("NFD", text), text) for text in foreign]
    changed = [(fault, right) for fault, right in planted if fault != right]
    return _repair_score("unicode", Rules(unicode="NFC"), changed, [*GOOD, *foreign, "\ufb01n", "x\u00b2"])


def _control_characters() -> Score:
    dice, planted = Dice("control"), []
    for character in "\x00\x01\x08\x0e\x1b\x1f\x7f\x80\x9f\ufeff\ufffe\r\x0b\x0c\x85\u2028\u2029":
        for _ in range(5):
            text = dice.choice(GOOD)
            if character in "\r\x0b\x0c\x85\u2028\u2029":
                planted.append((text.replace("\n", "\r\n" if character == "\r" else character), text))
                continue
            place = dice.randrange(len(text))
            planted.append((text[:place] + character + text[place:], text))
    others = [*GOOD, "a\tb\n", "\U0001f469\u200d\U0001f680", "soft\u00adhyphen", "\u200fعربي", "a\u00a0b", "\ufffd"]
    return _repair_score("control_characters", Rules(control_characters=True), planted, others)


def _personal_data(kind: str) -> Score:
    dice, forms = Dice(kind), ("{}", "Write to {}, please.", "({})", '"{}"\n', "one: {} two")
    planted = []
    for value in PLANTED[kind]:
        for form in forms:
            text = f"{dice.choice(GOOD)}\n{form}"
            planted.append((text.format(value), text.format(f"<{kind.replace('_', '-')}>")))
    alike = [f"{dice.choice(GOOD)} Read {value} there." for values in LOOK_ALIKES.values() for value in values]
    return _repair_score(f"personal_data: {kind}", Rules(personal_data=[kind]), planted, GOOD + alike)


# Rules that look at all documents


def _whole_score(folder: Path, rule: str, rules: Rules, planted: list[str], others: list[str]) -> Score:
    """By ``prepare``: what is not kept was found. Planted documents stand behind the others."""
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", [{"text": text} for text in [*others, *planted]])
    tokenizer = save_tokenizer(folder / "tokenizer")
    options = PrepareOptions([str(folder / "rows.jsonl")], folder / "out", tokenizer, rules=rules, rules_file="r.yaml")
    options.validation_fraction, options.unit_bytes = 0, 100_000
    prepare(options)
    shards = TokenShards(folder / "out" / "train")
    found = Counter([*others, *planted])
    tokens, end = shards.read(0, shards.tokens), 0
    for length in shards.document_lengths():
        found[small_tokenizer().decode(tokens[end : end + length - 1])] -= 1
        end += length
    return Score(rule, len(planted), len(others), *_split_found(found, planted))


def _split_found(found: "Counter[str]", planted: list[str]) -> tuple[int, int]:
    assert min(found.values()) >= 0  # all that was kept is as it was
    right = (found & Counter(planted)).total()
    return right, found.total() - right


def _near_duplicates() -> list[str]:
    """Other case and punctuation, words replaced, a beginning or an end changed: 0.8 or more of the runs are shared."""
    dice, planted = Dice("near"), []
    for original in ORIGINALS:
        words = original.split()
        replaced = list(words)
        for place in dice.sample(range(len(words)), dice.randint(1, 5)):
            replaced[place] = "instead"
        ends = [*words, *["which", "is", "all", "that", "was", "said"] * 2]
        variants = [original.lower().replace(",", " ;"), " ".join(replaced), " ".join(words[15:]), " ".join(ends)]
        planted += [text for text in variants if _similarity(text, original) >= 0.8]
    return planted


def measured(folder: Path) -> list[Score]:
    foreign = [text for code, texts in TEXTS.items() if code != "en" for text in texts]
    english = [*GOOD, *TEXTS["en"]]
    language = Rules(language={"keep": ["en"]})
    write_jsonl(folder / "test.jsonl", [{"question": text} for text in QUESTIONS])
    evaluation = Rules(decontamination={"files": [str(folder / "test.jsonl")]})
    questions = [text for question in QUESTIONS for text in contaminated(question)]
    no_questions = [text for question in QUESTIONS for text in other_questions(question)]
    copies = Dice("copies").choices(GOOD, k=EACH)
    nearly = [text + " " for text in GOOD[:EACH]] + [text[:-1] for text in GOOD[:EACH]]
    halves = [half_equal(number) for number in range(0, 50, 2)]
    return [
        _encoding("Latin-1, Windows-1252", ["latin-1", "sloppy-windows-1252"]),
        _encoding("Mac Roman, Windows-1251, code page 437", ["macroman", "sloppy-windows-1251", "cp437"]),
        _unicode(),
        _control_characters(),
        *map(_personal_data, PLANTED),
        Score("language", len(foreign), len(english), _dropped(language, foreign), _dropped(language, english)),
        *map(_bound_score, FAULTS),
        _whole_score(folder / "d", "decontamination", evaluation, questions, GOOD + no_questions),
        _whole_score(folder / "e", "duplicates: exact", Rules(duplicates="exact"), copies, GOOD + nearly),
        _whole_score(
            folder / "n", "duplicates: near", Rules(duplicates="near"), _near_duplicates(), ORIGINALS + halves
        ),
    ]


def test_the_table_of_the_readme_is_what_is_measured(tmp_path: Path) -> None:
    scores = measured(tmp_path)
    bounds = {f"{section}.{name}" for section, fields in SECTIONS.items() for name in fields if name != "stop_words"}
    rules = {score.rule.partition(":")[0].partition(".")[0] for score in scores}
    assert bounds == set(FAULTS) and rules == set(Rules.model_fields) - {"augmentation"}  # which drops nothing
    head = ["| rule | planted | others | precision | recall |", "| --- | --- | --- | --- | --- |"]
    table = "\n".join([*head, *(score.row() for score in scores)])
    assert table in README.read_text(encoding="utf-8"), f"put this table into README.md, Cleaning rules:\n{table}"
