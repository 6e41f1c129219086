"""The commands that compare pictures with texts: `match`, `embed`, `search`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cli_output import write_line
from .errors import ImageError, InputError
from .gallery import Gallery
from .gallery_base import ADD_BATCH
from .pipeline import Pipeline
from .progress import progress
from .text_gallery import TextGallery

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
    """Add pictures, or the lines of a file, to a gallery; those that it has already are left as they are."""
    if bool(arguments.images) == bool(arguments.texts):
        raise InputError("give pictures for a gallery of images, or --texts FILE for a gallery of texts")
    if arguments.texts:
        return _embed_texts(arguments)
    status, pipe = 0, _pipeline(arguments)
    with Gallery(arguments.gallery, pipe, features=not arguments.itc_only) as gallery:
        known = set() if arguments.replace else set(gallery.ids)
        paths = [path for path in dict.fromkeys(arguments.images) if path not in known]
        starts = range(0, len(paths), ADD_BATCH)
        for start in progress(starts, "images", total=len(paths), step=ADD_BATCH):
            readable, failed = _readable(pipe, paths[start : start + ADD_BATCH], ("gallery",), arguments.json)
            status = status or failed
            if readable:
                gallery.add(list(readable.values()), list(readable))
            for path in readable:
                write_line({"image": path, "gallery": str(gallery.path), "error": None}, path, arguments.json)
        print(f"{gallery.path} holds {len(gallery)} pictures", file=sys.stderr)
    return status


def _embed_texts(arguments: argparse.Namespace) -> int:
    for option in ("--itc-only", "--replace"):
        if getattr(arguments, option[2:].replace("-", "_")):
            raise InputError(f"{option} is for pictures, and --texts adds texts")
    try:
        lines = Path(arguments.texts).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{arguments.texts} cannot be read ({error}): it holds one text a line, in UTF-8") from None
    with TextGallery(arguments.gallery, _pipeline(arguments)) as gallery:
        gallery.add([line.strip() for line in lines if line.strip()])
        print(f"{gallery.path} holds {len(gallery)} texts", file=sys.stderr)
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Find the pictures of a gallery that fit texts best, or the texts of one that fit pictures best."""
    if bool(arguments.texts) == bool(arguments.image):
        raise InputError("give texts to search a gallery of images, or --image FILE to search a gallery of texts")
    status, pipe, limits = 0, _pipeline(arguments), {"k": arguments.k, "rerank": arguments.rerank}
    if arguments.texts:
        found = Gallery(arguments.gallery, pipe).search(arguments.texts, **limits)
        _write_ranking(("text", "image"), arguments.texts, found, arguments.json)
    else:
        texts = TextGallery(arguments.gallery, pipe)
        readable, status = _readable(pipe, arguments.image, ("rank", "text", "score"), arguments.json)
        if readable:
            found = texts.search(list(readable.values()), **limits)
            _write_ranking(("image", "text"), list(readable), found, arguments.json)
    return status


def add_retrieval_commands(
    command: Callable[[Callable[[argparse.Namespace], int]], argparse.ArgumentParser],
    add_engine: Callable[[argparse.ArgumentParser], None],
) -> None:
    """What the three take."""
    for run in (match, embed, search):
        parser = command(run)
        if run is search:
            parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to find in a gallery of images")
            parser.add_argument("--image", nargs="+", metavar="IMAGE", help="what to find in a gallery of texts")
            parser.add_argument("--k", type=int, default=10, help="how many for each text or image (default: 10)")
            parser.add_argument("--rerank", type=int, metavar="N", help="candidates for ITM; 0: none (default: 128)")
        else:
            parser.add_argument("images", nargs="+" if run is match else "*", metavar="IMAGE")
        if run is match:
            parser.add_argument("--text", action="append", required=True, help="may be given again")
        else:
            parser.add_argument("--gallery", required=True, metavar="DIR", help="its folder; `embed` makes a new one")
        if run is embed:
            parser.add_argument("--texts", metavar="FILE", help="one text a line, for a gallery of texts")
            parser.add_argument("--itc-only", action="store_true", help="a new gallery without what ITM looks at")
            parser.add_argument("--replace", action="store_true", help="embed pictures again that are there already")
        add_engine(parser)
        parser.add_argument("--threads", type=int, help="cores to use (default: all)")


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    return Pipeline(arguments.engine, name=arguments.name, threads=arguments.threads)


def _readable(pipe: Pipeline, paths: Sequence[str], keys: tuple[str, ...], as_json: bool) -> tuple[dict[str, Any], int]:
    """Pixel values of the pictures that can be read, by path, and the status; a row with its error for each other."""
    pixels: dict[str, Any] = {}
    status = 0
    for path in dict.fromkeys(paths):
        try:
            pixels[path] = pipe.retrieval_engine.preprocess(path)
        except ImageError as error:
            status = _write_error(path, error, keys, as_json)
    return pixels, status


def _write_ranking(names: tuple[str, str], queries: Sequence[str], found: Any, as_json: bool) -> None:
    """A row for each query and what was found for it; `names` says what both are."""
    for query, ids, scores in zip(queries, found.ids, found.scores, strict=True):
        for rank, (identifier, score) in enumerate(zip(ids, scores.tolist(), strict=True), start=1):
            row = {names[0]: query, "rank": rank, names[1]: identifier, "score": score, "error": None}
            write_line(row, f"{query}: {rank}. {identifier} ({score:+.4f})", as_json)


def _write_error(path: str, error: ImageError, keys: tuple[str, ...], as_json: bool) -> int:
    """A row with the error; the status of a command that goes on with the other pictures."""
    row: dict[str, Any] = {"image": path, **dict.fromkeys(keys), "error": str(error)}
    write_line(row, f"blip2rt: {path}: {error}", as_json, sys.stderr)
    return 1
