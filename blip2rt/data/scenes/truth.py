"""Whether a caption is true of a scene: it is read into facts, and each is checked.

The reader takes any text. What it cannot read is a fact that is not true, so a caption with an unknown word, a verb, or
"a dogs" is never true as a whole. Counts are exact and things that are named twice are added: "a dog , a dog" states
two dogs.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .scene import Scene, Thing, is_at, related
from .words import COLORS, NUMBERS, ORDERS, PLACES, POSITIONS, RELATIONS, SIZES, Lexicon

TOKEN = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")
EVIDENT = 0.03  # by how much of the side a position or relation must hold for anybody to see it
LEADS = ("a photo of", "a picture of")
SILENT = ("and", "with", ",", ":", ".", "only")
COUNTS = {**{word: number for number, word in enumerate(NUMBERS) if number}, "a": 1, "an": 1}


@dataclass(frozen=True)
class Mention:
    """A noun phrase as it is written."""

    name: str
    count: int
    color: str | None
    size: str | None


@dataclass(frozen=True)
class Fact:
    """One statement: "count", "size", "place", "position", "relation", or "unreadable"; and what it says."""

    kind: str
    mention: Mention | None = None
    value: str = ""
    other: Mention | None = None


@dataclass
class Reading:
    """A caption as its noun phrases and its facts."""

    mentions: list[Mention] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """How a caption fares: its facts with their truth, and how many of the scene's things it names."""

    facts: tuple[tuple[Fact, bool], ...]
    named: int
    things: int

    @property
    def is_true(self) -> bool:
        """Every fact is true, and there is one."""
        return bool(self.facts) and all(truth for _, truth in self.facts)

    @property
    def true_facts(self) -> int:
        return sum(truth for _, truth in self.facts)


class TruthChecker:
    """Reads captions with the nouns of a lexicon and checks them against scenes."""

    def __init__(self, lexicon: Lexicon):
        self.nouns = {tuple(noun.split()): value for noun, value in lexicon.nouns.items()}
        self.longest_noun = max(map(len, self.nouns))
        self.phrases: dict[tuple[str, ...], Fact | None] = {tuple(w.split()): None for w in (*LEADS, *SILENT)}
        tables = (("position", POSITIONS), ("relation", RELATIONS), ("order", ORDERS))
        for kind, table in tables:
            self.phrases |= {tuple(phrase.split()): Fact(kind, value=value) for value, phrase in table.items()}
        for place in PLACES.values():
            for phrase in (place.phrase, place.noun):
                self.phrases[tuple(phrase.split())] = Fact("place", value=place.name)
        self.longest_phrase = max(map(len, self.phrases))

    def read(self, caption: str) -> Reading:
        """The facts of a caption, counts last."""
        tokens, reading, at = TOKEN.findall(caption.lower()), Reading(), 0
        pending: tuple[Mention, str] | None = None  # "a dog left of ...": what is left of what follows
        while at < len(tokens):
            length, fact = self._phrase(tokens, at)
            mention = None
            if not length:
                length, mention = self._mention(tokens, at)
            if mention:
                reading.mentions.append(mention)
                if mention.size:
                    reading.facts.append(Fact("size", mention, mention.size))
                if pending:
                    reading.facts.append(Fact("relation", pending[0], pending[1], mention))
                    pending = None
            elif not length or (pending and fact):
                reading.facts.append(Fact("unreadable", value=tokens[at]))
            elif fact and fact.kind == "relation" and reading.mentions:
                pending = (reading.mentions[-1], fact.value)
            elif fact:
                reading.facts += self._placed(fact, reading.mentions)
            at += length or 1
        if pending:
            reading.facts.append(Fact("unreadable", value=RELATIONS[pending[1]]))
        reading.facts += [Fact("count", mention) for mention in added(reading.mentions)]
        return reading

    def check(self, caption: str, scene: Scene) -> Verdict:
        """The truth of each fact, and the share of the scene that is named."""
        reading = self.read(caption)
        facts = tuple((fact, holds(fact, scene)) for fact in reading.facts)
        return Verdict(facts, named_things(reading.mentions, scene), len(scene.things))

    def _phrase(self, tokens: Sequence[str], at: int) -> tuple[int, Fact | None]:
        """How many tokens the longest fixed phrase takes, 0: none begins here; and what it states."""
        for length in range(self.longest_phrase, 0, -1):
            words = tuple(tokens[at : at + length])
            if len(words) == length and words in self.phrases:
                return length, self.phrases[words]
        return 0, None

    def _mention(self, tokens: Sequence[str], at: int) -> tuple[int, Mention | None]:
        """How many tokens a noun phrase takes, 0: none begins here."""
        start, count = at, COUNTS.get(tokens[at])
        if count is None:
            return 0, None
        at += 1
        found: dict[tuple[str, ...], str] = {}
        for words in (SIZES, COLORS):
            if at < len(tokens) and tokens[at] in words:
                found[words] = tokens[at]
                at += 1
        for length in range(self.longest_noun, 0, -1):
            noun = tuple(tokens[at : at + length])
            name, numbers = self.nouns.get(noun, ("", frozenset()))
            if (count != 1) in numbers:
                return at + length - start, Mention(name, count, found.get(COLORS), found.get(SIZES))
        return 0, None

    def _placed(self, fact: Fact, mentions: Sequence[Mention]) -> list[Fact]:
        """What a place, a position or an order says, of the things before it."""
        if fact.kind == "place":
            return [fact]
        if fact.kind == "order" and len(mentions) > 1:
            return [Fact("relation", one, fact.value, other) for one, other in pairwise(mentions)]
        if fact.kind == "position" and mentions:
            return [Fact("position", mentions[-1], fact.value)]
        return [Fact("unreadable", value=fact.value)]


def added(mentions: Iterable[Mention]) -> list[Mention]:
    """One mention for each name and colour, with the sum of the counts.

    Where a name stands with a colour and without, the plain one covers both: it counts all of the name.
    """
    mentions = list(mentions)
    sums: dict[tuple[str, str | None], int] = {}
    for m in mentions:
        sums[m.name, m.color] = sums.get((m.name, m.color), 0) + m.count
    for name, color in list(sums):
        if color is None:
            sums[name, None] = sum(count for (other, _), count in sums.items() if other == name)
    return [Mention(name, count, color, None) for (name, color), count in sums.items()]


def holds(fact: Fact, scene: Scene) -> bool:
    """Whether a fact is true of a scene."""
    if fact.kind == "place":
        return scene.place == fact.value
    if fact.mention is None:
        return False
    things = scene.select(fact.mention.name, fact.mention.color)
    if fact.kind == "count":
        return len(things) == fact.mention.count
    if fact.mention.size:
        things = tuple(t for t in things if t.size_name == fact.mention.size)
    if fact.kind == "size":
        return len(things) >= max(1, fact.mention.count)
    if fact.kind == "position":
        return is_at(things, fact.value, EVIDENT)
    if fact.kind == "relation" and fact.other:
        return related(things, fact.value, scene.select(fact.other.name, fact.other.color), EVIDENT)
    return False


def named_things(mentions: Iterable[Mention], scene: Scene) -> int:
    """How many of the scene's things are named: of each name no more than there are."""
    counts: dict[str, int] = {}
    for mention in mentions:
        counts[mention.name] = counts.get(mention.name, 0) + mention.count
    present: dict[str, list[Thing]] = {}
    for thing in scene.things:
        present.setdefault(thing.name, []).append(thing)
    return sum(min(counts.get(name, 0), len(things)) for name, things in present.items())
