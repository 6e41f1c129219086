"""What comes with the package: a tiny BLIP-2 checkpoint and four pictures, both written by `training/make_bundled.py`.

`CHECKPOINT` is a transformers directory (`Blip2ForConditionalGeneration` with OPT); `IMAGES` are picture files.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "captioner"
IMAGES = sorted((Path(__file__).parent / "images").glob("*.*"))
