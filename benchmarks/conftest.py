"""Two models and both ways to run them: the bundled tiny one, and a medium one whose time is spent in the engines."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from blip2rt import Pipeline
from blip2rt.bundled import CHECKPOINT
from blip2rt.export import export_engine


@dataclass(frozen=True)
class Contest:
    """The same weights in blip2rt and in transformers (eager, fp32)."""

    size: str
    pipe: Pipeline
    model: Blip2ForConditionalGeneration

    def pixel_values(self, num_images: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Noise [B, 3, S, S]."""
        side = self.pipe.manifest.image.size
        return np.random.default_rng(0).standard_normal((num_images, 3, side, side), dtype=np.float32)


@pytest.fixture(scope="session", params=["tiny", "medium"])
def contest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    """One of the two models, exported and loaded."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = CHECKPOINT if request.param == "tiny" else make_medium(folder / "checkpoint")
    pipe = Pipeline(export_engine(checkpoint, folder / "engine"))
    return Contest(
        request.param, pipe, Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype="float32").eval()
    )


def make_medium(directory: Path) -> Path:
    """27 M parameters: 101 tokens of width 384 through 6 blocks, OPT of width 512 with 6 blocks."""
    config = Blip2Config.from_pretrained(CHECKPOINT)
    vars(config.vision_config).update(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=140,
        patch_size=14,
    )
    vars(config.qformer_config).update(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, encoder_hidden_size=384
    )
    vars(config.text_config).update(
        hidden_size=512, word_embed_proj_dim=512, ffn_dim=2048, num_hidden_layers=6, num_attention_heads=8
    )
    config.num_query_tokens = 32
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    model.save_pretrained(directory)
    for file in CHECKPOINT.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The ratios, which are what the suite is about."""
    session = getattr(config, "_benchmarksession", None)
    for run in session.benchmarks if session else []:
        for name, ratio in run.extra_info.items():
            terminalreporter.write_line(f"{run.name:<28}{name} {ratio}")
