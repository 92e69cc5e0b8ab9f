"""What `prepare --rules FILE` may declare. A rule that the file does not name is off; a value at a bound is kept."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.languages import known_languages

PersonalData = Literal["email", "phone", "ip_address", "iban", "card_number", "secret_key"]


class RuleSection(BaseModel):
    """Base of all sections: unknown rules are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Bounds(RuleSection):
    """Fields `min_…` and `max_…` bound a measure of the document; null is no bound."""

    @model_validator(mode="after")
    def _can_be_met(self) -> "Bounds":
        for name, low in self:
            high = getattr(self, name.replace("min_", "max_", 1), None) if name.startswith("min_") else None
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name} is {low} and max_{name[4:]} {high}: no document would be kept")
        return self


class Length(Bounds):
    """Size of a document."""

    min_characters: int | None = Field(None, ge=1)
    """The fewest characters of a plain text; a short conversation is a whole one, too."""
    max_characters: int | None = Field(None, ge=1)
    """The most characters."""


class GopherQuality(Bounds):
    """Quality filters of Gopher, with its bounds (arXiv:2112.11446, A.1.1). Words are what white space separates."""

    min_words: int | None = Field(50, ge=1)
    """The fewest words."""
    max_words: int | None = Field(100_000, ge=1)
    """The most words."""
    min_mean_word_length: float | None = Field(3, ge=0)
    """The shortest mean word, in characters."""
    max_mean_word_length: float | None = Field(10, ge=0)
    """The longest mean word, in characters."""
    max_symbols_per_word: float | None = Field(0.1, ge=0)
    """The most hash signs, or ellipses, a word."""
    max_bullet_lines: float | None = Field(0.9, ge=0, le=1)
    """The largest share of lines that begin with a bullet point."""
    max_ellipsis_lines: float | None = Field(0.3, ge=0, le=1)
    """The largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float | None = Field(0.8, ge=0, le=1)
    """The smallest share of words with a letter."""
    min_stop_words: int | None = Field(2, ge=0)
    """How many of `stop_words` must be there, at least."""
    stop_words: list[str] = ["the", "be", "to", "of", "and", "that", "have", "with"]
    """Words of the language that is wanted; Gopher's are English."""


class GopherRepetition(Bounds):
    """Repetition filters of Gopher, with its bounds (arXiv:2112.11446, table A1). Shares of n-grams are of the
    characters in words."""

    max_repeated_lines: float | None = Field(0.30, ge=0, le=1)
    """The largest share of lines that stood before."""
    max_repeated_paragraphs: float | None = Field(0.30, ge=0, le=1)
    """The largest share of paragraphs that stood before."""
    max_repeated_line_characters: float | None = Field(0.20, ge=0, le=1)
    """The largest share of characters in such lines."""
    max_repeated_paragraph_characters: float | None = Field(0.20, ge=0, le=1)
    """The largest share of characters in such paragraphs."""
    max_top_2_gram: float | None = Field(0.20, ge=0, le=1)
    """The largest share of characters that the most frequent pair of words makes; only if it is there twice."""
    max_top_3_gram: float | None = Field(0.18, ge=0, le=1)
    """Likewise of three words."""
    max_top_4_gram: float | None = Field(0.16, ge=0, le=1)
    """Likewise of four words."""
    max_repeated_5_grams: float | None = Field(0.15, ge=0, le=1)
    """The largest share of characters in runs of five words that stood before."""
    max_repeated_6_grams: float | None = Field(0.14, ge=0, le=1)
    """Likewise of six words."""
    max_repeated_7_grams: float | None = Field(0.13, ge=0, le=1)
    """Likewise of seven words."""
    max_repeated_8_grams: float | None = Field(0.12, ge=0, le=1)
    """Likewise of eight words."""
    max_repeated_9_grams: float | None = Field(0.11, ge=0, le=1)
    """Likewise of nine words."""
    max_repeated_10_grams: float | None = Field(0.10, ge=0, le=1)
    """Likewise of ten words."""


class FinewebQuality(Bounds):
    """The line filters of FineWeb, with its bounds (arXiv:2406.17557, 3.5)."""

    min_punctuated_lines: float | None = Field(0.12, ge=0, le=1)
    """The smallest share of lines that end with punctuation."""
    max_short_lines: float | None = Field(0.67, ge=0, le=1)
    """The largest share of lines shorter than 30 characters."""
    max_repeated_line_characters: float | None = Field(0.10, ge=0, le=1)
    """The largest share of characters in lines that stood before."""


