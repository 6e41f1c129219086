"""Scenes: what they hold, what is held out, what their pictures show, and that every text about them is true."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from blip2rt import InputError
from blip2rt.data.scenes import (
    COLORS,
    PLACES,
    QuestionAnswer,
    Scene,
    Scenes,
    Sprites,
    TextPrior,
    classes,
    patch_targets,
)
from blip2rt.data.scenes.scene import Look, Thing
from blip2rt.data.scenes.words import NUMBERS, plural

NAMES = ("apple", "ball", "bee", "box", "cup", "fish", "hat", "hot dog", "key", "kite", "mouse", "owl", "pen", "toy")
COLORED = ("car", "flag")
INKS = {"red": "#e01010", "orange": "#f08010", "yellow": "#f0e010", "green": "#10a020", "blue": "#1030e0"}


class Texts(NamedTuple):
    scene: Scene
    captions: list[str]
    questions: list[QuestionAnswer]


def sprite(ink: str | int, round_one: bool) -> Image.Image:
    """A disc or a square in one colour."""
    color = ink if isinstance(ink, str) else "#" + f"{(ink * 2654435761) % 2**24:06x}"
    image = Image.new("RGBA", (64, 64))
    mask = Image.new("L", (64, 64))
    pixels = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 32 if round_one else np.ones((64, 64), bool)
    mask.putdata((255 * pixels).ravel().tolist())
    image.paste(Image.new("RGBA", (64, 64), color), (0, 0), mask)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sprites in two styles."""
    path = tmp_path_factory.mktemp("sprites")
    for style in ("flat", "square"):
        (path / style).mkdir()
        for number, name in enumerate(NAMES):
            sprite(number + 1, style == "flat").save(path / style / f"{name}.png")
        for name in COLORED:
            for color, ink in INKS.items():
                sprite(ink, style == "flat").save(path / style / f"{color} {name}.png")
    return path


@pytest.fixture(scope="module")
def sprites(folder: Path) -> Sprites:
    return Sprites.open(folder)


def texts(sprites: Sprites, split: str, count: int, seed: int = 5) -> Iterator[Texts]:
    """Scenes with their captions and questions, without drawing them."""
    scenes = Scenes(sprites, split, seed)
    for i in range(count):
        scene = scenes.scene(i)
        yield Texts(scene, scenes.captions(i, scene), scenes.questions(i, scene))


def test_an_element_depends_on_split_seed_and_index_alone(sprites: Sprites, folder: Path) -> None:
    one, other = Scenes(sprites, "train", 5), Scenes(Sprites.open(folder), "train", 5)
    for i in (7, 3, 99, 3):
        a, b = one[i], other[i]
        assert (a.scene, a.captions, a.questions) == (b.scene, b.captions, b.questions)
        assert np.array_equal(a.picture, b.picture)
        assert a.picture.shape == (112, 112, 3)
        assert a.picture.dtype == np.uint8
    others = (Scenes(sprites, "train", 6), Scenes(sprites, "val", 5), Scenes(sprites, "test", 5))
    assert len({str(scenes.scene(3)) for scenes in (one, *others)}) == 4
    assert len({str(one.scene(i)) for i in range(200)}) == 200


def combinations_in(scene: Scene) -> set[tuple[str, str]]:
    """Pairs of things, and of a thing and the place, counted anew."""
    names = {thing.name for thing in scene.things}
    return {(a, b) for a, b in combinations(sorted(names), 2)} | {(name, scene.place) for name in names}


def test_test_scenes_hold_combinations_that_training_never_shows(sprites: Sprites) -> None:
    train, val, test = (Scenes(sprites, split, 1) for split in ("train", "val", "test"))
    seen = set().union(*(combinations_in(train.scene(i)) for i in range(4000)))
    crowds = set().union(*(combinations_in(train.crowd(i)) for i in range(1500)))
    later = set().union(*(combinations_in(val.scene(i)) for i in range(1000)))
    new = [combinations_in(test.scene(i)) - seen - crowds - later for i in range(1000)]
    assert all(new)
    held = set().union(*new)
    possible = len(sprites.names) * (len(sprites.names) - 1) / 2 + len(sprites.names) * len(PLACES)
    assert 0.05 < len(held) / possible < 0.16
    assert len(seen) / possible > 0.8  # and training shows nearly all the others
    for i in range(300):  # with several names in a test scene, a pair of things is new, not only a thing in a place
        scene = test.scene(i)
        if len({thing.name for thing in scene.things}) > 1:
            assert any({a, b} <= set(sprites.names) for a, b in combinations_in(scene) - seen)


