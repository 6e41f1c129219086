"""Memory of a GPU by its addresses: what ONNX Runtime and TensorRT bind where no torch is. `cuda.bindings` serves it.

Everything is ordered by one stream: copies in, the stage, copies out. The host waits once, at the end. Memory that was
given back is given out again, the lowest address first: the same calls get the same addresses, and a CUDA graph that
was captured over them serves again.
"""

import heapq
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock, RLock
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError

Array = np.ndarray[Any, Any]


class Device(Protocol):
    """A GPU, as far as this package uses it; sizes and pitches are in bytes, addresses are of the device.

    Attributes:
        kind: what ONNX Runtime calls its memory.
        stream: handle of the stream that orders everything.
    """

    kind: str
    stream: int

    def allocate(self, size: int) -> int:
        """Address of fresh memory.

        Raises:
            EngineError: there is no more.
        """

    def free(self, address: int) -> None:
        """Give memory back."""

    def fill_zeros(self, address: int, size: int) -> None:
        """Write zeros."""

    def to_device(self, address: int, array: Array) -> None:
        """Copy a contiguous array there."""

    def to_host(self, array: Array, address: int) -> None:
        """Copy into a contiguous array."""

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy `height` pieces of `width` bytes that lie a pitch apart; source and goal do not overlap."""

    def synchronize(self) -> None:
        """Wait for all of the above."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What `launch` puts on the stream, as one launch that can be repeated (a CUDA graph)."""


class Pool:
    """Memory of a device that is used again and again.

    Attributes:
        device: whose memory it is.
        using: held by the thread that puts work on the device's stream, so that no other's gets into what it captures.
    """

    def __init__(self, device: Device):
        self.device = device
        self.using = RLock()
        self._lock = Lock()
        self._free: dict[int, list[int]] = defaultdict(list)  # heaps of addresses, by size

    def take(self, size: int) -> int:
        """Address of `size` bytes, which nobody has cleared.

        Raises:
            EngineError: the device has no more.
        """
        with self._lock:
            if self._free[size]:
                return heapq.heappop(self._free[size])
        try:
            return self.device.allocate(size)
        except EngineError:
            self._release()
            return self.device.allocate(size)

    def give_back(self, address: int, size: int) -> None:
        """Take back what `take` gave."""
        with self._lock:
            heapq.heappush(self._free[size], address)

    def _release(self) -> None:
        with self._lock:
            free, self._free = self._free, defaultdict(list)
        for addresses in free.values():
            for address in addresses:
                self.device.free(address)


class Buffer:
    """Memory of a pool, given back when nobody holds it any more."""

    def __init__(self, pool: Pool, size: int):
        self.size = max(size, 1)
        self.address = pool.take(self.size)
        weakref.finalize(self, pool.give_back, self.address, self.size).atexit = False


class DeviceCache:
    """Keys or values of a layer, [B, H, C, d], in the memory of a device; see `Cache`."""

    def __init__(self, pool: Pool, shape: Sequence[int], item_size: int):
        """A cache of zeros; `item_size` is that of a number, in bytes."""
        self._pool, self._device = pool, pool.device
        self.shape, self._item_size = tuple(shape), item_size
        self._buffer = self._zeros(self.shape)

    @property
    def address(self) -> int:
        """Where it lies now."""
        return self._buffer.address

    def write(self, array: Array) -> None:
        """Fill it with an array of its shape and item size."""
        with self._pool.using:
            self._device.to_device(self.address, array)

    def read(self, dtype: Any) -> Array:
        """What it holds, as an array of this type."""
        array: Array = np.empty(self.shape, dtype)
        with self._pool.using:
            self._device.to_host(array, self.address)
            self._device.synchronize()
        return array

    def keep(self, images: Sequence[int]) -> None:
        """See `Cache`."""
        size = self._size(self.shape[1:])
        with self._pool.using:
            for to, image in enumerate(images):
                if to != image:
                    self._device.copy(self.address + to * size, size, self.address + image * size, size, size, 1)
        self.shape = (len(images), *self.shape[1:])

    def grow(self, capacity: int, rows: int) -> None:
        """See `Cache`."""
        batch, heads, old_capacity, width = self.shape
        row, old = width * self._item_size, self._buffer
        self.shape = (batch, heads, capacity, width)
        self._buffer = self._zeros(self.shape)
        pitches = capacity * row, old_capacity * row
        with self._pool.using:
            self._device.copy(self.address, pitches[0], old.address, pitches[1], rows * row, batch * heads)

    def move_rows(self, image: int, rows: Array, to: int) -> None:
        """See `Cache`."""
        _, heads, capacity, width = self.shape
        row = width * self._item_size
        pitch = capacity * row
        start = self.address + image * heads * pitch
        with self._pool.using:
            for first, length in _runs(rows.tolist(), to):
                if first != to:
                    self._device.copy(start + to * row, pitch, start + first * row, pitch, length * row, heads)
                to += length

    def _zeros(self, shape: Sequence[int]) -> Buffer:
        buffer = Buffer(self._pool, self._size(shape))
        with self._pool.using:
            self._device.fill_zeros(buffer.address, self._size(shape))
        return buffer

    def _size(self, shape: Sequence[int]) -> int:
        return int(np.prod(shape)) * self._item_size


