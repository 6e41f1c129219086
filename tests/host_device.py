"""A "GPU" in this memory, and a TensorRT that runs its plans on it: what the GPU backends are tested on.

Fresh memory holds NaN, copies refuse to overlap, and a plan refuses whatever TensorRT would not take. What a GPU
computes and how fast, none of this shows.
"""

import ctypes
import json
import struct
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Array = np.ndarray[Any, Any]


DEVICES: list["HostDevice"] = []  # by stream


class HostDevice:
    """See `blip2rt.backends.device_memory.Device`."""

    kind = "cpu"

    def __init__(self) -> None:
        DEVICES.append(self)
        self.stream = len(DEVICES) - 1
        self.recorded: list[Callable[[], None]] | None = None  # while a graph is captured
        self.memory: dict[int, Array] = {}
        self.num_captures = 0
        self.most: int | None = None  # bytes

    def describe(self) -> dict[str, str]:
        return {"gpu": "imagined (sm_00)", "cuda driver": "0.0"}

    def allocate(self, size: int) -> int:
        from blip2rt import EngineError

        if self.most is not None and size + sum(block.nbytes for block in self.memory.copy().values()) > self.most:
            raise EngineError("the GPU has no memory left")
        block = np.full(size, 0xFF, np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]

    def fill_zeros(self, address: int, size: int) -> None:
        ctypes.memset(self._inside(address, size), 0, size)

    def to_device(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(self._inside(address, array.nbytes), array.ctypes.data, array.nbytes)

    def to_host(self, array: Array, address: int) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(array.ctypes.data, self._inside(address, array.nbytes), array.nbytes)

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        assert width <= min(to_pitch, source_pitch)
        for i in range(height):
            left, right = to + i * to_pitch, source + i * source_pitch
            assert abs(left - right) >= width
            ctypes.memmove(self._inside(left, width), self._inside(right, width), width)

    def synchronize(self) -> None:
        pass

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What is launched is not run but recorded, with the addresses and shapes of this moment, as CUDA does."""
        self.num_captures += 1
        self.recorded = []
        launch()
        recorded, self.recorded = self.recorded, None

        def replay() -> None:
            for run in recorded:
                run()

        return replay

    def _inside(self, address: int, size: int) -> int:
        """The address, of which so many bytes belong to one block."""
        for start, block in self.memory.copy().items():  # other threads allocate meanwhile
            if start <= address and address + size <= start + block.nbytes:
                return address
        raise AssertionError(f"{size} bytes at {address} are in no block")


class AttentionOutput:
    type = "output of an attention"

    def __init__(self) -> None:
        self.attention = SimpleNamespace(decomposable=False)


class Network:
    num_layers = 2

    def __init__(self) -> None:
        self.model: onnx.ModelProto | None = None
        self.layers = [AttentionOutput() for _ in range(self.num_layers)]

    def get_layer(self, index: int) -> Any:
        return self.layers[index]


class Parser:
    def __init__(self, network: Network, logger: Any):
        self._network, self.num_errors = network, 0

    def parse_from_file(self, path: str) -> bool:
        self._network.model = onnx.load(path)
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)), (name, least, usual, most)
        self.shapes[name] = [list(least), list(usual), list(most)]


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.timings = b""

    def set_flag(self, flag: int) -> None: ...

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: content + b".")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        self._cache = cache

    def get_timing_cache(self) -> Any:
        return self._cache


class Builder:
    def __init__(self, logger: Any): ...

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        assert network.model is not None
        assert all(layer.attention.decomposable for layer in network.layers)
        dynamic = {v.name for v in network.model.graph.input if any(d.dim_param for d in v.type.tensor_type.shape.dim)}
        for profile in config.profiles:
            assert profile.shapes.keys() == dynamic
        return pack([profile.shapes for profile in config.profiles], network.model)


def pack(profiles: Any, model: onnx.ModelProto) -> bytes:
    head = json.dumps(profiles).encode()
    return struct.pack("<I", len(head)) + head + model.SerializeToString()


class Engine:
    def __init__(self, plan: bytes):
        (size,) = struct.unpack_from("<I", plan)
        self.profiles = json.loads(plan[4 : 4 + size])
        self.model = onnx.load_from_string(plan[4 + size :])
        self.num_optimization_profiles = len(self.profiles)
        self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in self.model.graph.input}

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile].get(name) or [self.shapes[name]] * 3

    def create_execution_context(self) -> "Context":
        return Context(self)

    def serialize(self) -> bytes:
        return pack(self.profiles, self.model)


class Context:
    def __init__(self, engine: Engine):
        self._engine = engine
        self._session = ort.InferenceSession(engine.model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), (name, shape)
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        run = partial(self._run, dict(self._addresses), dict(self._shapes))
        recorded = DEVICES[stream].recorded
        if recorded is None:
            run()
        else:
            recorded.append(run)
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        binding = self._session.io_binding()
        for name, address in addresses.items():
            if name.startswith("past_"):
                assert address == addresses[name.replace("past_", "present_")]
        sizes: dict[str, int] = {}
        for value in self._engine.model.graph.input:
            kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
            shape = shapes[value.name]
            sizes |= {d.dim_param: n for d, n in zip(dims, shape, strict=True) if d.dim_param}
            binding.bind_input(value.name, "cpu", 0, kind, shape, addresses[value.name])
        for value in self._engine.model.graph.output:
            kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
            shape = tuple(sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims)
            binding.bind_output(value.name, "cpu", 0, kind, shape, addresses[value.name])
        self._session.run_with_iobinding(binding)


class Runtime:
    def __init__(self, logger: Any): ...

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        content = bytes(plan)
        return Engine(content) if len(content) > 4 and content[4:5] == b"[" else None


class Refitter:
    def __init__(self, engine: Engine, logger: Any):
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return True


class ParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any):
        self._refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        self._refitter.engine.model = onnx.load(Path(path))
        return True


class Logger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1

    ERROR = Severity.ERROR

    def __init__(self, *least: Any): ...


def fake_tensorrt() -> ModuleType:
    """What stands for the module `tensorrt`."""
    module = ModuleType("tensorrt")
    names = {
        "__version__": "11.4.0",
        "ILogger": Logger,
        "Logger": Logger,
        "Builder": Builder,
        "OnnxParser": Parser,
        "OnnxParserRefitter": ParserRefitter,
        "Refitter": Refitter,
        "Runtime": Runtime,
        "LayerType": SimpleNamespace(ATTENTION_OUTPUT=AttentionOutput.type),
        "IAttentionOutputLayer": AttentionOutput,
        "NetworkDefinitionCreationFlag": IntEnum("Flag", {"STRONGLY_TYPED": 1}),
        "BuilderFlag": IntEnum("BuilderFlag", {"REFIT": 1}),
    }
    vars(module).update(names)
    return module
