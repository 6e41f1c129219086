"""A linear layer of OPT-2.7B in every form that an engine can have: what a step, a prefill and a batch are made of.

    python benchmarks/linears.py        (1 GB of memory, some minutes)

fc1 of a block, 10240 outputs of 2560 inputs, for 1, 5, 36 and 257 rows: in fp32 and bf16 by torch, in fp32 by ONNX
Runtime, and after `quantize` with native kernels and with stock operators. One thread, and its CPU time, not the
clock's: the machine may be shared. Rounds time all forms in turn, so each finds its weights in memory, not in the
cache; the minimum counts. The last line on stdout is one JSON object, also written to
`benchmarks/results/linears.json`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from blip2rt.backends.ort import session_options
from blip2rt.export.lower import StoredWeight
from blip2rt.export.quantize import quantize
from blip2rt.export.weights import write_stage
from blip2rt.native import native_path

RESULT = Path(__file__).parent / "results" / "linears.json"
OUTPUTS, DEPTH = 10240, 2560
ROWS = (1, 5, 36, 257)
FORMS = {
    "ONNX Runtime fp32": ("fp32", "stock"),
    "native int8": ("int8", "native"),
    "stock int8": ("int8", "stock"),
    "native int4": ("int4", "native"),
    "stock int4": ("int4", "stock"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A linear layer of OPT-2.7B in every form that an engine can have.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    weight = torch.randn(OUTPUTS, DEPTH, generator=torch.Generator().manual_seed(0))
    inputs = {rows: np.random.default_rng(rows).standard_normal((rows, DEPTH), dtype=np.float32) for rows in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        forms = {name: layer(Path(folder), weight, *form) for name, form in FORMS.items()}
        forms |= {f"torch {name}": torch_layer(weight.to(dtype)) for name, dtype in TORCH.items()}
        exact = {rows: x @ weight.numpy().T for rows, x in inputs.items()}
        errors = {
            name: float(np.linalg.norm(run(inputs[36]) - exact[36]) / np.linalg.norm(exact[36]))
            for name, run in forms.items()
        }
        seconds: dict[str, list[float]] = {f"{name}, {rows}": [] for rows in ROWS for name in forms}
        for _ in range(arguments.rounds):
            for rows, x in inputs.items():
                for name, run in forms.items():
                    start = thread_time()
                    run(x)
                    seconds[f"{name}, {rows}"].append(thread_time() - start)
    result = {
        "command": "python benchmarks/linears.py",
        "task": f"a linear layer of {DEPTH} inputs and {OUTPUTS} outputs, CPU time of one thread",
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "path": native_path()},
        "versions": {package: version(package) for package in ("blip2rt", "onnxruntime", "torch")},
        "rounds": arguments.rounds,
        "milliseconds": {name: {str(rows): 1000 * min(seconds[f"{name}, {rows}"]) for rows in ROWS} for name in forms},
        "relative_error": errors,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer(folder: Path, weight: torch.Tensor, precision: str, kernels: str) -> Callable[[Any], Any]:
    """The layer as the exporter writes it and the runtime opens it, on one thread."""
    x = ir.Value(name="x", shape=ir.Shape(["S", DEPTH]), type=ir.TensorType(ir.DataType.FLOAT))
    value = ir.Value(name="weight", shape=ir.Shape([DEPTH, OUTPUTS]), type=ir.TensorType(ir.DataType.FLOAT))
    product = ir.node("MatMul", [x, value])
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], product.outputs, nodes=[product], opset_imports={"": 24})
    graph.initializers.add(value)
    model = ir.Model(graph, ir_version=11)
    stored = [StoredWeight("weight", "transposed", lambda tensor: {"": tensor.t().contiguous().numpy()})]
    written = quantize(model, "decoder", precision, stored, kernels)
    path = folder / f"{precision}-{kernels}.onnx"
    write_stage(model, written, lambda name: weight, path, {}, lambda name: name)
    session = ort.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"x": rows})[0]


def torch_layer(weight: torch.Tensor) -> Callable[[Any], Any]:
    """The layer in torch, in the weight's dtype."""

    def run(rows: Any) -> Any:
        with torch.no_grad():
            return torch.nn.functional.linear(torch.from_numpy(rows).to(weight.dtype), weight).float().numpy()

    return run


def cpu_name() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
