"""From a scene to its picture: background, clutter, things, light, noise, blur, JPEG.

Everything works on float32 [S, S, 3], 0..255, and a picture of 112 pixels takes well under a millisecond.
"""

import io
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .backgrounds import background
from .scene import Look, Scene, Thing
from .sprites import Sprites

Array = np.ndarray[Any, Any]
NOISE_SIDE = 512  # of the noise that pictures cut theirs from


def draw_picture(scene: Scene, sprites: Sprites, size: int = 112, behind: Array | None = None) -> Array:
    """The picture of a scene, uint8 [size, size, 3].

    Args:
        scene: what to draw; the same scene gives the same picture.
        sprites: that hold its things.
        size: side in pixels.
        behind: a picture [size, size, 3], 0..255, in place of the drawn background.
    """
    look = scene.look
    random = Random(look.variant)
    if behind is None:
        behind = background(scene.place, look.variant, size)
        behind = behind[:, ::-1] if random.random() < 0.5 else behind
    pixels = np.array(behind, np.float32)
    add_clutter(pixels, look.clutter, random)
    for thing in scene.things:
        paste(pixels, sprite_pixels(thing, sprites, size), thing.x * size, thing.y * size)
    return photographed(pixels, look, random)


def sprite_pixels(thing: Thing, sprites: Sprites, size: int) -> Array:
    """The thing as it will lie in the picture: premultiplied RGBA, uint8 [h, w, 4]."""
    key, side = (thing.style, thing.name, thing.color), max(1, round(thing.size * size))
    image = sprites.halves[key] if side <= sprites.halves[key].width else sprites.images[key]
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    if thing.angle:  # mirrored and then turned is turned the other way and then mirrored
        turn = -thing.angle if thing.mirrored else thing.angle
        image = image.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if thing.mirrored else pixels


def paste(pixels: Array, sprite: Array, x: float, y: float) -> None:
    """Lay a premultiplied sprite over the picture, its centre at (x, y) in pixels; what sticks out is cut off."""
    top, left = round(y - sprite.shape[0] / 2), round(x - sprite.shape[1] / 2)
    first_row, first_column = max(0, -top), max(0, -left)
    window = pixels[max(0, top) : top + sprite.shape[0], max(0, left) : left + sprite.shape[1]]
    sprite = sprite[first_row : first_row + window.shape[0], first_column : first_column + window.shape[1]]
    window *= 1 - sprite[..., 3:].astype(np.float32) / 255
    window += sprite[..., :3]


def add_clutter(pixels: Array, count: int, random: Random) -> None:
    """Specks and short strokes, half transparent, in any colour."""
    size = len(pixels)
    for _ in range(count):
        x, y = random.randrange(size), random.randrange(size)
        width, height = (max(1, round(random.uniform(0.01, 0.08) * size)) for _ in "xy")
        color = np.array([random.uniform(0, 255) for _ in "rgb"], np.float32)
        window = pixels[y : y + height, x : x + width]
        window += 0.4 * (color - window)


def photographed(pixels: Array, look: Look, random: Random) -> Array:
    """Light, noise, blur and compression; uint8."""
    size = len(pixels)
    pixels *= look.light
    pixels += np.array(look.tint, np.float32)
    if look.slope:
        pixels *= np.linspace(1 - look.slope, 1 + look.slope, size, dtype=np.float32)[None, :, None]
    if look.noise:
        pixels += look.noise * noise(size, random)
    np.clip(pixels, 0, 255, out=pixels)
    finished = (pixels + 0.5).astype(np.uint8)
    if not look.blur and look.jpeg is None:
        return finished
    image = Image.fromarray(finished)
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur * size))
    if look.jpeg is not None:
        stream = io.BytesIO()
        image.save(stream, "jpeg", quality=look.jpeg)
        image = Image.open(stream)
    return np.array(image)


def noise(size: int, random: Random) -> Array:
    """Normal noise [size, size, 3]: cut at random from one sheet, or, for larger pictures, drawn."""
    if size >= NOISE_SIDE:
        return np.random.default_rng(random.getrandbits(32)).standard_normal((size, size, 3), np.float32)
    sheet = noise_sheet()
    y, x = (random.randrange(NOISE_SIDE - size) for _ in "yx")
    return sheet[y : y + size, x : x + size, :: random.choice((1, -1))]


@lru_cache(maxsize=1)
def noise_sheet() -> Array:
    return np.random.default_rng(0).standard_normal((NOISE_SIDE, NOISE_SIDE, 3), np.float32)
