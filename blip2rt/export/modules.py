"""Checkpoint -> one file of weights for the stages that run as modules (`backends/torch_modules.py`)."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..backends.rounded_linears import FLOAT8, INT8, LAYERS, Float8Linear, Int4Linear, group_of, pack4, round_rows
from ..backends.torch_modules import DTYPES
from ..model import Checkpoint
from ..model.retrieval import stored_name
from ..progress import Progress
from ..stages import DECODER
from .rounding import round_weight
from .tensor_files import Entry, write_safetensors

WEIGHTS = "weights.safetensors"
MODULE_PRECISIONS = tuple(DTYPES)
ROUNDED = tuple(LAYERS)  # those among them whose weights have fewer bits than what is computed in


def round_linear(weight: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    """`weight` and `scale` of a rounded layer (`backends/rounded_linears.py`) for a weight [N, K] float32."""
    kind = LAYERS[precision]
    if kind is Int4Linear:
        values, scale = map(torch.from_numpy, round_weight(weight.cpu(), 4, group_of(weight.shape[1])))
        return {"weight": pack4(values).to(weight.device), "scale": scale.to(weight.device, torch.bfloat16)}
    return dict(zip(("weight", "scale"), round_rows(weight, FLOAT8 if kind is Float8Linear else INT8), strict=True))


def _rounded(reference: nn.Module, checkpoint: Checkpoint, precision: str) -> dict[str, Entry]:
    """Weights and scales of the decoder's linear layers."""

    def read(weight: str, part: str) -> torch.Tensor:
        return round_linear(checkpoint.parameter(weight), precision)[part]

    kind, entries, blocks = LAYERS[precision], {}, f"{DECODER}.blocks"
    for name, layer in reference.get_submodule(blocks).named_modules():
        if kind.takes(layer):
            for part, (shape, dtype) in kind.parts(layer).items():
                read_part = partial(read, f"{blocks}.{name}.weight", part)
                entries[f"{blocks}.{name}.{part}"] = Entry(shape, dtype, read_part)
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
    if precision in LAYERS:
        entries |= _rounded(reference, checkpoint, precision)
    bar = Progress("writing weights", len(entries))
    write_safetensors(directory / WEIGHTS, entries, bar.advance)
    bar.close()
    return WEIGHTS
