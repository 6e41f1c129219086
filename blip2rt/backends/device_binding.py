"""Arrays of the host bound to a stage on a GPU: what ONNX Runtime's CUDA provider and TensorRT share."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from ..stages import CROSS, StageSpec, sizes_of
from ..trace import trace
from .device_memory import Buffer, DeviceCache, Pool

Array = np.ndarray[Any, Any]
ITEM_SIZES = {"float32": 4, "int64": 8, "float16": 2, "bfloat16": 2}

Place = tuple[int, tuple[int, ...]]  # address on the device, and shape


class Launcher(Protocol):
    """A stage, as far as a binding runs it.

    Attributes:
        name: of the stage, for traces.
        spec: its signature.
    """

    name: str
    spec: StageSpec

    def launch(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place], is_repeated: bool) -> None:
        """Put the stage on the device's stream; no other thread does so meanwhile.

        Args:
            inputs: where they lie.
            outputs: where those that are wanted go.
            is_repeated: whether the last run had the same places.

        Raises:
            EngineError: it cannot run.
        """


class DeviceBinding:
    """Inputs and outputs of a stage bound to arrays of the host, which are copied, or to caches on the device."""

    def __init__(self, stage: Launcher, pool: Pool):
        self._stage, self._pool = stage, pool
        self._buffers: dict[str, Buffer] = {}
        self._inputs: dict[str, Place] = {}
        self._outputs: dict[str, Place] = {}
        self._sent: dict[str, Array] = {}
        self._wanted: dict[str, tuple[Array, Array]] = {}  # the caller's array, and all that the stage gives
        self._is_repeated = False

    def input(self, name: str, array: Array | DeviceCache, is_constant: bool = False) -> None:
        """Bind an input to a contiguous array, or to a cache."""
        if isinstance(array, DeviceCache):
            self._inputs[name] = array.address, array.shape
        else:
            self._inputs[name] = self._buffer(name, array.nbytes).address, array.shape
            if is_constant:
                with self._pool.using:
                    self._pool.device.to_device(self._inputs[name][0], array)
            else:
                self._sent[name] = array
        self._is_repeated = False

    def output(self, name: str, array: Array | DeviceCache) -> None:
        """Bind an output to a contiguous array, which may want fewer columns than there are, or to a cache."""
        if isinstance(array, DeviceCache):
            self._outputs[name] = array.address, array.shape
        else:
            last = self._last_axis(name)
            whole = array
            if isinstance(last, int) and last != array.shape[-1]:
                whole = np.empty((*array.shape[:-1], last), array.dtype)
            self._wanted[name] = array, whole
            self._outputs[name] = self._buffer(name, whole.nbytes).address, whole.shape
        self._is_repeated = False

    def run(self) -> None:
        """Run once."""
        start, device = perf_counter(), self._pool.device
        with self._pool.using:
            for name, array in self._sent.items():
                device.to_device(self._inputs[name][0], array)
            self._stage.launch(self._inputs, self._outputs, self._is_repeated)
            for name, (_, whole) in self._wanted.items():
                device.to_host(whole, self._outputs[name][0])
            device.synchronize()
        for array, whole in self._wanted.values():
            if whole is not array:
                array[...] = whole[..., : array.shape[-1]]
        self._is_repeated = True
        trace.seconds(self._stage.name, perf_counter() - start)

    def _buffer(self, name: str, size: int) -> Buffer:
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = Buffer(self._pool, size)
        return self._buffers[name]

    def _last_axis(self, name: str) -> int | str:
        return next(tensor for tensor in self._stage.spec.outputs if tensor.name == name).shape[-1]


def call(stage: Launcher, pool: Pool, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """Run a stage once, arrays in, arrays out; what an encoder gives stays on the device."""
    binding = DeviceBinding(stage, pool)
    sizes = sizes_of(stage.spec.inputs, {name: array.shape for name, array in inputs.items()})
    for tensor in stage.spec.inputs:
        binding.input(tensor.name, np.ascontiguousarray(inputs[tensor.name]))
    found: dict[str, Any] = {}
    for tensor in stage.spec.outputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.name.startswith(CROSS):
            found[tensor.name] = DeviceCache(pool, shape, ITEM_SIZES[tensor.dtype])
        else:
            found[tensor.name] = np.empty(shape, tensor.dtype)
        binding.output(tensor.name, found[tensor.name])
    binding.run()
    trace.outputs(stage.name, {name: array for name, array in found.items() if isinstance(array, np.ndarray)})
    return found
