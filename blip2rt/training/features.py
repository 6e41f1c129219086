"""What the frozen image encoder gives for every picture, computed once and kept on disk.

A file of float16 [examples, N+1, Dv], and beside it the names of its rows. Rows are computed in one order and in
batches of one size, wherever the work was interrupted: so a row's bits never depend on that.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.examples import BadRecords, Example, read_examples
from ..errors import ImageError, OutputError
from ..preprocess import Array, preprocess
from ..progress import Progress
from .recipe import Recipe

BATCH = 16


class FeatureCache:
    """The rows of a folder.

    Args:
        folder: `features-KEY.npy` and `.json` lie here; a key is made of the encoder and the pictures.
        key: what the rows depend on besides the examples: the encoder's weights and the picture's size.
        examples: whose pictures they are; several of one name count once.
        shape: of a row.
    """

    def __init__(self, folder: Path, key: str, examples: Sequence[Example], shape: tuple[int, int]):
        self._examples = list({example.id: example for example in examples}.values())
        digest = hashlib.sha256(key.encode())
        for example in self._examples:
            digest.update(f"{example.id}\0{example.image!r}\0".encode())
        name = f"features-{digest.hexdigest()[:16]}"
        self._path, self._done_path = folder / f"{name}.npy", folder / f"{name}.json"
        self._rows = {example.id: i for i, example in enumerate(self._examples)}
        self._shape = (len(self._examples), *shape)
        folder.mkdir(parents=True, exist_ok=True)
        self._state: dict[str, list[int]] = {"done": [0], "bad": []}
        if self._done_path.is_file() and self._path.is_file():
            self._state = json.loads(self._done_path.read_text())
        self._values: Array | None = None

    def fill(
        self,
        encode: Callable[[Tensor], Tensor],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        bad: BadRecords,
    ) -> None:
        """Compute the rows that are not there yet; pictures that cannot be read go to `bad`.

        Args:
            encode: pixel values [B, 3, S, S] -> [B, N+1, Dv].
            size, mean, std: how pictures become pixel values.
            bad: what is left out.

        Raises:
            OutputError: there is no room for it.
        """
        (start,), total = self._state["done"], len(self._examples)
        try:
            mode = "r+" if start else "w+"
            values = np.lib.format.open_memmap(self._path, mode, np.float16, self._shape)
            bar = Progress("features", total, log_seconds=30, done=start)
            for first in range(start, total, BATCH):
                rows = range(first, min(first + BATCH, total))
                values[rows.start : rows.stop] = self._batch(rows, encode, size, mean, std)
                bar.advance(len(rows))
                if rows.stop == total or rows.stop % (64 * BATCH) == 0:
                    values.flush()
                    self._state["done"] = [rows.stop]
                    self._done_path.write_text(json.dumps(self._state))
            bar.close()
        except OSError as error:
            raise OutputError(
                f"the features of {total} pictures do not fit into {self._path.parent} ({error.strerror or error}): "
                "make room, or choose another images.cache, and run the same command again"
            ) from error
        for i in self._state["bad"]:
            bad.add(f"{self._examples[i].id} cannot be read")
        self._values = np.load(self._path, mmap_mode="r")

    def __call__(self, name: str) -> Array | None:
        """The row of an example, float32 [N+1, Dv]; None: its picture could not be read."""
        assert self._values is not None
        row = self._rows[name]
        return None if row in self._state["bad"] else self._values[row].astype(np.float32)

    def _batch(
        self,
        rows: range,
        encode: Callable[[Tensor], Tensor],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Array:
        pixels = np.zeros((len(rows), 3, size, size), np.float32)
        for place, row in enumerate(rows):
            image = self._examples[row].image
            assert image is not None
            try:
                pixels[place] = preprocess(image, size, mean, std)
            except ImageError:
                if row not in self._state["bad"]:
                    self._state["bad"].append(row)
        with torch.no_grad():
            found = encode(torch.from_numpy(pixels)).to("cpu", torch.float32).numpy()
        limit = np.finfo(np.float16).max
        return np.clip(found, -limit, limit).astype(np.float16)


def cached_reader(
    recipe: Recipe,
    model: nn.Module,
    image: tuple[int, Sequence[float], Sequence[float]],
    bad: BadRecords,
) -> FeatureCache:
    """The cache of a recipe's pictures, filled.

    Args:
        recipe: its data sets and `images.cache`.
        model: with its `vision`, which is frozen but for its norm.
        image: size, mean and std.
        bad: pictures that cannot be read.

    Raises:
        OutputError: there is no room for it.
    """
    size, mean, std = image
    vision: Any = model.vision
    digest = hashlib.sha256(repr((size, tuple(mean), tuple(std))).encode())
    for name, parameter in vision.named_parameters():
        if not name.startswith("norm."):
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    examples = [
        example
        for data in recipe.data
        for example in read_examples(data.format, Path(data.path), data.split, BadRecords())
    ]
    position = vision.embedding.position
    cache = FeatureCache(Path(recipe.images.cache), digest.hexdigest(), examples, tuple(position.shape[1:]))
    cache.fill(lambda pixels: vision.features(pixels.to(position.device)), size, mean, std, bad)
    return cache
