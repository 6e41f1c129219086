"""Every error a caller can cause. Each message says what is wrong, with values, and what mends it."""

from collections.abc import Iterator
from contextlib import contextmanager


class Blip2rtError(Exception):
    """Base of every error that blip2rt raises on purpose."""


class InputError(Blip2rtError, ValueError):
    """A wrong argument: an unknown or contradictory option, a wrong type, a prompt that does not fit."""


class ImageError(InputError):
    """A picture that cannot be read. ``index`` is its place in the list that was given, or None."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message if index is None else f"image {index}: {message}")
        self.reason = message
        self.index = index


class CheckpointError(Blip2rtError):
    """A checkpoint that is missing, damaged, incomplete, or of a model that blip2rt does not know."""


class EngineError(Blip2rtError):
    """An engine directory that is missing, damaged, newer than this program, or built for another device."""


class ExportError(Blip2rtError):
    """An export that could not be finished or whose engines disagree with the reference model."""


class OutputError(Blip2rtError):
    """An output that cannot be written: no permission, no space, or changed by somebody else."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a missing package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Blip2rtError(f"this needs the package {error.name}: pip install 'blip2rt[{name}]'") from error
