"""What a scene holds, in numbers, and what is true of it.

Lengths are parts of the picture's side: (0, 0) is the upper left corner, a `size` of 0.3 spans 0.3 of the side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

BIG, SMALL = 0.40, 0.26  # sizes from which on a thing is called big, and up to which small
MIDDLE = 0.17  # farther from the centre than this, nothing is "in the middle"
CLEAR = 0.08  # how clearly a relation or position must hold before a text states it


@dataclass(frozen=True)
class Thing:
    """One thing: what it is, how it is drawn, where its centre lies, how large it is; `angle` in degrees."""

    name: str
    color: str | None
    style: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    mirrored: bool = False

    @property
    def size_name(self) -> str | None:
        """ "big", "small", or None for what lies between."""
        return "big" if self.size >= BIG else "small" if self.size <= SMALL else None


@dataclass(frozen=True)
class Group:
    """All things of a scene that share name and colour."""

    name: str
    color: str | None
    things: tuple[Thing, ...]

    @property
    def count(self) -> int:
        return len(self.things)

    @property
    def size_name(self) -> str | None:
        """Of all of them, or None."""
        names = {thing.size_name for thing in self.things}
        return names.pop() if len(names) == 1 else None


@dataclass(frozen=True)
class Look:
    """How a picture is taken: a variant of its background, light, and what a camera and a file format do to it."""

    variant: int  # draws the background, the clutter and the noise
    clutter: int = 0  # specks and strokes without a name
    light: float = 1.0  # factor on all channels
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to the channels, 0..255
    slope: float = 0.0  # change of the light from left to right
    noise: float = 0.0  # standard deviation, 0..255
    blur: float = 0.0  # radius in parts of the side
    jpeg: int | None = None  # quality


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    place: str
    things: tuple[Thing, ...]
    look: Look

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """In the order in which their first things stand in the scene."""
        keys = dict.fromkeys((thing.name, thing.color) for thing in self.things)
        return tuple(
            Group(*key, tuple(thing for thing in self.things if (thing.name, thing.color) == key)) for key in keys
        )

    def select(self, name: str, color: str | None = None) -> tuple[Thing, ...]:
        """The things of a name, of one colour or of any."""
        return tuple(t for t in self.things if name in (t.name, "thing") and color in (None, t.color))


def related(first: Sequence[Thing], relation: str, second: Sequence[Thing], margin: float = 0.0) -> bool:
    """Whether every one of `first` is "left", "right", "above" or "below" every one of `second`, by their centres."""
    if not first or not second:
        return False
    if relation in ("right", "below"):
        first, second, relation = second, first, {"right": "left", "below": "above"}[relation]
    axis = "x" if relation == "left" else "y"
    return max(getattr(thing, axis) for thing in first) + margin < min(getattr(thing, axis) for thing in second)


def is_at(things: Sequence[Thing], position: str, margin: float = 0.0) -> bool:
    """Whether all of them are in that half of the picture or, for "middle", near its centre."""
    if not things:
        return False
    if position == "middle":
        return all(max(abs(t.x - 0.5), abs(t.y - 0.5)) <= MIDDLE - margin for t in things)
    axis, sign = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}[position]
    return all(sign * (getattr(thing, axis) - 0.5) > margin for thing in things)


def clear_position(things: Sequence[Thing]) -> str | None:
    """Where they are, if one word says it and no other would do: the side must win over the other axis."""
    if is_at(things, "middle", CLEAR):
        return "middle"
    found = [name for name in ("left", "right", "top", "bottom") if is_at(things, name, 2 * CLEAR)]
    loose = [name for name in ("left", "right", "top", "bottom") if is_at(things, name, CLEAR)]
    return found[0] if len(found) == 1 and loose == found else None
