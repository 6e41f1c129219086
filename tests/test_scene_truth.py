"""Reading captions and checking them: what is true, what is not, and what nobody can read."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2rt.data.scenes import Scene, Thing, TruthChecker
from blip2rt.data.scenes.scene import Look
from blip2rt.data.scenes.unique import UniqueTexts
from blip2rt.data.scenes.words import Lexicon

LEXICON = Lexicon(("car", "cat", "dog", "fish", "hot dog", "mouse"))
CHECKER = TruthChecker(LEXICON)


def thing(name: str, x: float, y: float = 0.5, size: float = 0.3, color: str | None = None) -> Thing:
    return Thing(name, color, "flat", x, y, size)


def scene(*things: Thing, place: str = "beach") -> Scene:
    return Scene(place, things, Look(variant=0))


DOG_AND_CATS = scene(thing("dog", 0.2), thing("cat", 0.7, 0.2), thing("cat", 0.8, 0.8))
CARS = scene(thing("car", 0.2, 0.2, 0.5, "red"), thing("car", 0.7, 0.7, 0.2, "blue"), thing("fish", 0.7, 0.2))
DOG = scene(thing("dog", 0.48, 0.52))

TRUE = [
    (DOG, "a dog on a beach"),
    (DOG, "A photo of a dog, on a beach."),
    (DOG, "a dog in the middle on a beach"),
    (DOG, "one dog"),
    (DOG, "a beach"),
    (DOG_AND_CATS, "a dog left of two cats on a beach"),
    (DOG_AND_CATS, "two cats right of a dog"),
    (DOG_AND_CATS, "three things on a beach : two cats and a dog"),
    (DOG_AND_CATS, "a dog and two cats from left to right"),
    (DOG_AND_CATS, "a dog on the left and two cats on the right"),
    (DOG_AND_CATS, "a cat , a dog and a cat"),  # named twice, there twice
    (CARS, "a big red car , a small blue car and a fish"),
    (CARS, "two cars and a fish"),
    (CARS, "a car and a car"),
    (CARS, "a red car"),
    (CARS, "a red car and a fish from left to right"),
    (CARS, "a fish above a blue car"),
    (scene(thing("fish", 0.2), thing("fish", 0.8)), "two fish"),
    (scene(thing("hot dog", 0.2)), "a hot dog"),
]
FALSE = [
    (DOG, "", 0, 0),
    (DOG, "a dog , a dog on a beach", 1, 2),
    (DOG, "two dogs on a beach", 1, 2),
    (DOG, "a cat on a beach", 1, 2),
    (DOG, "a dog at night", 1, 2),
    (DOG, "a dog on a beach at night", 2, 3),
    (DOG, "a dog on the left", 1, 2),
    (DOG, "a big dog", 1, 2),
    (DOG, "a hot dog", 0, 1),
    (DOG, "a hot", 0, 2),
    (DOG, "dog", 0, 1),
    (DOG, "a dogs", 0, 2),
    (DOG, "no cats", 0, 2),  # what is not there is nobody's to guess
    (DOG, "a dog sleeping on a beach", 2, 3),
    (DOG, "left of a dog", 1, 2),
    (DOG, "a dog left of", 1, 2),
    (DOG, "a dog left of on a beach", 1, 3),
    (DOG_AND_CATS, "two cats left of a dog", 2, 3),
    (DOG_AND_CATS, "a cat right of a dog", 2, 3),  # there are two
    (DOG_AND_CATS, "two cats and a dog from left to right", 2, 3),
    (DOG_AND_CATS, "a dog above two cats", 2, 3),
    (DOG_AND_CATS, "four things", 0, 1),
    (CARS, "a blue car and a blue car", 0, 1),
    (CARS, "a red car and two cars", 1, 2),  # three are named
    (CARS, "a small red car", 1, 2),
    (CARS, "a purple car", 0, 1),
    (CARS, "a red fish", 0, 1),
]


@pytest.mark.parametrize(("shown", "caption"), TRUE)
def test_true(shown: Scene, caption: str) -> None:
    assert CHECKER.check(caption, shown).is_true


@pytest.mark.parametrize(("shown", "caption", "right", "stated"), FALSE)
def test_false(shown: Scene, caption: str, right: int, stated: int) -> None:
    """By how many facts, as well."""
    verdict = CHECKER.check(caption, shown)
    assert not verdict.is_true
    assert (verdict.true_facts, len(verdict.facts)) == (right, stated)


def test_things_that_are_named() -> None:
    captions = ("a dog", "two cats", "five cats", "a cat and a mouse", "a dog and two cats", "three things", "nothing")
    assert [CHECKER.check(text, DOG_AND_CATS).named for text in captions] == [1, 2, 2, 1, 3, 0, 0]
    assert CHECKER.check("two cars", CARS).named == CHECKER.check("a red car and a blue car", CARS).named == 2


VOCABULARY = (
    "a an two three dogs dog cats cat car red blue big small and with , : left of right above on the at top in middle "
    "beach night from to bottom hot mouse mice one no blur"
)
WORDS = [*VOCABULARY.split(), "on a beach", "left of"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14), st.text(max_size=8))
def test_any_text_can_be_read(words: list[str], noise: str) -> None:
    text = " ".join(words)
    verdict = CHECKER.check(text, DOG_AND_CATS)
    assert 0 <= verdict.named <= verdict.things == 3
    unreadable = [fact for fact, _ in verdict.facts if fact.kind == "unreadable"]
    assert not (verdict.is_true and unreadable)
    assert not CHECKER.check(f"{text} qqq", DOG_AND_CATS).is_true
    CHECKER.check(noise + text, DOG_AND_CATS)
    if "blur" in words or "no" in words:
        assert not verdict.is_true


def test_moving_a_thing_changes_what_is_true() -> None:
    """A relation holds for all of a group or not at all."""
    caption = "a dog left of two cats"
    for x in (0.1, 0.66, 0.69, 0.71, 0.9):
        moved = replace(DOG_AND_CATS, things=(thing("dog", x), *DOG_AND_CATS.things[1:]))
        assert CHECKER.check(caption, moved).is_true == (x < 0.67)  # by a hair's breadth does not count


def test_texts_of_one_scene_only() -> None:
    texts = UniqueTexts(CHECKER)
    other_place = replace(DOG, place="night")
    assert texts.add(DOG_AND_CATS, ["a dog and two cats on a beach"])
    assert not texts.add(DOG, ["a dog on a beach"])  # true of the first as well
    assert texts.add(other_place, ["a dog at night"])
    assert not texts.add(other_place, ["one dog at night"])
    assert texts.add(scene(thing("mouse", 0.5)), ["a mouse on a beach"])
    assert not texts.add(scene(thing("mouse", 0.3), thing("car", 0.8)), ["a mouse and a car on a beach"])  # an old text


def test_names_that_share_words() -> None:
    both = scene(thing("hot dog", 0.2), thing("dog", 0.8))
    assert all(CHECKER.check(text, both).is_true for text in ("a hot dog and a dog", "a hot dog left of a dog"))
    readings = [CHECKER.read(text).mentions for text in ("two mice", "a mouse", "three fish")]
    assert [(m.name, m.count) for (m,) in readings] == [("mouse", 2), ("mouse", 1), ("fish", 3)]
    for one, other in pairwise(("a", "an")):
        assert CHECKER.read(f"{one} dog") == CHECKER.read(f"{other} dog")
