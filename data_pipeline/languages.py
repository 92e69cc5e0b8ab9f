"""Which language a text is in, as py3langid (extra `language`) tells it; its model comes in the package."""

import functools
from typing import Any

SAMPLE_CHARACTERS = 4000  # of a text, from its beginning; more takes longer and tells no more
FEWEST_CONFIDENCE = 0.2  # py3langid's example of where a text tells too little
UNDETERMINED = "und"  # ISO 639-2; "zxx", no language, is one of the model's own


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise ValueError(
            "the package py3langid is not installed: pip install --constraint constraints.txt --editable '.[language]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=FEWEST_CONFIDENCE)


def known_languages() -> set[str]:
    """ISO 639 codes. ValueError where py3langid is not installed."""
    return {*_identifier().labels, UNDETERMINED}


def language_of(text: str) -> str:
    """The ISO 639 code of a text's language; "und" where the text tells too little."""
    return _identifier().classify(text[:SAMPLE_CHARACTERS])[0]
