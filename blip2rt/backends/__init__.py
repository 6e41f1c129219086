"""Backends run one stage: arrays in, arrays out.

`ort` on the CPU; on a GPU `torch_modules` where torch is, `ort_cuda` and `tensorrt` over `device_memory` without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError
from ..manifest import CUDA, TENSORRT, TORCH, Manifest
from . import ort

Array = np.ndarray[Any, Any]


class Cache(Protocol):
    """Keys or values of a layer [B, H, C, d], where and in the precision that a stage works; zeros at first."""

    def keep(self, images: Sequence[int]) -> None:
        """Go on with these images, in this order; an image moves only to a smaller index or stays."""

    def grow(self, capacity: int, rows: int) -> None:
        """Hold `capacity` rows of every image; of the old ones the first `rows` stay."""

    def move_rows(self, image: int, rows: Array, to: int) -> None:
        """Put rows of an image together, from row `to` on; they rise, and none lies before its new place."""


class Binding(Protocol):
    """Inputs and outputs of a stage bound to arrays, which it reads and writes in place.

    The arrays must stay alive and must not be resized while they are bound.
    """

    def input(self, name: str, array: Any, is_constant: bool = False) -> None:
        """Bind an input to a contiguous array, or to a `Cache` of the stage.

        Of an array that is constant, what it holds now is what every run reads.
        """

    def output(self, name: str, array: Any) -> None:
        """Bind an output to a contiguous array; the same one as an input for a cache that is updated in place."""

    def run(self) -> None:
        """Run once."""


class Stage(Protocol):
    """One engine, ready to run. Safe to call from several threads.

    Attributes:
        batch_size: images that it works on together, where the caller does not choose.
        longest_shortlist: the largest n for which a binding of a decoder can give `best_tokens` and `best_logprobs`
            [B, R, n], the likeliest of every row and best first, in the place of `logits`; 0: it gives logits only.
        scores_rows: whether the binding may be given `sums` [B, R] as well, and then gives the best continuations of
            each image: `best_sums`, `best_parents`, `best_tokens` and `best_logprobs` [B, n], of equal ones the first.
    """

    batch_size: int
    longest_shortlist: int
    scores_rows: bool

    def __call__(self, **inputs: Array) -> dict[str, Any]:
        """Run once; inputs and outputs by the names of `stages.py`.

        Keys and values that an encoder gives may be a `Cache` each, which the decoder of the same engine takes.
        """

    def bind(self) -> Binding:
        """A binding of inputs and outputs to buffers of the caller."""

    def cache(self, shape: tuple[int, ...]) -> Cache:
        """A cache of zeros that a binding updates in place."""


def open_stages(directory: Path, manifest: Manifest, threads: int | None) -> dict[str, Stage]:
    """The stages of an engine, ready to run.

    Args:
        directory: of the engine.
        manifest: its manifest.
        threads: cores to use; None: all that this process may use.

    Raises:
        EngineError: a file cannot be read, or what the engine's device needs is not there.
    """
    if manifest.device == TORCH:
        try:
            from .torch_modules import open_modules
        except ModuleNotFoundError as error:
            raise EngineError(
                f"{directory} runs on torch, and the package {error.name} is missing: pip install 'blip2rt[torch]'"
            ) from error
        return dict(open_modules(directory, manifest, threads))
    if manifest.device == CUDA:
        from . import ort_cuda

        return dict(ort_cuda.open_stages(directory, manifest))
    if manifest.device == TENSORRT:
        from . import tensorrt

        return dict(tensorrt.open_stages(directory, manifest))
    return {name: ort.Stage(name, directory / entry.file, threads) for name, entry in manifest.stages.items()}
