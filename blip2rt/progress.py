"""A progress bar on stderr; silent when stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")
WIDTH = 30  # characters of the bar


class Progress:
    """Counts up to `total`; `advance` it, `close` it."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self._visible = sys.stderr.isatty()
        self._start, self._drawn = monotonic(), 0.0

    def advance(self, steps: int = 1) -> None:
        """Some more are done."""
        self.done = min(self.total, self.done + steps)
        if self._visible and (monotonic() - self._drawn > 0.1 or self.done == self.total):
            self._drawn = monotonic()
            filled = WIDTH * self.done // max(1, self.total)
            elapsed = monotonic() - self._start
            left = elapsed / self.done * (self.total - self.done)
            bar = "#" * filled + "." * (WIDTH - filled)
            print(
                f"\r{self.label} [{bar}] {self.done}/{self.total}  {left:4.0f} s left",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._visible and self.done:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def progress(items: Iterable[Item], label: str, total: int, step: int = 1) -> Iterator[Item]:
    """Pass `items` on, counting `step` for each; the bar shows only when there is more than one to wait for."""
    bar = Progress(label, total)
    try:
        for item in items:
            yield item
            if total > step:
                bar.advance(step)
    finally:
        bar.close()
