"""What int8 and int4 cost in quality: the bundled model's captions and answers over 2,000 held-out scenes.

    python benchmarks/quality.py --directory SCRATCH     -> results/quality.json  (200 MB; ten minutes)

Engines of all three precisions say what is in the scenes of the model card (`training/make_scenes.py`, whose artwork
`training/make_sprites.py` fetches from npm). Fails where int8 loses more than 0.5 % of fp32's CIDEr or VQA accuracy, or
int4 more than 2 %. Also told: how many captions are the same, word for word.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import blip2rt.bundled
from blip2rt.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "training"
RESULT = Path(__file__).parent / "results" / "quality.json"
PRECISIONS = ("fp32", "int8", "int4")
MOST_LOST = {"int8": 0.005, "int4": 0.02}  # of fp32's score


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Captions and answers of the bundled model in fp32, int8 and int4.")
    parser.add_argument("--directory", type=Path, required=True, help="scratch; what is there already is used")
    parser.add_argument("--scenes", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="(default: results/quality.json)")
    arguments = parser.parse_args(argv)
    home = arguments.directory.absolute()
    home.mkdir(parents=True, exist_ok=True)
    sprites, scenes = home / "sprites", home / f"scenes-{arguments.scenes}"
    if not sprites.exists():
        call(TRAINING / "make_sprites.py", "--output", sprites)
    if not scenes.exists():
        styles = read_recipe(TRAINING / "recipes" / "small-vision.toml").data[0].styles
        drawn = ["--styles", *styles, "--count", str(arguments.scenes)]
        call(TRAINING / "make_scenes.py", "--sprites", sprites, "--output", scenes, *drawn)
    scores: dict[str, dict[str, float]] = {}
    captions: dict[str, dict[int, str]] = {}
    for precision in PRECISIONS:
        engine, run = home / precision, home / f"run-{precision}"
        options = ["--output", engine, "--precision", precision, "--force"]
        call("-m", "blip2rt", "export", "--model", blip2rt.bundled.CHECKPOINT, *options)
        call(TRAINING / "evaluate_scenes.py", "--engine", engine, "--data", scenes, "--output", run)
        table = json.loads((run / "scenes-table.json").read_text("utf-8"))
        scores[precision] = {
            "CIDEr": table["captions"]["CIDEr"],
            "captions true": table["captions"]["captions true"],
            "VQA accuracy": table["answers"]["accuracy"],
        }
        rows = json.loads((run / "captions" / "submission.json").read_text("utf-8"))
        captions[precision] = {row["image_id"]: row["caption"] for row in rows}
    losses = {precision: compare(scores, captions, precision) for precision in MOST_LOST}
    result = {
        "command": "python benchmarks/quality.py --directory SCRATCH",
        "task": f"the bundled captioner, {arguments.scenes} held-out scenes, 5 beams",
        "scores": scores,
        **losses,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return int(any(loss > most for p, most in MOST_LOST.items() for loss in losses[p]["lost"].values()))


def compare(scores: dict[str, dict[str, float]], captions: dict[str, dict[int, str]], precision: str) -> dict[str, Any]:
    """Shares of fp32's scores that a precision loses, and of captions that it leaves as they are."""
    exact, rounded = captions["fp32"], captions[precision]
    return {
        "lost": {name: 1 - scores[precision][name] / scores["fp32"][name] for name in ("CIDEr", "VQA accuracy")},
        "same captions": sum(rounded[image] == caption for image, caption in exact.items()) / len(exact),
    }


def call(*arguments: object) -> None:
    """A Python program, as its own process; its last words go to stderr."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
