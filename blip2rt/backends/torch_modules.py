"""The reference model's own modules as engines: on a GPU where there is one, else on the CPU.

Weights lie in one safetensors file, in the precision they are computed in, or with fewer bits (`rounded_linears.py`). A
binding that runs again with the same buffers is captured as a CUDA graph: a decoding step is then one launch, whatever
the number of kernels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import EngineError
from ..manifest import GENERATIVE, Manifest
from ..model import Blip2, Blip2Retrieval
from ..model.config import read_sizes
from ..model.layers import CacheInPlace
from ..model.retrieval import stored_name
from ..stages import CROSS, DECODER, StageSpec
from ..trace import trace
from .array_cache import ArrayCache
from .packages import open_package, package_name
from .rounded_linears import LAYERS, replace_linears

Array = np.ndarray[Any, Any]

# what is computed in; fewer bits are those of the decoder's linear layers alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(LAYERS, torch.bfloat16)
GPU = Lock()  # held while a thread uses it: what another did meanwhile would get into a graph that is being captured


def open_modules(directory: Path, manifest: Manifest, threads: int | None = None) -> dict[str, "Stage"]:
    """The stages of an engine.

    Args:
        directory: of the engine.
        manifest: its manifest.
        threads: cores that torch may use on the CPU, in the whole process; None: as many as it likes.

    Raises:
        EngineError: the weights cannot be read, or are of another model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    [file] = {entry.file for entry in manifest.stages.values()}
    try:
        weights = load_file(directory / file, device=str(device))
        model = build(manifest, weights.__getitem__)
    except Exception as error:  # safetensors' errors and torch's share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(
            f"{directory / file} cannot be opened ({reason}); build it anew with `blip2rt export`"
        ) from error
    modules: dict[str, Callable[..., Any]] = {name: model.get_submodule(name) for name in manifest.stages}
    for name in modules:
        if package_name(name) in manifest.files:
            modules[name] = open_package(directory, manifest, name, model.get_submodule(name))
    dtype = DTYPES[manifest.precision]
    return {name: Stage(name, modules[name], entry.signature, dtype, device) for name, entry in manifest.stages.items()}


