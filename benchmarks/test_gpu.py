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
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--size", "tiny", "tiny-t5", "--device", "cpu"]
    subprocess.run([*command, "--precision", "fp32", "--output", str(output)], cwd=ROOT, check=True, timeout=300)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("size", ["tiny", "tiny-t5"])
def test_every_figure_is_there(result: dict[str, Any], size: str) -> None:
    figures = result["models"][size]
    assert {name: figure for name, figure in figures.items() if "failed" in figure or "left out" in figure} == {}
    kinds = {name.partition(",")[0] for name in figures}
    assert kinds == {"parity", "stages", "ours", "transformers", "fp8", "int8", "int4"}


@pytest.mark.parametrize("size", ["tiny", "tiny-t5"])
def test_both_models_say_the_same(result: dict[str, Any], size: str) -> None:
    parity = result["models"][size]["parity"]
    assert parity["tokens until the first difference"] == [result["new tokens"]] * 4
    assert all(parity[name]["relative rms"] < 1e-5 for name in ("ours", "transformers"))


def test_the_work_is_what_torch_counts() -> None:
    """Operations by the formulas against those that torch counts while the reference runs."""
    program = """
import json
from torch.utils.flop_counter import FlopCounterMode
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from benchmarks.gpu.work import decoder_bytes, prefill_work, vision_work
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.config import OPTConfig, QFormerConfig, T5Config, VisionConfig

t5 = T5Config("t5", 96, 40, 8, 80, 3, 2, 4, feed_forward_proj="gated-gelu", tie_word_embeddings=False, bos_token_id=0)
for text in (OPTConfig("opt", 96, 40, 80, 2, 4), t5):
    config = Blip2Config(VisionConfig(48, 64, 3, 3, 42, 14), QFormerConfig(32, 64, 2, 4), text)
    model = Blip2(config).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.vision(torch.zeros(1, 3, 42, 42))
    print(json.dumps([vision_work(config), counter.get_total_flops()]))
    others = ("position", "relative_bias", *(["embedding"] if text is t5 else []))  # not read as matrices
    read = {name: p for name, p in model.decoder.named_parameters() if p.ndim == 2 and not any(map(name.count, others))}
    print(json.dumps([decoder_bytes(config, torch.bfloat16), 2 * sum(p.numel() for p in read.values())]))
rows = torch.arange(36)[None]
with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    model.encoder(torch.zeros(1, 36, 40), rows, rows, torch.zeros(1, 1, 1, 36))
print(json.dumps([prefill_work(config, 4), counter.get_total_flops()]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    for expected, counted in (json.loads(line) for line in done.stdout.splitlines()):
        assert expected == pytest.approx(counted, rel=1e-3)