def _runs(rows: Sequence[int], to: int) -> list[tuple[int, int]]:
    """Rows as (first, length) of runs that one copy can move: none reaches from its old place into its new one."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]) and runs[-1][1] < runs[-1][0] - to:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            continue
        to += runs[-1][1] if runs else 0
        runs.append((row, 1))
    return runs


class CudaGraph:
    """Work that was captured; calling it puts it on the stream once more."""

    def __init__(self, launch: Callable[[], None], destroy: Callable[[], None]):
        self._launch = launch
        weakref.finalize(self, destroy).atexit = False

    def __call__(self) -> None:
        self._launch()


class CudaDevice:
    """The first GPU that CUDA shows, through `cuda.bindings`; see `Device`."""

    kind = "cuda"

    def __init__(self) -> None:
        """Open it.

        Raises:
            EngineError: the bindings or the driver are missing, or there is no GPU.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EngineError(
                "this engine runs on a GPU, and the package cuda-bindings is missing: pip install 'blip2rt[cuda]'"
            ) from error
        self._runtime = runtime
        try:
            count = self._call("cudaGetDeviceCount")
        except RuntimeError as error:  # the bindings find no library of the driver
            raise EngineError(_no_driver(error)) from error
        if not count:
            raise EngineError(_no_driver("no device is visible"))
        self.stream = int(self._call("cudaStreamCreate"))

    def describe(self) -> dict[str, str]:
        """Name and compute capability of the GPU, and the driver's version."""
        found = self._call("cudaGetDeviceProperties", 0)
        version = int(self._call("cudaDriverGetVersion"))
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return {
            "gpu": f"{name} (sm_{found.major}{found.minor})",
            "cuda driver": f"{version // 1000}.{version % 1000 // 10}",
        }

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def fill_zeros(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def to_device(self, address: int, array: Array) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def to_host(self, array: Array, address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, height, kind, self.stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, launch: Callable[[], None]) -> "CudaGraph":
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        launch()
        graph = self._call("cudaStreamEndCapture", self.stream)
        ready = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        launched = partial(self._call, "cudaGraphLaunch", ready, self.stream)
        return CudaGraph(launched, partial(self._call, "cudaGraphExecDestroy", ready))

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the CUDA runtime; what it gives behind its status."""
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status):
            raise EngineError(_explain(name, status))
        return results[0] if results else None


def _explain(name: str, status: Any) -> str:
    reason = f"{status.name} in {name}"
    if "MemoryAllocation" in status.name:
        return f"the GPU has no memory left ({reason}): fewer images at once, or fewer beams"
    if "NoDevice" in status.name or "Driver" in status.name:
        return _no_driver(reason)
    return f"the GPU failed: {reason}"


def _no_driver(reason: object) -> str:
    return f"no GPU can be used ({reason}): install NVIDIA's driver, or export with --device cpu"
