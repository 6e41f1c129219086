"""The commands around a checkpoint: `export`, `calibrate`, `convert`, `verify`. Only they load torch."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import PLAN_SIZES, add_export, add_name, add_parts, add_sizes
from .errors import InputError, extra

# Fields of CheckpointSource.
SOURCE_OPTIONS = ("config", "vision", "llm", "image_size", "via_image_size", "vision_layers")


def export(arguments: argparse.Namespace) -> int:
    """Build an engine directory."""
    return _build(arguments)


def calibrate(arguments: argparse.Namespace) -> int:
    """Build an int4 engine whose weights are rounded by what pictures do to them."""
    texts: Any = arguments.prompt
    if arguments.texts:
        try:
            texts = Path(arguments.texts).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--texts {arguments.texts} cannot be read ({error}): a UTF-8 file with a text a line"
            ) from None
    return _build(arguments, pictures=arguments.images, texts=texts)


def _build(arguments: argparse.Namespace, **calibration: Any) -> int:
    with extra("export"):
        from .bundled import CHECKPOINT
        from .export import export_engine
        from .export.plans import Limits

    sizes = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in PLAN_SIZES}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    engine = export_engine(
        _source(arguments, CHECKPOINT if arguments.model is None else arguments.model),
        arguments.output,
        precision=arguments.precision,
        device=arguments.device,
        tokenizer=arguments.tokenizer,
        text_tokenizer=arguments.text_tokenizer,
        limits=Limits(**sizes) if sizes else None,
        refit=arguments.refit,
        compiled=arguments.compile,
        force=arguments.force,
        **calibration,
    )
    print(f"built {engine}", file=sys.stderr)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write a checkpoint in another format, tensor for tensor."""
    with extra("export"):
        from .export.convert import convert_checkpoint

    source = _source(arguments, arguments.model)
    differences = convert_checkpoint(source, arguments.output, arguments.to, tokenizer=arguments.tokenizer)
    for difference in differences:
        print(f"blip2rt: note: {difference}", file=sys.stderr)
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare an engine with the reference model, stage by stage."""
    with extra("export"):
        from .export.verify import verify_engine

    status = 0
    for comparison in verify_engine(arguments.engine, _source(arguments, arguments.model), arguments.name):
        print(json.dumps(comparison.as_dict()) if arguments.json else comparison)
        status = status or int(comparison.first_divergence is not None)
    return status


def _source(arguments: argparse.Namespace, model: Any) -> Any:
    """The checkpoint that a command names; imported here, because it loads torch."""
    from .model import CheckpointSource

    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in SOURCE_OPTIONS}
    return CheckpointSource(**given | {"model": model})


def add_export_commands(command: Callable[[Callable[[argparse.Namespace], int]], argparse.ArgumentParser]) -> None:
    """What the four take."""
    add_export(command(export))
    calibrator = command(calibrate)
    calibrator.add_argument(
        "images", nargs="+", metavar="IMAGE", help="pictures like those that it will see; 32 are many"
    )
    calibrator.add_argument("--prompt", default="a photo of", help="behind every picture (default: %(default)s)")
    calibrator.add_argument("--texts", metavar="FILE", help="prompt and caption of each picture, a line each, instead")
    add_export(calibrator, precision="int4")

    converter = command(convert)
    converter.add_argument("model", metavar="IN", help="a checkpoint, as `blip2rt export --model` takes it")
    converter.add_argument("output", metavar="OUT", help="a directory (transformers) or a .pth (LAVIS, mmpretrain)")
    converter.add_argument("--to", required=True, metavar="FORMAT", help="transformers, lavis or mmpretrain")
    converter.add_argument("--tokenizer", help="directory of its tokenizer (default: the model's or the LLM's)")
    add_parts(converter)

    verifier = command(verify)
    verifier.add_argument("engine", metavar="ENGINE")
    verifier.add_argument("--model", required=True, help="the checkpoint that the engine was built from")
    add_parts(verifier)
    add_sizes(verifier)
    add_name(verifier)
