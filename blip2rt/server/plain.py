"""/caption and /answer: pictures as uploads of a form, results as `blip2rt caption --json` gives them."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile

from ..errors import InputError
from ..tokenizer import CAPTION_PROMPT
from .answering import Answering, read_prompt, row_of
from .engines import Engines

Pictures = Annotated[list[UploadFile], File(description="one or more pictures, under this one name")]
Options = Annotated[str, Form(description='generation options as a JSON object, for example {"num_beams": 3}')]


def router(engines: Engines, answering: Answering) -> APIRouter:
    """Routes for people, scripts, and the page."""
    routes = APIRouter(tags=["Uploads"])

    async def answer_all(
        request: Request, image: list[UploadFile], task: str, prompt: str, options: str
    ) -> dict[str, Any]:
        with engines.use() as engine:
            resolved = answering.options(task, _parse_options(options))
            pictures = [await picture.read() for picture in image]
            prompts = [read_prompt(engine, task, prompt, resolved)] * len(pictures)
            jobs = await answering.jobs(engine, pictures, prompts, resolved)
            results = await answering.results(request, engine, jobs)
        names = [picture.filename for picture in image]
        return {"results": [{"image": n} | row_of(r) for n, r in zip(names, results, strict=True)]}

    @routes.post("/caption")
    async def caption(
        request: Request,
        image: Pictures,
        prompt: Annotated[str, Form()] = CAPTION_PROMPT,
        options: Options = "{}",
    ) -> dict[str, Any]:
        """Caption pictures: 5 beams and at most 30 tokens, unless `options` say otherwise."""
        return await answer_all(request, image, "caption", prompt, options)

    @routes.post("/answer")
    async def answer(
        request: Request, image: Pictures, question: Annotated[str, Form()], options: Options = "{}"
    ) -> dict[str, Any]:
        """Answer a question about pictures: 5 beams, 10 tokens, length penalty -1, unless `options` say otherwise."""
        return await answer_all(request, image, "answer", question, options)

    return routes


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"options is not JSON ({error})") from None
    if not isinstance(options, dict):
        raise InputError(f"options must be a JSON object, not {type(options).__name__}")
    return options
