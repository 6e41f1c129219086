"""ONNX Runtime on the CPU."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import EngineError
from ..native import library_path
from ..trace import trace
from .array_cache import ArrayCache

Array = np.ndarray[Any, Any]


class Stage:
    """One engine, ready to run. Safe to call from several threads."""

    batch_size = 8
    longest_shortlist = 0  # the logits lie in this memory already
    scores_rows = False

    def __init__(self, name: str, path: Path, threads: int | None = None):
        """Open an engine.

        Args:
            name: name of the stage, for traces and messages.
            path: the .onnx file; its weights are mapped from the file beside it.
            threads: cores to use; None: all that this process may use.

        Raises:
            EngineError: ONNX Runtime cannot read the file.
        """
        self.name = name
        try:
            self.session = ort.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EngineError(
                f"{path} cannot be opened ({first_line(error)}); build it anew with `blip2rt export`"
            ) from error
        self.output_names = [output.name for output in self.session.get_outputs()]

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run once; inputs and outputs by the names of `stages.py`."""
        outputs = self._run(lambda: self.session.run(self.output_names, inputs))
        named = dict(zip(self.output_names, outputs, strict=True))
        trace.outputs(self.name, named)
        return named

    def bind(self) -> "Binding":
        """A binding of inputs and outputs to buffers of the caller."""
        return Binding(self)

    def cache(self, shape: tuple[int, ...]) -> ArrayCache:
        """A cache that a binding updates in place."""
        return ArrayCache(partial(np.zeros, dtype=np.float32), np.zeros(shape, np.float32))

    def _run(self, run: Callable[[], Any]) -> Any:
        start = perf_counter()
        try:
            result = run()
        except Exception as error:  # see above
            raise EngineError(f"stage {self.name!r} failed: {first_line(error)}") from error
        trace.seconds(self.name, perf_counter() - start)
        return result


class Binding:
    """Inputs and outputs of a stage bound to numpy arrays, which it reads and writes in place.

    The arrays must stay alive and must not be resized while they are bound.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._binding = stage.session.io_binding()

    def input(self, name: str, array: Array | ArrayCache, is_constant: bool = False) -> None:
        """Bind an input to a contiguous array, or to a cache."""
        array = array.array if isinstance(array, ArrayCache) else array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, _address(array))

    def output(self, name: str, array: Array | ArrayCache) -> None:
        """Bind an output to a contiguous array; the same one as an input for a cache that is updated in place."""
        array = array.array if isinstance(array, ArrayCache) else array
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, _address(array))

    def run(self) -> None:
        """Run once."""
        self._stage._run(lambda: self._stage.session.run_with_iobinding(self._binding))


def session_options(threads: int | None) -> ort.SessionOptions:
    """How every session of blip2rt is opened."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    # processors with AVX2 and no VNNI add up products of bytes in 16 bits, which overflow; this keeps them exact, and
    # takes 2.5 times as long where VNNI does so anyway
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if library := library_path():
        options.register_custom_ops_library(str(library))
    return options


@cache
def has_vnni() -> bool:
    """Whether this processor adds up products of bytes in 32 bits; False where nobody says."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _address(array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError(f"only a contiguous array can be bound, not strides {array.strides} of shape {array.shape}")
    return array.ctypes.data


def first_line(error: Exception) -> str:
    """Of what ONNX Runtime says, which goes on for many."""
    return str(error).strip().splitlines()[0]
