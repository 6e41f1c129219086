"""The best OpenVINO that we can build of the same model, beside our int4 engine, in one run.

    pip install openvino nncf
    python benchmarks/openvino_peer.py --directory SCRATCH      (full_size.py's, with its checkpoint and int4 engine)

OpenVINO's own tools do not know BLIP-2, so its parts are built by hand, as strong as we know how: the image encoder and
the Q-Former with 8-bit weights and activations (SmoothQuant), the language model with 4-bit weights in groups of 128,
the output layer included, a stateful cache whose beams change places by an index, prefilled once an image, and our own
search over its logits. Every part runs in a process of its own. Writes `results/openvino-opt-2.7b.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "openvino-opt-2.7b.json"
NEW_TOKENS, BEAMS, RUNS = 20, 5, 3
BATCHES = (1, 8, 32)
GROUP = 128  # rows that share a scale, of weights and of activations
SAMPLES = 4  # pictures that the 8-bit stages are calibrated with
PROMPT = [2, 102, 1345, 9]
Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="OpenVINO beside blip2rt, int4.")
    parser.add_argument(
        "--directory", type=Path, required=True, help="scratch, with full_size.py's checkpoint and int4"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--part", nargs="+", help="run one part (used by the program)")
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(PARTS[args.part[0]](args.directory, *map(int, args.part[1:]))))
        return 0
    if not (args.directory / "openvino" / "decoder.xml").exists():
        for part in ("see", "write"):
            run_part(args.directory, part)
    figures = {}
    for batch in args.batches:
        for beams in (BEAMS, 1):
            ours, theirs = (run_part(args.directory, part, batch, beams) for part in ("ours", "theirs"))
            both = {"blip2rt": ours, "openvino": theirs}
            figures[f"{batch} pictures, {beams} beams"] = both | {"ratio": theirs["seconds"] / ours["seconds"]}
    versions = {package: version(package) for package in ("blip2rt", "onnxruntime", "openvino", "nncf", "torch")}
    result = {
        "command": "python benchmarks/openvino_peer.py --directory SCRATCH",
        "task": f"224 px pictures, exactly {NEW_TOKENS} tokens, int4; seconds of a batch, minimum of {RUNS} runs",
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "figures": figures,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result))
    return 0


def run_part(directory: Path, *part: object) -> dict[str, Any]:
    """A part in a new process: what it prints last."""
    command = [sys.executable, __file__, "--directory", str(directory), "--part", *map(str, part)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(told.strip().splitlines()[-1])
    print(*part, found, file=sys.stderr, flush=True)
    return found


# --- building -----------------------------------------------------------------------------------------------------


def build_seeing(directory: Path) -> dict[str, Any]:
    """Image encoder and Q-Former: converted, then 8-bit weights and activations."""
    import nncf
    import openvino as ov
    import torch

    from blip2rt.model import Checkpoint

    checkpoint = Checkpoint(directory / "checkpoint")
    reference, config = checkpoint.build(), checkpoint.config
    home = directory / "openvino"
    home.mkdir(exist_ok=True)
    pixels = torch.randn(SAMPLES, 3, config.vision.image_size, config.vision.image_size)
    inputs = pixels
    for stage in ("vision", "qformer"):
        module = checkpoint.load(reference.get_submodule(stage), stage)
        model = ov.convert_model(module, example_input=inputs[:1])
        model.reshape([-1, *inputs.shape[1:]])
        with torch.no_grad():
            found = module(inputs)
        samples = nncf.Dataset([row[None].numpy() for row in inputs])
        model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=SAMPLES)
        ov.save_model(model, home / f"{stage}.xml")
        inputs = found if isinstance(found, torch.Tensor) else found[0]
    return {}


def build_writing(directory: Path) -> dict[str, Any]:
    """The language model: a stateful cache, 4-bit weights."""
    import nncf
    import openvino as ov
    import torch
    from openvino import opset15 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    from blip2rt.model import Checkpoint

    checkpoint = Checkpoint(directory / "checkpoint")
    decoder: Any = checkpoint.load(checkpoint.build().get_submodule("decoder"), "decoder")
    config: Any = checkpoint.config.text  # type: ignore[union-attr]
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    num_caches = 2 * config.num_hidden_layers
    inputs = (
        torch.zeros(2, 3, config.hidden_size),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 1, 3, 5),
        *torch.zeros(num_caches, 2, heads, 2, width).unbind(),
    )
    with torch.no_grad():
        model = ov.convert_model(_Concatenating(decoder), example_input=inputs)
    names = ["prefix", "input_ids", "positions", "mask", *(f"past_{i}" for i in range(num_caches))]
    shapes = [[-1, -1, config.hidden_size], [-1, -1], [-1, -1], [-1, 1, -1, -1], *[[-1, heads, -1, width]] * num_caches]
    model.reshape({port: ov.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    for i, port in enumerate(model.outputs):
        port.get_tensor().set_names({"logits" if i == 0 else f"present_{i - 1}"})
    beams = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    for port in model.inputs[len(names) - num_caches : len(names)]:
        consumers = port.get_target_inputs()
        chosen = ops.gather(port, beams, ops.constant(0, dtype=np.int64))
        for consumer in consumers:
            consumer.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past_{i}": f"present_{i}" for i in range(num_caches)})
    batch = ops.gather(ops.shape_of(model.input("input_ids")), ops.constant([0]), ops.constant(0))
    empty = [ops.constant([number], dtype=np.int64) for number in (heads, 0, width)]
    for operation in model.get_ops():
        if operation.get_type_name() == "ReadValue":
            zeros = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, *empty], 0))
            operation.set_arguments([zeros])
    model.validate_nodes_and_infer_types()
    model = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0, all_layers=True
    )
    ov.save_model(model, directory / "openvino" / "decoder.xml")
    return {}


def _Concatenating(decoder: Any) -> Any:  # noqa: N802  # a class, which needs torch
    """OPT with a cache that grows by concatenation, as OpenVINO knows how to fuse it."""
    import torch

    from blip2rt.model.layers import attend, split_heads

    class Concatenating(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, prefix: Any, input_ids: Any, positions: Any, mask: Any, *past: Any) -> Any:
            x = self.decoder.embedding(prefix, input_ids, positions)
            present: list[Any] = []
            for block, key, value in zip(self.decoder.blocks, past[0::2], past[1::2], strict=True):
                rows = (split_heads(part, block.num_heads) for part in block.qkv(block.norm1(x)).chunk(3, dim=-1))
                query, new_key, new_value = rows
                key, value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
                x = x + block.proj(attend(query, key, value, mask))
                x = x + block.fc2(block.activation(block.fc1(block.norm2(x))))
                present += key, value
            last = torch.full_like(input_ids[:, :1], -1) + input_ids.shape[1]
            return self.decoder.head(x, last, self.decoder.embedding.token.weight), *present

    return Concatenating().eval()


# --- running ------------------------------------------------------------------------------------------------------


class OpenVINO:
    """Pictures to token ids."""

    def __init__(self, home: Path):
        import openvino as ov

        core = ov.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        self._models = {
            stage: core.compile_model(core.read_model(home / f"{stage}.xml"), "CPU", settings)
            for stage in ("vision", "qformer", "decoder")
        }
        self._decoder = self._models["decoder"].create_infer_request()
        self.seconds: dict[str, float] = {}

    def captions(self, pixels: Array, beams: int) -> list[list[int]]:
        """The best caption of every picture."""
        from blip2rt.options import ResolvedOptions
        from blip2rt.search import run_searches, start_search

        start = perf_counter()
        image_embeds = self._models["vision"](pixels)[0]
        self.seconds["vision"] = perf_counter() - start
        self._prefix = self._models["qformer"](image_embeds)[1]
        self._beams = beams
        options = ResolvedOptions(num_beams=beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        searches = [start_search(options, PROMPT, []) for _ in pixels]
        for _ in run_searches(self, searches):
            pass
        return [search.sequences()[0].token_ids for search in searches]

    def prefill(self) -> Array:
        """Once an image; the beams are made of it by the first step's `beam_idx`."""
        batch, queries, _ = self._prefix.shape
        rows = queries + len(PROMPT)
        prefix = np.zeros((batch, rows, self._prefix.shape[2]), np.float32)
        prefix[:, :queries] = self._prefix
        ids = np.tile([-1] * queries + PROMPT, (batch, 1)).astype(np.int64)
        positions = np.tile(np.arange(rows), (batch, 1)).astype(np.int64)
        hidden = np.arange(rows) > np.arange(rows)[:, None]
        mask = np.where(hidden, np.finfo(np.float32).min, np.float32(0))[None, None].repeat(batch, 0)
        self._decoder.reset_state()
        self._length, self._owners = rows, np.arange(batch)
        start = perf_counter()
        logits = self._run(prefix, ids, positions, mask, np.arange(batch))
        self.seconds["prefill"] = perf_counter() - start
        return logits.reshape(batch, 1, -1)

    def step(self, tokens: Array, parents: Array, _sums: Array) -> Array:
        """One token for every beam."""
        batch, beams = tokens.shape
        if len(self._owners) == batch:  # after the prefill
            places = np.arange(batch).repeat(beams)
            self._owners = np.arange(batch * beams)
        else:
            places = (parents + np.arange(batch)[:, None] * beams).ravel()
        prefix = np.zeros((batch * beams, 1, self._prefix.shape[2]), np.float32)
        positions = np.full((batch * beams, 1), self._length, np.int64)
        mask = np.zeros((batch * beams, 1, 1, self._length + 1), np.float32)
        start = perf_counter()
        logits = self._run(prefix, tokens.reshape(-1, 1).astype(np.int64), positions, mask, places)
        self.seconds["step"] = perf_counter() - start
        self._length += 1
        return logits.reshape(batch, beams, -1)

    def keep(self, images: Sequence[int]) -> None:
        """All captions have one length."""
        raise NotImplementedError

    def _run(self, prefix: Array, ids: Array, positions: Array, mask: Array, places: Array) -> Array:
        inputs = {"prefix": prefix, "input_ids": ids, "positions": positions, "mask": mask}
        self._decoder.infer(inputs | {"beam_idx": places.astype(np.int32)})
        return np.array(self._decoder.get_tensor("logits").data, np.float32)


