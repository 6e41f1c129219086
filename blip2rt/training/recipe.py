"""A recipe: everything that decides what a training computes, as one TOML file. A key that nobody reads is an error."""

import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import InputError

STAGES = ("vision", "language", "stage1", "retrieval", "stage2", "caption", "vqa")
CONTRASTIVE, GENERATIVE = ("stage1", "retrieval"), ("stage2", "caption", "vqa")
FORMATS = ("coco", "flickr30k", "vqav2", "okvqa", "jsonl", "webdataset", "scenes", "crowds", "text")
CHOICES = {
    "stage": STAGES,
    "data.format": FORMATS,
    "optimizer.name": ("adamw", "muon"),
    "run.precision": ("fp32", "bf16"),
    "run.save_as": ("float32", "float16", "bfloat16"),
}
AT_LEAST = {  # smallest values of numbers; what is not named may be 0
    "run.steps": 1,
    "run.batch_size": 1,
    "run.accumulate": 1,
    "run.save_every": 1,
    "run.log_every": 1,
    "run.keep": 1,
    "text.max_tokens": 4,
    "text.per_picture": 1,
}


@dataclass(frozen=True)
class ModelRecipe:
    """Where the parts come from and which of them learn. Paths are those of transformers, LAVIS and mmpretrain.

    Attributes:
        start: a BLIP-2 checkpoint whose parts are taken as far as this model has them.
        start_config: the sizes of `start` where it is a file, as JSON or a published name.
        config: a `Blip2Config` as JSON or a published name; empty: that of `start`, with the language model of `llm`.
        vision: image encoder alone: what the stage `vision` wrote, or LAVIS's `eva_vit_g.pth`.
        qformer: a BERT in transformers' format, which the Q-Former starts from, as in the paper.
        llm: an OPT or T5 in transformers' format.
        tokenizer, text_tokenizer: of the language model (empty: that of `llm` or `start`); BERT's, for stage 1.
        image_size: side of the pictures in pixels, to which position embeddings are interpolated; 0: the model's.
        train: beginnings of names of the parts that learn; empty: as the paper for this stage.
        lora_rank: above 0: low-rank adapters beside every linear layer of the language model, merged at saving.
        lora_alpha: scale of the adapters, over their rank.
        question_conditioned: the Q-Former reads the question too (paper, section 4.3).
        qformer_dropout: share of the Q-Former's embeddings, attention weights and layers' outputs that is left out;
            LAVIS trains with BERT's 0.1.
    """

    start: str = ""
    start_config: str = ""
    config: str = ""
    vision: str = ""
    qformer: str = ""
    llm: str = ""
    tokenizer: str = ""
    text_tokenizer: str = ""
    image_size: int = 0
    train: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0
    question_conditioned: bool = False
    qformer_dropout: float = 0.0


@dataclass(frozen=True)
class DataRecipe:
    """One data set. `weight`: how often it is drawn from, beside the others. `prompt`: of its captions.

    Scenes, and crowds of things without texts, are composed on the way, of the sprites in the folder `path`.
    """

    format: str
    path: str
    split: str = "train"
    weight: float = 1.0
    prompt: str = ""
    shuffle: int = 1000  # samples among which those of WebDataset are shuffled
    styles: tuple[str, ...] = ()  # art styles of scenes; none: all
    size: int = 112  # of scenes in pixels


@dataclass(frozen=True)
class TextRecipe:
    """Texts. `per_picture`: captions, or questions with answers, that share one pass over their picture."""

    max_tokens: int = 32
    per_picture: int = 1
    question: str = ""  # the question's template; empty: the paper's for the language model


@dataclass(frozen=True)
class ImageRecipe:
    """Pictures. Augmentation is the paper's: a random crop, at least `min_scale` of the area, and a flip.

    `cache`: folder for the frozen image encoder's output, computed once; empty: it is computed at every step.
    """

    augment: bool = True
    min_scale: float = 0.5
    flip: bool = True
    cache: str = ""


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW, or Muon for matrices and AdamW beside it; linear warm-up, then a cosine down to `min_learning_rate`."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 2000
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.98)
    clip: float = 0.0  # largest norm of the gradient; 0: as it is
    vision_layer_decay: float = 1.0  # each block's rate is this times that of the block above it


