"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under valgrind where that is installed.

Valgrind and many processors know no AVX-512: for them its instructions are emulated (`emulated/immintrin.h`), so that
every path is tested on every machine. Of what valgrind says of Python itself nothing counts.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from blip2rt.native import PATHS, native_path

ROOT = Path(__file__).parents[1]
BASE, SANITIZED, EMULATED = (ROOT / "build" / name for name in ("native", "sanitized", "emulated"))
TESTS = (
    "tests/test_native.py",
    "tests/test_quantized_attention.py",
    "tests/test_gallery.py::test_the_native_pass_equals_its_twin",
)
WITH_LIBRARY = "import sys, blip2rt; blip2rt.__path__.insert(0, {!r}); sys.path.insert(0, 'tests')\n"
RUN_TESTS = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
READ_BEYOND = """
from test_native import kernel, problem
x, packed, scales, bias, bits = problem(0, 3, 300, 40, 4)
kernel("portable", x, packed[:-1].copy(), scales, bias, bits)
"""
UNDER_VALGRIND = """
import numpy as np
import test_quantized_attention as quantized
from test_native import attention_kernel, attention_problem, kernel, problem, twin
for path in {!r}:
    for rows, depth, outputs, bits, activation in (
        (1, 128, 16, 4, ""), (9, 300, 40, 8, "Gelu"), (37, 257, 33, 4, "Relu"), (67, 257, 40, 4, "Gelu")
    ):
        inputs = problem(rows, rows, depth, outputs, bits)
        expected = twin.quantized_matmul(*inputs, activation)
        np.testing.assert_array_equal(kernel(path, *inputs, activation), expected)
    for rows, width, capacity in ((1, 16, 1), (5, 20, 30), (19, 7, 40)):
        inputs = attention_problem(rows, 2, rows, 3, width, capacity, 1)
        np.testing.assert_array_equal(attention_kernel(path, inputs, 0.5)[0], twin.cached_attention(0.5, *inputs)[0])
        qkv = quantized.problem(rows, 2, rows, 3, width)
        np.testing.assert_array_equal(quantized.kernel(path, 0.5, 3, qkv), twin.quantized_attention(0.5, 3, qkv))
"""


def main() -> int:
    build(BASE)
    check_symbols()
    is_emulated = native_path() != "vnni"
    build(SANITIZED, "-DBLIP2RT_SANITIZE=ON", f"-DBLIP2RT_EMULATE={'ON' if is_emulated else 'OFF'}")
    libraries = [run("gcc", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan")]
    watched = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    with_library = WITH_LIBRARY.format(str(SANITIZED))
    caught = run(sys.executable, "-c", with_library + READ_BEYOND, may_fail=True, **watched)
    assert "heap-buffer-overflow" in caught.stderr, f"the sanitizer sees nothing:\n{caught.stdout}{caught.stderr}"
    done = run(sys.executable, "-c", with_library + RUN_TESTS, "-q", "-x", "-p", "no:cacheprovider", *TESTS, **watched)
    summary = done.stdout.splitlines()[-1]
    assert "skipped" not in summary, f"a path that did not run:\n{done.stdout}"
    print(f"sanitizers, AVX-512 {'emulated' if is_emulated else 'of this processor'}: {summary}")
    if shutil.which("valgrind") is None:
        print("valgrind is not installed")
        return 0
    build(EMULATED, "-DBLIP2RT_EMULATE=ON")
    log = EMULATED / "valgrind.log"
    program = WITH_LIBRARY.format(str(EMULATED)) + UNDER_VALGRIND.format(PATHS)
    run("valgrind", f"--log-file={log}", sys.executable, "-c", program, PYTHONMALLOC="malloc")
    reports = log.read_text("utf-8").split("== \n")
    ours = [report for report in reports if "blip2rt_native" in report]
    assert not ours, "\n".join(ours)
    print("valgrind: nothing in the kernels")
    return 0


def check_symbols() -> None:
    """Make sure that what a path compiles for its own instructions stays in that path.

    The linker keeps one of several inline functions of the same name, which another processor may then run.
    """
    objects = [path for path in BASE.rglob("*.cpp.o") if path.name.startswith(("avx2", "vnni", "cosines_"))]
    assert len(objects) == 4, objects
    shared = [
        line for path in objects for line in run("nm", "-C", path).stdout.splitlines() if line[17:19] in ("W ", "V ")
    ]
    assert not shared, "shared between paths:\n" + "\n".join(shared)


def build(directory: Path, *options: str) -> None:
    """The library, in a folder that can stand in for the package's own."""
    run("cmake", "-S", ROOT, "-B", directory, *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={directory / 'native'}")
    run("cmake", "--build", directory)


def run(*command: str | Path, may_fail: bool = False, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command; where it fails, what it said, and an end."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    sys.exit(main())
