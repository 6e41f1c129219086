"""What can be said without looking: the answer and the caption that training texts make most likely."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from .questions import QuestionAnswer


class TextPrior:
    """The most frequent answer to a question, and the most frequent caption, of a training set; it sees no picture.

    A question that training did not hold gets the most frequent answer of its first two words.

    Args:
        questions: with their answers.
        captions: all of the training set.
    """

    def __init__(self, questions: Iterable[QuestionAnswer], captions: Iterable[str]):
        exact: dict[str, Counter[str]] = defaultdict(Counter)
        begun: dict[str, Counter[str]] = defaultdict(Counter)
        for item in questions:
            exact[item.question][item.answer] += 1
            begun[_beginning(item.question)][item.answer] += 1
        self._exact = {question: answers.most_common(1)[0][0] for question, answers in exact.items()}
        self._begun = {words: answers.most_common(1)[0][0] for words, answers in begun.items()}
        self.caption = Counter(captions).most_common(1)[0][0]

    def answer(self, question: str) -> str:
        """The most likely one; empty where even the first words are new."""
        return self._exact.get(question) or self._begun.get(_beginning(question), "")


def _beginning(question: str) -> str:
    return " ".join(question.split()[:2])
