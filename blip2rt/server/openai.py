"""OpenAI's chat completions and models (platform.openai.com/docs/api-reference/chat), as far as BLIP-2 can follow.

A picture and a question: what BLIP-2 was trained on is "Question: {} Answer:", so that is what is asked; earlier turns
stand before it. A picture alone is captioned. `temperature` above 0 samples, otherwise the likeliest text is sought;
`num_beams` and all other options of blip2rt are taken as well, by their own names.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError
from ..options import GenerationOptions
from ..results import Generation
from ..tokenizer import CAPTION_PROMPT
from .answering import Answering
from .batching import Job
from .engines import Engine, Engines
from .errors import HttpError, error_body

OURS = frozenset(GenerationOptions.__dataclass_fields__)
NOT_HERE = ("tools", "functions", "response_format", "logit_bias", "stop", "audio", "prediction")
NO_EFFECT = {"frequency_penalty": 0, "presence_penalty": 0, "top_logprobs": 0}  # the one value that may be given


class Events(StreamingResponse):
    """Server-sent events. What they need is released at their end, however they end."""

    def __init__(self, events: AsyncIterator[str], needed: ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._needed = needed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._needed:
            await super().__call__(scope, receive, send)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str
    detail: str | None = None


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is not named here is an option of blip2rt, or refused."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    seed: int | None = None
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


def router(engines: Engines, answering: Answering) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    def model_row(kind: str, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "blip2rt", "kind": kind}

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """What answers now: a `generative` model chats, a `retrieval` model embeds."""
        return {"object": "list", "data": [model_row(*pair) for pair in engines.current.names.items()]}

    @routes.get("/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        names = engines.current.names
        kind = next((kind for kind, name in names.items() if name == model), None)
        if kind is None:
            raise no_model(model, names.values())
        return model_row(kind, model)

    @routes.post("/chat/completions")
    async def chat(chat: ChatRequest, request: Request) -> Response:
        """Ask about a picture."""
        with ExitStack() as stack:
            engine = stack.enter_context(engines.use())
            generative = engine.generative
            if chat.model != engine.name:
                raise no_model(chat.model, [engine.name])
            url, text, question = _conversation(chat.messages, generative.question_template)
            options = answering.options("generate", _options(chat))
            prompt = generative.prompt(text, options, question)
            [job] = await answering.jobs(engine, [await answering.picture(url)], [prompt], options)
            if not chat.stream:
                [result] = await answering.results(request, engine, [job])
                return JSONResponse(_completion(engine, chat, job, result))
            if options.num_rows > 1:
                option = "num_beams" if options.num_beams > 1 else "n"
                raise InputError(f"{option}={options.num_rows} cannot be streamed: a stream is one sequence")
            pieces = answering.stream(engine, job)  # a full queue is a status, not an event
            return Events(_events(engine, chat, job, pieces), stack.pop_all())

    return routes


def no_model(name: str, there: Iterable[str]) -> HttpError:
    """What a client is told that asks for another model than there is."""
    return HttpError(404, f"there is no model {name[:100]!r} here, only {', '.join(map(repr, there))}")


def _conversation(messages: list[ChatMessage], template: str) -> tuple[str, str, str | None]:
    """URL of the picture, prompt, and the last question, of a conversation; None: a caption is wanted."""
    urls: list[str] = []
    before: list[str] = []
    question: str | None = None
    for message in messages:
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        urls += [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        text = " ".join(part.text for part in parts if isinstance(part, TextPart)).strip()
        if message.role in ("system", "developer"):
            before += [text] if text else []
        elif message.role == "assistant":
            if question is None:
                raise InputError("an assistant's message follows no question of a user")
            before.append(f"{template.format(question)} {text.rstrip('.')}.")
            question = None
        elif text:
            question = f"{question} {text}" if question else text
    if len(urls) != 1:
        raise InputError(f"BLIP-2 sees one picture in a conversation, and this one has {len(urls)}: send one image_url")
    if messages[-1].role != "user":
        raise InputError("the last message must be the user's")
    if question is None:
        if before:
            raise InputError("the last message asks nothing: give it a text")
        return urls[0], CAPTION_PROMPT, None
    return urls[0], " ".join([*before, template.format(question)]), question


def _options(chat: ChatRequest) -> dict[str, Any]:
    """OpenAI's names -> ours."""
    extra = dict(chat.model_extra or {})
    for name in NOT_HERE:
        if extra.pop(name, None) not in (None, [], {}, {"type": "text"}):
            raise InputError(f"{name} is not supported by BLIP-2")
    for name, only in NO_EFFECT.items():
        if extra.pop(name, None) not in (None, only):
            raise InputError(f"{name} is not supported: leave it out")
    given = {name: value for name, value in extra.items() if name in OURS or not _is_openai(name)}
    tokens = chat.max_completion_tokens or chat.max_tokens
    if tokens is not None:
        given["max_new_tokens"] = tokens
    if chat.temperature:
        given |= {"do_sample": True, "temperature": chat.temperature}
        given |= {name: value for name, value in (("top_p", chat.top_p), ("seed", chat.seed)) if value is not None}
    if chat.n and chat.n > 1:
        given["num_return_sequences"] = chat.n
        if not given.get("do_sample"):  # the n likeliest
            given.setdefault("num_beams", chat.n)
    return given


def _is_openai(name: str) -> bool:
    """Names of OpenAI's that change nothing about a text."""
    return name in ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


def _usage(job: Job, engine: Engine, result: Generation) -> dict[str, int]:
    """The picture counts with its query slots."""
    prompt = engine.generative.num_queries + len(job.prompt.ids)
    completion = sum(len(row.token_ids) for row in (result, *result.alternatives))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(engine: Engine, result: Generation) -> dict[str, Any]:
    rows = []
    for token_id, logprob in zip(result.token_ids, result.token_logprobs, strict=True):
        token = engine.generative.tokenizer.decode([token_id])
        rows.append({"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []})
    return {"content": rows, "refusal": None}


def _head(engine: Engine, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": engine.name}


def _completion(engine: Engine, chat: ChatRequest, job: Job, result: Generation) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": row.text, "refusal": None},
            "logprobs": _logprobs(engine, row) if chat.logprobs else None,
            "finish_reason": row.finish_reason,
        }
        for index, row in enumerate((result, *result.alternatives))
    ]
    return _head(engine, "chat.completion") | {"choices": choices, "usage": _usage(job, engine, result)}


async def _events(
    engine: Engine, chat: ChatRequest, job: Job, pieces: AsyncIterator[str | Generation]
) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, why it ended, perhaps the usage, [DONE]."""
    head = _head(engine, "chat.completion.chunk")
    with_usage = bool(chat.stream_options and chat.stream_options.include_usage)

    def event(delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}))

    yield event({"role": "assistant", "content": ""})
    try:
        async for piece in pieces:
            if isinstance(piece, str):
                yield event({"content": piece})
                continue
            yield event({}, piece.finish_reason, _logprobs(engine, piece) if chat.logprobs else None)
            if with_usage:
                yield _event(head | {"choices": [], "usage": _usage(job, engine, piece)})
        yield "data: [DONE]\n\n"
    except HttpError as error:  # too late for a status
        yield _event(error_body("/v1", error.status, error.message))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
