"""A split of scenes: element `i` is a pure function of the sprites, the split, the seed and `i`."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from ...errors import InputError
from .captions import write_captions
from .distractors import write_distractors
from .layout import SPLITS, draw_crowd, draw_scene
from .picture import draw_picture
from .questions import QuestionAnswer, write_questions
from .scene import Scene
from .sprites import Sprites
from .truth import TruthChecker

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sample:
    """A scene with its picture, uint8 [S, S, 3], its five captions (the plain one first) and its questions."""

    scene: Scene
    picture: Array
    captions: list[str]
    questions: list[QuestionAnswer]


class Scenes:
    """Scenes without end, composed when they are asked for.

    Args:
        sprites: what there is to draw.
        split: "train", "val" or "test". Train and val never hold a held-out combination, a test scene always does.
        seed: another seed, other scenes.
        size: side of the pictures in pixels.

    Raises:
        InputError: an unknown split, or too few things to hold combinations out.
    """

    def __init__(self, sprites: Sprites, split: str = "train", seed: int = 0, size: int = 112):
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.sprites, self.split, self.seed, self.size = sprites, split, seed, size
        self.checker = TruthChecker(sprites.lexicon)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return Sample(scene, self.picture(scene), self.captions(index, scene), self.questions(index, scene))

    def scene(self, index: int) -> Scene:
        """What the picture will hold."""
        return draw_scene(self._random(index, "scene"), self.sprites, self.split)

    def crowd(self, index: int) -> Scene:
        """Four to seven things that overlap, without texts."""
        return draw_crowd(self._random(index, "crowd"), self.sprites)

    def picture(self, scene: Scene, behind: Array | None = None) -> Array:
        """uint8 [S, S, 3]; `behind` as in `draw_picture`."""
        return draw_picture(scene, self.sprites, self.size, behind)

    def captions(self, index: int, scene: Scene) -> list[str]:
        """Five."""
        return write_captions(scene, self._random(index, "captions"))

    def questions(self, index: int, scene: Scene) -> list[QuestionAnswer]:
        """Four to six; two of them are answered yes and no."""
        return write_questions(scene, self.sprites, self._random(index, "questions"))

    def distractors(self, index: int, scene: Scene) -> list[str]:
        """Up to five captions that are almost true."""
        return write_distractors(scene, self.sprites, self.checker, self._random(index, "distractors"))

    def _random(self, index: int, what: str) -> Random:
        return Random(f"{self.seed}/{self.split}/{index}/{what}")