def pictures(batch: int, size: int) -> Array:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


def time_theirs(directory: Path, batch: int, beams: int) -> dict[str, Any]:
    """A batch by OpenVINO."""
    model = OpenVINO(directory / "openvino")
    size = json.loads((directory / "checkpoint" / "config.json").read_text("utf-8"))["vision_config"]["image_size"]
    pixels, seconds = pictures(batch, size), []
    for _ in range(1 + (RUNS if batch == 1 else 1)):  # the first allocates
        start = perf_counter()
        tokens = model.captions(pixels, beams)
        seconds.append(perf_counter() - start)
    return {"seconds": min(seconds[1:]), **model.seconds, "tokens": tokens[0], "peak_gb": peak_gb()}


def time_ours(directory: Path, batch: int, beams: int) -> dict[str, Any]:
    """The same batch by our int4 engine."""
    from blip2rt import Caption, Pipeline
    from blip2rt.generative import Prompt
    from blip2rt.options import ResolvedOptions

    pipe = Pipeline(directory / "int4")
    options = ResolvedOptions(num_beams=beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    pixels, seconds = list(pictures(batch, pipe.manifest.image.size)), []
    for _ in range(1 + (RUNS if batch == 1 else 1)):
        start = perf_counter()
        found = pipe.generative_engine.decode(Caption, pipe.encode(pixels), [Prompt(PROMPT)] * batch, options)
        seconds.append(perf_counter() - start)
    return {"seconds": min(seconds[1:]), "tokens": found[0].token_ids, "peak_gb": peak_gb()}


def peak_gb() -> float:
    """Peak resident memory of this process so far, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


PARTS: dict[str, Any] = {"see": build_seeing, "write": build_writing, "ours": time_ours, "theirs": time_theirs}


if __name__ == "__main__":
    sys.exit(main())
