"""Checkpoint -> one file of weights for the stages that run as modules (`backends/torch_modules.py`)."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..backends import float8
from ..backends.torch_modules import DTYPES
from ..model import Checkpoint
from ..model.retrieval import stored_name
from ..progress import Progress
from ..stages import DECODER
from .tensor_files import Entry, write_safetensors

WEIGHTS = "weights.safetensors"


def _in_float8(reference: nn.Module, checkpoint: Checkpoint) -> dict[str, Entry]:
    """Weights and scales of the decoder's linear layers (`backends/float8.py`)."""

    def read(name: str, part: int) -> torch.Tensor:
        return float8.round_rows(checkpoint.parameter(name))[part]

    entries = {}
    blocks = f"{DECODER}.blocks"
    for name, layer in reference.get_submodule(blocks).named_modules():
        if float8.takes(layer):
            weight = f"{blocks}.{name}.weight"
            rows, columns = reference.get_parameter(weight).shape
            entries[weight] = Entry((rows, columns), float8.TYPE, partial(read, weight, 0))
            entries[f"{blocks}.{name}.scale"] = Entry((rows, 1), torch.float32, partial(read, weight, 1))
    return entries


def write_modules(
    reference: nn.Module, stages: Collection[str], checkpoint: Checkpoint, directory: Path, precision: str
) -> str:
    """Write the parameters of all stages, each once, under this package's names; the file's name.

    Args:
        reference: the model, on the meta device.
        stages: its parts that the engine has.
        checkpoint: where the values come from, one tensor at a time.
        directory: where the file goes.
        precision: of the values.
    """
    dtype = DTYPES[precision]

    def read(name: str) -> torch.Tensor:
        return checkpoint.parameter(name).to(dtype)

    entries = {
        stored_name(name): Entry(tuple(parameter.shape), dtype, partial(read, name))
        for name, parameter in reference.named_parameters()
        if name.partition(".")[0] in stages
    }
    if precision == "fp8":
        entries |= _in_float8(reference, checkpoint)
    bar = Progress("writing weights", len(entries))
    write_safetensors(directory / WEIGHTS, entries, bar.advance)
    bar.close()
    return WEIGHTS
