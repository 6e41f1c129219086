"""Build the native and the pure wheel, install each where nothing else is, and caption with both.

python .ci/try_wheels.py ENGINE INT8    two engines; the second one runs on the kernels, which the pure wheel lacks
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "wheels"
KINDS = {"native": (), "pure": ("--config-settings", "wheel.cmake=false")}  # and what pip is told to build it
CHECK = """
import json, sys
from blip2rt import EngineError, Pipeline
texts = [Pipeline(sys.argv[1]).caption(sys.argv[3]).text]
try:
    texts.append(Pipeline(sys.argv[2]).caption(sys.argv[3]).text)
except EngineError as error:
    texts.append(f"refused: {error}")
print(json.dumps([*texts, sorted({"torch", "transformers", "onnx"} & sys.modules.keys())]))
"""


def main(arguments: list[str]) -> int:
    engines = [Path(argument).resolve() for argument in arguments]
    picture = ROOT / "blip2rt" / "bundled" / "images" / "beach.jpg"
    shutil.rmtree(HOME, ignore_errors=True)
    said = {}
    for kind, settings in KINDS.items():
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", HOME / kind, *settings, ROOT)
        (wheel,) = (HOME / kind).iterdir()
        libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".dll", ".dylib"))]
        assert bool(libraries) == (kind == "native"), (wheel.name, libraries)
        assert wheel.name.endswith("-none-any.whl") == (kind == "pure"), wheel.name
        environment = HOME / f"{kind}-environment"
        run(sys.executable, "-m", "venv", environment)
        run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", wheel)
        exact, quantized, heavy = json.loads(run(environment / "bin" / "python", "-c", CHECK, *engines, picture))
        assert not heavy, heavy
        assert quantized.startswith("refused: ") == (kind == "pure"), quantized
        said[kind] = exact
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB: {exact!r}; int8: {quantized[:90]!r}")
    assert said["native"] == said["pure"], said
    return 0


def run(*command: str | Path) -> str:
    """The output of a command; where it fails, what it said, and an end."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=HOME.parent, env=clean, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
