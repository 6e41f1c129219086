"""A recipe -> the model with its first weights, its objective, and what goes into its checkpoints."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.examples import BadRecords, read_examples
from ..data.scenes import PLACES
from ..errors import CheckpointError, InputError
from ..export import read_normalisation
from ..export.convert import COMPANIONS
from ..export.tokenizer_files import QUESTION_FOLDER, read_tokenizer
from ..model import Blip2, Blip2Config, Blip2Retrieval, Checkpoint, RetrievalConfig
from ..model.config import ModelConfig, OPTConfig, T5Config
from ..model.named_configs import read_config
from ..model.names import LANGUAGE_MODEL, TRANSFORMERS, Names
from ..model.opt import OPT
from ..model.sources import find_directory
from ..model.vision import VisionEncoder
from ..model.weight_files import read_json
from .lora import add_adapters
from .recipe import CONTRASTIVE, GENERATIVE, Recipe
from .saving import language_model_config, write_checkpoint
from .streams import open_scenes
from .tasks import (
    Contrastive,
    Generative,
    Language,
    Task,
    Vision,
    checkpoint_activations,
    drop_out,
    freeze,
)
from .texts import BertText, ContrastiveRows, GenerativeRows, LanguageRows, LanguageText, Rows, VisionRows
from .weights import fill, is_tied, open_start

IMAGE = "<image>"  # stands for a query slot in the text that transformers sees
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = tuple(name for name in COMPANIONS if name not in (*PROCESSORS, "generation_config.json"))


@dataclass(frozen=True)
class Built:
    """What the loop needs of a model.

    Attributes:
        task: model and objective; frozen as the recipe says.
        rows: what it reads of examples.
        image: size, mean and std of its pictures; None: it has none.
        fresh: parameters that started from the seed and not from a checkpoint.
        save: writes a transformers checkpoint into a directory.
    """

    task: Task
    rows: Rows
    image: tuple[int, Sequence[float], Sequence[float]] | None
    fresh: list[str]
    save: Callable[[Path], None]


def build(recipe: Recipe) -> Built:
    """Build what a recipe describes.

    Raises:
        CheckpointError: a checkpoint is missing, damaged, or does not fit the recipe.
        InputError: a part that the stage needs and the recipe does not name, or names that do not exist in the model.
    """
    start = open_start(recipe.model) if recipe.model.start else None
    config_json = _config(recipe, start)
    config: ModelConfig
    if recipe.stage in CONTRASTIVE:
        task, rows, config = _contrastive(recipe, config_json, start)
    elif recipe.stage in GENERATIVE:
        task, rows, config = _generative(recipe, config_json, start)
    else:
        task, rows, config = _alone(recipe, config_json, start)
    text = config.text if isinstance(config, Blip2Config) else None
    fresh = fill(task.model, recipe.model, start, config.vision, text, recipe.seed)
    unknown = freeze(task, recipe.model.train or task.trained)
    if recipe.model.train and unknown:
        parts = sorted({name.split(".")[0] for name, _ in task.model.named_parameters()})
        raise InputError(f"model.train names {', '.join(unknown)}, and the model has {', '.join(parts)}")
    parameters = dict(task.model.named_parameters())
    unlearnt = [name for name in fresh if not parameters[name].requires_grad]
    if unlearnt:
        raise CheckpointError(
            f"{len(unlearnt)} parameters are in no checkpoint of the recipe and do not learn, first {unlearnt[0]}: "
            "name their checkpoint in [model], or the part in model.train"
        )
    if recipe.model.lora_rank:
        add_adapters(task.model, recipe.model.lora_rank, recipe.model.lora_alpha, recipe.seed)
    if recipe.model.qformer_dropout:
        drop_out(task, recipe.model.qformer_dropout)
    if recipe.run.checkpoint_activations:
        checkpoint_activations(task)
    image = None
    if recipe.stage != "language":
        image = (config.vision.image_size, *read_normalisation(start.directory if start else None))
    return Built(task, rows, image, fresh, partial(_save, recipe, task.model, config, config_json, start))


def _config(recipe: Recipe, start: Checkpoint | None) -> dict[str, Any]:
    """The `Blip2Config` of what is trained, as JSON."""
    config = read_config(recipe.model.config) if recipe.model.config else dict(start.config_json if start else {})
    if start is not None and isinstance(start.config, RetrievalConfig) and not recipe.model.config:
        config.pop("text_config", None)  # transformers writes one, of no model
    if recipe.model.llm and not recipe.model.config:
        config["text_config"] = read_json(find_directory(recipe.model.llm, "model.llm") / "config.json")
    if recipe.model.image_size:
        config["vision_config"] = dict(config.get("vision_config") or {}) | {"image_size": recipe.model.image_size}
    is_contrastive = recipe.stage in CONTRASTIVE
    reads_text = is_contrastive or recipe.model.question_conditioned
    config["qformer_config"] = dict(config.get("qformer_config") or {}) | {"use_qformer_text_input": reads_text}
    name = "Blip2ForImageTextRetrieval" if is_contrastive else "Blip2ForConditionalGeneration"
    config["architectures"] = [name]
    if is_contrastive:
        config.pop("text_config", None)
        config.pop("image_token_index", None)  # transformers would cut as many words as queries off every text
    elif "text_config" not in config and recipe.stage != "vision":
        raise InputError(f"the stage {recipe.stage} has a language model: name it with model.llm or model.config")
    if recipe.stage in GENERATIVE and config.get("image_token_index") is None:
        image = read_tokenizer(_tokenizer(recipe, start), "model.tokenizer").get_vocab().get(IMAGE)
        if image is not None:
            config["image_token_index"] = image
    return config


def _contrastive(
    recipe: Recipe, config_json: Mapping[str, Any], start: Checkpoint | None
) -> tuple[Task, Rows, RetrievalConfig]:
    sizes = RetrievalConfig.from_transformers(config_json)
    config = RetrievalConfig(
        sizes.vision, sizes.qformer, sizes.num_query_tokens, sizes.image_text_hidden_size, has_training_parts=True
    )
    text = BertText(_text_tokenizer(recipe, start), config.qformer.vocab_size, recipe.text.max_tokens)
    return Contrastive(Blip2Retrieval(config), text.decode_id), ContrastiveRows(text), config


def _generative(
    recipe: Recipe, config_json: Mapping[str, Any], start: Checkpoint | None
) -> tuple[Task, Rows, Blip2Config]:
    config = Blip2Config.from_transformers(config_json)
    config = replace(config, text=replace(config.text, tie_word_embeddings=_is_tied(recipe, config, start)))
    text = LanguageText(_tokenizer(recipe, start), config.text, recipe.text)
    question = None
    if recipe.model.question_conditioned:
        question = BertText(_text_tokenizer(recipe, start), config.qformer.vocab_size, recipe.text.max_tokens)
    model = Blip2(config)
    if isinstance(config.text, T5Config):  # one embedding, which the engines hold once each
        model.decoder.embedding.token = model.encoder.embedding.token
    return Generative(model), GenerativeRows(text, recipe.data, recipe.text.per_picture, question), config


def _is_tied(recipe: Recipe, config: Blip2Config, start: Checkpoint | None) -> bool:
    """Whether the output layer is the token embedding: the weights know, and T5's configurations do not."""
    if recipe.model.llm:
        return is_tied(recipe.model.llm, config.text)
    if start is not None and isinstance(start.config, Blip2Config):
        return start.config.text.tie_word_embeddings
    return config.text.tie_word_embeddings


