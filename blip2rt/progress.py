"""A progress bar on stderr; silent when stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")
WIDTH = 30  # characters of the bar


class Progress:
    """Counts up to `total`; `advance` it, `close` it.

    Args:
        label: what is counted.
        total: how many there are, None: unknown; it may be changed on the way.
        log_seconds: where stderr is no terminal, write a line as often as this; None: never.
        done: so many were done before, by a run that this one goes on with; they count for the bar, not for the speed.
    """

    def __init__(self, label: str, total: int | None, log_seconds: float | None = None, done: int = 0):
        self.label, self.total, self.done, self._before = label, total, done, done
        self._visible = sys.stderr.isatty()
        self._interval = 0.1 if self._visible else log_seconds
        self._start = self._drawn = monotonic()

    def advance(self, steps: int = 1) -> None:
        """Some more are done."""
        self.done += steps
        if self.total is not None:
            self.done = min(self.total, self.done)
        now = monotonic()
        if self._interval is None or (now - self._drawn < self._interval and not self._is_last_drawing()):
            return
        self._drawn = now
        start, end = ("\r", "\033[K") if self._visible else ("", "\n")
        print(f"{start}{self._text(now - self._start)}{end}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._visible and self.done:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _is_last_drawing(self) -> bool:
        return self._visible and self.done == self.total

    def _text(self, elapsed: float) -> str:
        rate = (self.done - self._before) / max(elapsed, 1e-9)
        speed = f"{rate:.1f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
        if self.total is None:
            return f"{self.label} {self.done}  {speed}"
        filled = WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + "." * (WIDTH - filled)
        left = (self.total - self.done) / max(rate, 1e-9)
        return f"{self.label} [{bar}] {self.done}/{self.total}  {speed}  {left:4.0f} s left"


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
