"""BLIP-2 at full size on a GPU: ours beside transformers, and both beside what the card can do.

    python -m benchmarks.gpu.measure --output benchmarks/results/gpu-h200.json

From the root of the source, nothing installed; it needs torch, transformers, onnxruntime, tokenizers and pillow.
Random weights are made on the card and shared by both models. It checks parity, measures the card's ceilings, times the
stages and whole captions of 20 tokens, prints a line for each, and leaves out what would begin after `--minutes`.
`--size tiny tiny-t5 --device cpu` runs all of it anywhere in seconds; its figures mean nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.gpu.models import BEGIN, Ours, Transformers, make_models
from benchmarks.gpu.work import decoder_bytes, matrix_rate, prefill_work, read_rate, vision_work
from blip2rt.backends.rounded_linears import LAYERS

NEW_TOKENS, BEAMS, REPEATS = 20, 5, 5
TINY: tuple[dict[str, Any], dict[str, Any]] = (  # vision, Q-Former
    {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)
T5 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # vision, Q-Former, language model
    "opt-2.7b": (
        {},
        {},
        {
            "model_type": "opt",
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
        }
        | {"num_attention_heads": 32, "vocab_size": 50304, "max_position_embeddings": 2048},
    ),
    "flan-t5-xl": (
        {},
        {},
        {**T5, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32},
    ),
    "tiny": (
        *TINY,
        {"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 128},
    ),
    "tiny-t5": (
        *TINY,
        {**T5, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": 96},
    ),
}
BATCHES, PEER_BATCHES = (1, 8, 64, 256), (1, 8, 64)
TINY_BATCHES = (1, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Report:
    """Figures by name, printed as they come."""

    def __init__(self, seconds: float):
        self.figures: dict[str, Any] = {}
        self._deadline = perf_counter() + seconds

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure something, unless the time is up; an error is a result, too."""
        if perf_counter() > self._deadline:
            self.figures[name] = {"left out": "the time was up"}
        else:
            try:
                self.figures[name] = measure()
            except Exception as error:  # what one model cannot do must not hide what the others can
                self.figures[name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        print(name, json.dumps(self.figures[name]), file=sys.stderr, flush=True)


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median time of a run, after two that warm up and capture."""
    found = []
    for i in range(repeats + 2):
        synchronise(device)
        start = perf_counter()
        run()
        synchronise(device)
        if i >= 2:
            found.append(perf_counter() - start)
    return float(np.median(found))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parity(ours: Ours, peer: Transformers, pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Logits of the first token against a float32 run of the same weights, and the tokens of a greedy caption."""
    exact = ours.float32_logits(pixels)
    found: dict[str, Any] = {}
    for name, logits in (("ours", ours.logits(pixels)), ("transformers", peer.logits(pixels))):
        error = np.abs(logits - exact)
        found[name] = {
            "largest error": float(error.max()),
            "relative rms": float(np.linalg.norm(logits - exact) / np.linalg.norm(exact)),
            "same best token": float((logits.argmax(1) == exact.argmax(1)).mean()),
        }
    tokens = [model.captions(pixels, 1, NEW_TOKENS) for model in (ours, peer)]
    agreed = [num_equal(a, b) for a, b in zip(*tokens, strict=True)]
    return {**found, "tokens until the first difference": agreed}


def num_equal(a: list[int], b: list[int]) -> int:
    """Length of the common beginning of two sequences of one length."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def stage_figures(ours: Ours, batch: int, ceilings: dict[str, float], device: torch.device) -> dict[str, Any]:
    """Vision and prefill as a share of the matrix rate, and a decoding step as a multiple of its floor."""
    pixels = ours.pixels(batch)
    found: dict[str, Any] = {}
    vision, prefill = ours.bound_vision(pixels), ours.bound_prefill(batch)
    for name, run, work in (
        ("vision", vision, batch * vision_work(ours.config)),
        ("prefill", prefill, batch * prefill_work(ours.config, len(BEGIN))),
    ):
        seconds = seconds_of(run, device)
        rate = work / seconds / 1e12
        share = rate / ceilings["TFLOP/s"]
        found[name] = {"ms": seconds * 1e3, "TFLOP/s": rate, "share of the matrix rate": share}
    for rows in (1, BEAMS):
        seconds = seconds_of(ours.bound_step(batch, rows), device)
        floor = decoder_bytes(ours.config, ours.dtype) / ceilings["GB/s"] / 1e9
        found[f"step of {rows} rows"] = {"ms": seconds * 1e3, "over its memory floor": seconds / floor}
    return found


def caption_figures(
    model: Ours | Transformers, pixels: np.ndarray[Any, Any], beams: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Whole captions, from pixel values to token ids."""
    seconds = seconds_of(lambda: model.captions(pixels, beams, NEW_TOKENS), device, repeats)
    return {"seconds": seconds, "captions/s": len(pixels) / seconds}


def rounded_figures(ours: Ours, precision: str, device: torch.device) -> dict[str, Any]:
    """A decoding step with fewer bits beside the same in the precision of the run."""
    sizes = [(1, 1), (1, BEAMS), (8, BEAMS)]
    before = [seconds_of(ours.bound_step(*size), device) for size in sizes]
    with ours.rounded_decoder(precision):
        after = [seconds_of(ours.bound_step(*size), device) for size in sizes]
    return {
        f"step of {batch} x {rows} rows": {"ms": 1e3 * rounded, "times as fast": full / rounded}
        for (batch, rows), full, rounded in zip(sizes, before, after, strict=True)
    }


def measure_model(
    size: str, device: torch.device, precision: str, ceilings: dict[str, float], minutes: float
) -> dict[str, Any]:
    """All figures of a model; its memory is free afterwards."""
    report, is_tiny = Report(60 * minutes), size.startswith("tiny")
    ours, peer = make_models(*SIZES[size], device, DTYPES[precision])
    report.add("parity", partial(parity, ours, peer, ours.pixels(4)))
    for batch in TINY_BATCHES if is_tiny else BATCHES:
        report.add(f"stages, batch {batch}", partial(stage_figures, ours, batch, ceilings, device))
        for beams in (BEAMS, 1):
            figures = partial(caption_figures, ours, ours.pixels(batch), beams, device, 3)
            report.add(f"ours, batch {batch}, beams {beams}", figures)
    for batch in TINY_BATCHES if is_tiny else PEER_BATCHES:
        for beams in (BEAMS, 1):
            figures = partial(caption_figures, peer, ours.pixels(batch), beams, device, 1)
            report.add(f"transformers, batch {batch}, beams {beams}", figures)
    if device.type == "cuda":
        peer.compile()
        for beams in (BEAMS, 1):
            figures = partial(caption_figures, peer, ours.pixels(1), beams, device, 2)
            report.add(f"transformers compiled, batch 1, beams {beams}", figures)
    for fewer in LAYERS:
        report.add(fewer, partial(rounded_figures, ours, fewer, device))
    del ours, peer
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return report.figures


def measure(sizes: list[str], device: torch.device, precision: str, minutes: float) -> dict[str, Any]:
    """The card's ceilings and all figures of all models, each in its share of the time."""
    is_tiny = all(size.startswith("tiny") for size in sizes)
    ceilings = {
        "TFLOP/s": matrix_rate(device, DTYPES[precision], 64 if is_tiny else 8192),
        "GB/s": read_rate(device, 2**16 if is_tiny else 2**32),
    }
    print("ceilings", json.dumps(ceilings), file=sys.stderr)
    models = {size: measure_model(size, device, precision, ceilings, minutes / len(sizes)) for size in sizes}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {"precision": precision, "new tokens": NEW_TOKENS}
    return {"card": card, **versions, **settings, "ceilings": ceilings, "models": models}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time BLIP-2 on a GPU, ours beside transformers.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes (default: stdout only)")
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["opt-2.7b", "flan-t5-xl"])
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing begins later (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "measure: torch sees no GPU here: --size tiny tiny-t5 --device cpu tries the program out", file=sys.stderr
        )
        return 1
    result = measure(args.size, torch.device(args.device), args.precision, args.minutes)
    result["command"] = f"python -m benchmarks.gpu.measure {' '.join(sys.argv[1:])}"
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
