"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under valgrind where that is installed.

Valgrind knows no AVX-512, so it sees the other paths; of what it says of Python itself nothing counts.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
TESTS = (
    "tests/test_native.py",
    "tests/test_quantized_attention.py",
    "tests/test_gallery.py::test_the_native_pass_equals_its_twin",
)
SANITIZED = f"import sys, blip2rt; blip2rt.__path__.insert(0, {str(BUILD)!r}); sys.path.insert(0, 'tests')\n"
RUN_TESTS = SANITIZED + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
READ_BEYOND = """
from test_native import kernel, problem
x, packed, scales, bias, bits = problem(0, 3, 300, 40, 4)
kernel("portable", x, packed[:-1].copy(), scales, bias, bits)
"""
UNDER_VALGRIND = """
import sys; sys.path.insert(0, "tests")
import numpy as np
import test_quantized_attention as quantized
from test_native import attention_kernel, attention_problem, kernel, problem, twin
for path in ("avx2", "portable"):
    for rows, depth, outputs, bits in ((1, 128, 16, 4), (9, 300, 40, 8), (37, 257, 33, 4)):
        inputs = problem(rows, rows, depth, outputs, bits)
        np.testing.assert_array_equal(kernel(path, *inputs), twin.quantized_matmul(*inputs))
    for rows, width, capacity in ((1, 16, 1), (5, 20, 30), (19, 7, 40)):
        inputs = attention_problem(rows, 2, rows, 3, width, capacity, 1)
        np.testing.assert_array_equal(attention_kernel(path, inputs, 0.5)[0], twin.cached_attention(0.5, *inputs)[0])
        qkv = quantized.problem(rows, 2, rows, 3, width)
        np.testing.assert_array_equal(quantized.kernel(path, 0.5, 3, qkv), twin.quantized_attention(0.5, 3, qkv))
"""


def main() -> int:
    directory = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD / 'native'}"
    run("cmake", "-S", ROOT, "-B", BUILD, "-DBLIP2RT_SANITIZE=ON", directory)
    run("cmake", "--build", BUILD)
    libraries = [run("gcc", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan")]
    watched = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    caught = run(sys.executable, "-c", SANITIZED + READ_BEYOND, may_fail=True, **watched)
    assert "heap-buffer-overflow" in caught.stderr, f"the sanitizer sees nothing:\n{caught.stdout}{caught.stderr}"
    done = run(sys.executable, "-c", RUN_TESTS, "-q", "-x", "-p", "no:cacheprovider", *TESTS, **watched)
    print(f"sanitizers: {done.stdout.splitlines()[-1]}")
    if shutil.which("valgrind") is None:
        print("valgrind is not installed")
        return 0
    log = BUILD / "valgrind.log"
    run("valgrind", f"--log-file={log}", sys.executable, "-c", UNDER_VALGRIND, PYTHONMALLOC="malloc")
    reports = log.read_text("utf-8").split("== \n")
    ours = [report for report in reports if "blip2rt_native" in report]
    assert not ours, "\n".join(ours)
    print("valgrind: nothing in the kernels")
    return 0


def run(*command: str | Path, may_fail: bool = False, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command; where it fails, what it said, and an end."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    sys.exit(main())
