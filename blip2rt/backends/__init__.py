"""Backends run one stage: arrays in, arrays out. `ort` on the CPU, `torch_modules` on a GPU that has torch."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError
from ..manifest import TORCH, Manifest
from . import ort

Array = np.ndarray[Any, Any]


class Binding(Protocol):
    """Inputs and outputs of a stage bound to arrays, which it reads and writes in place.

    The arrays must stay alive and must not be resized while they are bound.
    """

    def input(self, name: str, array: Any) -> None:
        """Bind an input to a contiguous array, or to a cache of `zeros`."""

    def output(self, name: str, array: Any) -> None:
        """Bind an output to a contiguous array; the same one as an input for a cache that is updated in place."""

    def run(self) -> None:
        """Run once."""


class Stage(Protocol):
    """One engine, ready to run. Safe to call from several threads.

    Attributes:
        shortens: whether a binding of a decoder can give `best_tokens` and `best_logprobs` [B, R, n], the likeliest of
            every row and best first, in the place of `logits`.
    """

    shortens: bool

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run once; inputs and outputs by the names of `stages.py`."""

    def bind(self) -> Binding:
        """A binding of inputs and outputs to buffers of the caller."""

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """A cache that a binding may update in place, where and as the stage works: it is indexed like an array."""


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
    return {name: ort.Stage(name, directory / entry.file, threads) for name, entry in manifest.stages.items()}
