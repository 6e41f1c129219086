"""Pictures -> how the language model's weights are rounded: GPTQ, one block in memory at a time.

The pictures go through the reference's image encoder and Q-Former, then with a text through the language model. When
the exporter asks for the first weight of a block, the block runs on what the rounded blocks before it gave, the inputs
of its linear layers are added up, its weights are rounded by them, and it runs once more with those. T5's encoder reads
the text behind the picture, as a prompt is, and its decoder writes it, as a caption is.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import Blip2Config, Checkpoint
from ..model.config import ModelConfig, T5Config
from ..native.twin import GROUP
from ..progress import progress
from ..stages import DECODER, ENCODER, MASKED, QFORMER, VISION
from .gptq import round_by_moments
from .rounding import round_weight

Array = np.ndarray[Any, Any]
Rounded = tuple[Array, Array]  # as `round_weight`
BLOCK = re.compile(r"(blocks|cross)\.\d+\.")


def check_calibration(config: ModelConfig) -> None:
    """Make sure that a model can be calibrated.

    Raises:
        InputError: it has no language model.
    """
    if not isinstance(config, Blip2Config):
        raise InputError("pictures calibrate the 4-bit weights of a language model, and a retrieval model has none")


class Calibration:
    """What rounds the weights of a language model.

    Args:
        checkpoint: of a generative model.
        pixel_values: of the pictures, [n, 3, S, S] float32.
        texts: token ids of what stands behind each picture, BOS first (OPT) or the end last (T5).
    """

    def __init__(self, checkpoint: Checkpoint, pixel_values: Array, texts: Sequence[Sequence[int]]):
        self._checkpoint, self._reference = checkpoint, checkpoint.build()
        prefix = self._see(torch.from_numpy(pixel_values))  # [n, Q, D]
        self._rounded: dict[tuple[str, str], Rounded] = {}
        self._cross: list[Rounded] = []  # what makes T5's keys and values of cross-attention, block by block
        self._encoded = torch.empty(0)  # [n, E, D], what T5's encoder made
        text = checkpoint.config.text  # type: ignore[union-attr]
        if isinstance(text, T5Config):
            start = text.start_token_id
            assert start is not None  # as `check_config` asks
            self._walks = {
                ENCODER: self._walk_encoder(*_lay_out(prefix, texts)),
                DECODER: self._walk_t5(*_lay_out(prefix[:, :0], [[start, *ids] for ids in texts])),
            }
        else:
            self._walks = {DECODER: self._walk_opt(*_lay_out(prefix, texts))}

    def round(self, stage: str, name: str, weight: Tensor, bits: int, group: int) -> Rounded:
        """As `round_weight`, of a weight by its name in its stage; stages and blocks are asked for in their order."""
        if bits != 4 or stage not in self._walks or not BLOCK.match(name):
            return round_weight(weight, bits, group)
        assert group == GROUP
        while (stage, name) not in self._rounded:
            with torch.no_grad():
                next(self._walks[stage])
        return self._rounded.pop((stage, name))

    def _walk_opt(self, prefix: Tensor, ids: Tensor, is_row: Tensor) -> Iterator[None]:
        """Each step rounds a block of OPT's decoder."""
        others = _first_rows(ids), _causal(is_row), None, None
        hidden = self._load(f"{DECODER}.embedding")(prefix, ids, _positions(ids))  # [n, S, D]
        for name, block in self._blocks(DECODER, "blocks"):
            hidden = self._round(DECODER, name, block, is_row, hidden, *others)
            yield

    def _walk_encoder(self, prefix: Tensor, ids: Tensor, is_row: Tensor) -> Iterator[None]:
        """Each step rounds a block of T5's encoder, or what makes keys and values for one of the decoder's."""
        self._encoder_mask = torch.zeros(is_row.shape).masked_fill_(~is_row, MASKED)[:, None, None]  # [n, 1, 1, E]
        positions = _positions(ids)
        bias = self._load(f"{ENCODER}.relative_bias")(positions, positions, self._encoder_mask)
        hidden = self._load(f"{ENCODER}.embedding")(prefix, ids)  # [n, E, D]
        for name, block in self._blocks(ENCODER, "blocks"):
            hidden = self._round(ENCODER, name, block, is_row, hidden, bias)
            yield
        self._encoded = self._load(f"{ENCODER}.norm")(hidden)
        for name, cross in self._blocks(ENCODER, "cross"):
            self._round(ENCODER, name, cross, is_row, self._encoded)
            self._cross.append(self._rounded[ENCODER, f"{name}.kv.weight"])
            yield

    def _walk_t5(self, prefix: Tensor, ids: Tensor, is_row: Tensor) -> Iterator[None]:
        """Each step rounds a block of T5's decoder, whose prefix has no rows."""
        positions = _positions(ids)
        bias = self._load(f"{DECODER}.relative_bias")(positions, positions, _causal(is_row))
        others = bias, _first_rows(ids), self._encoder_mask, None, None
        hidden = self._load(f"{DECODER}.embedding")(ids.clamp(min=0))  # [n, S, D]
        blocks, crosses = self._blocks(DECODER, "blocks"), self._blocks(ENCODER, "cross")
        for (name, block), (_, cross), rounded in zip(blocks, crosses, self._cross, strict=True):
            cross.kv.weight.data = _spread(rounded, cross.kv.in_features)
            hidden = self._round(DECODER, name, block, is_row, hidden, *others, *cross(self._encoded))
            yield

    def _round(self, stage: str, name: str, block: nn.Module, is_row: Tensor, *inputs: Any) -> Tensor:
        """Round the linear layers of a block by what its inputs give them; what it gives with the rounded ones."""
        linears = {child_name: child for child_name, child in block.named_modules() if isinstance(child, nn.Linear)}
        moments = {
            child_name: torch.zeros(child.in_features, child.in_features) for child_name, child in linears.items()
        }

        def add(moment: Tensor, given: Tensor) -> None:
            rows = given[is_row]
            moment.addmm_(rows.t(), rows)

        handles = [
            child.register_forward_pre_hook(lambda _, given, moment=moments[child_name]: add(moment, given[0]))
            for child_name, child in linears.items()
        ]
        block(*inputs)
        for handle in handles:
            handle.remove()
        for child_name, child in linears.items():
            rounded = round_by_moments(child.weight, moments.pop(child_name) / is_row.sum(), GROUP)
            self._rounded[stage, f"{name}.{child_name}.weight"] = rounded
            child.weight.data = _spread(rounded, child.in_features)
        found: Tensor | tuple[Tensor, ...] = block(*inputs)
        return found if isinstance(found, Tensor) else found[0]

    def _blocks(self, stage: str, blocks: str) -> Iterator[tuple[str, Any]]:
        """The blocks of a stage by their names, loaded one at a time."""
        for i in range(len(list(self._reference.get_submodule(f"{stage}.{blocks}").children()))):
            yield f"{blocks}.{i}", self._load(f"{stage}.{blocks}.{i}")

    @torch.no_grad()
    def _see(self, pixel_values: Tensor) -> Tensor:
        """Image encoder and Q-Former, block by block: [n, Q, D]."""
        hidden = self._load(f"{VISION}.embedding")(pixel_values)
        number = len(list(self._reference.get_submodule(f"{VISION}.blocks").children()))
        for _, block in progress(self._blocks(VISION, "blocks"), "seeing the pictures", total=number):
            hidden = block(hidden)
        image = self._load(f"{VISION}.norm")(hidden)
        prefix: Tensor = self._load(QFORMER)(image)[1]
        return prefix

    def _load(self, name: str) -> Any:
        return self._checkpoint.load(deepcopy(self._reference.get_submodule(name)), name)


