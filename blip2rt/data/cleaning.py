"""How questions and captions are cleaned before a model sees them, in the codes that published numbers come from."""

import re
import string

MOST_WORDS = 50  # LAVIS's
LAVIS_MARKS = re.compile(r'[.!"()*#:;~]')
STYLES = ("lavis", "mmpretrain")


def clean_question(question: str, style: str) -> str:
    """A question as LAVIS ("lavis") or mmpretrain ("mmpretrain") puts it into the prompt.

    LAVIS keeps the question mark and drops some other marks; mmpretrain drops all punctuation. Both use small letters.
    """
    if style == "mmpretrain":
        return _without_punctuation(question)
    return _first_words(LAVIS_MARKS.sub("", question.lower()).rstrip(" "))


def clean_caption(caption: str, style: str) -> str:
    """A caption as it is compared with images; LAVIS leaves a space where a mark was."""
    if style == "mmpretrain":
        return _without_punctuation(caption)
    spaced = re.sub(r"\s{2,}", " ", LAVIS_MARKS.sub(" ", caption.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MOST_WORDS])


def _without_punctuation(text: str) -> str:
    """mmpretrain's order of things: what a mark leaves at the end, a space say, stays."""
    bare = text.strip().lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s{2,}", " ", bare)
