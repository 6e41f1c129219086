"""ONNX Runtime on a GPU, through its CUDA provider: caches stay on the device, steps are captured as CUDA graphs."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import EngineError
from ..manifest import Manifest
from ..stages import DECODER, StageSpec
from .device_binding import ITEM_SIZES, DeviceBinding, Place, call
from .device_memory import CudaDevice, Device, DeviceCache, Pool
from .ort import first_line

Array = np.ndarray[Any, Any]
PROVIDER = "CUDAExecutionProvider"
ELEMENTS = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}  # numbers of onnx.TensorProto
MOST_GRAPHS = 32  # ONNX Runtime keeps each for as long as the session lives
NO_GRAPH = "-1"


def open_stages(directory: Path, manifest: Manifest) -> dict[str, "Stage"]:
    """The stages of an engine, on the first GPU.

    Raises:
        EngineError: ONNX Runtime's CUDA provider, the driver or a GPU is missing, or a file cannot be read.
    """
    check_provider()
    device = CudaDevice()
    pool = Pool(device)
    return {
        name: Stage(name, directory / entry.file, entry.signature, pool, providers(device, name))
        for name, entry in manifest.stages.items()
    }


def providers(device: Device, stage: str) -> list[Any]:
    """What ONNX Runtime is to run a stage on: on our stream; the decoder, whose steps repeat, with CUDA graphs."""
    options = {"device_id": "0", "user_compute_stream": str(device.stream)}
    if stage == DECODER:
        options["enable_cuda_graph"] = "1"
    return [(PROVIDER, options), "CPUExecutionProvider"]


def check_provider() -> None:
    """Make sure that this process has ONNX Runtime with the CUDA provider.

    Raises:
        EngineError: it has another one; names the commands that mend it.
    """
    if PROVIDER in ort.get_available_providers():
        return
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed, own the same module, and the one for the CPU has won: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    raise EngineError(
        "this engine runs on ONNX Runtime's CUDA provider, and this ONNX Runtime "
        f"({ort.__version__}) has none: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


class Stage:
    """One engine, ready to run. Safe to call from several threads.

    Args:
        name: of the stage, for traces and messages.
        path: the .onnx file.
        spec: its signature.
        pool: of the device's memory.
        chosen: providers of ONNX Runtime, the device's first.
    """

    scores_rows = False  # the search does, on the host

    def __init__(self, name: str, path: Path, spec: StageSpec, pool: Pool, chosen: list[Any]):
        self.name, self.spec, self.pool = name, spec, pool
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(path, options, providers=chosen)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EngineError(f"{path} cannot be opened ({first_line(error)}): see to the GPU's driver") from error
        shapes = {tensor.name: tensor.shape for tensor in spec.outputs}
        self.batch_size = 64
        self.longest_shortlist = int(shapes["best_tokens"][-1]) if "best_tokens" in shapes else 0
        self._types = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
        self._graphs: dict[Any, str] = {}  # number of the CUDA graph of every set of places
        self._numbers = count(1)

    def __call__(self, **inputs: Array) -> dict[str, Any]:
        """Run once; inputs and outputs by the names of `stages.py`."""
        return call(self, self.pool, inputs)

    def bind(self) -> DeviceBinding:
        """A binding of inputs and outputs to buffers of the caller."""
        return DeviceBinding(self, self.pool)

    def cache(self, shape: tuple[int, ...]) -> DeviceCache:
        """A cache on the device, in the precision of the stage."""
        return DeviceCache(self.pool, shape, ITEM_SIZES[self.spec.outputs[1].dtype])

    def launch(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place], is_repeated: bool) -> None:
        """See `Launcher`. What repeats is captured, or was captured over the same places before."""
        binding = self._session.io_binding()
        for places, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, (address, shape) in places.items():
                bind(name, self.pool.device.kind, 0, ELEMENTS[self._types[name]], shape, address)
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", self._graph(inputs, outputs, is_repeated))
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # see above
            raise EngineError(f"stage {self.name!r} failed: {first_line(error)}") from error

    def _graph(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place], is_repeated: bool) -> str:
        places = (*inputs.items(), *outputs.items())
        if is_repeated and places not in self._graphs and len(self._graphs) < MOST_GRAPHS:
            self._graphs[places] = str(next(self._numbers))
        return self._graphs.get(places, NO_GRAPH)
