"""Texts as the Q-Former reads them: ids and masks, in batches of texts that are padded to the same length."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .stages import MASKED

Array = np.ndarray[Any, Any]

TEXT_LENGTH = 35  # tokens that texts are padded to, as LAVIS does; longer ones to the next multiple


def padded_texts(
    rows: Sequence[list[int]], batch_size: int, pad: int, num_positions: int
) -> Iterator[tuple[list[int], Array, Array]]:
    """Places in `rows`, ids [B, L] and mask [B, 1, 1, L], at most `batch_size` texts at a time.

    The length a text is padded to depends on the text alone: so what the model makes of it is the same, bit for bit, in
    any batch.

    Args:
        rows: token ids of each text.
        batch_size: B at most.
        pad: the id of padding.
        num_positions: L at most.
    """
    lengths: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        length = min(-(-len(row) // TEXT_LENGTH) * TEXT_LENGTH, num_positions)
        lengths.setdefault(length, []).append(place)
    for length, places in lengths.items():
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            text_ids = np.full((len(batch), length), pad, np.int64)
            text_mask = np.full((len(batch), 1, 1, length), MASKED, np.float32)
            for b, place in enumerate(batch):
                text_ids[b, : len(rows[place])] = rows[place]
                text_mask[b, ..., : len(rows[place])] = 0
            yield batch, text_ids, text_mask
