"""Five differently worded captions, each true and each naming all the things of a scene."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

from .scene import CLEAR, Group, Scene, clear_position, is_at, related
from .words import NUMBERS, ORDERS, PLACES, POSITIONS, RELATIONS, article, plural

CAPTIONS = 5


def noun_phrase(group: Group, number: str | None = None) -> str:
    """ "a dog", "two big red cars": number, size and colour as they are; `number` in place of "a" or "one"."""
    noun = group.name if group.count == 1 else plural(group.name)
    words = [word for word in (group.size_name, group.color, noun) if word]
    return f"{number or count_word(group, words[0])} {' '.join(words)}"


def count_word(group: Group, following: str) -> str:
    return article(following) if group.count == 1 else NUMBERS[group.count]


def listed(phrases: Sequence[str]) -> str:
    """ "x", "x and y", "x , y and z": the comma stands alone, as a word."""
    return " and ".join([" , ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def write_captions(scene: Scene, random: Random) -> list[str]:
    """The plain caption first, the other four in any order."""
    plain = plain_caption(scene)
    wordings = list(dict.fromkeys([*other_plain(scene), *layout_captions(scene)]))
    placed = [text for text in layout_captions(scene) if text != plain]
    others = [text for text in wordings if text != plain]
    chosen = random.sample(placed, min(2, len(placed)))
    rest = [text for text in others if text not in chosen]
    chosen += random.sample(rest, CAPTIONS - 1 - len(chosen))
    random.shuffle(chosen)
    return [plain, *chosen]


def plain_caption(scene: Scene) -> str:
    """What the scene holds, in its own order, and where: "two dogs and a cat on a beach"."""
    return f"{listed([noun_phrase(group) for group in scene.groups])} {PLACES[scene.place].phrase}"


def other_plain(scene: Scene) -> Iterator[str]:
    """The same facts in other words."""
    place, groups = PLACES[scene.place], scene.groups
    phrases = [noun_phrase(group) for group in groups]
    backwards = phrases[::-1]
    yield f"{place.noun} with {listed(phrases)}"
    yield f"{place.noun} with {listed(backwards)}"
    yield f"{listed(backwards)} {place.phrase}"
    yield f"only {listed(phrases)} {place.phrase}"
    yield f"{phrases[0]} {'with ' + listed(phrases[1:]) + ' ' if len(phrases) > 1 else ''}{place.phrase}"
    total = len(scene.things)
    if total > 1:
        yield f"{NUMBERS[total]} things {place.phrase} : {listed(phrases)}"
        yield f"{NUMBERS[total]} things : {listed(phrases)} {place.phrase}"
    else:
        yield f"{noun_phrase(groups[0], 'one')} {place.phrase}"
        yield f"{place.noun} with {noun_phrase(groups[0], 'one')}"
        yield f"{place.noun} with only {phrases[0]}"


def layout_captions(scene: Scene) -> list[str]:
    """Captions that say where things are, as far as it is clear."""
    place, groups = PLACES[scene.place], scene.groups
    found = []
    if len(groups) == 2:
        first, second = groups
        for relation in RELATIONS:
            for one, other in ((first, second), (second, first)):
                if related(one.things, relation, other.things, CLEAR):
                    found.append(f"{noun_phrase(one)} {RELATIONS[relation]} {noun_phrase(other)} {place.phrase}")
    if len(groups) > 1:
        for relation, phrase in ORDERS.items():
            row = in_order(groups, relation)
            if row:
                found.append(f"{listed([noun_phrase(group) for group in row])} {phrase} {place.phrase}")
    positions = [stated_position(scene, group) for group in groups]
    if all(positions) and len(groups) <= 2:
        phrases = [f"{noun_phrase(g)} {POSITIONS[p]}" for g, p in zip(groups, positions, strict=True) if p]
        found += [f"{listed(phrases)} {place.phrase}", f"{place.noun} with {listed(phrases)}"]
    return found


def in_order(groups: Sequence[Group], relation: str) -> list[Group]:
    """The groups so that each stands in the relation to the next; empty: they do not."""
    axis = "x" if relation == "left" else "y"
    row = sorted(groups, key=lambda group: getattr(group.things[0], axis))
    fits = all(related(a.things, relation, b.things, CLEAR) for a, b in pairwise(row))
    return row if fits else []


def stated_position(scene: Scene, group: Group) -> str | None:
    """Where a group is: what is clear by itself, or, of two groups, the side that tells it from the other."""
    alone = clear_position(group.things)
    if alone or len(scene.groups) != 2:
        return alone
    (other,) = (o for o in scene.groups if o != group)
    for relation, position in (("left", "left"), ("right", "right"), ("above", "top"), ("below", "bottom")):
        if related(group.things, relation, other.things, CLEAR) and is_at(group.things, position, CLEAR / 2):
            return position
    return None
