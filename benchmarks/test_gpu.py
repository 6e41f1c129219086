"""The GPU's program at a tiny size on the CPU: every figure comes about, and both models say the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--size", "tiny", "--device", "cpu"]
    subprocess.run([*command, "--precision", "fp32", "--output", str(output)], cwd=ROOT, check=True, timeout=300)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_figure_is_there(result: dict[str, Any]) -> None:
    assert not [name for name, figure in result["figures"].items() if "failed" in figure or "left out" in figure]
    assert {name.partition(",")[0] for name in result["figures"]} == {
        "parity",
        "stages",
        "ours",
        "transformers",
        "fp8",
        "int8",
        "int4",
    }


def test_both_models_say_the_same(result: dict[str, Any]) -> None:
    parity = result["figures"]["parity"]
    assert parity["tokens until the first difference"] == [result["new tokens"]] * 4
    assert all(parity[name]["relative rms"] < 1e-5 for name in ("ours", "transformers"))


def test_the_work_is_what_torch_counts() -> None:
    """Operations by the formulas against those that torch counts while the reference runs."""
    program = """
import json
from torch.utils.flop_counter import FlopCounterMode
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from benchmarks.gpu.work import decoder_bytes, vision_work
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.config import OPTConfig, QFormerConfig, VisionConfig

text = OPTConfig("opt", 96, 40, 80, 2, 4)
config = Blip2Config(VisionConfig(48, 64, 3, 3, 42, 14), QFormerConfig(32, 64, 2, 4), text)
model = Blip2(config).eval()
with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    model.vision(torch.zeros(1, 3, 42, 42))
matrices = [p.numel() for name, p in model.decoder.named_parameters() if p.ndim == 2 and "position" not in name]
print(json.dumps([vision_work(config), counter.get_total_flops()]))
print(json.dumps([decoder_bytes(config, torch.bfloat16), 2 * sum(matrices)]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    work, num_bytes = (json.loads(line) for line in done.stdout.splitlines())
    assert work[0] == pytest.approx(work[1], rel=1e-3)
    assert num_bytes[0] == num_bytes[1]
