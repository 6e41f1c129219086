"""Questions about a scene with their answers: yes/no, count, color, where, what.

A question alone must not tell its answer: a "no" asks for what "yes" could have asked for as often, in the same words.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .captions import stated_position
from .scene import CLEAR, Group, Scene, related
from .sprites import Sprites
from .words import COLORS, NUMBERS, OPPOSITE, PLACES, POSITIONS, RELATIONS, article, plural

ANSWER_TYPES = {"yes/no": "yes/no", "count": "number", "color": "other", "where": "other", "what": "other"}
COUNT_WEIGHTS = {1: 1, 2: 2, 3: 4, 4: 7, 5: 9}  # rare counts are asked for more often
ONLY_ONE = 0.6  # how often one thing alone is not counted, or "1" would be a good guess
SEVERAL = {2: 55, 3: 25, 4: 13, 5: 7}  # "are there three dogs?": how often each number is wrong


@dataclass(frozen=True)
class QuestionAnswer:
    """One question, its answer, and its kind: a key of `ANSWER_TYPES`."""

    question: str
    answer: str
    kind: str


def write_questions(scene: Scene, sprites: Sprites, random: Random) -> list[QuestionAnswer]:
    """One that is answered yes, one that is answered no, and one of each other kind that the scene allows."""
    found = [yes_no(scene, sprites, random, wanted) for wanted in (True, False)]
    for kind, writer in (("count", counts), ("color", colors), ("where", wheres), ("what", whats)):
        pairs = list(writer(scene))
        if kind == "count" and len(scene.things) == 1 and random.random() < ONLY_ONE:
            continue
        if pairs:
            weights = [COUNT_WEIGHTS[int(answer)] if kind == "count" else 1 for _, answer in pairs]
            question, answer = random.choices(pairs, weights)[0]
            found.append(QuestionAnswer(question, answer, kind))
    return found


def definite(group: Group) -> str:
    """ "the dog", "the red cars"."""
    noun = group.name if group.count == 1 else plural(group.name)
    return " ".join(word for word in ("the", group.color, noun) if word)


def verb(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def yes_no(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> QuestionAnswer:
    """A question with the wanted answer, about a thing, a colour, a number, the place or how two groups stand."""
    writers: list[Callable[[Scene, Sprites, Random, bool], str | None]] = [is_there, has_color, has_number, is_place]
    writers += [stands] * 2
    question = None
    while question is None:
        question = random.choice(writers)(scene, sprites, random, wanted)
    return QuestionAnswer(question, "yes" if wanted else "no", "yes/no")


def is_there(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> str | None:
    present = {thing.name for thing in scene.things}
    absent = [name for name in sprites.names if name not in present]
    name = random.choice(sorted(present)) if wanted else sprites.choose(random, absent)
    several = random.random() < 0.3
    return f"are there any {plural(name)}?" if several else f"is there {article(name)} {name}?"


def has_color(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> str | None:
    groups = [group for group in scene.groups if group.color]
    if not groups:
        return None
    group = random.choice(groups)
    taken = {g.color for g in scene.groups if g.name == group.name}
    others = [color for color in sprites.colors[group.name] if color and color not in taken]
    color = group.color if wanted else random.choice(others) if others else None
    return color and f"is there {article(color)} {color} {group.name}?"


def has_number(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> str | None:
    group = random.choice(scene.groups)
    number = random.choices(list(SEVERAL), list(SEVERAL.values()))[0]
    if wanted:
        several = [group for group in scene.groups if group.count > 1]
        if not several:
            return None
        group = random.choice(several)
        number = group.count
    elif number == group.count:
        return None
    color = f"{group.color} " if group.color else ""
    return f"are there {NUMBERS[number]} {color}{plural(group.name)}?"


def is_place(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> str | None:
    name = scene.place if wanted else random.choice([name for name in PLACES if name != scene.place])
    return f"is this {PLACES[name].noun}?"


def stands(scene: Scene, sprites: Sprites, random: Random, wanted: bool) -> str | None:
    found = list(relations(scene))
    if not found:
        return None
    first, relation, second = random.choice(found)
    return (
        f"{verb(first)} {definite(first)} {RELATIONS[relation if wanted else OPPOSITE[relation]]} {definite(second)}?"
    )


def relations(scene: Scene) -> Iterator[tuple[Group, str, Group]]:
    """Every relation of two groups that is clear."""
    for first in scene.groups:
        for second in scene.groups:
            for relation in RELATIONS:
                if first != second and related(first.things, relation, second.things, CLEAR):
                    yield first, relation, second


def counts(scene: Scene) -> Iterator[tuple[str, str]]:
    for group in scene.groups:
        color = f"{group.color} " if group.color else ""
        yield f"how many {color}{plural(group.name)} are there?", str(group.count)
    if len(scene.groups) > 1:
        yield "how many things are there?", str(len(scene.things))


def colors(scene: Scene) -> Iterator[tuple[str, str]]:
    for group in scene.groups:
        if group.color in COLORS and len({g.color for g in scene.groups if g.name == group.name}) == 1:
            noun = group.name if group.count == 1 else plural(group.name)
            yield f"what color {verb(group)} the {noun}?", str(group.color)


def wheres(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "where is this?", scene.place
    for group in scene.groups:
        position = stated_position(scene, group)
        if position:
            yield f"where {verb(group)} {definite(group)}?", position


def whats(scene: Scene) -> Iterator[tuple[str, str]]:
    """Only where one group fits and no other could be meant."""
    groups = scene.groups
    if len(groups) == 1:
        yield "what is in the picture?", named(groups[0])
        return
    for relation, phrase in RELATIONS.items():
        for anchor in groups:
            fitting = [g for g in groups if g != anchor and not related(g.things, OPPOSITE[relation], anchor.things)]
            if len(fitting) == 1 and related(fitting[0].things, relation, anchor.things, CLEAR):
                yield f"what is {phrase} {definite(anchor)}?", named(fitting[0])
    if len(groups) == 2:
        for group, other in (groups, groups[::-1]):
            yield f"what is next to {definite(other)}?", named(group)
            position = stated_position(scene, group)
            if position and position != "middle" and stated_position(scene, other) not in (None, position):
                yield f"what is {POSITIONS[position]}?", named(group)


def named(group: Group) -> str:
    return group.name if group.count == 1 else plural(group.name)