def test_scenes_are_varied_and_nothing_hides(sprites: Sprites) -> None:
    scenes = [Scenes(sprites, "train", 2).scene(i) for i in range(600)]
    totals = Counter(len(scene.things) for scene in scenes)
    assert set(totals) == {1, 2, 3, 4, 5}
    assert min(totals.values()) > 30
    assert {scene.place for scene in scenes} == set(PLACES)
    sizes = Counter(thing.size_name for scene in scenes for thing in scene.things)
    assert min(sizes.values()) > 50
    assert set(sizes) == {"big", "small", None}
    for scene in scenes:
        for a, b in combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > 0.8 * (a.size + b.size) / 2
        for thing in scene.things:
            assert thing.size / 2 <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            assert not 0.24 < thing.size < 0.28  # between small and ordinary nothing is drawn
            assert not 0.37 < thing.size < 0.44


@pytest.mark.parametrize("size", [64, 112, 157])
def test_a_picture_shows_its_things(sprites: Sprites, size: int) -> None:
    """At the centre of each thing lies its colour, and where there is none the background, light and noise aside."""
    scenes = Scenes(sprites, "test", 4, size)
    for i in range(12):
        scene = scenes.scene(i)
        plain = Scene(scene.place, scene.things, Look(variant=scene.look.variant))
        picture, empty = scenes.picture(plain), scenes.picture(Scene(scene.place, (), plain.look))
        changed = (picture != empty).any(2)
        rows, columns = np.mgrid[:size, :size] / size + 0.5 / size
        for thing in scene.things:
            source = sprites.images[thing.style, thing.name, thing.color].convert("RGBA").getpixel((32, 32))
            row, column = int(thing.y * size), int(thing.x * size)
            assert abs(picture[row, column].astype(int) - source[:3]).max() <= 2  # type: ignore[index]
            changed &= np.hypot(rows - thing.y, columns - thing.x) > 0.75 * thing.size + 2 / size
        assert not changed.any()
        photographed = scenes.picture(scene)
        assert photographed.shape == (size, size, 3)
        assert abs(photographed.astype(float) - picture).mean() < 90


def test_a_photograph_can_stand_behind(sprites: Sprites) -> None:
    scenes = Scenes(sprites, "test", 4, 80)
    behind = np.random.default_rng(0).integers(0, 256, (80, 80, 3)).astype(np.uint8)
    scene = Scene("room", (Thing("key", None, "flat", 0.5, 0.5, 0.3),), Look(variant=1))
    picture = scenes.picture(scene, behind)
    assert np.array_equal(picture[:20], behind[:20])
    assert not np.array_equal(picture[40, 40], behind[40, 40])


def test_captions_are_true_complete_and_different(sprites: Sprites) -> None:
    words = set(sprites.lexicon.vocabulary())
    checker = Scenes(sprites).checker
    wordings = Counter[str]()
    for split in ("train", "test"):
        for sample in texts(sprites, split, 400):
            assert len(set(sample.captions)) == 5
            for caption in sample.captions:
                verdict = checker.check(caption, sample.scene)
                assert verdict.is_true, (caption, verdict)
                assert verdict.named == verdict.things == len(sample.scene.things)
                assert set(caption.split()) <= words
                wordings[re.sub(r"\b(" + "|".join(map(re.escape, sprites.lexicon.nouns)) + r")\b", "X", caption)] += 1
    assert len(wordings) > 150
    for phrase in ("left of", "above", "from left to right", "on the right", "in the middle", "only", "X :"):
        assert any(phrase in wording for wording in wordings), phrase


def answered(question: str, scene: Scene) -> str | None:
    """Another way to an answer, for the kinds of questions that words and counts settle; None: not one of them."""
    things = [(t.name, t.color) for t in scene.things]
    kinds = {plural(name): name for name, _ in things} | {name: name for name, _ in things}
    if found := re.fullmatch(rf"how many (?:({'|'.join(COLORS)}) )?(.+) are there\?", question):
        color, noun = found.groups()
        return str(sum(noun == "things" or (n == kinds[noun] and color in (None, c)) for n, c in things))
    if found := re.fullmatch(r"what color (?:is|are) the (.+)\?", question):
        (color,) = {c for n, c in things if n == kinds[found[1]]}
        return color
    if question == "where is this?":
        return scene.place
    if found := re.fullmatch(rf"(?:is there an?|are there any|are there) (?:({'|'.join(NUMBERS)}) )?(.+)\?", question):
        number, noun = found.groups()
        color = noun.split()[0] if noun.split()[0] in COLORS else None
        name = kinds.get(noun.removeprefix(f"{color} "))
        count = sum(n == name and color in (None, c) for n, c in things)
        return "yes" if (count == NUMBERS.index(number) if number else count) else "no"
    return None