class Language(RuleSection):
    """Documents are counted by language, and those in others than are wanted are dropped."""

    keep: list[str] | None = Field(None, min_length=1)
    """ISO 639 codes of the languages that stay; null: all. `und` is a text that tells too little, `zxx` no language."""

    @model_validator(mode="after")
    def _is_known(self) -> "Language":
        known = known_languages()
        if unknown := [code for code in self.keep or [] if code not in known]:
            raise ValueError(f"unknown language {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return self


class Decontamination(RuleSection):
    """Texts that training must not hold."""

    files: list[str] = Field(min_length=1)
    """Evaluation files, read as `--input` is; of tables all texts count, whatever the columns."""


class Paraphrases(RuleSection):
    """Phrases of the user's tables, in other words."""

    files: list[str] = Field(min_length=1)
    """Tables with the columns `phrase` and `paraphrase`, of any format that `--input` takes. A phrase may stand in
    several rows; one that may also stay has a row with itself."""
    copies: int = Field(1, ge=1)
    """Variants of each document that holds a phrase."""


class Parallel(RuleSection):
    """Whole texts that the user gives another text for."""

    files: list[str] = Field(min_length=1)
    """Tables with the columns `text` and `parallel`; either side stands for the other."""


class Noise(RuleSection):
    """Case and white space as they are often typed."""

    case: float = Field(0.0, ge=0, le=1)
    """The share of words that are written in lower case, upper case or with one capital."""
    white_space: float = Field(0.0, ge=0, le=1)
    """The share of gaps between words that become one space, two, a line end or a tab."""
    copies: int = Field(1, ge=1)
    """Variants of each document."""

    @model_validator(mode="after")
    def _does_something(self) -> "Noise":
        if not self.case and not self.white_space:
            raise ValueError("case and white_space are both 0: set one of them, or leave noise out")
        return self


class Turns(RuleSection):
    """Parts of conversations: some exchanges in a row, behind what stands before the first, as the system message."""

    copies: int = Field(1, ge=1)
    """Variants of each conversation of two exchanges or more."""


class Augmentation(RuleSection):
    """Variants of training documents, each of the document itself and made by one of these."""

    paraphrases: Paraphrases | None = None
    """Every phrase of the tables that stands in the document becomes one of its paraphrases."""
    parallel: Parallel | None = None
    """A document, or a message of the user, that is equal to one side of a pair becomes the other side."""
    noise: Noise | None = None
    """Words in other case, other white space between them."""
    turns: Turns | None = None
    """Some exchanges of a conversation, in a row."""

    @model_validator(mode="after")
    def _declares_something(self) -> "Augmentation":
        if all(value is None for _, value in self):
            raise ValueError("no variants are declared: name one of paraphrases, parallel, noise, turns")
        return self


class Rules(RuleSection):
    """The rules, in the order in which they are applied."""

    encoding: bool = False
    """Repair text that was decoded with the wrong encoding (ftfy), line by line where it looks so."""
    unicode: Literal["NFC", "NFKC"] | None = None
    """Unicode normalisation form."""
    control_characters: bool = False
    """Remove control characters but tabs and line ends, and byte-order marks; form feeds and CR LF become line ends."""
    personal_data: list[PersonalData] = []
    """What is replaced by its name in angle brackets: `email`, `phone` (international, North American, or behind a word
    such as "tel"), `ip_address` (public ones), `iban` and `card_number` (where the check digits are right),
    `secret_key` (of cloud and code services, and PEM private keys)."""
    language: Language | None = None
    """Language of a document, told by its first 4,000 characters (py3langid, extra `language`); of a conversation, of
    all its messages."""
    length: Length | None = None
    """Size of a document."""
    gopher_quality: GopherQuality | None = None
    """Words, symbols and lines as in Gopher (arXiv:2112.11446, A.1.1)."""
    fineweb_quality: FinewebQuality | None = None
    """Lines as in FineWeb (arXiv:2406.17557, 3.5)."""
    gopher_repetition: GopherRepetition | None = None
    """Repeated lines, paragraphs and n-grams as in Gopher (arXiv:2112.11446, table A1)."""
    decontamination: Decontamination | None = None
    """No document of `--input` may share 13 words in a row with an evaluation file, whatever their case and ASCII
    punctuation, or be equal to a shorter text of it. `--validation-input` is left as it is."""
    duplicates: Literal["exact", "near"] | None = None
    """exact: of documents that are equal after the rules above the first one stays; of one that stands in the
    validation inputs, none stays in training. near: likewise of documents that share most of their runs of five words
    (MinHash-LSH), too."""
    augmentation: Augmentation | None = None
    """Variants of the training documents that are kept, drawn by `--seed` and added behind them; never in validation.
    Of conversations only the user's messages are changed. Variants are not measured by the bounds above."""
