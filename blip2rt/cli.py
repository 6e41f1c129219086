"""The `blip2rt` command: one function per command, no logic of its own.

Results go to stdout, messages and progress to stderr. Exit status: 0 ok, 1 the work failed, 2 the call was wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from . import __version__
from .arguments import add_bulk, add_engine, add_name, add_options, add_serve, add_strip_prefix
from .cli_export import add_export_commands
from .cli_output import write_line
from .cli_retrieval import add_retrieval_commands
from .errors import Blip2rtError, ImageError, InputError, extra
from .options import GenerationOptions, resolve_options
from .pipeline import ANSWER_DEFAULTS, CAPTION_DEFAULTS, GENERATE_DEFAULTS, Pipeline
from .progress import progress
from .results import Generation
from .server.settings import ServerSettings
from .tokenizer import CAPTION_PROMPT

RESULT_KEYS = ("text", "score", "token_ids", "token_logprobs", "finish_reason")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names are bytes that need not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    arguments = _parser().parse_args(argv)
    return run_command(arguments.run, arguments)


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """What a command comes to: its exit status, and a sentence on stderr where it failed."""
    try:
        status = command(arguments)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except InputError as error:
        print(f"blip2rt: {error}", file=sys.stderr)
        return 2
    except Blip2rtError as error:
        print(f"blip2rt: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # which only means that the reader of our output has left
            print(f"blip2rt: {error}", file=sys.stderr)
        _drop_unwritten_output()
        return 1
    except KeyboardInterrupt:
        return 130


def caption(arguments: argparse.Namespace) -> int:
    """Caption pictures."""
    ranking = {"rerank": arguments.rerank} if arguments.rerank else {}
    return _write_results(
        arguments,
        CAPTION_DEFAULTS,
        lambda pipe, images, **keywords: pipe.caption(images, arguments.prompt, **ranking, **keywords),
    )


def answer(arguments: argparse.Namespace) -> int:
    """Answer a question about pictures; of a closed list, where one is given."""
    closed: dict[str, Any] = {"candidates": _lines(arguments.candidates)} if arguments.candidates else {}

    def run(pipe: Pipeline, images: Any, **keywords: Any) -> list[Generation]:
        if closed:  # what was not said must not seem to be
            keywords = {name: value for name, value in keywords.items() if value not in ([], GenerationOptions())}
        return pipe.answer(images, arguments.question, **closed, **keywords)

    return _write_results(arguments, ANSWER_DEFAULTS, run)


def generate(arguments: argparse.Namespace) -> int:
    """Follow an instruction about pictures."""
    return _write_results(
        arguments,
        GENERATE_DEFAULTS,
        lambda pipe, images, **keywords: pipe.generate(images, arguments.prompt, **keywords),
    )


def bulk(arguments: argparse.Namespace) -> int:
    """Caption, or ask about, a whole collection; killed and run again, it goes on where it was."""
    from .bulk.job import BulkJob
    from .bulk.run import run_bulk
    from .bulk.sources import Columns

    job = BulkJob(
        source=arguments.source,
        output=Path(arguments.output),
        task=arguments.task,
        text={"answer": arguments.question, "match": arguments.text}.get(arguments.task, arguments.prompt),
        columns=Columns(arguments.image_column, arguments.id_column, arguments.text_column),
        options=_options(arguments),
        format=arguments.format,
        extension=arguments.extension,
        strip_prefixes=arguments.strip_prefix,
        min_itm=arguments.min_itm,
        pooling=arguments.pooling,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        force=arguments.force,
    )
    if arguments.actors is not None and not arguments.ray:
        raise InputError("--actors is for --ray: add it, or leave --actors out")
    if arguments.workers is not None and arguments.ray:
        raise InputError("with --ray every actor decodes for itself: leave --workers out")
    if arguments.ray:
        with extra("ray"):
            from .bulk.on_ray import run_on_ray

        on = (arguments.engine, arguments.name, arguments.threads, arguments.actors)
        with redirect_stdout(sys.stderr):  # where Ray may say what it likes, and no row is read
            report = run_on_ray(job, arguments.output, *on)
    else:
        with extra("parquet"):
            report = run_bulk(job, arguments.engine, arguments.name, arguments.threads)
    print(json.dumps(asdict(report)) if arguments.json else report, file=sys.stdout if arguments.json else sys.stderr)
    return int(bool(report.failed) and not report.answered + report.kept + report.skipped)


def eval(arguments: argparse.Namespace) -> int:
    """Run a preset over its data set: the table beside the published one."""
    from .evaluate import evaluate
    from .presets import find_preset

    preset = find_preset(arguments.preset)
    pipe = Pipeline(arguments.engine, name=arguments.name, threads=arguments.threads)
    output = Path(arguments.output or f"eval-{preset.name}")
    report = evaluate(preset, pipe, Path(arguments.data), output, any_engine=arguments.any_engine)
    print(json.dumps(asdict(report)) if arguments.json else report)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Answer over HTTP: OpenAI's chat and embeddings, the Open Inference Protocol, uploads, a gallery, and a page."""
    with extra("serve"):
        from .server.run import serve as run_server
    if arguments.grpc_port is not None:
        with extra("grpc"):
            from .server import inference_grpc  # noqa: F401

    limits = {name: getattr(arguments, name) for name, _, _ in ServerSettings.limits()}
    keys = tuple(Path(arguments.api_keys).read_text().split()) if arguments.api_keys else ()
    gallery, pictures = (folder and Path(folder) for folder in (arguments.gallery, arguments.pictures))
    settings = ServerSettings(
        **limits, gallery=gallery, pictures=pictures, api_keys=keys, allow_hosts=tuple(arguments.allow_host)
    )
    run_server(
        arguments.engine,
        host=arguments.host,
        port=arguments.port,
        grpc_port=arguments.grpc_port,
        name=arguments.name,
        threads=arguments.threads,
        settings=settings,
    )
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Show what is in an engine directory."""
    from .inspection import describe_engine

    description = describe_engine(arguments.engine, arguments.name)
    print(json.dumps(description.as_dict()) if arguments.json else description)
    return 0


def _write_results(
    arguments: argparse.Namespace,
    defaults: Mapping[str, Any],
    run: Callable[..., list[Generation]],
) -> int:
    """Run pictures in batches; a bad one becomes a row with its error, and the others go on."""
    options = _options(arguments)
    resolve_options(defaults, options, {})  # a wrong call is refused before a picture is looked at
    pipe = Pipeline(arguments.engine, name=arguments.name, threads=arguments.threads)
    status, size = 0, pipe.generative_engine.batch_size
    starts = range(0, len(arguments.images), size)
    for start in progress(starts, "images", total=len(arguments.images), step=size):
        paths = arguments.images[start : start + size]
        prepared = [_preprocess(pipe, path) for path in paths]
        readable = [pixels for pixels in prepared if not isinstance(pixels, ImageError)]
        if getattr(arguments, "rerank", None):  # pixel values are one engine's, and two look at the picture
            readable = [path for path, found in zip(paths, prepared, strict=True) if not isinstance(found, ImageError)]
        keywords = {"options": options, "strip_prefix": arguments.strip_prefix}
        results = iter(run(pipe, readable, **keywords) if readable else [])
        for path, pixels in zip(paths, prepared, strict=True):
            error = pixels if isinstance(pixels, ImageError) else None
            _write_row(path, None if error else next(results), error, arguments.json)
            status = status or int(error is not None)
    return status


def _lines(path: str) -> list[str]:
    """The lines of a file that hold something."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): it holds one candidate a line, in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def _options(arguments: argparse.Namespace) -> GenerationOptions:
    return GenerationOptions(**{field.name: getattr(arguments, field.name) for field in fields(GenerationOptions)})