def _lay_out(prefix: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts behind rows [n, Q, D], right-padded: rows [n, S, D], ids [n, S] with -1 for rows, what is no padding."""
    num_prefix = prefix.shape[1]
    lengths = torch.tensor([num_prefix + len(ids) for ids in texts])
    num_rows = int(lengths.max())
    ids = torch.full((len(texts), num_rows), -1)
    for i, text in enumerate(texts):
        ids[i, num_prefix:] = 0
        ids[i, num_prefix : int(lengths[i])] = torch.tensor(text)
    padded = nn.functional.pad(prefix, (0, 0, 0, num_rows - num_prefix))
    return padded, ids, torch.arange(num_rows) < lengths[:, None]


def _positions(ids: Tensor) -> Tensor:
    """[n, S], the same for every text."""
    return torch.arange(ids.shape[1]).expand(len(ids), -1)


def _first_rows(ids: Tensor) -> Tensor:
    """Where texts begin in a cache, [n]."""
    return torch.zeros(len(ids), dtype=torch.int64)


def _causal(is_row: Tensor) -> Tensor:
    """[n, S] -> [n, 1, S, S]: what hides the rows behind each, and padding."""
    rows = torch.arange(is_row.shape[1])
    hidden = (rows[None] > rows[:, None])[None] | ~is_row[:, None, :]
    return torch.zeros(hidden.shape).masked_fill_(hidden, MASKED)[:, None]


def _spread(rounded: Rounded, depth: int) -> Tensor:
    """The weight [N, K] that values and scales stand for."""
    values, scales = rounded
    return torch.from_numpy(values * np.repeat(scales, GROUP, axis=1)[:, :depth])
