"""Backgrounds that have names, drawn: a place and a variant give a picture."""

from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray[Any, Any]
Color = tuple[float, float, float]
VARIANTS = 24  # of each place; mirrored, lit and tinted, they are many more
SMOOTH = 2  # drawn so many times as large


@lru_cache(maxsize=1024)
def background(place: str, variant: int, size: int) -> Array:
    """A place as float32 [size, size, 3], 0..255. Do not write into it."""
    random, side = Random(f"{place}/{variant % VARIANTS}"), SMOOTH * size
    canvas = Canvas(random, side)
    DRAW[place](canvas)
    image = canvas.image.resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
    pixels.flags.writeable = False
    return pixels


class Canvas:
    """Drawing in parts of the side, with colours that vary a little from picture to picture."""

    def __init__(self, random: Random, side: int):
        self.random, self.side = random, side
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)

    def near(self, color: Color, spread: float = 12) -> tuple[int, int, int]:
        r, g, b = (round(min(255, max(0, c + self.random.uniform(-spread, spread)))) for c in color)
        return r, g, b

    def fade(self, top: float, bottom: float, above: Color, below: Color) -> None:
        """A vertical gradient over the whole width."""
        first, last = round(top * self.side), round(bottom * self.side)
        above, below = self.near(above), self.near(below)
        for y in range(first, last):
            part = (y - first) / max(1, last - first)
            color = tuple(round(a + part * (b - a)) for a, b in zip(above, below, strict=True))
            self.draw.line([(0, y), (self.side, y)], fill=color)

    def oval(self, x: float, y: float, width: float, height: float, color: Color) -> None:
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        self.draw.ellipse([value * self.side for value in box], fill=self.near(color, 0))

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.draw.rectangle([v * self.side for v in (left, top, right, bottom)], fill=self.near(color, 0))

    def stroke(self, points: list[tuple[float, float]], color: Color, width: float) -> None:
        pixels = [(x * self.side, y * self.side) for x, y in points]
        self.draw.line(pixels, fill=self.near(color, 0), width=max(1, round(width * self.side)), joint="curve")

    def area(self, points: list[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=self.near(color, 0))

    def hill(self, height: float, lift: float, color: Color) -> None:
        """Everything below a wavy line."""
        tops = [(i / 12, height + self.random.uniform(-lift, lift)) for i in range(13)]
        self.area([(0.0, 1.0), *tops, (1.0, 1.0)], color)


def sky(c: Canvas) -> None:
    c.fade(0, 1, (92, 160, 232), (190, 222, 248))
    for _ in range(c.random.randint(3, 6)):
        x, y = c.random.random(), c.random.random()
        for _ in range(4):
            width = c.random.uniform(0.1, 0.22)
            c.oval(
                x + c.random.uniform(-0.12, 0.12), y + c.random.uniform(-0.02, 0.02), width, width / 2, (246, 249, 252)
            )


def meadow(c: Canvas) -> None:
    horizon = c.random.uniform(0.22, 0.38)
    c.fade(0, horizon, (150, 205, 245), (215, 235, 248))
    c.fade(horizon, 1, (132, 192, 92), (84, 148, 58))
    for _ in range(60):
        x, y = c.random.random(), c.random.uniform(horizon, 1)
        lean = c.random.uniform(-0.01, 0.01)
        c.stroke([(x, y), (x + lean, y - 0.03)], c.random.choice(((70, 130, 50), (150, 205, 100))), 0.006)


def beach(c: Canvas) -> None:
    horizon = c.random.uniform(0.18, 0.26)
    shore = horizon + c.random.uniform(0.14, 0.22)
    c.fade(0, horizon, (140, 200, 245), (220, 238, 250))
    c.fade(horizon, shore + 0.05, (30, 120, 185), (70, 170, 205))
    c.hill(shore, 0.012, (248, 250, 250))
    c.hill(shore + 0.025, 0.012, c.near((232, 208, 156)))
    for _ in range(80):
        c.oval(c.random.random(), c.random.uniform(shore + 0.06, 1), 0.01, 0.008, (206, 180, 126))


def night(c: Canvas) -> None:
    c.fade(0, 1, (10, 14, 42), (44, 52, 104))
    for _ in range(45):
        size = c.random.choice((0.008, 0.012))
        c.oval(c.random.random(), c.random.random(), size, size, (236, 236, 210))
    c.hill(c.random.uniform(0.86, 0.93), 0.02, (14, 18, 30))


def room(c: Canvas) -> None:
    floor = c.random.uniform(0.62, 0.72)
    wall = c.random.choice(((236, 216, 186), (226, 200, 196), (206, 214, 196), (214, 208, 226)))
    c.fade(0, floor, wall, tuple(v - 14 for v in wall))  # type: ignore[arg-type]
    for i in range(1, 9):
        c.box(i / 9 - 0.004, 0, i / 9, floor, tuple(v - 16 for v in wall))  # type: ignore[arg-type]
    c.fade(floor, 1, (164, 116, 74), (126, 86, 52))
    for i in range(-3, 14):
        c.stroke([(0.5 + (i - 5) * 0.09, floor), (0.5 + (i - 5) * 0.2, 1.0)], (112, 76, 46), 0.006)
    c.box(0, floor - 0.035, 1, floor, (246, 242, 234))


def snow(c: Canvas) -> None:
    horizon = c.random.uniform(0.3, 0.42)
    c.fade(0, horizon, (168, 186, 204), (208, 220, 230))
    peaks = [(i / 5, horizon - c.random.uniform(0.02, 0.2)) for i in range(6)]
    c.area([(0.0, horizon), *peaks, (1.0, horizon)], (150, 164, 184))
    c.fade(horizon, 1, (238, 243, 249), (216, 226, 240))
    for _ in range(4):
        y = c.random.uniform(horizon + 0.08, 1)
        c.oval(c.random.random(), y, c.random.uniform(0.3, 0.6), 0.03, (224, 232, 243))


def desert(c: Canvas) -> None:
    c.fade(0, 0.5, (250, 206, 140), (252, 230, 188))
    for height, color in ((0.34, (226, 166, 98)), (0.5, (214, 146, 78)), (0.7, (202, 130, 64))):
        c.hill(height + c.random.uniform(-0.03, 0.03), 0.03, c.near(color))


def street(c: Canvas) -> None:
    walk = c.random.uniform(0.3, 0.4)
    c.fade(0, walk - 0.12, (176, 170, 166), (166, 158, 152))
    for row in range(5):
        y = row * (walk - 0.12) / 5
        c.stroke([(0, y), (1, y)], (146, 138, 132), 0.006)
        for column in range(8):
            x = (column + row % 2 / 2) / 8
            c.stroke([(x, y), (x, y + (walk - 0.12) / 5)], (146, 138, 132), 0.006)
    c.box(0, walk - 0.12, 1, walk, (206, 204, 200))
    c.box(0, walk - 0.015, 1, walk, (150, 150, 150))
    c.fade(walk, 1, (92, 94, 98), (74, 76, 80))
    start, line = c.random.uniform(-0.2, 0), c.random.uniform(0.66, 0.76)
    for i in range(6):
        c.box(start + i * 0.24, line, start + i * 0.24 + 0.13, line + 0.025, (236, 236, 228))


def sea(c: Canvas) -> None:
    c.fade(0, 1, (64, 170, 196), (16, 78, 128))
    for _ in range(16):
        x, y, step = c.random.uniform(-0.1, 1), c.random.random(), c.random.uniform(0.03, 0.05)
        wave = [(x + i * step, y + (0.012 if i % 2 else -0.012)) for i in range(6)]
        c.stroke(wave, c.random.choice(((120, 204, 220), (34, 110, 160))), 0.01)


def stage(c: Canvas) -> None:
    floor = c.random.uniform(0.74, 0.82)
    red = c.near((150, 30, 52))
    for i in range(14):
        shade = 1.0 if i % 2 else 0.74
        c.box(i / 14, 0, (i + 1) / 14, floor, (red[0] * shade, red[1] * shade, red[2] * shade))
    c.fade(floor, 1, (206, 160, 104), (170, 124, 74))
    for i in range(1, 5):
        c.box(0, floor + i * 0.055, 1, floor + i * 0.055 + 0.005, (146, 104, 62))


DRAW: dict[str, Callable[[Canvas], None]] = {
    drawing.__name__: drawing for drawing in (sky, meadow, beach, night, room, snow, desert, street, sea, stage)
}
