"""A BLIP-2 at full size with random weights: export, one caption, and transformers beside it.

    python benchmarks/full_size.py --directory SCRATCH        (30 GB of disk, 17 GB of memory, ten minutes)

Every part runs in a process of its own, so that its peak memory (VmHWM) is its own. The last line on stdout is one JSON
object, which is also written to `benchmarks/results/full-size-<model>-fp32.json`. Exit status 1 when the tokens differ.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS, BEAMS, RUNS = 20, 5, 2
MODELS: dict[str, dict[str, Any]] = {
    "opt-2.7b": {
        "text": {
            "model_type": "opt",
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "eos_token_id": 50118,
        },
        "image_token": 50265,
        "prompt": [2, 102, 1345, 9],  # BOS and three words
    },
    "flan-t5-xl": {
        "text": {
            "model_type": "t5",
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        "image_token": 32100,
        "prompt": [102, 1345, 9, 1],  # three words and the end
    },
}
WEIGHT_SCALE = 0.05  # 0.02, transformers' own, makes a model that repeats the last token for ever


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A full-size model: export and one caption beside transformers.")
    parser.add_argument("--model", choices=MODELS, default="opt-2.7b", help="the language model (default: opt-2.7b)")
    parser.add_argument("--directory", type=Path, required=True, help="scratch folder with 30 GB of space")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process (used by the program itself)")
    parser.add_argument("--output", type=Path, help="where the figures go (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.part:
        part = PARTS[arguments.part](arguments.directory, MODELS[arguments.model])
        print(json.dumps(part | {"peak_gb": peak_gb()}))
        return 0

    arguments.directory.mkdir(parents=True, exist_ok=True)
    figures = {part: run_part(part, arguments.directory, arguments.model) for part in PARTS}
    ours, theirs = figures["ours"], figures["transformers"]
    same_tokens = ours.pop("token_ids") == (tokens := theirs.pop("token_ids"))
    result = {
        "command": f"python benchmarks/full_size.py --model {arguments.model} --directory SCRATCH",
        "task": f"one 224 px picture, {BEAMS} beams, exactly {NEW_TOKENS} tokens, fp32, minimum of {RUNS} runs",
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {package: version(package) for package in ("blip2rt", "onnxruntime", "torch", "transformers")},
        "same_tokens": same_tokens,
        "distinct_tokens": len(set(tokens)),
        "score_difference": abs(ours["score"] - theirs["score"]),
        "speedup": theirs["seconds"] / ours["seconds"],
        **figures,
    }
    output = arguments.output or RESULTS / f"full-size-{arguments.model}-fp32.json"
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if same_tokens else 1


def make_checkpoint(directory: Path, model_spec: dict[str, Any]) -> dict[str, Any]:
    """transformers' `Blip2Config` defaults with the language model's sizes, random bf16 weights."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    from blip2rt.bundled import CHECKPOINT

    config = Blip2Config(text_config=model_spec["text"], image_token_index=model_spec["image_token"])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.02)
            elif name.endswith("shared.weight"):  # T5 has no norm before its first block
                parameter.normal_()
            else:
                # T5's queries and keys, too: it does not scale their products
                is_small = "embed" in name or name.endswith((".q.weight", ".k.weight"))
                parameter.normal_(0.0, 0.02 if is_small else WEIGHT_SCALE)
        model.query_tokens.normal_()
    model.save_pretrained(directory / "checkpoint")
    for file in CHECKPOINT.glob("tokenizer*"):  # any tokenizer will do: the prompt is given as ids
        (directory / "checkpoint" / file.name).write_bytes(file.read_bytes())
    return {"parameters": sum(p.numel() for p in model.parameters())}


def export(directory: Path, model_spec: dict[str, Any]) -> dict[str, Any]:
    """Build the engine."""
    from blip2rt.export import export_engine

    start = perf_counter()
    export_engine(directory / "checkpoint", directory / "engine", force=True)
    return {"seconds": perf_counter() - start}


def caption_ours(directory: Path, model_spec: dict[str, Any]) -> dict[str, Any]:
    """One caption by the engine."""
    from blip2rt import Caption, Pipeline
    from blip2rt.generative import Prompt
    from blip2rt.options import ResolvedOptions

    start = perf_counter()
    pipe = Pipeline(directory / "engine")
    load_seconds = perf_counter() - start
    options = ResolvedOptions(num_beams=BEAMS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    encode_seconds = []

    def caption() -> Caption:
        start = perf_counter()
        features = pipe.encode(pixel_values())
        encode_seconds.append(perf_counter() - start)
        return pipe.generative_engine.decode(Caption, [features], [Prompt(model_spec["prompt"])], options)[0]

    seconds, result = fastest(caption)
    return {
        "seconds": seconds,
        "encode_seconds": min(encode_seconds),
        "load_seconds": load_seconds,
        "score": result.score,
        "token_ids": result.token_ids,
    }


def caption_transformers(directory: Path, model_spec: dict[str, Any]) -> dict[str, Any]:
    """The same caption by transformers, eager, fp32."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(directory / "checkpoint", dtype=torch.float32).eval()
    input_ids = torch.tensor([[model_spec["image_token"]] * model.config.num_query_tokens + model_spec["prompt"]])
    pixels = torch.from_numpy(pixel_values())[None]

    def caption() -> Any:
        return model.generate(
            pixels,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            num_beams=BEAMS,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_scores=True,
        )

    seconds, output = fastest(caption)
    token_ids = output.sequences[0, -NEW_TOKENS:].tolist()
    return {"seconds": seconds, "score": float(output.sequences_scores[0]), "token_ids": token_ids}


PARTS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "make": make_checkpoint,
    "export": export,
    "ours": caption_ours,
    "transformers": caption_transformers,
}


def run_part(part: str, directory: Path, model: str) -> dict[str, Any]:
    """Run a part in a new process; what it prints last."""
    print(f"{part} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--directory", str(directory), "--model", model, "--part", part]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    print(f"{part}: {figures}", file=sys.stderr)
    return figures


def pixel_values() -> np.ndarray[Any, Any]:
    """The picture: noise, [3, 224, 224]."""
    return np.random.default_rng(0).standard_normal((3, 224, 224), dtype=np.float32)


def fastest(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of `RUNS` runs, and the last result."""
    seconds = []
    for _ in range(RUNS):
        start = perf_counter()
        result = run()
        seconds.append(perf_counter() - start)
    return min(seconds), result


def peak_gb() -> float:
    """Peak resident memory of this process so far, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def cpu_name() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
