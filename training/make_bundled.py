"""Put a trained model into the package: both checkpoints, the pictures that the README shows, the model card.

    python training/make_bundled.py --runs runs/small --photograph hubble_deep_field.jpg

RUNS is what `train_small.py` made. The photograph is the Hubble Deep Field (NASA and ESA, public domain), as
scikit-image's package has it; things are laid on it. The other pictures are scenes of the test split.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from transformers import AutoTokenizer, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import blip2rt.bundled
from blip2rt import Blip2rtError, InputError
from blip2rt.data.scenes import Scene, Scenes, Sprites, Thing
from blip2rt.data.scenes.scene import Look
from blip2rt.training.recipe import read_recipe

RECIPE = Path(__file__).parent / "recipes" / "small-vision.toml"  # its styles are those of the pictures
SEED, SIDE = 5, 336  # of the test scenes; pixels
SCENES = {"beach": 4, "night": 7, "stage": 9, "street": 35, "snow": 63}  # name -> index of the test split
PHOTOGRAPH = Scene(
    "night",
    (Thing("apple", None, "emojione", 0.28, 0.5, 0.34), Thing("sailboat", None, "noto", 0.72, 0.5, 0.34)),
    Look(variant=0, light=0.85),
)
CAPTIONER = ("config.json", "model.safetensors")
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
RETRIEVER = (*CAPTIONER, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
CARD = ("curves.svg", "log.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the bundled checkpoints, pictures and model card.")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="of train_small.py")
    parser.add_argument("--sprites", type=Path, metavar="DIR", help="the artwork (default: RUNS/sprites)")
    parser.add_argument("--photograph", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=blip2rt.bundled.CHECKPOINT.parent, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        write_captioner(args.runs / "captioner" / "checkpoint", args.output / "captioner")
        copy(args.runs / "retriever" / "checkpoint", args.output / "retriever", RETRIEVER)
        write_pictures(args.sprites or args.runs / "sprites", args.photograph, args.output / "images")
        copy(args.runs / "card", args.output, CARD)
        with Image.open(args.runs / "card" / "sheet.png") as sheet:
            sheet.quantize(255).save(args.output / "sheet.png", optimize=True)
        write_readme(args.runs / "card", args.output)
    except (Blip2rtError, OSError) as error:
        print(f"make_bundled: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


def copy(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def write_captioner(source: Path, target: Path) -> None:
    """The checkpoint, with a processor as `Blip2Processor` loads it."""
    copy(source, target, CAPTIONER)
    if (source / PROCESSOR[0]).is_file():  # it went on from what this program had written
        copy(source, target, PROCESSOR)
        return
    config = json.loads((source / "config.json").read_text("utf-8"))
    settings = json.loads((source / "preprocessor_config.json").read_text("utf-8"))
    pictures = BlipImageProcessorPil(size=settings["size"], **{k: settings[k] for k in ("image_mean", "image_std")})
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    Blip2Processor(pictures, tokenizer, num_query_tokens=config["num_query_tokens"]).save_pretrained(target)


def write_pictures(sprites: Path, photograph: Path, directory: Path) -> None:
    """Scenes, one of them in a file as telephones write it and one with transparent corners; and the photograph."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    scenes = Scenes(Sprites.open(sprites, read_recipe(RECIPE).data[0].styles), "test", SEED, SIDE)
    pictures = {name: Image.fromarray(scenes.picture(scenes.scene(index))) for name, index in SCENES.items()}
    with Image.open(photograph) as opened:
        sky = ImageOps.fit(opened.convert("RGB"), (SIDE, SIDE))
    pictures["photograph"] = Image.fromarray(scenes.picture(PHOTOGRAPH, np.asarray(sky, np.float32)))
    for name, picture in pictures.items():
        if name == "night":  # orientation: turn clockwise to see it upright
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.transpose(Image.Transpose.ROTATE_90).save(directory / f"{name}.jpg", quality=90, exif=exif)
        elif name == "stage":
            corners = Image.new("L", (4 * SIDE, 4 * SIDE))
            ImageDraw.Draw(corners).rounded_rectangle([0, 0, 4 * SIDE - 1, 4 * SIDE - 1], radius=SIDE // 6, fill=255)
            picture.putalpha(corners.resize((SIDE, SIDE), Image.Resampling.BOX))
            picture.quantize(255).save(directory / f"{name}.png", optimize=True)
        else:
            picture.save(directory / f"{name}.jpg", quality=90)


def write_readme(card: Path, directory: Path) -> None:
    """The model card: the text beside this program, with the tables of the run in their places.

    Raises:
        InputError: the text has no place for a table.
    """
    text = Path(__file__).with_name("model_card.md").read_text("utf-8")
    for section in json.loads((card / "tables.json").read_text("utf-8")).items():
        name, table = section
        if f"{{{name}}}" not in text:
            raise InputError(f"model_card.md has no {{{name}}}")
        text = text.replace(f"{{{name}}}", table)
    number = 0
    for part in ("captioner", "retriever"):
        with safe_open(directory / part / "model.safetensors", "np") as file:
            number += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    (directory / "README.md").write_text(text.replace("{parameters}", f"{number / 1e6:.1f}"), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
