"""OpenAI's embeddings (platform.openai.com/docs/api-reference/embeddings): ITC embeddings of texts and pictures.

A text is one unit vector of E numbers. A picture, given as a data URL in a text's place, has one for each of its Q
queries, and what it shares with a text is the largest of their Q cosines. `pooling` says what is returned of it:

    "mean"  (default) the unit vector in the direction of their mean: E numbers, for a store of one vector a picture.
            An approximation: its cosine with a text is not what `/match` calls `itc`.
    "none"  all of them, one behind the other: Q x E numbers.
"""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError
from ..manifest import RETRIEVAL
from ..retrieval import RetrievalEngine, pooled
from ..stages import QFORMER
from .answering import Answering
from .engines import Engines
from .openai import no_model
from .pictures import DATA_URL

Array = np.ndarray[Any, Any]
Input = str | list[str] | list[int] | list[list[int]]


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    input: Annotated[Input, Field(description="texts, or pictures as data URLs; token ids are refused")]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["mean", "none"] = "mean"
    user: str | None = None


def router(engines: Engines, answering: Answering) -> APIRouter:
    """The route /v1/embeddings."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        """Embed texts and pictures."""
        with engines.use() as engine:
            retrieval = engine.retrieval
            if body.model != engine.names[RETRIEVAL]:
                raise no_model(body.model, [engine.names[RETRIEVAL]])
            inputs = _inputs(body)
            places = [place for place, text in enumerate(inputs) if DATA_URL.match(text[:300])]
            texts = [text for place, text in enumerate(inputs) if place not in places]
            answering.check_texts(texts)
            token_ids = retrieval.token_ids(texts) if texts else []
            pictures = [await answering.picture(inputs[place]) for place in places]
            pixels = await answering.pixels(pictures, retrieval.preprocess)

            def work() -> tuple[Array, Array]:
                itc = [f.itc_embeds for f in engine.pipe.retrieval_features(pixels)] if pixels else []
                return retrieval.embed(token_ids), np.array(itc)  # [T, E], [I, Q, E]

            text_embeds, image_embeds = await answering.call(request, engine, work)
        _check_dimensions(body, text_embeds.shape[1])
        of_pictures = (pooled(image[None], body.pooling).ravel() for image in image_embeds)
        of_texts = iter(text_embeds)
        vectors = [next(of_pictures if place in places else of_texts) for place in range(len(inputs))]
        tokens = sum(map(len, token_ids)) + len(places) * _num_queries(retrieval)
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
                for i, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes


def _inputs(body: EmbeddingRequest) -> list[str]:
    given = [body.input] if isinstance(body.input, str) else body.input
    texts = [text for text in given if isinstance(text, str)]
    if not given:
        raise InputError("input is empty: give a text, a picture as data URL, or a list of them")
    if len(texts) != len(given):
        raise InputError("input is token ids of another tokenizer than this model's: give texts")
    return texts


def _check_dimensions(body: EmbeddingRequest, size: int) -> None:
    if body.dimensions not in (None, size):
        raise InputError(f"dimensions={body.dimensions}: this model's embeddings have {size}, leave it out")


def _num_queries(retrieval: RetrievalEngine) -> int:
    return int(retrieval.manifest.stages[QFORMER].signature.outputs[1].shape[1])


def _encoded(vector: Array, encoding: str) -> Any:
    """Little-endian float32 in base64, or numbers."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
