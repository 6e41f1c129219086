"""What every patch of a picture shows: the dense targets that an image encoder learns from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .scene import Scene
from .sprites import Sprites
from .words import COLORS, PLACES

Array = np.ndarray[Any, Any]
EXTENT = 0.42  # of a thing's size: the radius within which a patch shows it


@dataclass(frozen=True)
class PatchTargets:
    """int64 [G, G] each: `kind` is an index of `classes`, `color` one of `COLORS` or -1, `center` the things whose
    centres lie in the patch."""

    kind: Array
    color: Array
    center: Array


def classes(sprites: Sprites) -> tuple[str, ...]:
    """The places, then the things."""
    return (*PLACES, *sprites.names)


def patch_targets(scene: Scene, kinds: tuple[str, ...], grid: int) -> PatchTargets:
    """The targets of a picture of grid x grid patches.

    Args:
        scene: what it shows.
        kinds: `classes(sprites)`.
        grid: patches on a side, G.
    """
    shape = (grid, grid)
    kind = np.full(shape, kinds.index(scene.place), np.int64)
    color, center = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    middle = (np.arange(grid) + 0.5) / grid
    for thing in scene.things:
        near = np.hypot(middle[None] - thing.x, middle[:, None] - thing.y) < max(EXTENT * thing.size, 0.5 / grid)
        kind[near] = kinds.index(thing.name)
        color[near] = COLORS.index(thing.color) if thing.color else -1
        row, column = (min(grid - 1, max(0, int(value * grid))) for value in (thing.y, thing.x))
        center[row, column] += 1
    return PatchTargets(kind, color, center)
