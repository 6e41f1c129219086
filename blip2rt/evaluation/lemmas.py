"""Nouns and verbs in their basic form: what LAVIS does to answers before it scores OK-VQA.

People's answers there are lemmatised as well, so that "dogs" counts for "dog". LAVIS takes spaCy's `en_core_web_sm`;
another lemmatiser would give another number under the same name, so without that model there is none.
"""

from collections.abc import Callable
from typing import Any

MODEL = "en_core_web_sm"
REDUCED = ("NOUN", "VERB")
INSTALL = f"pip install 'blip2rt[okvqa]' && python -m spacy download {MODEL}"


def load_lemmatizer() -> tuple[Callable[[str], str] | None, str]:
    """Answer -> answer with its nouns and verbs in their basic form; or None and why there is none."""
    try:
        import spacy
    except ModuleNotFoundError as error:
        return None, f"LAVIS lemmatises answers with spaCy, and {error.name} is not installed: {INSTALL}"
    try:
        model: Any = spacy.load(MODEL)
    except OSError:
        return None, f"LAVIS lemmatises answers with spaCy's {MODEL}, which is not there: {INSTALL}"

    def lemmatize(answer: str) -> str:
        return " ".join(token.lemma_ if token.pos_ in REDUCED else token.text for token in model(answer))

    return lemmatize, ""
