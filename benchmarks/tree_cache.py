"""Beams as a tree in one cache against a cache for every beam: the same graph, the same ops, the same run.

    python benchmarks/tree_cache.py [--layers 2]        (3 GB of memory, three minutes)

Layers of OPT-2.7B's size, 5 beams, a prefix of 36 rows. Timed are steps 150 to 200, what they grow, drop and copy
included; the two decoders step in turn. In `shared` all beams descend from one ancestor a few steps back, as they do in
a beam search; in `diverged` every beam goes its own way from the first step, the tree's worst case. `per_beam` copies
no cache at all (nobody could reorder more cheaply); `per_beam_reorder` copies what changed places, as it has to.
The last line on stdout is one JSON object, also written to `benchmarks/results/tree-cache.json`. Exit status 1 when the
tree costs more than 1.1 (shared) or 1.3 (diverged) times `per_beam`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from blip2rt.backends.array_cache import ArrayCache
from blip2rt.backends.ort import Stage
from blip2rt.bundled import CHECKPOINT
from blip2rt.decoder import CachedDecoder
from blip2rt.export import export_engine
from blip2rt.manifest import Manifest
from blip2rt.stages import DECODER

RESULT = Path(__file__).parent / "results" / "tree-cache.json"
BEAMS, PREFIX_ROWS, PROMPT_TOKENS, STEPS, TIMED_FROM = 5, 32, 4, 200, 150
LIMITS = {"shared": 1.1, "diverged": 1.3}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Beams as a tree in one cache against a cache for every beam.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), arguments.layers)
        manifest = Manifest.read(engine)
        stage = Stage(DECODER, engine / manifest.stages[DECODER].file)
        cases = {case: compare(stage, manifest, case, arguments.repeats) for case in LIMITS}
    result = {
        "command": "python benchmarks/tree_cache.py",
        "task": f"steps {TIMED_FROM} to {STEPS}, {BEAMS} beams, prefix {PREFIX_ROWS + PROMPT_TOKENS}, fp32",
        "layers": arguments.layers,
        "cores": len(os.sched_getaffinity(0)),
        "milliseconds_per_layer_and_step": cases,
        "tree_over_per_beam": {case: times["tree"] / times["per_beam"] for case, times in cases.items()},
        "tree_over_per_beam_reorder": {
            case: times["tree"] / times["per_beam_reorder"] for case, times in cases.items()
        },
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return int(any(result["tree_over_per_beam"][case] > limit for case, limit in LIMITS.items()))


def make_engine(folder: Path, layers: int) -> Path:
    """An engine whose decoder has layers of OPT-2.7B's size and a small vocabulary."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    config = Blip2Config.from_pretrained(CHECKPOINT)
    vars(config.text_config).update(
        {
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_attention_heads": 32,
            "num_hidden_layers": layers,
            "max_position_embeddings": 512,
        }
    )
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(folder / "checkpoint")
    for file in CHECKPOINT.glob("tokenizer*"):
        (folder / "checkpoint" / file.name).write_bytes(file.read_bytes())
    return export_engine(folder / "checkpoint", folder / "engine")


def compare(stage: Stage, manifest: Manifest, case: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a step per layer, median over the repeats of the mean over the timed steps."""
    layers = manifest.model["text"]["num_hidden_layers"]
    totals: dict[str, list[float]] = {"tree": [], "per_beam": [], "per_beam_reorder": []}
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        tree = start(stage, manifest, images=1, rows=BEAMS)
        per_beam = start(stage, manifest, images=BEAMS, rows=1)
        seconds = dict.fromkeys(totals, 0.0)
        for step in range(STEPS):
            tokens = rng.integers(4, 500, BEAMS)
            parents = rng.integers(0, 2, BEAMS) if case == "shared" else np.arange(BEAMS)
            times = [perf_counter()]
            tree.step(tokens[None], parents[None])
            times.append(perf_counter())
            per_beam.step(tokens[:, None], np.zeros((BEAMS, 1), np.int64))
            times.append(perf_counter())
            if case == "shared":
                reorder(per_beam, parents)
            times.append(perf_counter())
            if step >= TIMED_FROM:
                seconds["tree"] += times[1] - times[0]
                seconds["per_beam"] += times[2] - times[1]
                seconds["per_beam_reorder"] += times[3] - times[1]
        for name in totals:
            totals[name].append(seconds[name])
    scale = 1000 / (STEPS - TIMED_FROM) / layers
    return {name: median(values) * scale for name, values in totals.items()}


def start(stage: Stage, manifest: Manifest, images: int, rows: int) -> CachedDecoder:
    """A prefilled decoder."""
    width = manifest.model["text"]["hidden_size"]
    prefix = np.random.default_rng(1).standard_normal((1, PREFIX_ROWS, width), dtype=np.float32)
    prompts = [[2, 5, 6, 7]] * images
    signature = manifest.stages[DECODER].signature
    decoder = CachedDecoder(stage, signature, np.repeat(prefix, images, axis=0), prompts, rows, STEPS + 1)
    decoder.prefill()
    return decoder


def reorder(decoder: CachedDecoder, parents: np.ndarray[Any, Any]) -> None:
    """What a cache for every beam has to copy when beams change places."""
    rows = int(decoder._used.max())
    moved = np.flatnonzero(parents != np.arange(BEAMS))
    for cache in decoder._caches:
        assert isinstance(cache, ArrayCache)
        cache.array[moved, :, :rows] = cache.array[parents[moved], :, :rows]


if __name__ == "__main__":
    sys.exit(main())