@dataclass(frozen=True)
class RunRecipe:
    """Lengths in optimiser steps; `batch_size` is one process's, and `accumulate` batches make a step.

    `shard`: each of several processes holds a slice of the model instead of all of it (FSDP2).
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: str = "fp32"
    checkpoint_activations: bool = False
    shard: bool = False
    workers: int = 4
    save_every: int = 1000
    log_every: int = 10
    keep: int = 2
    save_as: str = "float32"


@dataclass(frozen=True)
class Recipe:
    """One training."""

    stage: str
    output: str
    run: RunRecipe
    data: tuple[DataRecipe, ...]
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    images: ImageRecipe = field(default_factory=ImageRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for comparing and logging."""
        return asdict(self)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with single values replaced.

    Args:
        path: the TOML file.
        overrides: "section.key=value", the value as TOML has it; a text needs no quotes.

    Raises:
        InputError: no such file, broken TOML, or keys that are unknown, missing, of another type, out of range or
            contradict each other, all listed at once.
    """
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is not TOML: {error}") from None
    for override in overrides:
        _override(content, override)
    problems: list[str] = []
    recipe = _parse(Recipe, content, "", problems)
    if not problems:
        assert isinstance(recipe, Recipe)
        problems = contradictions(recipe)
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return recipe


def contradictions(recipe: Recipe) -> list[str]:
    """What does not go together in a recipe, one sentence each."""
    found, model, stage = [], recipe.model, recipe.stage
    for name, choices in CHOICES.items():
        section, _, key = name.rpartition(".")
        parts = recipe.data if section == "data" else [getattr(recipe, section) if section else recipe]
        found += [
            f"{name} is {getattr(part, key)!r}, not one of {', '.join(choices)}"
            for part in parts
            if getattr(part, key) not in choices
        ]
    for section in ("run", "text", "optimizer", "images", "model"):
        for key, value in vars(getattr(recipe, section)).items():
            least = AT_LEAST.get(f"{section}.{key}", 0)
            if isinstance(value, int | float) and value < least:
                found.append(f"{section}.{key} is {value}, and must be at least {least}")
    if not recipe.data:
        found.append("there is no [[data]]: name at least one data set")
    if len(recipe.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        found.append(f"optimizer.betas is {list(recipe.optimizer.betas)}, not two numbers from 0 to below 1")
    if recipe.optimizer.warmup_steps >= recipe.run.steps:
        found.append(
            f"optimizer.warmup_steps {recipe.optimizer.warmup_steps} leaves nothing of run.steps {recipe.run.steps}"
        )
    if model.qformer_dropout >= 1:
        found.append(f"model.qformer_dropout is {model.qformer_dropout}, and must be below 1")
    if model.qformer_dropout and stage not in (*CONTRASTIVE, *GENERATIVE):
        found.append(f"model.qformer_dropout is {model.qformer_dropout}, and the stage {stage} has no Q-Former")
    if not 0 < recipe.images.min_scale <= 1:
        found.append(f"images.min_scale is {recipe.images.min_scale}, not a share of the picture above 0")
    if not (model.start or model.config):
        found.append("model.start or model.config must say which model it is")
    if model.lora_rank and stage not in GENERATIVE:
        found.append(f"model.lora_rank is for a language model behind a picture, and the stage is {stage}")
    if model.question_conditioned and stage != "vqa":
        found.append(f"model.question_conditioned is for the stage vqa, not {stage}")
    if recipe.images.cache and recipe.images.augment:
        found.append("images.cache needs images.augment = false: what is cached is one view of each picture")
    if recipe.images.cache and (stage == "vision" or any(_is_encoder(part) for part in model.train)):
        found.append("images.cache needs a frozen image encoder, and here it learns")
    found += [f"data.weight is {data.weight}, and must be above 0" for data in recipe.data if data.weight <= 0]
    kinds = {data.format for data in recipe.data}
    if "text" in kinds and (stage != "language" or len(kinds) > 1):
        found.append(f"data.format text has no pictures: it is for the stage language alone, not {stage}")
    if stage == "language" and kinds != {"text"}:
        found.append("the stage language reads data.format text")
    if stage == "vision" and kinds - {"jsonl", "scenes", "crowds"}:
        found.append("the stage vision needs boxes, and their labels beforehand: data.format jsonl, scenes or crowds")
    if stage != "vision" and "crowds" in kinds:
        found.append(f"data.format crowds has no texts: it is for the stage vision, not {stage}")
    if stage in CONTRASTIVE and recipe.run.batch_size < 2:
        found.append(f"run.batch_size 1 leaves the stage {stage} no other picture to tell a text from")
    if recipe.images.cache and kinds & {"webdataset", "scenes"}:
        found.append("images.cache is for data sets in files, and WebDataset and scenes are streamed")
    return found


def _is_encoder(part: str) -> bool:
    """Whether a beginning of names takes in more of the image encoder than its norm, which comes behind the cache."""
    return part == "vision" or (part.startswith("vision.") and not part.startswith("vision.norm"))


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise InputError(f"{override!r}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        if isinstance(content, list):
            content = content[int(section)] if section.isdecimal() and int(section) < len(content) else None
        else:
            content = content.setdefault(section, {})
        if not isinstance(content, dict | list):
            raise InputError(f"{override!r}: the recipe has no section {section!r}")
    if isinstance(content, list):
        raise InputError(f"{override!r}: say which of the {len(content)} sections, as in data.0.path=...")
    content[key] = value


def _parse(kind: Any, table: Any, where: str, problems: list[str]) -> Any:
    """A dataclass from a TOML table."""
    if not isinstance(table, Mapping):
        problems.append(f"{where or 'the recipe'} is {table!r}, not a table")
        return None
    known = {item.name: item for item in fields(kind)}
    for name in table.keys() - known.keys():
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else f": it has {', '.join(known)}"
        problems.append(f"{where}{name} is unknown{hint}")
    problems += [
        f"{where}{name} is missing" for name, item in known.items() if name not in table and _is_required(item)
    ]
    hints = get_type_hints(kind)
    values = {name: _value(hints[name], table[name], f"{where}{name}", problems) for name in known if name in table}
    return kind(**values) if not problems else None


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _value(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if is_dataclass(kind):
        return _parse(kind, value, f"{where}.", problems)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            problems.append(f"{where} is {value!r}, not a list")
            return ()
        return tuple(_value(get_args(kind)[0], item, f"{where}.{i}", problems) for i, item in enumerate(value))
    assert get_origin(kind) not in (Union, types.UnionType)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{where} is {value!r}, not of type {kind.__name__}")
    return value