def test_answers_are_right(sprites: Sprites) -> None:
    checked = Counter[str]()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    words = set(sprites.lexicon.vocabulary())
    for split in ("train", "test"):
        for sample in texts(sprites, split, 500, seed=8):
            for item in sample.questions:
                kinds[item.kind][item.answer] += 1
                expected = answered(item.question, sample.scene)
                assert expected in (None, item.answer), (item, sample.scene)
                checked[item.kind] += expected is not None
                assert set(f"{item.question[:-1]} ? {item.answer}".split()) <= words
    assert kinds["yes/no"]["yes"] == kinds["yes/no"]["no"] == 1000
    assert set(kinds) == {"yes/no", "count", "color", "where", "what"}
    assert min(checked[kind] for kind in ("yes/no", "count", "color", "where")) > 150


def test_answers_about_place_and_relation(sprites: Sprites) -> None:
    """By the pictures' own axes: a thing that is left of another has the smaller x."""
    axis = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
    seen = Counter[str]()
    for sample in texts(sprites, "train", 900, seed=3):
        named = {f"{g.color} {g.name}" if g.color else g.name: g for g in sample.scene.groups if g.count == 1}
        for item in sample.questions:
            if found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", item.question):
                first, second = named.get(found[1]), named.get(found[3])
                if first and second:
                    name, sign = axis[found[2]]
                    gap = sign * (getattr(second.things[0], name) - getattr(first.things[0], name))
                    assert abs(gap) > 0.07
                    assert item.answer == ("yes" if gap > 0 else "no")
                    seen[item.answer] += 1
            elif (found := re.fullmatch(r"where is the (.+)\?", item.question)) and found[1] in named:
                thing = named[found[1]].things[0]
                side = {"left": thing.x < 0.5, "right": thing.x > 0.5, "top": thing.y < 0.5, "bottom": thing.y > 0.5}
                middle = max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.17
                assert side.get(item.answer, middle)
                seen[item.answer] += 1
    assert all(seen[answer] > 8 for answer in ("yes", "no", "left", "right", "top", "bottom", "middle"))


def test_texts_alone_do_not_tell_the_answers(sprites: Sprites) -> None:
    """A prior with all the training texts it could wish for stays near chance."""
    train = list(texts(sprites, "train", 2500, seed=1))
    prior = TextPrior((q for s in train for q in s.questions), (c for s in train for c in s.captions))
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in texts(sprites, "test", 800, seed=2):
        for item in sample.questions:
            right[item.kind].append(prior.answer(item.question) == item.answer)
    found = {kind: float(np.mean(values)) for kind, values in right.items()}
    assert found["yes/no"] < 0.58
    assert found["count"] < 0.5
    assert found["color"] < 0.35
    assert found["where"] < 0.3
    assert found["what"] < 0.15
    assert prior.answer("why?") == ""


def test_patch_targets(sprites: Sprites) -> None:
    kinds = classes(sprites)
    things = (Thing("key", None, "flat", 0.25, 0.5, 0.3), Thing("car", "blue", "flat", 0.8, 0.1, 0.2))
    targets = patch_targets(Scene("beach", things, Look(variant=0)), kinds, 7)
    assert kinds[targets.kind[3, 1]] == "key"
    assert targets.color[3, 1] == -1
    assert (kinds[targets.kind[0, 5]], COLORS[targets.color[0, 5]]) == ("car", "blue")
    assert kinds[targets.kind[6, 6]] == "beach"
    assert targets.center.sum() == targets.center[3, 1] + targets.center[0, 5] == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"holds no sprites.*make_sprites\.py"),
        (["flat/Dog.png"], "no name of a thing"),
        (["flat/sky.png"], "captions use that word"),
        (["flat/car.png", "flat/red car.png"], "car: some sprites have a colour"),
    ],
)
def test_sprites_that_cannot_be_used(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sprite(7, True).save(tmp_path / name)
    with pytest.raises(InputError, match=message):
        Sprites.open(tmp_path)


def test_other_wrong_arguments(sprites: Sprites, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"style round \(styles: flat, square\)"):
        Sprites.open(folder, ["flat", "round"])
    with pytest.raises(InputError, match="split must be one of train, val, test"):
        Scenes(sprites, "testing")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "dog.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"the sprite .*dog\.png cannot be read"):
        Sprites.open(tmp_path)
