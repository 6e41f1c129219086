"""Captions that are almost true: of scenes that differ from the real one in one thing, in the same wordings."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from .captions import write_captions
from .scene import Scene, Thing
from .sprites import Sprites
from .truth import TruthChecker
from .words import PLACES

DISTRACTORS = 5
TRIES = 60

Change = Callable[[Scene, Sprites, Random], Scene | None]


def write_distractors(scene: Scene, sprites: Sprites, checker: TruthChecker, random: Random) -> list[str]:
    """Captions, pairwise different, none of them true of the scene."""
    changes, found = random.sample(CHANGES, len(CHANGES)), list[str]()
    for step in range(TRIES):
        changed = changes[step % len(changes)](scene, sprites, random)
        if changed is None:
            continue
        wrong = [text for text in write_captions(changed, random) if not checker.check(text, scene).is_true]
        new = [text for text in wrong if text not in found]
        if new:
            found.append(random.choice(new))
        if len(found) == DISTRACTORS:
            break
    return found


def another_thing(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """One group is of something else."""
    group = random.choice(scene.groups)
    name = sprites.choose(random, [name for name in sprites.names if not scene.select(name)] or [group.name])
    color = random.choice(sprites.colors[name])
    return changed(scene, group.things, lambda thing: replace(thing, name=name, color=color))


def another_color(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """One group has another colour."""
    groups = [group for group in scene.groups if group.color]
    if not groups:
        return None
    group = random.choice(groups)
    color = random.choice(sprites.colors[group.name])
    return changed(scene, group.things, lambda thing: replace(thing, color=color))


def another_place(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """The same in another place."""
    return replace(scene, place=random.choice([name for name in PLACES if name != scene.place]))


def another_count(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """One more or one fewer in a group."""
    group = random.choice(scene.groups)
    if group.count > 1 and random.random() < 0.5:
        return replace(scene, things=tuple(thing for thing in scene.things if thing is not group.things[0]))
    return replace(scene, things=(*scene.things, group.things[-1]))


def exchanged(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """Two groups change their names: two dogs and a cat become two cats and a dog, left becomes right."""
    if len(scene.groups) < 2:
        return None
    first, second = random.sample(scene.groups, 2)
    things = []
    for thing in scene.things:
        for one, other in ((first, second), (second, first)):
            if thing in one.things:
                things.append(replace(thing, name=other.name, color=other.color))
                break
        else:
            things.append(thing)
    return replace(scene, things=tuple(things))


def turned(scene: Scene, sprites: Sprites, random: Random) -> Scene | None:
    """Left is right, or above is below."""
    if random.random() < 0.5:
        return replace(scene, things=tuple(replace(thing, x=1 - thing.x) for thing in scene.things))
    return replace(scene, things=tuple(replace(thing, y=1 - thing.y) for thing in scene.things))


def changed(scene: Scene, chosen: tuple[Thing, ...], change: Callable[[Thing], Thing]) -> Scene:
    """The scene with some of its things changed."""
    return replace(scene, things=tuple(change(thing) if thing in chosen else thing for thing in scene.things))


CHANGES: list[Change] = [another_thing, another_color, another_place, another_count, exchanged, turned]
