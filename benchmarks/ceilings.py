"""What the machine can do at most, in some seconds: `python benchmarks/ceilings.py` prints one JSON object.

Bytes that all cores together read from memory, in a loop that fetches ahead, and operations of ONNX Runtime's product
of 8-bit integers, two for a multiplication and an addition. `full_size.py` makes floors of them.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

BYTES = 2**30  # read in one go, far beyond any cache
SIZE = 4096, 4096, 1024  # outputs, inputs and rows of the product of integers
ROUNDS = 40  # some seconds: shared machines have fast and slow ones
READER = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *from, size_t count) {
    uint64_t sums[16] = {0}, sum = 0;
    for (size_t i = 0; i < count; i += 16) {
        __builtin_prefetch(from + i + 512);
        __builtin_prefetch(from + i + 520);
        for (size_t j = 0; j < 16; ++j) sums[j] ^= from[i + j];
    }
    for (size_t j = 0; j < 16; ++j) sum ^= sums[j];
    return sum;
}
"""


def main() -> int:
    print(json.dumps({"read_gb_per_s": read_rate() / 1e9, "int8_gop_per_s": int8_rate() / 1e9}))
    return 0


def read_rate() -> float:
    """Bytes a second that all cores together read from memory."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "reader.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=READER.encode(), check=True)
        read_all = ctypes.CDLL(str(library)).read_all
    parts = np.array_split(np.ones(BYTES // 8, np.uint64), cores)
    arguments = [(ctypes.c_void_p(part.ctypes.data), ctypes.c_size_t(len(part) // 16 * 16)) for part in parts]
    with ThreadPoolExecutor(cores) as pool:  # ctypes lets go of the interpreter
        return BYTES / fastest(lambda: list(pool.map(lambda pair: read_all(*pair), arguments)))


def int8_rate() -> float:
    """Operations a second of ONNX Runtime's product of unsigned by signed bytes, on all cores."""
    outputs, depth, rows = SIZE
    x = ir.Value(name="x", shape=ir.Shape([rows, depth]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.tensor(np.random.default_rng(0).integers(-127, 128, (depth, outputs)).astype(np.int8), name="weight")
    stored = ir.Value(name="weight", const_value=weight)
    node = ir.node("MatMulInteger", [x, stored])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 24})
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    options = ort.SessionOptions()  # not our own, which give up speed for exact sums where there is no VNNI
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": np.ones((rows, depth), np.uint8)}
    return 2 * outputs * depth * rows / fastest(lambda: session.run(None, inputs))


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(ROUNDS):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
