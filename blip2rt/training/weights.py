"""Where a model's first weights come from: checkpoints of the whole or of its parts, or the seed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.checkpoint import POSITION, Checkpoint, resize_position
from ..model.config import T5Config, TextConfig, VisionConfig
from ..model.formats import recognise
from ..model.names import LANGUAGE_MODEL, LAVIS, QFORMER_PREFIXES, TRANSFORMERS, VISION_PREFIXES, Names
from ..model.retrieval import stored_name
from ..model.sources import CheckpointSource, find_directory
from ..model.weight_files import WeightFile, open_weight_file, open_weight_files
from .recipe import ModelRecipe

TRAINING_PARTS = "training_parts.safetensors"  # what stage 1 trains and transformers' format has no place for
PUBLISHED_WIDTH, PUBLISHED_STD = 768, 0.02  # BERT's: where weights start from; at other widths outputs keep their size

Find = Callable[[str], Tensor | None]


def open_start(recipe: ModelRecipe) -> Checkpoint:
    """The checkpoint `model.start`. A file of LAVIS's may lack parts, which the recipe names.

    Raises:
        CheckpointError: it cannot be used.
    """
    path, size = Path(recipe.start), recipe.image_size or None
    if not path.is_file():
        return Checkpoint(CheckpointSource(recipe.start, image_size=size))
    contents = recognise(open_weight_file(path).shapes, path)
    needs_llm = not (contents.has_llm or contents.is_retrieval)
    return Checkpoint(
        CheckpointSource(
            path,
            recipe.start_config or None,
            vision=None if contents.has_vision else recipe.vision or None,
            llm=(recipe.llm or None) if needs_llm else None,
            image_size=size,
        )
    )


def fill(
    model: nn.Module,
    recipe: ModelRecipe,
    start: Checkpoint | None,
    vision: VisionConfig,
    text: TextConfig | None,
    seed: int,
) -> list[str]:
    """Give every parameter of `model` its first value; the names of those that start from the seed.

    Parts of their own (`vision`, `llm`) come before `start`, and BERT behind it.

    Raises:
        CheckpointError: a source cannot be read, or has parameters of other shapes.
    """
    finders: list[Find] = []
    if recipe.vision:
        finders.append(_vision_finder(recipe.vision, vision))
    if recipe.llm and text is not None:
        finders.append(_language_finder(recipe.llm, text))
    if start is not None:
        finders.append(_start_finder(start))
    if recipe.qformer:  # last: it brings the text branch to a Q-Former that has learnt without
        finders.append(_bert_finder(recipe.qformer))
    fresh, misshaped = [], []
    for name, parameter in model.named_parameters():
        found = next((tensor for find in finders if (tensor := find(stored_name(name))) is not None), None)
        if found is None:
            fresh.append(name)
            found = initial(name, parameter.shape, seed)
        elif name.endswith(("embedding.token.weight", "itg.bias")) and len(found) < len(parameter):
            found = _with_more_words(found, len(parameter))  # [DEC] is no word of BERT's
        if found.shape != parameter.shape:
            misshaped.append(f"{name} is {list(found.shape)}, not {list(parameter.shape)}")
            continue
        with torch.no_grad():
            parameter.copy_(found)
    if misshaped:
        more = f", and {len(misshaped) - 10} more" if len(misshaped) > 10 else ""
        raise CheckpointError("the checkpoints do not fit the recipe's model: " + ", ".join(misshaped[:10]) + more)
    return fresh


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What a parameter starts from without a checkpoint: the same whatever other parameters there are."""
    if name == "temperature":
        return torch.tensor(0.07)
    is_norm = ".norm" in name or name.startswith("norm") or "norm." in name
    if len(shape) < 2:
        return torch.ones(shape) if is_norm and name.endswith("weight") else torch.zeros(shape)
    std = PUBLISHED_STD
    if not name.endswith(
        ("token.weight", "position.weight", "position", "query_tokens", "class_token", "bucket.weight")
    ):
        std *= (PUBLISHED_WIDTH / shape[1:].numel()) ** 0.5
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0, std, generator=generator)


