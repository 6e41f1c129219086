"""The house holds: imports go one way, programs stand alone, the runtime stays small and quick to import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "blip2rt"
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted(
    path for folder in ("export", "training", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
)

# A part (a module, or a folder as a whole) imports only parts of the layers before its own.
RUNTIME_LAYERS = (
    {"__init__", "errors", "stages", "results", "progress", "trace", "bundled", "cli_output"},
    {"manifest", "native", "options", "prefixes", "qformer_texts", "evaluation", "gallery_store", "data", "memory"},
    {"engine_directory", "backends", "gallery_scan"},
    {"preprocess", "tokenizer", "logits"},
    {"scores"},
    {"search"},
    {"decoder"},
    {"inputs", "retrieval"},
    {"candidates"},
    {"generative"},
    {"pipeline", "inspection"},
    {"gallery_base", "presets"},
    {"gallery", "text_gallery"},
    {"inference", "evaluate_retrieval", "evaluate_scores"},
    {"evaluate"},
    {"bulk", "server", "huggingface"},
    {"cli_retrieval"},
    {"arguments"},
    {"cli_export"},
    {"cli"},
    {"__main__"},
)
MEETING_POINTS = {"__init__", "stages", "manifest", "engine_directory", "errors", "progress"}  # of runtime and exporter
EXPORTER = {
    "model": {"errors", "stages"},
    "export": {"model", "native", *MEETING_POINTS},
    # training sees pictures as the runtime does, and writes what the exporter reads
    "training": {"model", "export", "errors", "progress", "data", "bulk", "preprocess", "tokenizer"},
}
# pieces.py runs parts of an engine as the runtime will; torch_modules.py, which only engines built for torch load, runs
# the reference's modules
EXCEPTIONS = {
    ("blip2rt/export/pieces.py", "backends"),
    ("blip2rt/export/modules.py", "backends"),
    ("blip2rt/export/packages.py", "backends"),
    ("blip2rt/export/gpu.py", "backends"),
    # calibration sees pictures and reads texts as the runtime does
    ("blip2rt/export/__init__.py", "preprocess"),
    ("blip2rt/export/__init__.py", "tokenizer"),
    ("blip2rt/backends/torch_modules.py", "model"),
}
# inside a function only: nothing but `blip2rt export` and `verify` loads torch
ON_DEMAND = {("cli_export", "export"), ("cli_export", "model"), ("huggingface", "export")}

RUNTIME_PACKAGES = {"numpy", "onnxruntime", "PIL", "tokenizers"}
EXTRA_PACKAGES = {  # not installed with the runtime; at the top only of files that nothing else loads
    "backends": {"cuda", "safetensors", "tensorrt", "torch"},
    "bulk": {"pyarrow", "ray"},
    "evaluation": {"pycocoevalcap", "spacy"},
    "huggingface": {"optimum", "torch", "transformers"},
    "server": {"fastapi", "grpc", "prometheus_client", "pydantic", "ray", "starlette", "tritonclient", "uvicorn"},
}
LOADED_WITHOUT_EXTRAS = {"blip2rt/server/__init__.py", "blip2rt/server/settings.py"}
LOADED_WITH_EXTRAS = {
    "blip2rt/bulk/on_ray.py",
    "blip2rt/backends/packages.py",
    "blip2rt/backends/torch_modules.py",
    "blip2rt/backends/rounded_linears.py",
}
EXPORTER_PACKAGES = {
    "model": {"torch", "safetensors", "huggingface_hub"},
    "export": {"torch", "ml_dtypes", "numpy", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "transformers"},
    "training": {"torch", "numpy", "PIL"},
}


def part_of(path: Path) -> str:
    """The part of blip2rt that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Full names of the modules that a file imports; type checkers' imports do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(REPOSITORY).with_suffix("").parts[:-1])
    skipped: set[ast.AST] = set()
    found: set[str] = set()
    for node in ast.walk(tree):  # parents come before their children
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if node in skipped or is_typing or (is_function and not inside_functions):
            skipped |= set(ast.iter_child_nodes(node))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` may import a module or what __init__ defines
            found |= {f"{name}.{alias.name}" for alias in node.names} if name == "blip2rt" else {name}
    return found


def parts(path: Path, inside_functions: bool = True) -> set[str]:
    """The other parts of blip2rt that a file imports."""
    names = {name.split(".")[1] for name in imports(path, inside_functions) if name.startswith("blip2rt.")}
    known = {part_of(file) for file in FILES}
    return {name if name in known else "__init__" for name in names} - {part_of(path)}


def packages(path: Path, inside_functions: bool = True) -> set[str]:
    """The packages of others that a file imports, anywhere or at its top."""
    tops = {name.split(".")[0] for name in imports(path, inside_functions)}
    return tops - set(sys.stdlib_module_names) - {"blip2rt"}


def test_the_reader_of_imports_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blind reader would let everything pass."""
    file = PACKAGE / "export" / "imagined.py"
    source = """
import os.path
from . import x
from .. import errors
from ..model.opt import OPT
def f():
    import torch
"""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: source)
    assert imports(file) == {"os.path", "blip2rt.errors", "blip2rt.model.opt", "blip2rt.export", "torch"}
    assert "torch" not in imports(file, inside_functions=False)
    assert parts(file) == {"errors", "model"}
    assert packages(file) == {"torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_one_way(path: Path) -> None:
    part, name = part_of(path), str(path.relative_to(REPOSITORY))
    if part in EXPORTER:
        allowed, foreign = EXPORTER[part], EXPORTER_PACKAGES[part]
    else:
        layer = next((i for i, layer in enumerate(RUNTIME_LAYERS) if part in layer), None)
        assert layer is not None, f"which layer of {Path(__file__).name} does {part} belong to?"
        allowed = set().union(*RUNTIME_LAYERS[:layer], {"__init__"})
        foreign = RUNTIME_PACKAGES | EXTRA_PACKAGES.get(part, set())
        needs_extras = part in ("server", "huggingface") or name in LOADED_WITH_EXTRAS
        if not needs_extras or name in LOADED_WITHOUT_EXTRAS:
            assert packages(path, inside_functions=False) <= RUNTIME_PACKAGES
        imported = {module for module in imports(path, inside_functions=False) if "blip2rt.server" in module}
        assert part == "server" or imported <= {"blip2rt.server.settings"}
        assert part == "huggingface" or "huggingface" not in parts(path)
        if part == "decoder":
            allowed |= {"backends"}
    extra = {found for found in parts(path) - allowed if (name, found) not in EXCEPTIONS}
    assert {found for found in extra if (part, found) not in ON_DEMAND} == set()
    at_top = {found for found in parts(path, inside_functions=False) if (name, found) not in EXCEPTIONS}
    assert at_top & set(EXPORTER) <= EXPORTER.get(part, set())
    assert packages(path) - foreign == set()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_programs_stand_alone(path: Path) -> None:
    """Programs and recipes know blip2rt and nothing of each other; one that fills a folder knows its own files."""
    siblings = {file.stem for file in PROGRAMS} | {"export", "training", "benchmarks", "tests"}
    folder = path.relative_to(REPOSITORY).parts[:-1]
    own = f"{'.'.join(folder)}." if len(folder) > 1 else " "
    assert {name.split(".")[0] for name in imports(path) if not name.startswith(own)} & siblings == set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    assert not any(isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" for node in ast.walk(tree))


def test_files_are_small_and_named_by_what_they_do() -> None:
    files = [*FILES, *PROGRAMS]
    assert len(files) > 35
    lengths = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert [path.name for path in files if path.stem in ("util", "utils", "helpers", "common", "misc")] == []


def in_a_new_process(program: str, *arguments: object) -> object:
    """What a program prints as JSON."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_runtime_loads_no_training_packages(tiny_engine: Path, tmp_path: Path) -> None:
    """The whole way from a file to a caption."""
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(picture)
    program = """
import json, sys
import blip2rt
loaded = [set(sys.modules)]
pipe = blip2rt.Pipeline(sys.argv[1])
pipe.caption(sys.argv[2], "w1")
loaded.append(set(sys.modules))
print(json.dumps([sorted({name.partition(".")[0] for name in names}) for names in loaded]))
"""
    loaded = in_a_new_process(program, tiny_engine, picture)
    assert isinstance(loaded, list)
    at_import, at_work = map(set, loaded)
    assert at_import & {"numpy", "onnxruntime", "PIL", "tokenizers"} == set()
    assert (
        at_work & {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub"} == set()
    )
    assert at_work >= RUNTIME_PACKAGES


def test_import_is_quick() -> None:
    program = "from time import perf_counter as t; s = t(); import blip2rt; print(t() - s)"
    seconds = [in_a_new_process(program) for _ in range(5)]
    assert min(float(str(value)) for value in seconds) < 0.3
