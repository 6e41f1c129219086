"""What a stage of BLIP-2 costs, and what a device can do: operations, bytes, and the rates to hold them against."""

from time import perf_counter

import torch

from blip2rt.model import Blip2Config
from blip2rt.model.config import T5Config, TextConfig

SECONDS = 1.0  # that a rate is measured over


def vision_work(config: Blip2Config) -> float:
    """Floating-point operations of the image encoder for a picture: products with weights, and of attention."""
    vision = config.vision
    tokens, width = vision.num_tokens, vision.hidden_size
    weights = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = vision.num_hidden_layers * 2 * tokens * width  # scores and their sums, for each token
    patches = (tokens - 1) * 3 * vision.patch_size**2 * width
    return 2.0 * (tokens * (weights + attention) + patches)


def prefill_work(config: Blip2Config, prompt_tokens: int) -> float:
    """Floating-point operations of the language model for the prefix of a picture: T5's encoder; OPT with one logit."""
    text = config.text
    rows, width = config.num_query_tokens + prompt_tokens, text.hidden_size
    if isinstance(text, T5Config):
        inner = text.num_heads * text.d_kv
        weights = text.num_layers * (4 * width * inner + _feed_forward(text))
        cross = text.num_decoder_layers * 2 * width * inner
        return 2.0 * (rows * (weights + cross) + 2 * text.num_layers * rows**2 * inner)
    return 2.0 * (rows * _block_weights(text) + 2 * text.num_hidden_layers * rows**2 * width + width * text.vocab_size)


def decoder_bytes(config: Blip2Config, dtype: torch.dtype) -> float:
    """Bytes of weights that every step of the decoder reads."""
    text = config.text
    return float(dtype.itemsize * (_block_weights(text) + text.vocab_size * text.hidden_size))


def _block_weights(text: TextConfig) -> int:
    """Weights of all blocks of the decoder; T5's keys and values of the picture are the encoder's."""
    if isinstance(text, T5Config):
        return text.num_decoder_layers * (6 * text.d_model * text.num_heads * text.d_kv + _feed_forward(text))
    return text.num_hidden_layers * (4 * text.hidden_size**2 + 2 * text.hidden_size * text.ffn_dim)


def _feed_forward(text: T5Config) -> int:
    return (3 if text.is_gated_act else 2) * text.d_model * text.d_ff


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of square products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2e-12 * size**3 / _seconds(lambda: a @ b, device)


def read_rate(device: torch.device, num_bytes: int) -> float:
    """GB/s of a copy, reads and writes together."""
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2e-9 * num_bytes / _seconds(lambda: target.copy_(source), device)


def _seconds(run, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    """Of one run among many, over about a second; the first ones warm up."""
    for _ in range(3):
        run()
    _wait(device)
    start, runs = perf_counter(), 0
    while perf_counter() - start < SECONDS:
        for _ in range(5):
            run()
        _wait(device)
        runs += 5
    return (perf_counter() - start) / runs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
