"""The words of the scenes: what things, places, numbers, sizes, positions and relations are called.

The vocabulary is small and regular: every noun has one singular and one plural, every relation one phrase.
"""

from dataclasses import dataclass
from functools import cached_property

from ...errors import InputError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIZES = ("small", "big")
POSITIONS = {  # value -> phrase
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}  # value -> phrase
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ORDERS = {"left": "from left to right", "above": "from top to bottom"}  # relation of each thing to the next -> phrase


@dataclass(frozen=True)
class Place:
    """A background: `name` answers "what place is this?", `phrase` ends a caption, `noun` begins one."""

    name: str
    phrase: str
    noun: str


PLACES = {
    place.name: place
    for place in (
        Place("sky", "in the sky", "a wide sky"),
        Place("meadow", "in a meadow", "a meadow"),
        Place("beach", "on a beach", "a beach"),
        Place("night", "at night", "a dark night"),
        Place("room", "in a room", "a room"),
        Place("snow", "in the snow", "a snowy field"),
        Place("desert", "in a desert", "a desert"),
        Place("street", "on a street", "a street"),
        Place("sea", "in the sea", "the sea"),
        Place("stage", "on a stage", "a stage"),
    )
}
IRREGULAR = {
    "child": "children",
    "fish": "fish",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "snowman": "snowmen",
    "woman": "women",
}


def plural(noun: str) -> str:
    """The plural of a noun; of several words the last one changes."""
    first, _, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    elif last in ("tomato", "potato", "volcano"):
        last += "es"
    else:
        last += "s"
    return f"{first} {last}".strip()


def article(phrase: str) -> str:
    """ "a" or "an", as the phrase wants it."""
    return "an" if phrase[0] in "aeiou" and not phrase.startswith(("uni", "uku", "eu", "one")) else "a"


@dataclass(frozen=True)
class Lexicon:
    """The nouns of a collection of sprites.

    Raises:
        InputError: a name that is not one to four lower-case words, or that the captions use for something else.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if not all(word.isalpha() and word.islower() and word.isascii() for word in name.split(" ")):
                raise InputError(f"{name!r} is no name of a thing: lower-case English words with single spaces")
            if name in RESERVED or plural(name) in RESERVED:
                raise InputError(f"{name!r} cannot name a thing: captions use that word for something else")

    @cached_property
    def nouns(self) -> dict[str, tuple[str, frozenset[bool]]]:
        """Noun as written -> name, and whether it may be one thing (False), several (True) or both."""
        found: dict[str, tuple[str, frozenset[bool]]] = {}
        for name in (*self.names, "thing"):
            if plural(name) == name:
                found[name] = (name, frozenset((False, True)))
            else:
                found[name] = (name, frozenset((False,)))
                found[plural(name)] = (name, frozenset((True,)))
        return found

    def vocabulary(self) -> list[str]:
        """Every word and mark that captions, questions and answers can hold, sorted."""
        phrases = [*self.nouns, *COLORS, *NUMBERS, *SIZES, *POSITIONS, *POSITIONS.values(), *RELATIONS.values()]
        phrases += [*ORDERS.values(), *(text for place in PLACES.values() for text in (place.name, place.phrase))]
        phrases += [*(place.noun for place in PLACES.values()), *map(str, range(11)), OTHER_WORDS, *MARKS]
        return sorted({word for phrase in phrases for word in phrase.split()})


RESERVED = {*COLORS, *NUMBERS, *SIZES, *RELATIONS, *POSITIONS, *PLACES, "thing", "things", "a", "an", "the", "and"}
OTHER_WORDS = (
    "a an and any are color how in is many next no of only photo picture the there this to what where with yes"
)
MARKS = ",:?"
