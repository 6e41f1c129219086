"""A BLIP-2 at full size with random weights: export, one caption, and transformers beside it.

    python benchmarks/full_size.py --directory SCRATCH        (30 GB of disk, 17 GB of memory, ten minutes)
    python benchmarks/full_size.py --directory SCRATCH --precisions fp32 int8 int4      (40 GB, half an hour)
    python benchmarks/full_size.py --directory SCRATCH --model opt-6.7b --precisions int4           (25 GB of disk)

Every part runs in a process of its own, so that its peak memory (VmHWM) is its own; one whose figures lie in SCRATCH
is not run again. Engines with native kernels are also held against the floors of the machine (`ceilings.py`), and that
of OPT-2.7B in int4 is run in batches and under a limit of the address space. The last line on stdout is one JSON
object, also written to `benchmarks/results/full-size-<model>.json`. Exit status 1 when the tokens of the fp32 engine
are not those of transformers; those of the others are counted.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from blip2rt.native import native_path

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS, BEAMS, RUNS = 20, 5, 3
BATCHES = (8, 32)
ADDRESS_SPACE = 6 * 2**30  # bytes in which an int4 engine has to run
OPT = {"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32, "eos_token_id": 50118}
OPT_PROMPT = {"image_token": 50265, "prompt": [2, 102, 1345, 9]}  # BOS and three words
MODELS: dict[str, dict[str, Any]] = {
    "opt-2.7b": {
        "text": {**OPT, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
        **OPT_PROMPT,
    },
    "opt-6.7b": {
        "text": {**OPT, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
        **OPT_PROMPT,
        "peers": ("bf16",),  # 31 GB in fp32
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
PRECISIONS = ("fp32", "int8", "int4")
WEIGHT_SCALE = 0.05  # 0.02, transformers' own, makes a model that repeats the last token for ever


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A full-size model: export and one caption beside transformers.")
    parser.add_argument("--model", choices=MODELS, default="opt-2.7b", help="the language model (default: opt-2.7b)")
    parser.add_argument("--directory", type=Path, required=True, help="scratch folder with 30 GB of space")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="(default: fp32)")
    parser.add_argument("--peers", nargs="*", choices=("fp32", "bf16"), help="of transformers (default: what fits)")
    parser.add_argument("--part", nargs=2, metavar=("PART", "PRECISION"), help="run one part (used by the program)")
    parser.add_argument("--output", type=Path, help="where the figures go (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.part:
        part, precision = arguments.part
        figures = PARTS[part](arguments.directory, MODELS[arguments.model], precision)
        print(json.dumps(figures | {"peak_gb": peak_gb()}))
        return 0

    arguments.directory.mkdir(parents=True, exist_ok=True)
    made = run_part("make", "bf16", arguments)
    peers = MODELS[arguments.model].get("peers", ("fp32", "bf16")) if arguments.peers is None else arguments.peers
    theirs = {precision: run_part("transformers", precision, arguments) for precision in peers}
    engines: dict[str, dict[str, Any]] = {}
    for precision in arguments.precisions:
        built = run_part("export", precision, arguments)
        floors = {} if precision == "fp32" else run_part("floors", precision, arguments)
        ours = run_part("ours", precision, arguments)
        engines[precision] = {
            "export": built,
            "caption": ours,
            **{f"transformers_{peer}_over_ours": found["seconds"] / ours["seconds"] for peer, found in theirs.items()},
        }
        if theirs:
            tokens, score = theirs[peers[0]]["token_ids"], theirs[peers[0]]["score"]
            same = sum(a == b for a, b in zip(ours["token_ids"], tokens, strict=True))
            engines[precision] |= {"tokens_as_transformers": same, "score_difference": abs(ours["score"] - score)}
        if floors:
            engines[precision] |= {"floors": floors, "over_floor": over_floors(ours, floors)}
        if precision == "int4" and arguments.model == "opt-2.7b":
            engines[precision]["batches"] = run_part("batches", precision, arguments)
            limited = run_part("ours", precision, arguments, ADDRESS_SPACE)
            engines[precision]["under_ulimit"] = {"bytes": ADDRESS_SPACE, "seconds": limited["seconds"]}
    command = f"python benchmarks/full_size.py --model {arguments.model} --directory SCRATCH --precisions "
    command += " ".join(arguments.precisions)
    result = {
        "model": arguments.model,
        "command": command + (f" --peers {' '.join(peers)}".rstrip() if arguments.peers is not None else ""),
        "task": f"one 224 px picture, {BEAMS} beams, exactly {NEW_TOKENS} tokens, minimum of {RUNS} runs",
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "kernels": native_path()},
        "versions": {package: version(package) for package in ("blip2rt", "onnxruntime", "torch", "transformers")},
        "parameters": made["parameters"],
        "distinct_tokens": len(set(ours["token_ids"])),
        "transformers": theirs,
        "engines": engines,
    }
    (arguments.output or RESULTS / f"full-size-{arguments.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if engines.get("fp32", {}).get("tokens_as_transformers", NEW_TOKENS) == NEW_TOKENS else 1


def make_checkpoint(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
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
            elif name.endswith((".q.weight", ".k.weight")):  # T5's, whose products are not scaled: transformers' own
                parameter.normal_(0.0, 0.0028 if name.endswith(".q.weight") else 0.022)
            else:
                parameter.normal_(0.0, 0.02 if "embed" in name else WEIGHT_SCALE)
        model.query_tokens.normal_()
        if model_spec["text"]["model_type"] == "t5":  # an output layer of its own, as FLAN-T5 has
            head = model.language_model.lm_head
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight).normal_(0.0, WEIGHT_SCALE))
    model.save_pretrained(directory / "checkpoint")
    for file in CHECKPOINT.glob("tokenizer*"):  # any tokenizer will do: the prompt is given as ids
        (directory / "checkpoint" / file.name).write_bytes(file.read_bytes())
    return {"parameters": sum(p.numel() for p in model.parameters())}


def export(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
    """Build the engine."""
    from blip2rt.export import export_engine

    start = perf_counter()
    engine = export_engine(directory / "checkpoint", directory / precision, precision=precision, force=True)
    seconds = perf_counter() - start
    return {"seconds": seconds, "engine_gb": sum(file.stat().st_size for file in engine.iterdir()) / 1e9}


def caption_ours(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
    """One caption by the engine: with beams, where the time goes, and greedy."""
    from blip2rt import Pipeline

    start = perf_counter()
    pipe = Pipeline(directory / precision)
    load_seconds = perf_counter() - start
    first = perf_counter()
    run_ours(pipe, model_spec, 1, BEAMS)
    first_seconds = perf_counter() - first
    seconds, (result, stages) = fastest(lambda: run_ours(pipe, model_spec, 1, BEAMS))
    greedy_seconds, (_, greedy_stages) = fastest(lambda: run_ours(pipe, model_spec, 1, 1))
    return {
        "seconds": seconds,
        "stages": stages,
        "greedy_seconds": greedy_seconds,
        "greedy_step_seconds": greedy_stages["step"],
        "load_seconds": load_seconds,
        "first_caption_later_by": load_seconds + first_seconds - seconds,
        "score": result.score,
        "token_ids": result.token_ids,
    }


def run_ours(pipe: Any, model_spec: dict[str, Any], batch: int, num_beams: int) -> tuple[Any, dict[str, float]]:
    """Captions of so many pictures, the first one of them, and the seconds of every stage (a step: the median)."""
    from blip2rt import Caption
    from blip2rt.generative import Prompt
    from blip2rt.options import ResolvedOptions
    from blip2rt.trace import trace

    options = ResolvedOptions(num_beams=num_beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as stream:
        trace.path = stream.name
        features = pipe.encode([pixel_values()] * batch)
        captions = pipe.generative_engine.decode(Caption, features, [Prompt(model_spec["prompt"])] * batch, options)
        trace.path = None
        rows = [row for row in map(json.loads, stream) if "seconds" in row]
    seconds = {stage: [row["seconds"] for row in rows if row["stage"] == stage] for stage in ("vision", "qformer")}
    prefill, *steps = (row["seconds"] for row in rows if row["stage"] == "decoder")
    totals = {stage: sum(parts) for stage, parts in seconds.items()}
    return captions[0], totals | {"prefill": prefill, "step": statistics.median(steps)}


def batches(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
    """Seconds a picture in batches, and over their floor: a run each."""
    from blip2rt import Pipeline

    pipe, found = Pipeline(directory / precision), {}
    run_ours(pipe, model_spec, 1, 1)  # reads the file
    ceilings = measure()
    for batch in BATCHES:
        for num_beams in (1, BEAMS):
            start = perf_counter()
            run_ours(pipe, model_spec, batch, num_beams)
            seconds = (perf_counter() - start) / batch
            floors = stage_floors(directory / precision, model_spec, ceilings, batch, num_beams)
            floor = (sum(floors.values()) + (NEW_TOKENS - 2) * floors["step"]) / batch
            found[f"{batch} pictures, {num_beams} beams"] = {"seconds": seconds, "over_floor": seconds / floor}
    return found


def floors(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
    """Seconds that each stage of a caption needs at least on this machine, now."""
    ceilings = measure()
    stages = stage_floors(directory / precision, model_spec, ceilings, 1, BEAMS)
    greedy = stage_floors(directory / precision, model_spec, ceilings, 1, 1)["step"]
    return asdict(ceilings) | {"stages": stages, "greedy_step": greedy}


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, all cores together (`ceilings.py`)."""

    read_gb_per_s: float
    int8_gop_per_s: float

    def floor(self, weights: "Weights", rows: int, other_rows: int | None = None) -> float:
        """Seconds that a stage needs at least for so many rows; `weights.other` may see another number."""
        operations = 2 * (weights.inner * rows + weights.other * (rows if other_rows is None else other_rows))
        return max(weights.bytes / self.read_gb_per_s / 1e9, operations / self.int8_gop_per_s / 1e9)


