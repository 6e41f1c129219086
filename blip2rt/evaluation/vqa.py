"""VQA accuracy under three rules that are all called "VQA accuracy", named apart.

`official`: the evaluation script of visualqa.org. A prediction counts min(1, matches / 3), averaged over the ten ways
to leave one answer out. Answers and prediction are cleaned only where people's answers differ.
`lavis`: LAVIS's copy of it cleans the prediction always and the answers of punctuation only.
`mmpretrain`: min(1, share of matching answers / 0.3), everything cleaned.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

RULES = ("official", "lavis", "mmpretrain")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
_DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(_DIGITS.split())}
NUMBERS["none"] = "0"

# Words that people type without their apostrophe. Of two apostrophes either may be missing.
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"""
CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONE.split()},
    **{key: word for word in _TWO.split() for key in (word.replace("'", "", 1), word.replace("'ve", "ve"))},
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # the script's own slip
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the scripts hand re.UNICODE, which is 32, to sub() where its count goes


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str = "official") -> float:
    """How right a prediction is, 0..1.

    Args:
        prediction: the model's answer.
        answers: what people answered, ten in VQAv2.
        rule: "official", "lavis" or "mmpretrain".

    Raises:
        InputError: an unknown rule, a prediction that is no string, or no answers.
    """
    if rule not in RULES:
        raise InputError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if not isinstance(prediction, str):
        raise InputError(f"the prediction must be a string, not {type(prediction).__name__}")
    if isinstance(answers, str) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"answers must be a list of strings and not empty: {answers!r:.60}")
    if rule == "mmpretrain":
        said = clean(prediction)
        matches = sum(clean(answer) == said for answer in answers)
        return min(1.0, matches / len(answers) / 0.3)
    if rule == "lavis":
        prediction = clean(prediction)
        differ = len(set(answers)) > 1
        answers = [remove_punctuation(answer) if differ else answer for answer in answers]
    else:
        prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
        if len(set(answers)) > 1:
            prediction, answers = clean(prediction), [clean(answer) for answer in answers]
    matches = sum(answer == prediction for answer in answers)
    left_in, left_out = min(1.0, matches / 3), min(1.0, (matches - 1) / 3)
    return ((len(answers) - matches) * left_in + matches * left_out) / len(answers)


def vqa_table(rows: Sequence[Mapping[str, Any]], rule: str = "official") -> dict[str, Any]:
    """Accuracy in percent as the official script prints it: overall, by type of question, by type of answer.

    Args:
        rows: each with "prediction", "answers" (strings), and, where known, "question_type" and "answer_type".
        rule: as in `vqa_accuracy`.
    """
    return accuracy_table(rows, [vqa_accuracy(row["prediction"], row["answers"], rule) for row in rows])


def accuracy_table(rows: Sequence[Mapping[str, Any]], accuracies: Sequence[float]) -> dict[str, Any]:
    """Percent overall and by the "question_type" and "answer_type" of rows, where they have one."""
    table: dict[str, Any] = {"overall": _percent(accuracies)}
    for name, key in (("perQuestionType", "question_type"), ("perAnswerType", "answer_type")):
        groups: dict[str, list[float]] = {}
        for row, accuracy in zip(rows, accuracies, strict=True):
            if row.get(key) is not None:
                groups.setdefault(row[key], []).append(accuracy)
        table[name] = {group: _percent(values) for group, values in groups.items()}
    return table


def exact_accuracy(prediction: str, answer: str) -> float:
    """GQA's: 1 where the prediction, cleaned as LAVIS cleans it, is the one answer, else 0."""
    return float(clean(prediction) == answer)


def clean(answer: str) -> str:
    """Without punctuation, articles and capitals; numbers up to ten as digits, contractions with their apostrophe."""
    words = remove_punctuation(_one_line(answer)).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def remove_punctuation(answer: str) -> str:
    """A mark beside a space, or any mark where a number has a comma, goes; others become spaces; periods go last."""
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if has_number or beside_space else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 2)
