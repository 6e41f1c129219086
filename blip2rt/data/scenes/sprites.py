"""Sprites: a folder of transparent pictures, `STYLE/NAME.png`, where `red car.png` is a car that is red."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from PIL import Image

from ...errors import InputError
from .words import COLORS, Lexicon

COLORED = 3  # things in colours are few, and a colour has to be learnt with each of them
Key = tuple[str, str | None]  # name, colour


class Sprites:
    """Named drawings of things, in styles.

    Args:
        images: style -> (name, colour or None) -> RGBA picture, square.

    Raises:
        InputError: no sprites; a name that cannot be used; a thing that has colours in one sprite and none in another.
    """

    def __init__(self, images: Mapping[str, Mapping[Key, Image.Image]]):
        self.images = {
            (style, *key): image.convert("RGBA").convert(
                "RGBa"
            )  # premultiplied: resizing must not mix in hidden pixels
            for style, sprites in images.items()
            for key, image in sprites.items()
        }
        # small sprites are made from half-size copies: it takes a third of the time
        self.halves = {key: image.reduce(2) for key, image in self.images.items()}
        if not self.images:
            raise InputError("there are no sprites: a folder of sprites holds STYLE/NAME.png")
        styles, colors = defaultdict(set), defaultdict(set)
        for style, name, color in self.images:
            styles[name, color].add(style)
            colors[name].add(color)
        self.styles: dict[Key, tuple[str, ...]] = {key: tuple(sorted(found)) for key, found in styles.items()}
        self.colors: dict[str, tuple[str | None, ...]] = {
            name: tuple(sorted(found, key=str)) for name, found in sorted(colors.items())
        }
        mixed = [name for name, found in self.colors.items() if None in found and len(found) > 1]
        if mixed:
            raise InputError(f"{', '.join(mixed)}: some sprites have a colour in their name and others none")
        self.lexicon = Lexicon(tuple(self.colors))

    def choose(self, random: Random, names: Sequence[str]) -> str:
        """One of the names; one that comes in colours is as likely as `COLORED` others."""
        return random.choices(names, [COLORED if len(self.colors[name]) > 1 else 1 for name in names])[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The things, sorted."""
        return tuple(self.colors)

    @classmethod
    def open(cls, folder: Path | str, styles: Sequence[str] | None = None) -> "Sprites":
        """Read a folder, all of its styles or those that are named.

        Raises:
            InputError: the folder, a style or every sprite is missing, or one cannot be read.
        """
        folder = Path(folder)
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        absent = [style for style in styles or [] if style not in found]
        if absent or not found:
            raise InputError(
                f"{folder} holds no {'sprites' if not found else 'style ' + ', '.join(absent)} (styles: "
                f"{', '.join(found) or 'none'}): draw them with `python training/make_sprites.py --output {folder}`"
            )
        return cls({style: dict(map(_read, sorted((folder / style).glob("*.png")))) for style in styles or found})


def _read(path: Path) -> tuple[Key, Image.Image]:
    try:
        with Image.open(path) as image:
            image.load()
            return key_of(path.stem), image
    except (OSError, ValueError) as error:
        raise InputError(f"the sprite {path} cannot be read ({error})") from None


def key_of(stem: str) -> Key:
    """ "red car" -> ("car", "red"), "hot dog" -> ("hot dog", None)."""
    first, _, rest = stem.partition(" ")
    return (rest, first) if first in COLORS and rest else (stem, None)
