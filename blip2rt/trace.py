"""Debugging: BLIP2RT_TRACE=FILE appends one JSON line for every run of a stage ("-" is stderr).

`{"stage": "vision", "seconds": 0.012}` and `{"stage": "vision", "output": "image_embeds", "shape": [1, 17, 64], "min":
..., "max": ..., "mean": ..., "nan": 0}`: enough to see which stage is slow and which one first goes wrong.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

VARIABLE = "BLIP2RT_TRACE"


class Trace:
    """Writes what it is told, where the environment says, or nowhere."""

    def __init__(self, path: str | None):
        self.path = path
        self._lock = threading.Lock()

    def seconds(self, stage: str, seconds: float) -> None:
        """A stage has run."""
        if self.path:
            self._write({"stage": stage, "seconds": round(seconds, 6)})

    def outputs(self, stage: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """A stage has given these arrays."""
        if self.path:
            for name, array in arrays.items():
                finite = array[np.isfinite(array)]
                row: dict[str, Any] = {"stage": stage, "output": name, "shape": list(array.shape)}
                if finite.size:
                    row |= {kind: float(getattr(finite, kind)()) for kind in ("min", "max", "mean")}
                self._write(row | {"nan": int(np.isnan(array).sum())})

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        with self._lock:
            if self.path == "-":
                print(line, file=sys.stderr)
            else:
                with open(str(self.path), "a", encoding="utf-8") as stream:
                    stream.write(line + "\n")


trace = Trace(os.environ.get(VARIABLE))
