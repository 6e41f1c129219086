"""Every stage and the whole, against transformers in the same run: `make bench`.

A test fails on a ratio, never on a time: machines differ and are shared, but both sides run on the same one, in turn.
The floors lie well below what is measured on a quiet machine; they catch a regression, they are no claim.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import DynamicCache

from blip2rt.decoder import CachedDecoder
from blip2rt.stages import DECODER

from_numpy = torch.from_numpy
ROUNDS, BEAMS, STEPS, NEW_TOKENS = 4, 5, 10, 20
PROMPT = "a photo of"


def race(benchmark: BenchmarkFixture, ours: Callable[[], Any], theirs: Callable[[], Any], floor: float) -> None:
    """Time both in turn; fail when transformers takes less than `floor` times as long as blip2rt.

    Each function prepares what is not timed and returns what is.
    """
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(ROUNDS + 1):
        for side, prepare in (("ours", ours), ("theirs", theirs)):
            run = prepare()
            start = perf_counter()
            with torch.no_grad():
                run()
            if round_number:  # the first warms up
                seconds[side].append(perf_counter() - start)
    ratio = min(seconds["theirs"]) / min(seconds["ours"])
    benchmark.extra_info["transformers_over_blip2rt"] = round(ratio, 2)
    benchmark.pedantic(ours(), rounds=1)
    assert ratio >= floor, f"transformers / blip2rt = {ratio:.2f}, floor {floor}"


@pytest.mark.benchmark(group="vision")
def test_vision(benchmark: BenchmarkFixture, contest: Any) -> None:
    pixels = contest.pixel_values(2)
    race(
        benchmark,
        lambda: lambda: contest.pipe.generative_engine._vision(pixel_values=pixels),
        lambda: lambda: contest.model.vision_model(from_numpy(pixels)),
        floor=0.7,
    )


@pytest.mark.benchmark(group="qformer")
def test_qformer(benchmark: BenchmarkFixture, contest: Any) -> None:
    model = contest.model
    embeds = np.stack([f.image_embeds for f in contest.pipe.encode(list(contest.pixel_values(2)))])

    def theirs() -> Any:
        queries = model.query_tokens.expand(2, -1, -1)
        hidden = model.qformer(query_embeds=queries, encoder_hidden_states=from_numpy(embeds)).last_hidden_state
        return model.language_projection(hidden)

    race(
        benchmark,
        lambda: lambda: contest.pipe.generative_engine._qformer(image_embeds=embeds),
        lambda: theirs,
        floor=0.7,
    )


@pytest.mark.benchmark(group="prefill")
def test_prefill(benchmark: BenchmarkFixture, contest: Any) -> None:
    """One prefix; transformers prefills it once for every beam."""
    decoder, embeds = new_decoder(contest), expanded_prefix(contest)
    race(
        benchmark,
        lambda: decoder().prefill,
        lambda: lambda: contest.model.language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1),
        floor=1.5,
    )


@pytest.mark.benchmark(group="steps")
def test_steps(benchmark: BenchmarkFixture, contest: Any) -> None:
    """Ten steps of five beams, cache included, search excluded."""
    model, decoder, embeds = contest.model.language_model, new_decoder(contest), expanded_prefix(contest)
    tokens, parents = np.full((1, BEAMS), 7), np.zeros((1, BEAMS), np.int64)

    def ours() -> Callable[[], Any]:
        prefilled = decoder()
        prefilled.prefill()
        return lambda: [prefilled.step(tokens, parents) for _ in range(STEPS)]

    def theirs() -> Callable[[], Any]:
        cache = DynamicCache()
        with torch.no_grad():
            model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

        def run() -> None:
            for _ in range(STEPS):
                model(input_ids=from_numpy(tokens.T), past_key_values=cache, use_cache=True)
                cache.reorder_cache(torch.LongTensor([0] * BEAMS))

        return run

    race(benchmark, ours, theirs, floor=1.0)


@pytest.mark.benchmark(group="caption")
@pytest.mark.parametrize(("num_images", "num_beams"), [(1, 1), (1, BEAMS), (4, BEAMS)])
def test_caption(benchmark: BenchmarkFixture, contest: Any, num_images: int, num_beams: int) -> None:
    """From pixel values to tokens: exactly 20 of them."""
    pipe, pixels = contest.pipe, contest.pixel_values(num_images)
    options = {"num_beams": num_beams, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    image_slots = [pipe.manifest.tokens.image] * contest.model.config.num_query_tokens
    input_ids = torch.tensor([image_slots + pipe.generative_engine.tokenizer.encode(PROMPT)] * num_images)
    race(
        benchmark,
        lambda: lambda: pipe.caption(list(pixels), PROMPT, **options),
        lambda: (
            lambda: contest.model.generate(
                from_numpy(pixels), input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options
            )
        ),
        floor=1.2,
    )


def new_decoder(contest: Any) -> Callable[[], CachedDecoder]:
    """Makes decoders of one picture and `PROMPT`."""
    pipe = contest.pipe
    prefix = pipe.encode(contest.pixel_values(1)[0]).prefix[None]
    prompt = pipe.generative_engine.tokenizer.encode(PROMPT)
    signature = pipe.manifest.stages[DECODER].signature
    return lambda: CachedDecoder(pipe.generative_engine._decoder, signature, prefix, [prompt], BEAMS, NEW_TOKENS)


def expanded_prefix(contest: Any) -> torch.Tensor:
    """The same prefix as transformers' beam search sees it: [K, Q+P, D]."""
    pipe = contest.pipe
    prefix = from_numpy(pipe.encode(contest.pixel_values(1)[0]).prefix)
    with torch.no_grad():
        prompt = contest.model.get_input_embeddings()(torch.tensor(pipe.generative_engine.tokenizer.encode(PROMPT)))
    return torch.cat((prefix, prompt))[None].expand(BEAMS, -1, -1).contiguous()
