"""The commands that compare pictures with texts: `match`, `embed`, `search`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from .cli_output import write_line
from .errors import ImageError
from .gallery import ADD_BATCH, Gallery
from .pipeline import Pipeline
from .progress import progress

SCORES = ("itc", "itm", "itm_probability")


def match(arguments: argparse.Namespace) -> int:
    """Score pictures against texts: does this text describe this picture?"""
    pipe = _pipeline(arguments)
    pipe.retrieval_engine.token_ids(arguments.text)  # a wrong call is refused before a picture is looked at
    status = 0
    for path in progress(arguments.images, "images", total=len(arguments.images)):
        try:
            scores = pipe.match(path, arguments.text)
        except ImageError as error:
            status = _write_error(path, error, ("text", "score", *SCORES), arguments.json)
            continue
        for i, text in enumerate(arguments.text):
            found = {key: float(getattr(scores, key)[0, i]) for key in SCORES}
            row = {"image": path, "text": text, "score": found["itm"] + found["itc"], **found, "error": None}
            shown = f"{path}: {found['itm_probability']:.4f} itm {found['itm']:+.4f} itc {found['itc']:+.4f}  {text}"
            write_line(row, shown, arguments.json)
    return status


def embed(arguments: argparse.Namespace) -> int:
    """Add pictures to a gallery; those that it has already are left as they are."""
    status, pipe = 0, _pipeline(arguments)
    with Gallery(arguments.gallery, pipe, features=not arguments.itc_only) as gallery:
        known = set() if arguments.replace else set(gallery.ids)
        paths = [path for path in dict.fromkeys(arguments.images) if path not in known]
        starts = range(0, len(paths), ADD_BATCH)
        for start in progress(starts, "images", total=len(paths), step=ADD_BATCH):
            readable: dict[str, Any] = {}
            for path in paths[start : start + ADD_BATCH]:
                try:
                    readable[path] = pipe.retrieval_engine.preprocess(path)
                except ImageError as error:
                    status = _write_error(path, error, ("gallery",), arguments.json)
            if readable:
                gallery.add(list(readable.values()), list(readable))
            for path in readable:
                write_line({"image": path, "gallery": str(gallery.path), "error": None}, path, arguments.json)
        print(f"{gallery.path} holds {len(gallery)} pictures", file=sys.stderr)
    return status


def search(arguments: argparse.Namespace) -> int:
    """Find the pictures of a gallery that fit texts best."""
    gallery = Gallery(arguments.gallery, _pipeline(arguments))
    found = gallery.search(arguments.texts, k=arguments.k, rerank=arguments.rerank)
    for text, ids, scores in zip(arguments.texts, found.ids, found.scores, strict=True):
        for rank, (identifier, score) in enumerate(zip(ids, scores.tolist(), strict=True), start=1):
            row = {"text": text, "rank": rank, "image": identifier, "score": score, "error": None}
            write_line(row, f"{text}: {rank}. {identifier} ({score:+.4f})", arguments.json)
    return 0


def add_retrieval_commands(
    command: Callable[[Callable[[argparse.Namespace], int]], argparse.ArgumentParser],
    add_engine: Callable[[argparse.ArgumentParser], None],
) -> None:
    """What the three take."""
    for run in (match, embed, search):
        parser = command(run)
        if run is search:
            parser.add_argument("texts", nargs="+", metavar="TEXT")
        else:
            parser.add_argument("images", nargs="+", metavar="IMAGE")
        if run is match:
            parser.add_argument("--text", action="append", required=True, help="may be given again")
        else:
            parser.add_argument("--gallery", required=True, metavar="DIR", help="its folder; `embed` makes a new one")
        if run is embed:
            parser.add_argument("--itc-only", action="store_true", help="a new gallery without what ITM looks at")
            parser.add_argument("--replace", action="store_true", help="embed pictures again that are there already")
        if run is search:
            parser.add_argument("--k", type=int, default=10, help="how many pictures for each text (default: 10)")
            parser.add_argument("--rerank", type=int, metavar="N", help="candidates for ITM; 0: none (default: 128)")
        add_engine(parser)
        parser.add_argument("--threads", type=int, help="cores to use (default: all)")


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    return Pipeline(arguments.engine, name=arguments.name, threads=arguments.threads)


def _write_error(path: str, error: ImageError, keys: tuple[str, ...], as_json: bool) -> int:
    """A row with the error; the status of a command that goes on with the other pictures."""
    row: dict[str, Any] = {"image": path, **dict.fromkeys(keys), "error": str(error)}
    write_line(row, f"blip2rt: {path}: {error}", as_json, sys.stderr)
    return 1
