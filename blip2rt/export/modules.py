"""Checkpoint -> one file of weights for the stages that run as modules (`backends/torch_modules.py`)."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..backends.torch_modules import DTYPES
from ..model import Checkpoint
from ..model.retrieval import stored_name
from ..progress import Progress
from .tensor_files import Entry, write_safetensors

WEIGHTS = "weights.safetensors"


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
    bar = Progress("writing weights", len(entries))
    write_safetensors(directory / WEIGHTS, entries, bar.advance)
    bar.close()
    return WEIGHTS
