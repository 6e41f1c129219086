"""Pictures -> how the language model's weights are rounded: GPTQ, one block in memory at a time.

The pictures go through the reference's image encoder and Q-Former, then with a text through the decoder. When the
exporter asks for the first weight of a block, the block runs on what the rounded blocks before it gave, the inputs of
its linear layers are added up, its weights are rounded by them, and it runs once more with those.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import Blip2Config, Checkpoint
from ..model.config import ModelConfig, OPTConfig
from ..progress import progress
from ..stages import DECODER, MASKED, QFORMER, VISION
from .gptq import round_by_moments
from .rounding import round_weight

Array = np.ndarray[Any, Any]
BLOCK = re.compile(r"blocks\.(\d+)\.")


def check_calibration(config: ModelConfig) -> None:
    """Make sure that a model can be calibrated.

    Raises:
        InputError: it has no OPT.
    """
    if not isinstance(config, Blip2Config) or not isinstance(config.text, OPTConfig):
        raise InputError("pictures calibrate the weights of OPT; T5's are rounded without any")


class Calibration:
    """What rounds the weights of a decoder.

    Args:
        checkpoint: of a model with OPT.
        pixel_values: of the pictures, [n, 3, S, S] float32.
        texts: token ids of what stands behind each picture, BOS first.
    """

    def __init__(self, checkpoint: Checkpoint, pixel_values: Array, texts: Sequence[Sequence[int]]):
        self._checkpoint, self._reference = checkpoint, checkpoint.build()
        prefix = self._see(torch.from_numpy(pixel_values))  # [n, Q, D]
        lengths = torch.tensor([prefix.shape[1] + len(ids) for ids in texts])
        num_rows = int(lengths.max())
        rows = torch.arange(num_rows)
        laid = nn.functional.pad(prefix, (0, 0, 0, num_rows - prefix.shape[1]))  # [n, S, D]
        ids = torch.full((len(texts), num_rows), -1)
        for i, text in enumerate(texts):
            ids[i, prefix.shape[1] :] = 0
            ids[i, prefix.shape[1] : int(lengths[i])] = torch.tensor(text)
        self._is_row = rows < lengths[:, None]  # [n, S]; the others are padding
        hidden = (rows[None] > rows[:, None])[None] | ~self._is_row[:, None, :]  # [n, S, S]
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, MASKED)[:, None]
        embedding = self._load(f"{DECODER}.embedding")
        positions = rows.expand(len(texts), -1)
        with torch.no_grad():
            self._hidden = embedding(laid, ids, positions)  # [n, S, D]
        self._rounded: dict[str, tuple[Array, Array]] = {}
        self._num_done = 0  # blocks

    def round(self, name: str, weight: Tensor, bits: int, group: int) -> tuple[Array, Array]:
        """As `round_weight`, of a weight by its name in the decoder; blocks are asked for in their order."""
        block = BLOCK.match(name)
        if bits != 4 or block is None:
            return round_weight(weight, bits, group)
        while self._num_done <= int(block[1]):
            self._round_block(self._num_done, group)
            self._num_done += 1
        return self._rounded.pop(name)

    @torch.no_grad()
    def _round_block(self, index: int, group: int) -> None:
        block = self._load(f"{DECODER}.blocks.{index}")
        linears = {name: child for name, child in block.named_modules() if isinstance(child, nn.Linear)}
        moments = {name: torch.zeros(child.in_features, child.in_features) for name, child in linears.items()}
        handles = [
            child.register_forward_pre_hook(lambda _, given, name=name: self._add(moments[name], given[0]))
            for name, child in linears.items()
        ]
        self._run(block)
        for handle in handles:
            handle.remove()
        for name, child in linears.items():
            values, scales = round_by_moments(child.weight, moments.pop(name) / self._is_row.sum(), group)
            self._rounded[f"blocks.{index}.{name}.weight"] = values, scales
            spread = np.repeat(scales, group, axis=1)[:, : child.in_features]
            child.weight.data = torch.from_numpy(values * spread)
        self._hidden = self._run(block)

    def _add(self, moments: Tensor, inputs: Tensor) -> None:
        rows = inputs[self._is_row]
        moments.addmm_(rows.t(), rows)

    @torch.no_grad()
    def _run(self, block: nn.Module) -> Tensor:
        first_rows = torch.zeros(len(self._hidden), dtype=torch.int64)
        hidden: Tensor = block(self._hidden, first_rows, self._mask, None, None)[0]
        return hidden

    @torch.no_grad()
    def _see(self, pixel_values: Tensor) -> Tensor:
        """Image encoder and Q-Former, block by block: [n, Q, D]."""
        hidden = self._load(f"{VISION}.embedding")(pixel_values)
        number = len(list(self._reference.get_submodule(f"{VISION}.blocks").children()))
        for i in progress(range(number), "seeing the pictures", total=number):
            hidden = self._load(f"{VISION}.blocks.{i}")(hidden)
        image = self._load(f"{VISION}.norm")(hidden)
        prefix: Tensor = self._load(QFORMER)(image)[1]
        return prefix

    def _load(self, name: str) -> nn.Module:
        return self._checkpoint.load(deepcopy(self._reference.get_submodule(name)), name)
