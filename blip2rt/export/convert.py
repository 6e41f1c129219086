"""A checkpoint in one format -> the same tensors, bit for bit, in another.

transformers' checkpoints say their sizes in config.json. The files of LAVIS and mmpretrain do not, so the same JSON is
written beside them, and `--config` reads it there.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ExportError, InputError
from ..model import Checkpoint, CheckpointSource
from ..model.config import RetrievalConfig
from ..model.formats import NORM_EPS, unused_blocks
from ..model.names import FORMATS, LANGUAGE_MODEL, LAVIS, MMPRETRAIN, QFORMER_PREFIXES, TRANSFORMERS, NoPlaceError
from ..progress import Progress
from .tensor_files import Entry, write_safetensors, write_torch
from .tokenizer_files import QUESTION_FOLDER

# Files of a transformers checkpoint that are neither weights nor config.json.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
# What the code of LAVIS and mmpretrain fixes and their files cannot say otherwise.
FIXED = {
    "vision.hidden_act": "gelu",
    "vision.layer_norm_eps": 1e-6,
    "qformer.hidden_act": "gelu",
    "qformer.layer_norm_eps": 1e-12,
    "qformer.cross_attention_frequency": 2,
}


def convert_checkpoint(
    source: str | Path | CheckpointSource, output: str | Path, to: str, *, tokenizer: str | Path | None = None
) -> list[str]:
    """Write a checkpoint in another format. Peak memory is a few tensors, not the model.

    Args:
        source: the checkpoint, as `export_engine` takes it. Parts that were saved apart are put together.
        output: for transformers a directory; for LAVIS and mmpretrain a .pth, and beside it its sizes as .json.
        to: one of FORMATS.
        tokenizer: for transformers, the directory of the tokenizer; None: the model's own, or that of `llm`.

    Returns:
        What the other format's code will compute otherwise from the same tensors, one sentence each.

    Raises:
        InputError: an unknown format, or an output that exists.
        CheckpointError: the checkpoint cannot be used, or the other format has no place for a part of it.
        ExportError: there is no room for it.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is not one of {', '.join(FORMATS)}")
    target = Path(output)
    for path in (target, target.with_suffix(".json")) if to != TRANSFORMERS else (target,):
        if path.exists():
            raise InputError(f"{path} exists, and a conversion replaces nothing: choose another name")
    if to != TRANSFORMERS and target.suffix not in (".pth", ".pt", ".bin"):
        raise InputError(f"{target}: a file of {to} is called .pth, so call it {target}.pth")
    checkpoint = Checkpoint(source, all_blocks=True)
    companions = Path(tokenizer) if tokenizer else checkpoint.directory
    if to == TRANSFORMERS and companions is None:
        raise CheckpointError(f"{checkpoint.source.model} holds no tokenizer: pass its directory with --tokenizer")
    entries = _entries(checkpoint, to)
    needed = sum(entry.num_bytes for entry in entries.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ExportError(f"{target} needs {needed} bytes and {target.parent} has {free} free: choose another place")
    bar = Progress("converting", len(entries))
    with _beside(target) as folder:
        config = json.dumps(checkpoint.config_json, indent=2) + "\n"
        if to == TRANSFORMERS:
            written = folder / target.name
            written.mkdir()
            (written / "config.json").write_text(config, "utf-8")
            for place in filter(None, (checkpoint.directory, companions)):  # the tokenizer that was named comes last
                for name in COMPANIONS:
                    if (place / name).is_file():
                        shutil.copy(place / name, written / name)
                if (place / QUESTION_FOLDER).is_dir():
                    shutil.copytree(place / QUESTION_FOLDER, written / QUESTION_FOLDER, dirs_exist_ok=True)
            write_safetensors(written / "model.safetensors", entries, bar.advance)
            Checkpoint(written)  # strict: as much as the format wants, and no more
        else:
            written, sizes = folder / target.name, folder / target.with_suffix(".json").name
            sizes.write_text(config, "utf-8")
            extra: dict[str, Any] = {} if to == LAVIS else {"meta": {}}
            write_torch(written, "model" if to == LAVIS else "state_dict", entries, extra, bar.advance)
            Checkpoint(CheckpointSource(written, config=sizes), all_blocks=True)
            os.rename(sizes, target.with_suffix(".json"))
        bar.close()
        os.rename(written, target)
    return _differences(checkpoint, to)


def _entries(checkpoint: Checkpoint, to: str) -> dict[str, Entry]:
    """The tensors of the other format by their names in it, in the order of the model."""
    old, new = checkpoint.names, checkpoint.names.of(to)
    if to == MMPRETRAIN and old.language_model != "opt":
        raise CheckpointError("mmpretrain has no BLIP-2 with FLAN-T5: convert to transformers or lavis")
    entries: dict[str, Entry] = {}
    homeless = []
    for name in checkpoint.parameter_names():
        try:
            keys = new(name)
        except NoPlaceError:
            homeless.append(name)
            continue
        for i, key in enumerate(keys):
            if key is not None:
                entries[new.stored_as(key)] = _entry(checkpoint, old(name), i, len(keys))
            else:
                _check_zeros(checkpoint, old(name), i, len(keys))
    if homeless:
        raise CheckpointError(
            f"{to}'s format has no place for {len(homeless)} parameters of {checkpoint.source.model}, which would be "
            f"lost: {', '.join(homeless[:5])}" + (" ..." if len(homeless) > 5 else "")
        )
    for copy, original in old.copies.items():  # kept where the source keeps them
        if {copy, original} <= checkpoint.tensors.shapes.keys():
            key = new.stored_as(copy)
            if not copy.startswith(LANGUAGE_MODEL):
                key = copy.replace(QFORMER_PREFIXES[old.format], QFORMER_PREFIXES[to])
            entries.setdefault(key, _entry(checkpoint, (copy,), 0, 1))
    return entries


def _entry(checkpoint: Checkpoint, stored: tuple[str | None, ...], part: int, parts: int) -> Entry:
    """One of `parts` equal parts of the join of the stored tensors."""
    own = stored[part] if len(stored) == parts else None
    if own is not None:
        return Entry(checkpoint.tensors.shapes[own], checkpoint.tensors.dtypes[own], lambda: checkpoint.stored(own))
    first = next(key for key in stored if key is not None)
    rows, *rest = checkpoint.tensors.shapes[first]
    shape = (rows * len(stored) // parts, *rest)
    return Entry(
        shape, checkpoint.tensors.dtypes[first], lambda: _join(checkpoint, stored).chunk(parts)[part].contiguous()
    )


def _join(checkpoint: Checkpoint, stored: tuple[str | None, ...]) -> Tensor:
    tensors = {key: checkpoint.stored(key) for key in stored if key is not None}
    zeros = torch.zeros_like(next(iter(tensors.values())))
    return torch.cat([zeros if key is None else tensors[key] for key in stored])


def _check_zeros(checkpoint: Checkpoint, stored: tuple[str | None, ...], part: int, parts: int) -> None:
    """A part that the other format leaves out, because it knows it to be zero."""
    if len(stored) == parts and stored[part] is None:
        return
    values = _join(checkpoint, stored).chunk(parts)[part]
    if values.any():
        raise CheckpointError(
            f"{checkpoint.tensors.place(next(filter(None, stored)))} is (query, key, value), and its key part is not "
            f"zero (up to {float(values.abs().max()):g}): LAVIS and mmpretrain have no place for it"
        )


def _differences(checkpoint: Checkpoint, to: str) -> list[str]:
    """What the code of the other format computes otherwise from the same tensors."""
    source, vision = checkpoint.contents.format, checkpoint.config.vision
    text = checkpoint.config_json.get("text_config") or {}
    found = []
    eps = NORM_EPS.get(to, vision.layer_norm_eps)
    if eps != vision.norm_eps:
        found.append(
            f"{source} normalises the image encoder's output with eps {vision.norm_eps:g}, {to} with {eps:g}: "
            "outputs differ by some 1e-6"
        )
    theirs = unused_blocks(to, checkpoint.contents.is_retrieval)
    if theirs != checkpoint.contents.unused_blocks:
        blocks = vision.num_hidden_layers
        found.append(
            f"all {blocks} blocks of the image encoder are kept, of which {source} uses "
            f"{blocks - checkpoint.contents.unused_blocks} and {to} {blocks - theirs}: outputs differ "
            "(`blip2rt export --vision-layers` chooses)"
        )
    if checkpoint.config.qformer.use_qformer_text_input and not isinstance(checkpoint.config, RetrievalConfig):
        found.append(
            f"the Q-Former reads the question beside its queries, and {to}'s code gives it none: its answers are those "
            "of a model that sees without knowing what is asked"
        )
    if to != TRANSFORMERS:
        for name, fixed in FIXED.items():
            part, field = name.split(".")
            value = getattr(getattr(checkpoint.config, part), field)
            if value != fixed and not vision.pre_norm:
                found.append(f"{name} is {value}, and {to}'s code has {fixed}")
        if isinstance(checkpoint.config, RetrievalConfig) and not checkpoint.config.has_training_parts:
            found.append(
                f"{source} keeps no temperature and no captioning head of stage 1: {to}'s code starts them anew"
            )
        if text.get("model_type") == "t5" and text.get("dense_act_fn", "gelu") != "gelu":
            found.append(f"the language model's activation is {text['dense_act_fn']}, and {to}'s code has gelu")
    return found


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` to build it in; gone afterwards."""
    folder = target.with_name(f".{target.name}.converting-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
