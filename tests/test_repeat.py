"""Blocks that were copied compute, bit for bit, what blocks that were traced one by one compute."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from blip2rt.export import graphs
from blip2rt.export.graphs import trace_stage
from blip2rt.export.pieces import IR_VERSION
from blip2rt.export.repeat import Shortened, shorten
from blip2rt.export.verify import _decoder_inputs, _encoder_inputs, _random_inputs
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.config import OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2rt.model.signatures import stage_specs
from blip2rt.stages import DECODER, ENCODER, QFORMER

VISION = VisionConfig(24, 30, 1, 2, 28, 14)
QFORMER_SIZES = QFormerConfig(12, 20, 4, 2, 3, use_qformer_text_input=True, vocab_size=50, max_position_embeddings=40)
OPT = OPTConfig(
    vocab_size=60, hidden_size=16, ffn_dim=20, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=90
)
T5 = T5Config(
    vocab_size=60, d_model=16, d_kv=6, d_ff=20, num_layers=3, num_decoder_layers=2, num_heads=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0,
)  # fmt: skip


def run(model: ir.Model, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Outputs of a graph whose weights are drawn by their names."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            seed = int.from_bytes(name.encode()) % 2**32
            values = np.random.default_rng(seed).normal(0, 0.3, tuple(value.shape.numpy())).astype(np.float32)
            value.const_value = ir.tensor(values, name=name)
    proto = ir.to_proto(ir.Model(model.graph, ir_version=IR_VERSION)).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


@pytest.mark.parametrize(("text", "stage"), [(OPT, QFORMER), (OPT, DECODER), (T5, ENCODER), (T5, DECODER)])
def test_equals_the_whole_trace(text: OPTConfig | T5Config, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of blocks in turn (a Q-Former's), caches, T5's cross-attention beside its blocks, masks that are shared."""
    config = Blip2Config(VISION, QFORMER_SIZES, text, num_query_tokens=5)
    with torch.device("meta"):
        module = Blip2(config).get_submodule(stage)
    spec = stage_specs(config)[stage]
    inputs = {DECODER: _decoder_inputs, ENCODER: _encoder_inputs}.get(stage, _random_inputs)(spec, config)
    assert any(shorten(module, spec).copies.values())
    repeated = trace_stage(module, spec)
    monkeypatch.setattr(graphs, "shorten", lambda module, spec: Shortened(module, spec, {}, ""))
    traced = trace_stage(module, spec)
    weights = {name for name, _ in module.named_parameters()}
    assert weights <= repeated.graph.initializers.keys() & traced.graph.initializers.keys()
    for tensor, found, expected in zip(spec.outputs, run(repeated, inputs), run(traced, inputs), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)
