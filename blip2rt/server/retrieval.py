"""/match: pictures against texts, as `blip2rt match --json` gives them. /search and /gallery: pictures found by text.

The gallery is the one that the operator names. A picture of it is shown by its row, never by a path that a client
gives: what its id says is looked up under the operator's folder of pictures, and a small copy of it is sent.
"""

import io
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import Response
from PIL import Image, ImageOps

from ..errors import ImageError, InputError
from ..gallery import Gallery
from ..gallery_base import RERANKED
from ..results import MatchScores
from .answering import Answering
from .engines import Engines
from .errors import HttpError
from .pictures import FORMATS, check_picture
from .settings import ServerSettings

SCORES = ("itc", "itm", "itm_probability")
MAX_FOUND = 100  # of one search
SIDE = 512  # pixels of a picture that is shown
NO_PICTURE = "there is no such picture in the gallery"


def router(engines: Engines, answering: Answering) -> APIRouter:
    """Routes for what a retrieval engine and a gallery can do."""
    routes = APIRouter(tags=["Retrieval"])
    settings = answering.settings

    @routes.post("/match")
    async def match(
        request: Request,
        image: Annotated[list[UploadFile], File(description="one or more pictures, under this one name")],
        text: Annotated[list[str], Form(description="one or more texts, under this one name")],
    ) -> dict[str, Any]:
        """Score every picture against every text: ITC cosine, ITM logit and probability, and the sum that ranks."""
        with engines.use() as engine:
            retrieval = engine.retrieval
            answering.check_texts(text)
            if len(image) * len(text) > settings.max_pairs:
                raise InputError(
                    f"{len(image)} pictures and {len(text)} texts are {len(image) * len(text)} pairs, more than a "
                    f"request may have: {settings.max_pairs}"
                )
            token_ids = retrieval.token_ids(text)
            pixels = await answering.pixels([await picture.read() for picture in image], retrieval.preprocess)

            def work() -> MatchScores:
                return retrieval.match(engine.pipe.retrieval_features(pixels), token_ids)

            scores = await answering.call(request, engine, work)
        rows = []
        for i, picture in enumerate(image):
            for t, words in enumerate(text):
                found = {key: float(getattr(scores, key)[i, t]) for key in SCORES}
                rows.append({"image": picture.filename, "text": words, "score": found["itm"] + found["itc"], **found})
        return {"results": rows}

    @routes.get("/search")
    async def search(
        request: Request,
        text: Annotated[str, Query(min_length=1)],
        k: Annotated[int, Query(ge=1, le=MAX_FOUND, description="how many pictures")] = 10,
        rerank: Annotated[int | None, Query(ge=0, description="candidates that ITM looks at; 0: none")] = None,
    ) -> dict[str, Any]:
        """The pictures of the gallery that fit a text best; `picture` is where each is shown, where it can be."""
        with engines.use() as engine:
            gallery = engine.gallery
            answering.check_texts([text])
            _ = engine.retrieval.token_ids(text)  # a wrong one is refused before it waits
            if (rerank or 0) > settings.max_pairs:
                raise InputError(f"rerank={rerank} is more than this server allows: {settings.max_pairs}")
            if rerank and not gallery.has_features:
                raise InputError("this gallery keeps no features for ITM: leave out rerank, or pass 0")

            def work() -> list[tuple[Any, float, int]]:
                pool = rerank
                if pool is None and gallery.has_features:
                    pool = min(settings.max_pairs, RERANKED)
                with gallery.guard:
                    found = gallery.search(text, k, rerank=pool)
                    return [(i, float(score), gallery.row_of(i)) for i, score in zip(*found, strict=True)]

            found = await answering.call(request, engine, work)
        shown = settings.pictures is not None
        return {
            "results": [
                {"id": _readable(identifier), "score": score, "picture": f"/gallery/{row}" if shown else None}
                for identifier, score, row in found
            ]
        }

    @routes.get("/gallery")
    async def describe() -> dict[str, Any]:
        """How many pictures can be searched, and whether they are shown."""
        gallery = engines.current.gallery
        return {"pictures": await answering.in_thread(lambda: len(gallery)), "shown": settings.pictures is not None}

    @routes.get("/gallery/{row}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def picture(row: int) -> Response:
        """A small copy of a picture of the gallery."""
        gallery = engines.current.gallery
        data = await answering.in_thread(lambda: small_copy(gallery, row, settings))
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    return routes


def small_copy(gallery: Gallery, row: int, settings: ServerSettings) -> bytes:
    """A picture of a gallery as a small JPEG.

    Raises:
        HttpError: 404, there is none in this row, or not under the operator's folder, or it cannot be read any more.
    """
    identifier = gallery.id_at(row)
    if settings.pictures is None or not isinstance(identifier, str):
        raise HttpError(404, NO_PICTURE)
    try:
        path = _inside(settings.pictures, identifier)
        data = check_picture(path.read_bytes(), settings)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = ImageOps.exif_transpose(opened)
            picture.thumbnail((SIDE, SIDE))
            copy = io.BytesIO()
            picture.convert("RGB").save(copy, "JPEG", quality=85)
    except ImageError as error:
        raise HttpError(404, f"this picture of the gallery cannot be shown: {error}") from None
    except HttpError:
        raise
    except Exception:  # PIL has no base class for it, and the disk has its own
        raise HttpError(404, "this picture of the gallery cannot be read any more") from None
    return copy.getvalue()


def _inside(folder: Path, name: str) -> Path:
    """Where a picture lies: links and `..` may not lead out of the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise HttpError(404, NO_PICTURE)
    return path


def _readable(identifier: str | int) -> str | int:
    """A file name need not be UTF-8, and JSON must be."""
    return identifier.encode("utf-8", "backslashreplace").decode() if isinstance(identifier, str) else identifier