@dataclass(frozen=True)
class Weights:
    """The linear layers of a stage."""

    inner: int  # weights
    other: int  # those of a decoder's output layer, or that make keys and values of an image in a Q-Former
    bytes: int


def measure() -> Ceilings:
    """The ceilings now, measured by a process of their own."""
    program = Path(__file__).with_name("ceilings.py")
    told = subprocess.run([sys.executable, program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return Ceilings(**json.loads(told))


def stage_floors(
    engine: Path, model_spec: dict[str, Any], ceilings: Ceilings, batch: int, num_beams: int
) -> dict[str, float]:
    """Of every stage with linear layers, for a batch; the prompt's rows and the queries' are those of this model."""
    vision, qformer, decoder = (linear_weights(engine / f"{stage}.onnx") for stage in ("vision", "qformer", "decoder"))
    queries, patches = 32, 257
    prompt_rows = queries + len(model_spec["prompt"])
    if (engine / "encoder.onnx").exists():
        encoder = linear_weights(engine / "encoder.onnx")
        prefill = ceilings.floor(encoder, batch * prompt_rows) + ceilings.floor(decoder, batch)
    else:
        prefill = ceilings.floor(decoder, batch * prompt_rows, batch)
    return {
        "vision": ceilings.floor(vision, batch * patches),
        "qformer": ceilings.floor(qformer, batch * queries, batch * patches),
        "prefill": prefill,
        "step": ceilings.floor(decoder, batch * num_beams),
    }


def linear_weights(path: Path) -> Weights:
    """The linear layers of a stage with native kernels."""
    import onnx_ir as ir

    sizes = {True: 0, False: 0}
    total = 0
    layers = [node for node in ir.load(path).graph if node.op_type == "QuantizedMatMul"]
    for node in layers:
        outputs, depth, bits = (node.attributes[name].as_int() for name in ("N", "K", "bits"))
        is_output = path.stem == "decoder" and node is layers[-1]
        sizes[is_output or "cross_attention.kv" in str(node.inputs[1])] += outputs * depth
        total += outputs * depth * bits // 8 + outputs * -(-depth // 128) * 2
    return Weights(sizes[False], sizes[True], total)


def over_floors(ours: dict[str, Any], floors: dict[str, Any]) -> dict[str, float]:
    """How many times its floor everything takes."""
    stages = {stage: ours["stages"][stage] / floor for stage, floor in floors["stages"].items()}
    whole = sum(floors["stages"].values()) + (NEW_TOKENS - 2) * floors["stages"]["step"]
    return stages | {
        "greedy_step": ours["greedy_step_seconds"] / floors["greedy_step"],
        "whole": ours["seconds"] / whole,
    }


def caption_transformers(directory: Path, model_spec: dict[str, Any], precision: str) -> dict[str, Any]:
    """The same caption by transformers, eager."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = Blip2ForConditionalGeneration.from_pretrained(directory / "checkpoint", dtype=dtype).eval()
    input_ids = torch.tensor([[model_spec["image_token"]] * model.config.num_query_tokens + model_spec["prompt"]])
    pixels = torch.from_numpy(pixel_values())[None].to(dtype)

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


PARTS: dict[str, Callable[[Path, dict[str, Any], str], dict[str, Any]]] = {
    "make": make_checkpoint,
    "export": export,
    "floors": floors,
    "ours": caption_ours,
    "batches": batches,
    "transformers": caption_transformers,
}


def run_part(part: str, precision: str, arguments: argparse.Namespace, limit: int | None = None) -> dict[str, Any]:
    """Run a part in a new process, of so many bytes; what it prints last."""
    kept = arguments.directory / f"{part}-{precision}{'-limited' if limit else ''}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    print(f"{part} {precision} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--directory", str(arguments.directory), "--model", arguments.model]
    command += ["--part", part, precision]
    if limit:
        command = ["prlimit", f"--as={limit}", *command]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    print(f"{part} {precision}: {figures}", file=sys.stderr)
    kept.write_text(json.dumps(figures))
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