def _preprocess(pipe: Pipeline, path: str) -> Any:
    try:
        return pipe.preprocess(path)
    except ImageError as error:
        return error


def _write_row(path: str, result: Generation | None, error: ImageError | None, as_json: bool) -> None:
    if as_json:
        row: dict[str, Any] = {"image": path}
        row |= {key: getattr(result, key, None) for key in RESULT_KEYS}
        others = result.alternatives if result else []
        row |= {"alternatives": [{key: getattr(other, key) for key in RESULT_KEYS} for other in others]}
        if getattr(result, "itm", None) is not None:  # re-ranked captions
            for found, caption in zip((row, *row["alternatives"]), (result, *others), strict=True):
                found["itm"] = getattr(caption, "itm", None)
        write_line(row | {"error": str(error) if error else None}, "", as_json)
    elif result is None:
        print(f"blip2rt: {path}: {error}", file=sys.stderr)
    else:
        for text in (result.text, *(other.text for other in result.alternatives)):
            print(f"{path}: {text}", flush=True)


def _drop_unwritten_output() -> None:
    """Else Python would try to write it once more at its end, and complain once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip2rt", description="BLIP-2 as fast, portable engines.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"blip2rt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    add_export_commands(command)

    for run in (caption, answer, generate):
        added = command(run)
        added.add_argument("images", nargs="+", metavar="IMAGE")
        add_engine(added)
        if run is answer:
            added.add_argument("--question", required=True)
            added.add_argument("--candidates", metavar="FILE", help="rank these answers, one a line; generate nothing")
        else:
            added.add_argument("--prompt", **({"default": CAPTION_PROMPT} if run is caption else {"required": True}))
        if run is caption:
            added.add_argument(
                "--rerank", choices=("itm",), help="order the captions found by a retrieval engine beside"
            )
        add_strip_prefix(added)
        add_options(added)
    add_bulk(command(bulk))
    add_serve(command(serve))

    add_retrieval_commands(command, add_engine)

    evaluator = command(eval)
    evaluator.add_argument("preset", metavar="PRESET")
    evaluator.add_argument("--data", required=True, metavar="DIR", help="the data set, as it is published")
    evaluator.add_argument("--output", metavar="DIR", help="folder of the run (default: eval-PRESET)")
    evaluator.add_argument("--any-engine", action="store_true", help="also one that the preset was not published for")
    evaluator.add_argument("--threads", type=int, help="cores to use (default: all)")
    add_engine(evaluator)

    inspector = command(inspect)
    inspector.add_argument("engine", metavar="ENGINE")
    add_name(inspector)
    return parser