def _start_finder(start: Checkpoint) -> Find:
    known = set(start.parameter_names())
    extra: Mapping[str, Tensor] = {}
    if start.directory is not None and (start.directory / TRAINING_PARTS).is_file():
        (file,) = (open_weight_file(start.directory / TRAINING_PARTS),)
        extra = {name: file.read(name).float() for name in file.shapes}
    return lambda name: start.parameter(name) if name in known else extra.get(name)


def _vision_finder(source: str, config: VisionConfig) -> Find:
    """An image encoder alone, in transformers' names or in LAVIS's with or without their prefix."""
    path = Path(source)
    files: list[WeightFile] = [open_weight_file(path)] if path.is_file() else []
    files = files or open_weight_files(find_directory(source, "model.vision"))
    is_lavis = any(name.removeprefix(VISION_PREFIXES[LAVIS]) == "cls_token" for file in files for name in file.shapes)
    names = Names(LAVIS if is_lavis else TRANSFORMERS, pre_norm=config.pre_norm)
    find = _finder(files, names, VISION_PREFIXES[LAVIS] if is_lavis else "")

    def found(name: str) -> Tensor | None:
        tensor = find(name) if name.startswith("vision.") else None
        if tensor is None or name != POSITION:
            return tensor
        return resize_position(tensor.flatten(0, -2), config)[None]

    return found


def _bert_finder(source: str) -> Find:
    """A BERT: LAVIS's names of the Q-Former are its own; the queries' feed-forward layers start as the text's."""
    files = open_weight_files(find_directory(source, "model.qformer"))
    old = {"gamma": "weight", "beta": "bias"}  # what TensorFlow called them
    stored = {}
    for file in files:
        for name in file.shapes:
            module, _, leaf = name.rpartition(".")
            stored[f"{module}.{old.get(leaf, leaf)}".removeprefix("bert.")] = file, name
    names = Names(LAVIS)

    def found(name: str) -> Tensor | None:
        if not name.startswith(("qformer.", "itg.")) or "projection" in name or ".itc." in name:
            return None
        keys = [
            str(key).removeprefix(QFORMER_PREFIXES[LAVIS]).removeprefix("bert.").replace("_query", "")
            for key in names(name)
        ]
        if not all(key in stored for key in keys):
            return None
        return torch.cat([stored[key][0].read(stored[key][1]).float() for key in keys])

    return found


def _language_finder(source: str, config: TextConfig) -> Find:
    files = open_weight_files(find_directory(source, "model.llm"))
    is_gated = not isinstance(config, T5Config) or config.is_gated_act
    find = _finder(files, Names(TRANSFORMERS, config.model_type, is_gated=is_gated), LANGUAGE_MODEL)
    return lambda name: find(name) if name.startswith(("encoder.", "decoder.")) else None


def is_tied(llm: str, config: TextConfig) -> bool:
    """Whether a language model's output layer is its token embedding, which files may hold twice."""
    files = open_weight_files(find_directory(llm, "model.llm"))
    find = _finder(files, Names(TRANSFORMERS, config.model_type), LANGUAGE_MODEL)
    head, embedding = find("decoder.head.lm_head.weight"), find("decoder.embedding.token.weight")
    return head is None or (embedding is not None and torch.equal(head, embedding))


def _finder(files: list[WeightFile], names: Names, prefix: str) -> Find:
    """Tensors by our names; a file may leave out `prefix`."""
    where = {name: (file, name) for file in files for name in file.shapes}
    # Meta's first OPT files leave out the outermost module too
    where |= {f"model.{name}": place for name, place in where.items() if name.startswith("decoder.")}

    def found(name: str) -> Tensor | None:
        parts: list[Tensor | None] = []
        for key in names(name):
            place = None if key is None else where.get(key) or where.get(key.removeprefix(prefix))
            if key is not None and place is None:
                return None
            parts.append(None if place is None else place[0].read(place[1]).float())
        first = next(part for part in parts if part is not None)
        return (
            torch.cat([torch.zeros_like(first) if part is None else part for part in parts])
            if len(parts) > 1
            else first
        )

    return found


def _with_more_words(tensor: Tensor, rows: int) -> Tensor:
    """Rows behind the last, each the mean of all."""
    return torch.cat((tensor, tensor.mean(0, keepdim=True).expand(rows - len(tensor), *tensor.shape[1:])))