def _alone(recipe: Recipe, config_json: Mapping[str, Any], start: Checkpoint | None) -> tuple[Task, Rows, Blip2Config]:
    """A part on its own: image encoder or language model."""
    config = Blip2Config.from_transformers(config_json)
    if recipe.stage == "vision":
        rows = VisionRows(*_classes(recipe), config.vision.image_size // config.vision.patch_size)
        return Vision(VisionEncoder(config.vision), rows.num_classes), rows, config
    if not isinstance(config.text, OPTConfig):
        raise InputError("the stage language trains an OPT, and the configuration's language model is T5")
    return (
        Language(OPT(config.text)),
        LanguageRows(LanguageText(_tokenizer(recipe, start), config.text, recipe.text)),
        config,
    )


def _classes(recipe: Recipe) -> tuple[set[str], set[str]]:
    """Labels of backgrounds and of things in all data sets."""
    backgrounds: set[str] = set()
    things: set[str] = set()
    for data in recipe.data:
        if data.format == "jsonl":
            for example in read_examples(data.format, Path(data.path), data.split, BadRecords()):
                backgrounds.add(example.background)
                things |= {box.label for box in example.boxes}
        else:
            backgrounds |= set(PLACES)
            colors = open_scenes(data, recipe.seed).sprites.colors
            things |= {f"{color} {name}" if color else name for name, found in colors.items() for color in found}
    return backgrounds, things


def _tokenizer(recipe: Recipe, start: Checkpoint | None) -> Path:
    """The directory of the language model's tokenizer."""
    named = recipe.model.tokenizer or recipe.model.llm
    if named:
        return find_directory(named, "model.tokenizer")
    if start is None or start.directory is None or isinstance(start.config, RetrievalConfig):
        raise InputError("model.tokenizer must name the directory of the language model's tokenizer")
    return start.directory


def _text_tokenizer(recipe: Recipe, start: Checkpoint | None) -> Path:
    """The directory of BERT's tokenizer."""
    named = recipe.model.text_tokenizer or recipe.model.qformer
    if named:
        return find_directory(named, "model.text_tokenizer")
    if start is not None and start.directory is not None:
        is_retrieval = isinstance(start.config, RetrievalConfig)
        own = start.directory if is_retrieval else start.directory / QUESTION_FOLDER
        if own.is_dir():
            return own
    raise InputError("model.text_tokenizer must name the directory of BERT's tokenizer")


def _save(
    recipe: Recipe,
    model: nn.Module,
    config: ModelConfig,
    config_json: dict[str, Any],
    start: Checkpoint | None,
    directory: Path,
) -> None:
    companions: dict[Path, Sequence[str]] = {}
    if recipe.stage in CONTRASTIVE:
        companions[_text_tokenizer(recipe, start)] = TOKENIZERS
    elif recipe.stage != "vision":
        companions[_tokenizer(recipe, start)] = TOKENIZERS
    questions = _text_tokenizer(recipe, start) if recipe.model.question_conditioned else None
    if start is not None and start.directory is not None and recipe.stage != "language":
        companions[start.directory] = (*companions.get(start.directory, ()), *PROCESSORS)
    text = config.text if isinstance(config, Blip2Config) else OPTConfig()  # whose names no retrieval model has
    is_gated = not isinstance(text, T5Config) or text.is_gated_act
    names = Names(TRANSFORMERS, text.model_type, config.vision.pre_norm, is_gated)
    dtype: torch.dtype = getattr(torch, recipe.run.save_as)
    if recipe.stage == "language":
        config_json = language_model_config(config_json)
    prefix = LANGUAGE_MODEL if recipe.stage == "language" else ""
    processor = None
    if recipe.stage != "language":
        mean, std = read_normalisation(start.directory if start else None)
        processor = image_processor(config.vision.image_size, mean, std)
    write_checkpoint(directory, model, names, config_json, companions, dtype, prefix, processor, questions)


def image_processor(size: int, mean: Sequence[float], std: Sequence[float]) -> str:
    """preprocessor_config.json of pictures that are resized to a square, as `preprocess` does it."""
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return json.dumps(settings, indent=2) + "\n"
