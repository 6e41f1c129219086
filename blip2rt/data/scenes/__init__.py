"""Composed pictures of things that people can name, with captions, questions and answers that are known to be true.

Sprites.open(folder) -> Scenes(sprites, split, seed) -> scenes[i]: scene, picture, captions, questions
    layout.py      which things, how many, how large, where; what is held out for the test
    picture.py     background, clutter, things, light, noise, blur, JPEG
    captions.py, questions.py, distractors.py    the texts
    truth.py       whether any caption is true of a scene
    targets.py     what each patch shows
    written.py     the formats of COCO, VQAv2 and Karpathy, for the readers and evaluators of the real data sets
"""

from .collection import Sample, Scenes
from .layout import held_out_combinations, is_held_out
from .picture import draw_picture
from .prior import TextPrior
from .questions import QuestionAnswer
from .scene import Group, Scene, Thing
from .sheet import draw_sheet
from .sprites import Sprites
from .targets import PatchTargets, classes, patch_targets
from .truth import Fact, TruthChecker, Verdict
from .words import COLORS, PLACES, Lexicon
from .written import WrittenScenes, read_scenes, write_blank_twin, write_scenes

__all__ = [
    "COLORS",
    "PLACES",
    "Fact",
    "Group",
    "Lexicon",
    "PatchTargets",
    "QuestionAnswer",
    "Sample",
    "Scene",
    "Scenes",
    "Sprites",
    "TextPrior",
    "Thing",
    "TruthChecker",
    "Verdict",
    "WrittenScenes",
    "classes",
    "draw_picture",
    "draw_sheet",
    "held_out_combinations",
    "is_held_out",
    "patch_targets",
    "read_scenes",
    "write_blank_twin",
    "write_scenes",
]
