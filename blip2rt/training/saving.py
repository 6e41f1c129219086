"""A trained model -> a checkpoint as transformers has it, which `blip2rt export` takes as it is."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OutputError
from ..export.convert import COMPANIONS
from ..export.tensor_files import Entry, write_safetensors
from ..export.tokenizer_files import QUESTION_FOLDER
from ..model.names import TRANSFORMERS, Names, NoPlaceError
from ..model.retrieval import stored_name
from .lora import merged_parameters
from .weights import TRAINING_PARTS


def write_checkpoint(
    directory: Path,
    model: nn.Module,
    names: Names,
    config: Mapping[str, Any],
    companions: Mapping[Path, Sequence[str]],
    dtype: torch.dtype,
    prefix: str = "",
    processor: str | None = None,
    questions: Path | None = None,
) -> None:
    """Replace `directory` by a checkpoint, whole or not at all.

    Args:
        directory: where it goes.
        model: whose parameters have the names of this package. Adapters are merged.
        names: transformers' names for them.
        config: its config.json.
        companions: directories, and what is copied from each where it is there.
        dtype: of the stored values.
        prefix: what is left out at the beginning of names: a language model alone has no "language_model.".
        processor: its preprocessor_config.json, where no companion brings one.
        questions: directory of the tokenizer of a Q-Former that reads questions.

    Raises:
        OutputError: it cannot be written.
    """
    assert names.format == TRANSFORMERS
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for name, parameter in merged_parameters(model):
        name = stored_name(name)
        try:
            keys = names(name)
        except (NoPlaceError, KeyError):  # KeyError: the head of the stage `vision`, which no table knows
            extra[name] = parameter.detach()
            continue
        for key, part in zip(keys, parameter.detach().chunk(len(keys)) if parameter.ndim else [parameter], strict=True):
            assert key is not None
            tensors[key.removeprefix(prefix)] = part
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        building.mkdir(parents=True)
        for place, files in companions.items():
            for file in files:
                if (place / file).is_file():
                    shutil.copy(place / file, building / file)
        if processor and not any(
            (building / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
        ):
            (building / "preprocessor_config.json").write_text(processor, "utf-8")
        if questions is not None:
            (building / QUESTION_FOLDER).mkdir()
            for file in COMPANIONS:
                if (questions / file).is_file():
                    shutil.copy(questions / file, building / QUESTION_FOLDER / file)
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_safetensors(building / "model.safetensors", _entries(tensors, dtype), lambda: None)
        if extra:
            write_safetensors(building / TRAINING_PARTS, _entries(extra, torch.float32), lambda: None)
        if directory.exists():
            old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(4)}")
            os.rename(directory, old)
            os.rename(building, directory)
            shutil.rmtree(old)
        else:
            os.rename(building, directory)
    except OSError as error:
        raise OutputError(
            f"the checkpoint {directory} cannot be written ({error.strerror or error}): make room and run the same "
            "command again, the training goes on from its last state"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _entries(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Entry]:
    def entry(tensor: Tensor) -> Entry:
        return Entry(tuple(tensor.shape), dtype, lambda: tensor.to("cpu", dtype))

    return {name: entry(tensor) for name, tensor in tensors.items()}


def language_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone."""
    return {"architectures": ["OPTForCausalLM"], **config["text_config"]}
