"""Write what the package bundles: a tiny BLIP-2 checkpoint and four pictures.

    seed -> weights, tokenizer, processor -> OUTPUT/captioner/     drawings -> OUTPUT/images/

The weights are random, so the captions are nonsense; but they are nonsense that depends on the picture and the prompt,
which is what an export or a search has to get right. Nothing is downloaded, and two runs write the same bytes.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GPT2Tokenizer,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig

import blip2rt.bundled

SEED = 0
IMAGE_SIZE = 112
NUM_QUERIES = 8
VOCABULARY = 512  # all of it, `<image>` included: random weights may generate any id, and each must decode
BOS, PAD, EOS, UNK, IMAGE = "<s>", "<pad>", "</s>", "<unk>", "<image>"  # ids 0, 1, 2, 3 as in OPT; the last id
SINGLE_BYTES = slice(4, 4 + 256)
NEWLINE = "\u010a"  # "\n" as byte-level BPE writes it

Draw = ImageDraw.ImageDraw


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the bundled checkpoint and pictures.")
    parser.add_argument("--output", type=Path, default=blip2rt.bundled.CHECKPOINT.parent, metavar="DIR")
    parser.add_argument("--seed", type=int, default=SEED, help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    write_checkpoint(args.output / "captioner", args.seed)
    write_images(args.output / "images")
    print(f"wrote {args.output / 'captioner'} and {args.output / 'images'}", file=sys.stderr)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


def write_checkpoint(directory: Path, seed: int) -> None:
    """A directory that `Blip2ForConditionalGeneration` and `Blip2Processor` load with `from_pretrained`."""
    backend = train_tokenizer(sentences())
    tokenizer = GPT2Tokenizer(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=PAD, unk_token=UNK)
    model = Blip2ForConditionalGeneration(model_config(backend))
    randomize(model, seed)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors lets only its writer read it
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=NUM_QUERIES).save_pretrained(directory)


def model_config(tokenizer: Tokenizer) -> Blip2Config:
    """Sizes differ wherever they can, so that a swapped axis is an error and not a wrong answer."""
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=256,
        bos_token_id=tokenizer.token_to_id(EOS),  # OPT begins with </s>
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_id=tokenizer.token_to_id(NEWLINE),  # and BLIP-2 stops it at the end of the line
    )
    vision = Blip2VisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=160,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        cross_attention_frequency=2,
        encoder_hidden_size=vision.hidden_size,
    )
    return Blip2Config(
        text_config=text,
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=NUM_QUERIES,
        image_token_index=tokenizer.token_to_id(IMAGE),
    )


def randomize(model: Blip2ForConditionalGeneration, seed: int) -> None:
    """Fill every parameter; with larger numbers than a training starts from, or all pictures would give the same text.

    numpy draws the numbers: its generator gives the same bits on every processor, torch's does not.
    """
    generator = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.from_numpy(generator.standard_normal(tuple(parameter.shape), dtype=np.float32))
        if name.endswith(".bias"):
            value = 0.05 * noise
        elif "norm" in name.lower():
            value = 1 + 0.1 * noise
        elif ".embed_" in name:
            value = 0.1 * noise  # smaller, or every token predicts itself: the output layer is this matrix again
        else:
            value = (0.3 if name.startswith("language_model.") else 0.2) * noise
        parameter.data.copy_(value)
    embedding, stop = model.language_model.get_input_embeddings().weight.data, model.language_model.config.eos_token_id
    newline = embedding[stop].clone()
    embedding[SINGLE_BYTES] *= 0.3  # a small row seldom wins: the texts are mostly words,
    embedding[stop] = 2 * newline  # and about half of them end


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with OPT's special ids, and `</s>` in front of every text as OPT has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,  # `<image>` follows
        special_tokens=[BOS, PAD, EOS, UNK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    assert tokenizer.get_vocab_size() == VOCABULARY, "the sentences are too few for this vocabulary"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return tokenizer


def sentences() -> list[str]:
    """Captions, questions and answers of a small grammar: enough words for a vocabulary."""
    colors = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple", "brown", "gray"]
    things = ["ball", "block", "cup", "car", "boat", "house", "tree", "dog", "cat", "bird", "chair", "clock", "kite"]
    places = ["on the grass", "on a table", "in the water", "under the sun", "at night", "near a wall", "in a field"]
    people = ["a man", "a woman", "a child", "people", "someone"]
    actions = ["standing", "sitting", "walking", "playing with a toy", "holding an umbrella", "looking at the picture"]
    sizes = ["small", "large", "wooden", "round", "old"]
    relations = ["left of", "right of", "above", "below", "next to", "behind", "in front of"]
    counts = ["one", "two", "three", "four", "five", "several", "no"]
    draw = random.Random(SEED)
    texts = [f"a photo of a {color} {thing}\n" for color, thing in itertools.product(colors, things)]
    texts += [f"there are {count} {thing}s {place}\n" for count in counts for thing in things for place in places[:3]]
    texts += [f"{who} {action} {place}\n" for who in people for action in actions for place in places]
    for _ in range(300):
        first, second, color = draw.choice(things), draw.choice(things), draw.choice(colors)
        place, relation = draw.choice(places), draw.choice(relations)
        texts += [
            f"a {color} {first} {relation} a {draw.choice(colors)} {second} {place}\n",
            f"Question: what is {relation} the {first}? Answer: the {color} {second}\n",
            f"Question: what color is the {first}? Answer: {color}\n",
            f"Question: how many {first}s are {place}? Answer: {draw.choice(counts)}\n",
            f"Question: is there a {draw.choice(sizes)} {second} {place}? Short answer: {draw.choice(['yes', 'no'])}\n",
        ]
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The pictures: one file for each way in which a picture file surprises its reader


def write_images(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn clockwise to see it upright, as telephones write it
    ball = drawn(384, 288, ball_on_grass).transpose(Image.Transpose.ROTATE_90)
    ball.save(directory / "ball.jpg", quality=88, exif=rotated)
    boat = drawn(320, 320, boat_at_night)
    boat.putalpha(drawn(320, 320, rounded_card).getchannel("R"))
    boat.save(directory / "boat.png", optimize=True)
    house = drawn(352, 272, house_under_sun)
    house.save(directory / "house.png", optimize=True)
    still = drawn(300, 300, still_life).filter(ImageFilter.GaussianBlur(1)).convert("L")
    still.save(directory / "still.png", optimize=True)


def drawn(width: int, height: int, scene: Callable[[Draw, int, int], None]) -> Image.Image:
    """The scene in RGB, with smooth edges: drawn four times as large."""
    image = Image.new("RGB", (4 * width, 4 * height))
    scene(ImageDraw.Draw(image), 4 * width, 4 * height)
    return image.resize((width, height), Image.Resampling.BOX)


def shade(draw: Draw, width: int, top: int, bottom: int, above: Sequence[int], below: Sequence[int]) -> None:
    """A vertical gradient between two colours."""
    for y in range(top, bottom):
        part = (y - top) / (bottom - top)
        color = tuple(round(a + part * (b - a)) for a, b in zip(above, below, strict=True))
        draw.line([(0, y), (width, y)], fill=color)


def disc(draw: Draw, x: float, y: float, radius: float, color: str) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def house_under_sun(draw: Draw, w: int, h: int) -> None:
    draw.rectangle([0, 0, w, h], fill="#8ecbf2")
    draw.rectangle([0, 0.72 * h, w, h], fill="#6cae4f")
    disc(draw, 0.84 * w, 0.18 * h, 0.09 * h, "#ffd23c")
    draw.rectangle([0.25 * w, 0.45 * h, 0.62 * w, 0.80 * h], fill="#e8dcc0")
    draw.polygon([(0.20 * w, 0.45 * h), (0.435 * w, 0.20 * h), (0.67 * w, 0.45 * h)], fill="#b4452f")
    draw.rectangle([0.40 * w, 0.58 * h, 0.48 * w, 0.80 * h], fill="#6b4429")
    for x in (0.29, 0.52):
        draw.rectangle([x * w, 0.54 * h, (x + 0.07) * w, 0.64 * h], fill="#35607d")


def ball_on_grass(draw: Draw, w: int, h: int) -> None:
    shade(draw, w, 0, h // 2, (120, 180, 235), (215, 235, 250))
    shade(draw, w, h // 2, h, (120, 190, 80), (50, 120, 40))
    draw.ellipse([0.36 * w, 0.76 * h, 0.70 * w, 0.84 * h], fill="#2d6a26")
    disc(draw, 0.5 * w, 0.58 * h, 0.22 * h, "#c8201e")
    disc(draw, 0.47 * w, 0.53 * h, 0.13 * h, "#e0403a")
    disc(draw, 0.45 * w, 0.49 * h, 0.04 * h, "#ffc9c4")


def boat_at_night(draw: Draw, w: int, h: int) -> None:
    shade(draw, w, 0, 2 * h // 3, (8, 12, 40), (40, 52, 110))
    shade(draw, w, 2 * h // 3, h, (20, 40, 80), (4, 10, 30))
    disc(draw, 0.76 * w, 0.2 * h, 0.08 * h, "#f4f0d0")
    for x, y in ((0.10, 0.12), (0.24, 0.30), (0.38, 0.09), (0.55, 0.25), (0.90, 0.42), (0.14, 0.48)):
        disc(draw, x * w, y * h, 0.006 * h, "#ffffff")
    hull = [(0.22 * w, 0.66 * h), (0.74 * w, 0.66 * h), (0.64 * w, 0.76 * h), (0.31 * w, 0.76 * h)]
    draw.polygon(hull, fill="#7c4a2d")
    draw.polygon([(0.47 * w, 0.28 * h), (0.47 * w, 0.63 * h), (0.68 * w, 0.63 * h)], fill="#f2efe6")
    draw.polygon([(0.45 * w, 0.34 * h), (0.45 * w, 0.63 * h), (0.30 * w, 0.63 * h)], fill="#d9483b")


def rounded_card(draw: Draw, w: int, h: int) -> None:
    """An alpha channel: opaque but for the corners."""
    draw.rounded_rectangle([0, 0, w, h], radius=0.15 * w, fill="#ffffff")


def still_life(draw: Draw, w: int, h: int) -> None:
    shade(draw, w, 0, h, (210, 214, 222), (70, 72, 84))
    shade(draw, w, 2 * h // 3, h, (60, 58, 56), (120, 116, 110))
    draw.rectangle([0.12 * w, 0.38 * h, 0.36 * w, 0.74 * h], fill="#303038")
    draw.polygon([(0.55 * w, 0.30 * h), (0.75 * w, 0.78 * h), (0.42 * w, 0.78 * h)], fill="#a8a49a")
    disc(draw, 0.76 * w, 0.66 * h, 0.13 * h, "#ececec")
    disc(draw, 0.73 * w, 0.62 * h, 0.04 * h, "#ffffff")


if __name__ == "__main__":
    sys.exit(main())