def build(manifest: Manifest, read: Callable[[str], Tensor], prefix: str = "") -> nn.Module:
    """The model that a manifest describes.

    Args:
        manifest: whose stages get weights; other parts stay on the meta device.
        read: gives a weight by the name under which it is stored.
        prefix: only what begins with this name gets weights.
    """
    with torch.device("meta"):
        kind = Blip2 if manifest.kind == GENERATIVE else Blip2Retrieval
        model = kind(read_sizes(manifest.model))  # type: ignore[arg-type]
    if manifest.precision in LAYERS:
        replace_linears(model.get_submodule(f"{DECODER}.blocks"), manifest.precision)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names = [
        name
        for name in names
        if name.partition(".")[0] in manifest.stages and f"{name}.".startswith(prefix and f"{prefix}.")
    ]
    model.load_state_dict({name: read(stored_name(name)) for name in names}, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that stay finite in `dtype`: `MASKED` is the least number of float32, and beyond those of the others."""
    is_float = values.is_floating_point() and dtype != torch.float32
    return values.clamp(min=torch.finfo(dtype).min) if is_float else values


class Stage:
    """A module, or what was compiled of it, with the signature of a stage."""

    batch_size = 64
    longest_shortlist = 1 << 30
    scores_rows = True

    def __init__(
        self, name: str, module: Callable[..., Any], spec: StageSpec, dtype: torch.dtype, device: torch.device
    ):
        self.name, self.module, self.spec, self.dtype, self.device = name, module, spec, dtype, device
        self._zeros = partial(torch.zeros, dtype=dtype, device=device)
        self.using: AbstractContextManager[Any] = GPU if device.type == "cuda" else nullcontext()

    def __call__(self, **inputs: Array) -> dict[str, Any]:
        """Run once; inputs and outputs by the names of `stages.py`."""
        binding = self.bind()
        for name, array in inputs.items():
            binding.input(name, array)
        binding.run()
        kept = {name: value for name, value in binding.results.items() if name.startswith(CROSS)}
        found = {name: value.float().cpu().numpy() for name, value in binding.results.items() if name not in kept}
        trace.outputs(self.name, found)
        return found | {name: ArrayCache(self._zeros, value) for name, value in kept.items()}

    def bind(self) -> "Binding":
        """A binding of inputs and outputs to buffers of the caller."""
        return Binding(self)

    def cache(self, shape: tuple[int, ...]) -> ArrayCache:
        """A cache on the device, in the precision of the stage."""
        return ArrayCache(self._zeros, self._zeros(shape))


class Binding:
    """Inputs and outputs of a stage bound to arrays of the caller, or to caches on the device.

    Attributes:
        results: outputs of the last run, on the device.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._host: dict[str, Tensor] = {}  # what is copied to the device for every run
        self._device: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}
        self._num_runs = 0
        self._graph: Any = None  # a CUDA graph

    def input(self, name: str, array: Array | ArrayCache, is_constant: bool = False) -> None:
        """Bind an input to a contiguous array, or to a cache."""
        if isinstance(array, ArrayCache):
            self._device[name] = array.array
        else:
            host = torch.from_numpy(array if array.flags.writeable else array.copy())
            dtype = self._stage.dtype if host.is_floating_point() and name != "sums" else host.dtype
            self._device[name] = torch.empty(host.shape, dtype=dtype, device=self._stage.device)
            if is_constant:
                with self._stage.using:
                    self._device[name].copy_(within(host, dtype))
            else:
                self._host[name] = host
        self._num_runs, self._graph = 0, None

    def output(self, name: str, array: Array | ArrayCache) -> None:
        """Bind an output to an array; a cache that is bound as an input is written in place whatever is bound here."""
        if not isinstance(array, ArrayCache):
            self._outputs[name] = torch.from_numpy(array)

    @torch.no_grad()  # not the inference mode: caches of what it gives are written later
    def run(self) -> None:
        """Run once."""
        start = perf_counter()
        with self._stage.using:
            for name, host in self._host.items():
                self._device[name].copy_(within(host, self._device[name].dtype))
            try:
                self._launch()
            except RuntimeError as error:  # torch's, out of memory among them
                reason = str(error).strip().partition("\n")[0]
                raise EngineError(f"stage {self._stage.name!r} failed: {reason}") from error
            for name, array in self._outputs.items():
                array.copy_(self.results[name])
        trace.seconds(self._stage.name, perf_counter() - start)

    def _launch(self) -> None:
        """The first run is eager and warms up, the second is captured, all others are replayed."""
        self._num_runs += 1
        if self._stage.device.type == "cpu" or self._num_runs == 1:
            self.results = self._forward()
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.results = self._forward()
            self._graph = graph
        self._graph.replay()

    def _forward(self) -> dict[str, Tensor]:
        """Inputs in the order of the signature; caches in place."""
        spec = self._stage.spec
        inputs: list[Any] = [self._device[tensor.name] for tensor in spec.inputs]
        for i, tensor in enumerate(spec.inputs):
            if tensor.name.startswith("past_"):
                inputs[i] = CacheInPlace(inputs[i])
        outputs = self._stage.module(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        results = {tensor.name: value for tensor, value in zip(spec.outputs, outputs, strict=True)}
        if (best := self._outputs.get("best_tokens")) is not None:
            results |= likeliest(results["logits"], best.shape[-1], self._device.get("sums"))
        return results


def likeliest(logits: Tensor, size: int, sums: Tensor | None) -> dict[str, Tensor]:
    """The `size` likeliest tokens of every row by logits [B, R, V], best first; of an image where `sums` [B, R] come.

    Of equal continuations of an image the first row and token comes first, as in the search on the host.
    """
    logprobs = logits.float().log_softmax(-1)
    if sums is None:
        logprobs, tokens = logprobs.topk(size)
        return {"best_tokens": tokens, "best_logprobs": logprobs}
    tokens = logprobs.topk(min(size, logits.shape[2])).indices.sort().values  # [B, R, n]
    logprobs = logprobs.gather(2, tokens)
    totals, order = (logprobs + sums[:, :, None]).flatten(1).sort(descending=True, stable=True)
    order = order[:, :size]
    return {
        "best_sums": totals[:, :size],
        "best_parents": order // tokens.shape[2],
        "best_tokens": tokens.flatten(1).gather(1, order),
        "best_logprobs": logprobs.flatten(1).gather(1, order),
    }
