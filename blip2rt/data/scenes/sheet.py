"""A sheet of pictures with a few lines under each, for a model card."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray[Any, Any]
PAPER, INK, FRAME = "#ffffff", "#1d1d1f", "#d5d5d8"


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 [h, w, 3], and its lines of text, each with a colour."""

    picture: Array
    lines: Sequence[tuple[str, str]]


def draw_sheet(cells: Sequence[Cell], columns: int = 4, side: int = 224, font_size: int = 13) -> Image.Image:
    """The cells in a grid; every picture is `side` pixels wide, every row as high as its longest text."""
    font = ImageFont.load_default(font_size)
    letters = max(8, int(side / (font_size * 0.5)))
    gap, line_height = 12, font_size + 4
    wrapped = [[(part, color) for text, color in cell.lines for part in textwrap.wrap(text, letters)] for cell in cells]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [side + gap // 2 + line_height * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    draw, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (side + gap)
            picture = Image.fromarray(cells[i].picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top))
            draw.rectangle([left - 1, top - 1, left + side, top + side], outline=FRAME)
            for number, (text, color) in enumerate(wrapped[i]):
                draw.text((left, top + side + gap // 2 + number * line_height), text, fill=color, font=font)
        top += height + gap
    return sheet
