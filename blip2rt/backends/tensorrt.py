"""TensorRT on a GPU: plans that were built for this very GPU, caches in place, steps as CUDA graphs.

A decoder's plan has two profiles, one to prefill with many rows of which one wants logits, one to step.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError, InputError
from ..manifest import Manifest
from ..stages import ENCODER, StageSpec, sizes_of
from .device_binding import ITEM_SIZES, DeviceBinding, Place, call
from .device_memory import Buffer, CudaDevice, DeviceCache, Pool

Array = np.ndarray[Any, Any]
MOST_GRAPHS = 32  # CUDA graphs of a stage, the least recently used goes


def load_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        EngineError: it is not installed, or does not find its libraries.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"this engine runs on TensorRT, which cannot be imported ({error}): pip install tensorrt"
        ) from error
    return tensorrt


def open_stages(directory: Path, manifest: Manifest) -> dict[str, "Stage"]:
    """The stages of an engine, on the first GPU.

    Raises:
        EngineError: TensorRT, the driver or a GPU is missing, or the plans are of another GPU or TensorRT.
    """
    trt, device = load_tensorrt(), CudaDevice()
    check_built_for(manifest, {"tensorrt": trt.__version__, **device.describe()})
    runtime, pool = trt.Runtime(trt.Logger(trt.Logger.ERROR)), Pool(device)
    return {
        name: Stage(name, directory / entry.file, entry.signature, pool, trt, runtime)
        for name, entry in manifest.stages.items()
    }


def check_built_for(manifest: Manifest, found: Mapping[str, str]) -> None:
    """Make sure that plans fit.

    Args:
        manifest: of the engine.
        found: TensorRT's version and the GPU, as `Manifest.toolchain` names them.

    Raises:
        EngineError: they were built for another GPU, or by another TensorRT.
    """
    for what in ("gpu", "tensorrt"):
        built, here = manifest.toolchain.get(what), found[what]
        if built != here:
            raise EngineError(
                f"{manifest.name} was built for {what} {built}, and here is {here}: plans are tied to both, build it "
                f"again here with `blip2rt export --model {manifest.source_id} --device tensorrt`"
            )


class Stage:
    """One plan, ready to run. Safe to call from several threads.

    Args:
        name: of the stage, for traces and messages.
        path: the plan.
        spec: its signature.
        pool: of the device's memory.
        trt: the module.
        runtime: its `Runtime`.
    """

    scores_rows = False  # the search does, on the host

    def __init__(self, name: str, path: Path, spec: StageSpec, pool: Pool, trt: Any, runtime: Any):
        self.name, self.spec, self.pool = name, spec, pool
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{path} is no plan that TensorRT {trt.__version__} takes: build the engine again here")
        self._contexts = []
        for profile in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            if context is None:
                raise EngineError(f"the GPU has no memory left for {path}: close what else runs on it")
            context.set_optimization_profile_async(profile, pool.device.stream)
            self._contexts.append(context)
        self._graphs: OrderedDict[Any, Callable[[], None]] = OrderedDict()
        self._spare: dict[str, Buffer] = {}  # for outputs that nobody wants: TensorRT writes all
        shapes = {tensor.name: tensor.shape for tensor in spec.outputs}
        self.batch_size = self._most_images()
        self.longest_shortlist = int(shapes["best_tokens"][-1]) if "best_tokens" in shapes else 0

    def __call__(self, **inputs: Array) -> dict[str, Any]:
        """Run once; inputs and outputs by the names of `stages.py`."""
        if self.name == ENCODER:  # its decoder takes no more pictures than it does
            return call(self, self.pool, inputs)
        most = self.batch_size
        parts = [
            call(self, self.pool, {name: array[start : start + most] for name, array in inputs.items()})
            for start in range(0, len(next(iter(inputs.values()))), most)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def bind(self) -> DeviceBinding:
        """A binding of inputs and outputs to buffers of the caller."""
        return DeviceBinding(self, self.pool)

    def cache(self, shape: tuple[int, ...]) -> DeviceCache:
        """A cache on the device, in the precision of the stage."""
        return DeviceCache(self.pool, shape, ITEM_SIZES[self.spec.outputs[1].dtype])

    def launch(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place], is_repeated: bool) -> None:
        """See `Launcher`. What repeats is captured, or was captured over the same places before."""
        places = (*inputs.items(), *outputs.items())
        graph = self._graphs.get(places)
        if graph is not None:
            self._graphs.move_to_end(places)
            graph()
            return
        context = self._prepare(inputs, outputs)
        if is_repeated:
            self._graphs[places] = self.pool.device.capture(lambda: self._enqueue(context))
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[places]()
        else:
            self._enqueue(context)

    def _prepare(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place]) -> Any:
        """A context with everything in its place.

        Raises:
            InputError: sizes beyond what the plan was built for.
        """
        context = self._contexts[self._profile(inputs)]
        sizes = sizes_of(self.spec.inputs, {name: shape for name, (_, shape) in inputs.items()})
        for tensor in self.spec.inputs:
            address, shape = inputs[tensor.name]
            context.set_input_shape(tensor.name, shape)
            context.set_tensor_address(tensor.name, address)
        for tensor in self.spec.outputs:
            if tensor.name in outputs:
                address = outputs[tensor.name][0]
            else:
                count = int(np.prod([sizes[size] if isinstance(size, str) else size for size in tensor.shape]))
                address = self._spare_buffer(tensor.name, count * ITEM_SIZES[tensor.dtype]).address
            context.set_tensor_address(tensor.name, address)
        return context

    def _profile(self, inputs: Mapping[str, Place]) -> int:
        """The first profile that all inputs fit into."""
        beyond = ""
        for profile in range(len(self._contexts)):
            beyond = ""
            for name, (_, shape) in inputs.items():
                least, _, most = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, profile))
                if not all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True)):
                    beyond = f"{name} {list(shape)} is not between {list(least)} and {list(most)}"
                    break
            if not beyond:
                return profile
        raise InputError(
            f"stage {self.name!r} was not built for these sizes, {beyond}: fewer images, beams or words at once, or "
            "export with larger --max-batch, --max-beams, --max-prompt"
        )

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self.pool.device.stream):
            raise EngineError(f"stage {self.name!r} failed: TensorRT could not enqueue it")

    def _spare_buffer(self, name: str, size: int) -> Buffer:
        if name not in self._spare or self._spare[name].size < size:
            self._spare[name] = Buffer(self.pool, size)
            self._graphs.clear()  # they may write into the old one
        return self._spare[name]

    def _most_images(self) -> int:
        """That the plan takes at once."""
        return max(
            int(self._engine.get_tensor_profile_shape(self.spec.inputs[0].name, profile)[2][0])
            for profile in range(len(self._contexts))
        )
