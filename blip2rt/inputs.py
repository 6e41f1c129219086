"""What callers pass: one image or a list of them, one text or a list of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from .errors import ImageError, InputError
from .preprocess import ImageSource
from .results import ImageFeatures

Kind = TypeVar("Kind")

BATCH_SIZE = 8  # images that go through the engines together; answers do not depend on it


def in_batches(
    images: Sequence[Any],
    first_index: int | None,
    prepare: Callable[[ImageSource], np.ndarray[Any, Any]],
    run: Callable[[np.ndarray[Any, Any]], list[ImageFeatures]],
    check: Callable[[ImageFeatures], ImageFeatures],
    batch_size: int,
) -> list[ImageFeatures]:
    """Features of images, `batch_size` pictures at a time; those that are features already go through `check`."""
    features = {i: check(image) for i, image in enumerate(images) if isinstance(image, ImageFeatures)}
    pictures = [i for i in range(len(images)) if i not in features]
    for start in range(0, len(pictures), batch_size):
        places = pictures[start : start + batch_size]
        pixel_values = []
        for place in places:
            try:
                pixel_values.append(prepare(images[place]))
            except ImageError as error:
                raise ImageError(error.reason, None if first_index is None else first_index + place) from error
        features |= dict(zip(places, run(np.stack(pixel_values)), strict=True))  # [B, 3, S, S]
    return [features[i] for i in range(len(images))]


def ahead(calls: Sequence[Callable[[], Kind]], is_worth: bool) -> Iterator[Kind]:
    """What every call gives, in order; where it is worth it, the next one is under way while one is used."""
    if not is_worth or len(calls) < 2:
        for call in calls:
            yield call()
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(calls[0])
        for call in calls[1:]:
            found, waiting = waiting.result(), pool.submit(call)
            yield found
        yield waiting.result()


def is_list(images: Any) -> bool:
    """A list gives a list back; anything else is one image."""
    return isinstance(images, list | tuple)


def as_list(images: Any) -> list[Any]:
    """One image as a list of one.

    Raises:
        InputError: an empty list.
    """
    if not is_list(images):
        return [images]
    if not images:
        raise InputError("the list of images is empty")
    return list(images)
