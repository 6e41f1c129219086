"""Recall of retrieval, both ways, as LAVIS reports it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError

Array = np.ndarray[Any, Any]
NOT_RANKED = -100.0  # the score of a pair that ITM did not look at: LAVIS's


def recall_at(scores: Array, right: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Percent of the rows that have a right column among their k best.

    Args:
        scores: [N, M]; of equal scores the first column counts as better.
        right: the right columns of each row: all captions of an image, or the one image of a caption.
        ks: how many are looked at.

    Raises:
        InputError: another number of rows, or a row without a right column.
    """
    if len(right) != len(scores) or any(len(columns) == 0 for columns in right):
        raise InputError(f"{len(scores)} rows of scores, {len(right)} lists of right columns: each row needs one")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.array([np.isin(row, columns).argmax() for row, columns in zip(order, right, strict=True)])
    return {k: float(100 * (ranks < k).mean()) for k in ks}


def retrieval_table(image_to_text: Array, text_to_image: Array, image_of_text: Sequence[int]) -> dict[str, float]:
    """R@1, R@5 and R@10 of both directions, their means, and the mean of those.

    Args:
        image_to_text: scores [I, T].
        text_to_image: scores [T, I].
        image_of_text: the image that each text belongs to.
    """
    texts_of: list[list[int]] = [[] for _ in image_to_text]
    for text, image in enumerate(image_of_text):
        texts_of[image].append(text)
    table: dict[str, float] = {}
    for name, scores, right in (
        ("txt", image_to_text, texts_of),
        ("img", text_to_image, [[image] for image in image_of_text]),
    ):
        recalls = recall_at(scores, right)
        table |= {f"{name}_r{k}": value for k, value in recalls.items()}
        table[f"{name}_r_mean"] = sum(recalls.values()) / len(recalls)
    table["r_mean"] = (table["txt_r_mean"] + table["img_r_mean"]) / 2
    return table
