"""The options that several commands share, and the long lists of some; which command has which stands in cli.py."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .inputs import BATCH_SIZE
from .options import GenerationOptions
from .server.settings import ServerSettings

OPTION_TYPES: dict[str, Callable[[str], Any]] = {
    "early_stopping": lambda text: {"true": True, "false": False}.get(text.lower(), text),
    "rules": str,
}
PLAN_SIZES = {  # field of `export.plans.Limits`, with dashes -> what it limits
    "max-batch": "images at once (default: 32)",
    "max-beams": "rows of an image side by side (default: 32)",
    "max-prompt": "tokens of a prompt (default: 64)",
    "capacity": "rows of the cache of an image (default: 256)",
}
FLOATS = ("length_penalty", "repetition_penalty", "temperature", "top_p")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """What the files of LAVIS and mmpretrain do not say or hold themselves."""
    parser.add_argument("--config", metavar="FILE|NAME", help="a Blip2Config as JSON, or a name like blip2-opt-2.7b")
    parser.add_argument("--vision", metavar="FILE", help="the image encoder of a LAVIS file without one")
    parser.add_argument("--llm", metavar="DIR|ID", help="the language model of a file without one")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Other sizes than the checkpoint's."""
    parser.add_argument("--image-size", type=int, metavar="N", help="interpolate the position embeddings to N pixels")
    parser.add_argument(
        "--via-image-size",
        type=int,
        metavar="N",
        help="interpolate them to N pixels before that, as mmpretrain's VQA does",
    )
    parser.add_argument("--vision-layers", type=int, metavar="N", help="use the first N blocks of the image encoder")


def add_export(parser: argparse.ArgumentParser, precision: str | None = None) -> None:
    """Those of `blip2rt export`."""
    parser.add_argument(
        "--model", help="a transformers directory or hub id, a LAVIS or mmpretrain .pth (default: the bundled model)"
    )
    add_parts(parser)
    add_sizes(parser)
    parser.add_argument("--output", help="the engine directory (default: engines/<model>-<precision>-<device>)")
    parser.add_argument(
        "--precision",
        default=precision,
        help="fp32; int8 or int4 on the CPU and torch, bf16 or fp16 on GPUs, fp8 on torch (default: "
        f"{precision or 'fp32 on the CPU, bf16 on a GPU'})",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu; for a GPU torch, cuda (ONNX Runtime's provider) or tensorrt, which builds on it (default: cpu)",
    )
    for name, what in PLAN_SIZES.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"tensorrt: {what}")
    parser.add_argument("--refit", metavar="ENGINE", help="tensorrt: plans of the same sizes that get these weights")
    parser.add_argument(
        "--compile", action="store_true", help="torch: compile image encoder and Q-Former for this machine"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR|ID", help="its tokenizer, where it is apart (default: the model's or the LLM's)"
    )
    parser.add_argument(
        "--text-tokenizer",
        metavar="DIR|ID",
        help="BERT's tokenizer, for retrieval and questions (default: the model's)",
    )
    parser.add_argument("--force", action="store_true", help="replace an engine that is there")


def add_name(parser: argparse.ArgumentParser) -> None:
    """For commands that look at an engine and run none."""
    parser.add_argument("--name", help="which engine of a folder")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Which engine, and in which form its results come."""
    parser.add_argument("--engine", default="engines", metavar="DIR", help="engine directory, or a folder with one")
    add_name(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Threads, and every generation option."""
    parser.add_argument("--threads", type=int, help="cores to use (default: all)")
    for field in fields(GenerationOptions):
        option = "--" + field.name.replace("_", "-")
        if field.name == "do_sample":
            parser.add_argument(option, action="store_true", default=None)
        else:
            kind = OPTION_TYPES.get(field.name, float if field.name in FLOATS else int)
            parser.add_argument(option, type=kind, metavar="VALUE")


def add_strip_prefix(parser: argparse.ArgumentParser) -> None:
    """For commands that write texts."""
    parser.add_argument(
        "--strip-prefix", action="append", default=[], metavar="TEXT", help="take it off the beginning of every text"
    )


def add_bulk(parser: argparse.ArgumentParser) -> None:
    """Those of `blip2rt bulk`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, a list of paths (.txt), .jsonl, .csv, .tsv, .parquet, or WebDataset shards: a .tar, a pattern "
        "of them, 'pipe:COMMAND'",
    )
    parser.add_argument("--output", required=True, metavar="DEST", help="a file, or a folder, by --format")
    parser.add_argument("--format", help="jsonl, csv, parquet, webdataset, sidecar; npy (default: DEST's ending)")
    parser.add_argument("--task", default="caption", help="caption (the default), answer, generate, embed or match")
    parser.add_argument("--prompt", help="for all pictures (default: a column 'prompt'; for captions 'a photo of')")
    parser.add_argument("--question", help="for all pictures (default: a column 'question')")
    parser.add_argument("--text", help="match: for all pictures (default: a column 'text')")
    parser.add_argument("--text-column", metavar="NAME", help="column with a question, prompt or text for each picture")
    parser.add_argument(
        "--min-itm", type=float, metavar="P", help="drop captions that ITM finds less probable (0 to 1)"
    )
    parser.add_argument("--pooling", default="mean", help="embed: mean (the default), one vector a picture, or none")
    parser.add_argument("--image-column", metavar="NAME", help="column with the picture: its path, or its bytes")
    parser.add_argument("--id-column", metavar="NAME", help="column that names a row (default: 'id', else the picture)")
    parser.add_argument("--extension", default=".txt", help="of sidecar files (default: .txt)")
    add_strip_prefix(parser)
    parser.add_argument("--workers", type=int, help="processes that decode (default: one for two cores)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"(default: {BATCH_SIZE})")
    parser.add_argument("--force", action="store_true", help="throw away an output that is there, and begin anew")
    parser.add_argument("--ray", action="store_true", help="on the Ray cluster of RAY_ADDRESS, or of this machine")
    parser.add_argument(
        "--actors", type=int, help="with --ray: engines, each of --threads CPUs (default: all there is)"
    )
    add_engine(parser)
    add_options(parser)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Those of `blip2rt serve`; every limit of a server is one."""
    parser.add_argument("engine", nargs="?", default="engines", metavar="ENGINE", help="engine directory, or a folder")
    parser.add_argument("--name", help="which engine of a folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any)")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="answer over gRPC as well (default: no)")
    parser.add_argument("--threads", type=int, help="cores to use (default: all)")
    parser.add_argument("--api-keys", metavar="FILE", help="file with a key a line (default: everybody may ask)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST", help="fetch pictures by URL from this host as well"
    )
    parser.add_argument("--gallery", metavar="DIR", help="a gallery of `blip2rt embed` that may be searched")
    parser.add_argument(
        "--pictures", metavar="DIR", help="folder that the gallery's ids are paths under: show its pictures"
    )
    for name, default, what in ServerSettings.limits():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help=f"{what} (default: {default})")
