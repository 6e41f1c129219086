"""What comes with the package: a small BLIP-2 that this repository trained, and pictures for it. README.md is its card.

`CHECKPOINT` and `RETRIEVER` are transformers directories (`Blip2ForConditionalGeneration` with OPT, and
`Blip2ForImageTextRetrieval`); `IMAGES` are picture files.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "captioner"
RETRIEVER = Path(__file__).parent / "retriever"
IMAGES = sorted((Path(__file__).parent / "images").glob("*.*"))
