"""From predictions to a table in percent and the submission in the official format, for captions and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .data import CaptionItem, Question
from .evaluation import exact_accuracy, score_captions, vqa_accuracy
from .evaluation.lemmas import load_lemmatizer
from .evaluation.vqa import accuracy_table
from .presets import VQA, Preset

DOMAINS = ("in-domain", "near-domain", "out-domain")  # of NoCaps


@dataclass
class Scores:
    """What came out: percent by name, and why names are missing."""

    found: dict[str, float]
    not_scored: dict[str, str] = field(default_factory=dict)
    by_question_type: dict[str, float] = field(default_factory=dict)


def submission(preset: Preset, items: Sequence[CaptionItem | Question], texts: Mapping[Any, str]) -> list[Any]:
    """What the official server takes of texts by id."""
    if preset.task != VQA:
        return [{"image_id": item.id, "caption": texts[item.id]} for item in items]
    identifier, answer = ("questionId", "prediction") if preset.data_set == "gqa" else ("question_id", "answer")
    return [{identifier: item.id, answer: texts[item.id]} for item in items]


def score(
    preset: Preset, items: Sequence[CaptionItem | Question], texts: Mapping[Any, str], why_not: str = ""
) -> Scores:
    """Score texts by id, as the preset's source did; both arguments are what `as_scored` gave."""
    questions = [item for item in items if isinstance(item, Question)]
    if questions:
        return _score_answers(preset, questions, [texts[question.id] for question in questions], why_not)
    pictures = [item for item in items if isinstance(item, CaptionItem)]
    scores = Scores({})
    for domain in (None, *DOMAINS):
        among = [picture for picture in pictures if domain in (None, picture.domain)]
        if among:
            _add_caption_scores(scores, among, texts, f", {domain}" if domain else "")
    return scores


def _add_caption_scores(scores: Scores, pictures: Sequence[CaptionItem], texts: Mapping[Any, str], suffix: str) -> None:
    captions = {picture.id: texts[picture.id] for picture in pictures}
    scored = score_captions(captions, {picture.id: picture.captions for picture in pictures})
    scores.found |= {f"{name}{suffix}": round(100 * value, 2) for name, value in scored.scores.items()}
    if not suffix:  # the same is missing in every domain
        scores.not_scored |= scored.not_scored


def _score_answers(preset: Preset, questions: Sequence[Question], answers: list[str], why_not: str) -> Scores:
    as_said, not_scored = (", not lemmatised", {"accuracy": why_not}) if why_not else ("", {})
    if not any(question.answers for question in questions):
        reason = f"the answers of {preset.split} are not public: send submission.json to the official server"
        return Scores({}, {"accuracy": reason})
    accuracies = [
        exact_accuracy(answer, question.answers[0])
        if preset.data_set == "gqa"
        else vqa_accuracy(answer, question.answers, preset.rule)
        for question, answer in zip(questions, answers, strict=True)
    ]
    table = accuracy_table([asdict(question) for question in questions], accuracies)
    found = {f"accuracy{as_said}": table["overall"]}
    found |= {f"accuracy, {kind}{as_said}": value for kind, value in table["perAnswerType"].items()}
    return Scores(found, not_scored, table["perQuestionType"])


def as_scored(preset: Preset, texts: Mapping[Any, str]) -> tuple[Mapping[Any, str], str]:
    """Texts by id as the preset's source scores them, lemmatised perhaps; and, where that cannot be, why not."""
    if not preset.lemmatizes:
        return texts, ""
    lemmatize, why_not = load_lemmatizer()
    return ({key: lemmatize(text) for key, text in texts.items()}, "") if lemmatize else (texts, why_not)
