"""What a device and its precisions cost: the bundled model's captions and answers over 2,000 held-out scenes.

    python benchmarks/quality.py --directory SCRATCH                 -> results/quality.json  (200 MB; ten minutes)
    python benchmarks/quality.py --directory SCRATCH --device torch  -> results/quality-torch.json

Engines say what is in the scenes of the model card (`training/make_scenes.py`, whose artwork `training/make_sprites.py`
fetches from npm). Fails where int8 on the CPU loses more than 0.5 % of the CIDEr or VQA accuracy that fp32 has there,
or int4 more than 2 %; `MOST_LOST` has the others. Also told: how many captions are the same, word for word.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import blip2rt.bundled
from blip2rt.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "training"
RESULTS = Path(__file__).parent / "results"
PRECISIONS = {
    "cpu": ("int8", "int4"),
    "torch": ("fp32", "bf16", "fp16", "fp8", "int8", "int4"),
    "cuda": ("fp32", "bf16", "fp16"),
    "tensorrt": ("bf16", "fp16"),
}
MOST_LOST = {"fp32": 0.001, "bf16": 0.005, "fp16": 0.005, "fp8": 0.02, "int8": 0.005, "int4": 0.02}  # of fp32's score


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Captions and answers of the bundled model, beside fp32 on the CPU.")
    parser.add_argument("--directory", type=Path, required=True, help="scratch; what is there already is used")
    parser.add_argument("--scenes", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--device", choices=PRECISIONS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="(default: results/quality.json, results/quality-DEVICE.json)")
    arguments = parser.parse_args(argv)
    device = arguments.device
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
    exact = "fp32" if device == "cpu" else "fp32 on cpu"
    engines = {exact: ("cpu", "fp32")} | {precision: (device, precision) for precision in PRECISIONS[device]}
    for name, (kind, precision) in engines.items():
        engine, run = home / f"{precision}-{kind}", home / f"run-{precision}-{kind}"
        options = ["--output", engine, "--precision", precision, "--device", kind, "--force"]
        call("-m", "blip2rt", "export", "--model", blip2rt.bundled.CHECKPOINT, *options)
        call(TRAINING / "evaluate_scenes.py", "--engine", engine, "--data", scenes, "--output", run)
        table = json.loads((run / "scenes-table.json").read_text("utf-8"))
        scores[name] = {
            "CIDEr": table["captions"]["CIDEr"],
            "captions true": table["captions"]["captions true"],
            "VQA accuracy": table["answers"]["accuracy"],
        }
        rows = json.loads((run / "captions" / "submission.json").read_text("utf-8"))
        captions[name] = {row["image_id"]: row["caption"] for row in rows}
    losses = {
        precision: compare(scores[exact], captions[exact], scores[precision], captions[precision])
        for precision in PRECISIONS[device]
    }
    option = "" if device == "cpu" else f" --device {device}"
    result = {
        "command": f"python benchmarks/quality.py --directory SCRATCH{option}",
        "task": f"the bundled captioner, {arguments.scenes} held-out scenes, 5 beams",
        "device": device if device == "cpu" else f"{device}, on {gpu()}",
        "scores": scores,
        **losses,
    }
    output = arguments.output or RESULTS / ("quality.json" if device == "cpu" else f"quality-{device}.json")
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return int(any(loss > MOST_LOST[p] for p in losses for loss in losses[p]["lost"].values()))


def compare(
    exact_scores: dict[str, float],
    exact_captions: dict[int, str],
    scores: dict[str, float],
    captions: dict[int, str],
) -> dict[str, Any]:
    """Shares of the exact scores that others lose, and of captions that they leave as they are."""
    return {
        "lost": {name: 1 - scores[name] / exact_scores[name] for name in ("CIDEr", "VQA accuracy")},
        "same captions": sum(captions[i] == caption for i, caption in exact_captions.items()) / len(exact_captions),
    }


def gpu() -> str:
    """What torch's modules run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def call(*arguments: object) -> None:
    """A Python program, as its own process; its last words go to stderr."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
