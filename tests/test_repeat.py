"""Blocks that were copied compute, bit for bit, what blocks that were traced one by one compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2rt.backends import Stage
from blip2rt.export import export_engine, graphs
from blip2rt.export.repeat import Shortened
from blip2rt.export.verify import _decoder_inputs, _encoder_inputs, _random_inputs
from blip2rt.manifest import Manifest
from blip2rt.model import Checkpoint
from blip2rt.stages import DECODER, ENCODER


@pytest.mark.parametrize("kind", ["opt", "t5", "asking", "retrieval"])
def test_equals_the_whole_trace(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_maker: Callable[..., Path],
    asking_checkpoint_maker: Callable[..., Path],
    retrieval_checkpoint_maker: Callable[..., Path],
) -> None:
    """Kinds of blocks in turn (a Q-Former's), caches, T5's cross-attention beside its blocks, masks that are shared."""
    layers: dict[str, Any] = {"num_hidden_layers": 5, "cross_attention_frequency": 3}
    makers: dict[str, Callable[[], Path]] = {
        "opt": lambda: checkpoint_maker(tmp_path / "checkpoint", 5, qformer=layers, num_hidden_layers=4),
        "t5": lambda: checkpoint_maker(tmp_path / "checkpoint", 5, "t5", num_layers=3, num_decoder_layers=3),
        "asking": lambda: asking_checkpoint_maker(tmp_path / "checkpoint", 5, **layers),
        "retrieval": lambda: retrieval_checkpoint_maker(tmp_path / "checkpoint", 5, qformer=layers),
    }
    checkpoint = makers[kind]()
    repeated = export_engine(checkpoint, tmp_path / "repeated")
    monkeypatch.setattr(graphs, "shorten", lambda module, spec: Shortened(module, spec, {}, ""))
    traced = export_engine(checkpoint, tmp_path / "traced")
    config = Checkpoint(checkpoint).config
    for name, entry in Manifest.read(traced).stages.items():
        draw = {DECODER: _decoder_inputs, ENCODER: _encoder_inputs}.get(name, _random_inputs)
        inputs = draw(entry.signature, config)
        found, expected = (
            Stage(name, folder / entry.file, 1)(**{k: v.copy() for k, v in inputs.items()})
            for folder in (repeated, traced)
        )
        assert found.keys() == expected.keys()
        for output, values in expected.items():
            np.testing.assert_array_equal(found[output], values, err_msg=f"{name}: {output}")
