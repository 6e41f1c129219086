"""From a random generator to a scene: which things, how many, how large, where.

Combinations are held out by name: about one in ten pairs of things, and one in ten pairs of a thing and a place, never
occur in training and validation. A test scene always holds one: a pair of things, or, where all its things are of one
name, that thing in that place.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise
from random import Random
from zlib import crc32

from .scene import Look, Scene, Thing
from .sprites import Sprites
from .words import PLACES

SPLITS = ("train", "val", "test")
HELD_OUT = 10  # one in so many pairs
TOTALS = {1: 20, 2: 30, 3: 24, 4: 15, 5: 11}  # things in a scene -> weight
KINDS = {1: (1,), 2: (1, 2, 2), 3: (1, 2, 2, 3), 4: (1, 2, 2, 3), 5: (1, 2, 2, 3)}  # names and colours among them
CROWD = (4, 7)  # things of a crowded scene
BORDER = 0.02
APART = 0.86  # centres are at least this many mean sizes apart
GAP = 0.14  # between the centres of groups that stand side by side
TRIES = 60


@cache
def is_held_out(first: str, second: str) -> bool:
    """Whether a pair (two things, or a thing and a place) is kept for the test; the order does not matter."""
    return first != second and crc32("|".join(sorted((first, second))).encode()) % HELD_OUT == 0


def held_out_combinations(scene: Scene) -> list[tuple[str, str]]:
    """The pairs of a scene that never occur in training."""
    names = sorted({thing.name for thing in scene.things})
    pairs = [*combinations(names, 2), *((name, scene.place) for name in names)]
    return [pair for pair in pairs if is_held_out(*pair)]


def draw_scene(random: Random, sprites: Sprites, split: str) -> Scene:
    """A scene of one to five things.

    Args:
        random: all of the scene comes from it.
        sprites: what there is to draw.
        split: "train", "val" or "test": which combinations it may hold.
    """
    while True:
        total = random.choices(list(TOTALS), list(TOTALS.values()))[0]
        kinds = random.choice(KINDS[total])
        chosen = draw_kinds(random, sprites, split, kinds)
        if chosen is None:
            continue
        place, keys = chosen
        counts = split_total(random, total, kinds)
        things = arrange(random, keys, counts)
        if things is not None:
            styled = [dress(random, sprites, thing) for thing in things]
            return Scene(place, tuple(styled), draw_look(random))


def draw_kinds(
    random: Random, sprites: Sprites, split: str, kinds: int
) -> tuple[str, list[tuple[str, str | None]]] | None:
    """A place, and different pairs of name and colour, that the split allows; None: try again."""
    place, names = random.choice(list(PLACES)), sprites.names
    chosen: list[str] = []
    for step in range(kinds):
        pool: Sequence[str] = names
        if split != "test":
            pool = [n for n in names if not any(is_held_out(n, other) for other in (place, *chosen))]
        elif step == 1 or kinds == 1:
            pool = [n for n in names if is_held_out(n, chosen[0] if step else place)]
        if not pool:
            return None
        # two groups of one thing in two colours, often enough that a colour has to be bound to its thing
        again = step and split != "test" and len(sprites.colors[chosen[0]]) > 1 and random.random() < 0.3
        chosen.append(chosen[0] if again else sprites.choose(random, pool))
    keys = [(name, random.choice(sprites.colors[name])) for name in chosen]
    return (place, keys) if len(set(keys)) == kinds else None


def split_total(random: Random, total: int, kinds: int) -> list[int]:
    """`total` as a sum of `kinds` positive numbers, each sum equally likely."""
    cuts = sorted(random.sample(range(1, total), kinds - 1))
    return [after - before for before, after in zip([0, *cuts], [*cuts, total], strict=True)]


def arrange(random: Random, keys: Sequence[tuple[str, str | None]], counts: Sequence[int]) -> list[Thing] | None:
    """Sizes and places for every group: side by side, one above the other, or anywhere; None: it does not fit."""
    total = sum(counts)
    order = random.choice(("x", "y", "x", "y", "any")) if len(keys) > 1 else "any"
    bands = [(0.0, 1.0)] * len(keys)
    if order != "any":
        edges = [0.0]
        for count in counts:
            edges.append(edges[-1] + math.sqrt(count))
        bands = [(low / edges[-1], high / edges[-1]) for low, high in pairwise(edges)]
    things: list[Thing] = []
    for (name, color), count, (low, high) in zip(keys, counts, bands, strict=True):
        small, large = draw_sizes(random, total, count, len(keys))
        for _ in range(count):
            size = random.uniform(small, large)
            box = [[size / 2 + BORDER, 1 - size / 2 - BORDER] for _ in "xy"]
            if order != "any":
                inner = GAP / 2
                axis = box["xy".index(order)]
                axis[0] = max(axis[0], low + (inner if low else 0))
                axis[1] = min(axis[1], high - (inner if high < 1 else 0))
            thing = free_place(random, things, Thing(name, color, "", 0, 0, size), box)
            if thing is None:
                return None
            things.append(thing)
    return things


def draw_sizes(random: Random, total: int, count: int, kinds: int) -> tuple[float, float]:
    """The range of sizes of one group: ordinary, small, or, where there is room, big."""
    lot = random.random()
    if lot < 0.15:
        return 0.21, 0.24
    if lot < 0.32 and count == 1 and total <= 3:
        return (0.44, 0.52) if kinds > 1 else (0.46, 0.6)
    return (0.29, 0.37) if total <= 3 else (0.28, 0.33)


def free_place(random: Random, others: Sequence[Thing], thing: Thing, box: Sequence[Sequence[float]]) -> Thing | None:
    """The thing somewhere in the box, where it hides no other; None: there is no room."""
    if any(low > high for low, high in box):
        return None
    for _ in range(TRIES):
        x, y = (random.uniform(low, high) for low, high in box)
        if all(math.hypot(x - o.x, y - o.y) >= APART * (thing.size + o.size) / 2 for o in others):
            return Thing(thing.name, thing.color, thing.style, x, y, thing.size)
    return None


def dress(random: Random, sprites: Sprites, thing: Thing) -> Thing:
    """The thing in a style that has it, turned a little, and mirrored or not."""
    style = random.choice(sprites.styles[thing.name, thing.color])
    angle = random.choice((0.0, random.uniform(-14, 14)))
    return Thing(thing.name, thing.color, style, thing.x, thing.y, thing.size, angle, random.random() < 0.5)


def draw_look(random: Random) -> Look:
    """Light, tint, noise, blur and compression, each mild and each often absent."""
    return Look(
        variant=random.getrandbits(32),
        clutter=random.choice((0, 0, 2, 4, 7)),
        light=random.uniform(0.82, 1.15),
        tint=(random.uniform(-10, 10), random.uniform(-10, 10), random.uniform(-10, 10)),
        slope=random.choice((0.0, random.uniform(-0.25, 0.25))),
        noise=random.choice((0.0, random.uniform(1, 7))),
        blur=random.choice((0.0, 0.0, 0.0, random.uniform(0.003, 0.007))),
        jpeg=random.choice((None, None, None, random.randint(40, 90))),
    )


def draw_crowd(random: Random, sprites: Sprites) -> Scene:
    """Four to seven things that may overlap, in combinations of the training split: to learn what things look like."""
    place, names = random.choice(list(PLACES)), list[str]()
    things = []
    for _ in range(random.randint(*CROWD)):
        pool = [n for n in sprites.names if not any(is_held_out(n, other) for other in (place, *names))]
        name = sprites.choose(random, pool)
        names.append(name)
        size = random.uniform(0.22, 0.45)
        x, y = (random.uniform(size / 3, 1 - size / 3) for _ in "xy")
        things.append(dress(random, sprites, Thing(name, random.choice(sprites.colors[name]), "", x, y, size)))
    return Scene(place, tuple(things), draw_look(random))
