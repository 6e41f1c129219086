"""NVIDIA's own words, without a GPU: every name that is used exists, and their parser and builder take every graph.

The bindings of TensorRT link to libraries that cannot be had everywhere: `nvidia_shim.c` stands for them.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import host_device
import pytest

import blip2rt
from blip2rt.backends import device_memory

PACKAGE = Path(blip2rt.__file__).parent
SOURCES = [PACKAGE / "backends" / "tensorrt.py", PACKAGE / "export" / "plans.py"]
OWNERS = {  # what variables of these files hold
    "runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "layer.attention": "IAttention",
    "layer": "IAttentionOutputLayer",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "reader": "OnnxParserRefitter",
    "config.get_timing_cache()": "ITimingCache",
}
DOUBLES = {  # of host_device.py
    "Network": "INetworkDefinition",
    "AttentionOutput": "IAttentionOutputLayer",
    "Parser": "OnnxParser",
    "Profile": "IOptimizationProfile",
    "Config": "IBuilderConfig",
    "Builder": "Builder",
    "Engine": "ICudaEngine",
    "Context": "IExecutionContext",
    "Runtime": "Runtime",
    "Refitter": "Refitter",
    "ParserRefitter": "OnnxParserRefitter",
}
OF_DOUBLES_ALONE = {"profiles", "timings", "model", "shapes", "engine"}
HEADS = {"hidden_size": 64, "num_attention_heads": 2}  # of a width that fused attention takes; not 7, say
RTX = "onnxruntime_ep_nv_tensorrt_rtx"

LOOK_UP = """
import json, sys
import tensorrt_bindings as trt
def exists(name):
    found = trt
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None
print(json.dumps([name for name in json.loads(sys.argv[1]) if not exists(name)]))
"""

BUILD = """
import sys
from functools import partial
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from host_device import HostDevice
import blip2rt.export as export
from blip2rt.export import gpu
from blip2rt.manifest import TENSORRT
model, output, precision = sys.argv[1:]
prove = export._prove
gpu.CudaDevice = HostDevice
gpu.build_plan = partial(gpu.build_plan, can_refit=False)  # RTX compiles such plans on the device
export._prove = lambda directory, manifest, checkpoint: (
    {} if manifest.device == TENSORRT else prove(directory, manifest, checkpoint)  # a plan runs on a GPU alone
)
export.export_engine(model, output, device="tensorrt", precision=precision)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the bindings can be imported."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("pip install tensorrt-cu13-bindings: the names that are used are looked up there")
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "no C compiler"
    folder = tmp_path_factory.mktemp("shim")
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.11"
        source = Path(__file__).with_name("nvidia_shim.c")
        options = ["-shared", "-fPIC", f"-D{name.upper()}", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run([compiler, *options, source, "-ldl"], check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(Path(__file__).parent)}


def run(program: str, environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def missing(names: set[str], environment: dict[str, str]) -> list[str]:
    return json.loads(run(LOOK_UP, environment, json.dumps(sorted(names))))


def test_every_name_of_tensorrt_exists(shim: dict[str, str]) -> None:
    used: set[str] = set()
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "trt" or owner.startswith("trt."):
                used.add(ast.unparse(node).removeprefix("trt."))
            elif owner in OWNERS:
                used.add(f"{OWNERS[owner]}.{node.attr}")
    assert len(used) > 35
    assert {"IExecutionContext.execute_async_v3", "BuilderFlag.REFIT", "ITimingCache.serialize"} < used
    assert missing(used, shim) == []
    assert missing({"Builder.platform_has_wings"}, shim)  # it can fail


def test_what_stands_for_tensorrt_is_like_it(shim: dict[str, str]) -> None:
    names = {
        f"{real}.{name}"
        for double, real in DOUBLES.items()
        for name in vars(getattr(host_device, double))
        if not name.startswith("_") and name not in OF_DOUBLES_ALONE
    }
    assert len(names) > 20
    assert missing(names, shim) == []


def test_every_name_of_cuda_exists() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-bindings: it has the names")
    tree = ast.parse(Path(device_memory.__file__).read_text())
    called = {node.args[0].value for node in ast.walk(tree) if _is_call(node)}  # type: ignore[attr-defined]
    assert {"cudaMalloc", "cudaMemcpy2DAsync", "cudaGraphLaunch"} < called
    assert [name for name in called if not hasattr(runtime, name)] == []


def _is_call(node: ast.AST) -> bool:
    """Whether it is self._call("a name", ...), or a partial of it."""
    if not isinstance(node, ast.Call):
        return False
    if ast.unparse(node.func) == "partial":
        node.args = node.args[1:]
        return True
    return ast.unparse(node.func) == "self._call" and isinstance(node.args[0], ast.Constant)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("model", ["captioner", "retriever", "t5", "asking"])
def test_nvidia_builds_every_graph(
    model: str,
    precision: str,
    shim: dict[str, str],
    tmp_path: Path,
    checkpoint_maker: Callable[..., Path],
    asking_checkpoint_maker: Callable[..., Path],
) -> None:
    """The graphs of an export for TensorRT become plans, with their profiles, in the builder of TensorRT for RTX."""
    spec = find_spec(RTX)
    if spec is None or spec.origin is None:
        pytest.skip("pip install onnxruntime-ep-nv-tensorrt-rtx-cu13 (146 MB, NVIDIA's licence) brings their builder")
    if (model, precision) == ("t5", "fp16"):
        pytest.skip("T5 overflows in fp16 and is refused (test_gpu_backends.py)")
    libraries = Path(spec.origin).parent
    (builder,), (parser,) = libraries.glob("libtensorrt_rtx.so.*"), libraries.glob("libtensorrt_onnxparser_rtx.so.*")
    links = tmp_path / "links"  # the parser asks for the builder by another name
    links.mkdir()
    (links / ".".join(builder.name.split(".")[:3])).symlink_to(builder)
    paths = f"{shim['LD_LIBRARY_PATH']}:{links}:{libraries}"
    environment = shim | {"LD_LIBRARY_PATH": paths, "NVIDIA_BUILDER": str(builder), "NVIDIA_PARSER": str(parser)}
    if model in ("t5", "asking"):
        checkpoint = tmp_path / "checkpoint"
        if model == "t5":
            checkpoint_maker(checkpoint, 1, "t5", vision=HEADS, qformer=HEADS, d_kv=64)
        else:
            others = {"vision": HEADS, **HEADS, "word_embed_proj_dim": HEADS["hidden_size"]}
            asking_checkpoint_maker(checkpoint, 1, "opt", others, **HEADS)
    else:
        checkpoint = PACKAGE / "bundled" / model
    run(BUILD, environment, checkpoint, tmp_path / "engine", precision)
    assert {path.suffix for path in (tmp_path / "engine").iterdir()} >= {".plan"}
