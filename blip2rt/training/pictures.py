"""A picture as training sees it: cropped and flipped at random, and where its boxes lie then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.examples import Box
from ..preprocess import Array, ImageSource, load_image
from .recipe import ImageRecipe

ASPECTS = 3 / 4, 4 / 3
ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """A crop of a picture, in shares of its width and height, and whether it is flipped."""

    x0: float = 0.0
    y0: float = 0.0
    x1: float = 1.0
    y1: float = 1.0
    is_flipped: bool = False

    def move(self, box: Box) -> Box | None:
        """The box as the view shows it, or None where it shows nothing of it."""
        x0, x1 = ((x - self.x0) / (self.x1 - self.x0) for x in (box.x0, box.x1))
        y0, y1 = ((y - self.y0) / (self.y1 - self.y0) for y in (box.y0, box.y1))
        if self.is_flipped:
            x0, x1 = 1 - x1, 1 - x0
        if x0 >= 1 or y0 >= 1 or x1 <= 0 or y1 <= 0:
            return None
        return Box(box.label, max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1))


WHOLE = View()


def draw_view(size: tuple[int, int], recipe: ImageRecipe, draw: np.random.Generator) -> View:
    """A random resized crop: an area of at least `min_scale`, sides between 3:4 and 4:3; flipped half the time.

    The paper's augmentation (section 3.4), with LAVIS's numbers.
    """
    if not recipe.augment:
        return WHOLE
    width, height = size
    is_flipped = recipe.flip and draw.random() < 0.5
    for _ in range(ATTEMPTS):
        area = width * height * draw.uniform(recipe.min_scale, 1)
        aspect = math.exp(draw.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return View(x / width, y / height, (x + w) / width, (y + h) / height, is_flipped)
    return View(is_flipped=is_flipped)


def render(
    source: ImageSource,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    recipe: ImageRecipe,
    draw: np.random.Generator,
) -> tuple[Array, View]:
    """Pixel values float32 [3, S, S] of a random view, and the view. What is not augmented equals `preprocess`.

    Raises:
        ImageError: the picture cannot be read.
    """
    picture = load_image(source)
    width, height = picture.size
    view = draw_view(picture.size, recipe, draw)
    box = (view.x0 * width, view.y0 * height, view.x1 * width, view.y1 * height)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if view.is_flipped:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values: Array = np.asarray(picture, np.float32) / np.float32(255)
    values = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)), view


def patch_labels(boxes: Sequence[Box], background: int, classes: dict[str, int], view: View, side: int) -> Array:
    """The class of each of the side x side patches, int64: of the smallest box over its centre, or `background`."""
    labels = np.full((side, side), background, np.int64)
    shown = [moved for box in boxes if (moved := view.move(box)) is not None]
    for box in sorted(shown, key=lambda box: (box.x0 - box.x1) * (box.y1 - box.y0)):  # the largest first
        rows, columns = (
            slice(math.ceil(low * side - 0.5), math.ceil(high * side - 0.5))
            for low, high in ((box.y0, box.y1), (box.x0, box.x1))
        )
        labels[rows, columns] = classes[box.label]
    return labels.reshape(-1)
