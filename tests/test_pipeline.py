"""The contract of `Pipeline`: lists, batches, threads, features, streams, results, and every wrong call."""

import dataclasses
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import blip2rt
from blip2rt import (
    Answer,
    Blip2rtError,
    Caption,
    EngineError,
    Generation,
    GenerationOptions,
    ImageError,
    InputError,
    Pipeline,
)
from blip2rt.bundled import CHECKPOINT, IMAGES
from blip2rt.export import export_engine

Array = np.ndarray[Any, Any]
EARLY_STOPPING: list[bool | str] = [False, True, "never"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The bundled model, whose tokenizer works on bytes as OPT's does."""
    return Pipeline(export_engine(CHECKPOINT, tmp_path_factory.mktemp("bundled") / "engine"))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Options of one call."""
    most = draw(st.sampled_from([1, 3, 10, 64]))
    common = {
        "max_new_tokens": most,
        "min_new_tokens": draw(st.integers(0, most)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 3])),
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 1.0])),
    }
    if draw(st.integers(0, 3)) == 0:
        return common | {"do_sample": True, "seed": draw(st.integers(0, 9)), "num_return_sequences": 2}
    beams = draw(st.integers(1, 6))
    returned = draw(st.integers(1, beams))
    early_stopping = draw(st.sampled_from(EARLY_STOPPING))
    return common | {"num_beams": beams, "num_return_sequences": returned, "early_stopping": early_stopping}


@settings(max_examples=40, deadline=None)
@given(calls(), st.lists(st.integers(0, 5), min_size=1, max_size=11), st.randoms(use_true_random=False))
def test_alone_equals_in_a_batch(
    tiny_pipeline: Pipeline, tiny_images: list[Array], options: dict[str, Any], chosen: list[int], rng: random.Random
) -> None:
    """Bit for bit, whatever lies beside it, how many there are and in which order; twice the same as well.

    Catches a capacity, a compaction, a thread count or a padding that depends on the batch.
    """
    prompts = [" ".join(f"w{rng.randrange(40)}" for _ in range(rng.choice([0, 1, 4, 12]))) for _ in chosen]
    images = [tiny_images[i] for i in chosen]
    together = tiny_pipeline.generate(images, prompts, **options)
    for image, prompt, result in zip(images, prompts, together, strict=True):
        assert tiny_pipeline.generate(image, prompt, **options) == result
    order = list(range(len(images)))
    rng.shuffle(order)
    shuffled = tiny_pipeline.generate([images[i] for i in order], [prompts[i] for i in order], **options)
    assert shuffled == [together[i] for i in order]


def test_two_threads_on_one_pipeline(tiny_pipeline: Pipeline, tiny_images: list[Array]) -> None:
    """Catches buffers that are shared between calls."""
    expected = [tiny_pipeline.caption(image, "w1 w2") for image in tiny_images]
    found: list[list[Caption]] = [[], []]

    def work(place: int) -> None:
        found[place] = [tiny_pipeline.caption(image, "w1 w2") for image in tiny_images * 3]

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected * 3, expected * 3]


def test_lists_and_order(pipe: Pipeline) -> None:
    """A list in gives a list out, in its order; one picture gives one result; prompts are one or one each."""
    paths = [str(path) for path in IMAGES] * 3  # more than one batch
    results = pipe.caption(paths, num_beams=2, max_new_tokens=5)
    assert isinstance(results, list)
    assert results == [pipe.caption(path, num_beams=2, max_new_tokens=5) for path in paths]
    assert len({result.text for result in results}) > 1
    assert pipe.caption(tuple(paths[:1]), num_beams=2, max_new_tokens=5) == results[:1]
    questions = [f"what is {i}?" for i in range(4)]
    assert pipe.answer(paths[:4], questions) == [pipe.answer(p, q) for p, q in zip(paths, questions, strict=False)]
    assert pipe.answer(paths[:4], questions[0])[3] == pipe.answer(paths[3], questions[0])


def test_every_kind_of_picture(pipe: Pipeline) -> None:
    """Path, bytes, PIL image, array and pixel values of one picture say the same."""
    path = next(path for path in IMAGES if Image.open(path).mode == "RGB" and not Image.open(path).getexif())
    image = Image.open(path)
    sources = [path, str(path), path.read_bytes(), image, np.asarray(image), pipe.preprocess(path)]
    captions = pipe.caption(sources, max_new_tokens=8)
    assert all(caption == captions[0] for caption in captions)


def test_features_stand_for_the_picture(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded once, they give what the picture gives, also beside pictures in one list; shapes are the contract's."""
    features = pipe.encode(IMAGES[0])
    config = pipe.manifest.model
    tokens = (config["vision"]["image_size"] // config["vision"]["patch_size"]) ** 2 + 1
    queries = config["num_query_tokens"]
    assert features.image_embeds.shape == (tokens, config["vision"]["hidden_size"])
    assert features.query_embeds.shape == (queries, config["qformer"]["hidden_size"])
    assert features.prefix is not None
    assert features.prefix.shape == (queries, config["text"]["hidden_size"])
    assert {a.dtype for a in (features.image_embeds, features.query_embeds, features.prefix)} == {np.dtype("float32")}
    expected = pipe.caption([IMAGES[1], IMAGES[0]])
    assert pipe.caption([IMAGES[1], features]) == expected
    first = pipe.encode(list(IMAGES))[0].prefix
    assert first is not None
    assert np.array_equal(first, features.prefix)
    monkeypatch.setattr(pipe.generative_engine, "_vision", lambda **_: pytest.fail("the vision tower ran again"))
    assert pipe.caption(features) == expected[1]
    assert pipe.answer(features, "why?").text == str(pipe.answer(features, "why?"))


def test_defaults_and_prompts(pipe: Pipeline) -> None:
    """caption: "a photo of", 5 beams, 30 tokens. answer: the paper's. generate: greedy, 20 tokens, prompt verbatim."""
    features = pipe.encode(IMAGES[0])
    beams: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 30}
    assert _fields(pipe.caption(features)) == _fields(pipe.generate(features, "a photo of", **beams))
    paper: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0}
    answered = pipe.answer(features, "what {is} it?")
    assert _fields(answered) == _fields(pipe.generate(features, "Question: what {is} it? Answer:", **paper))
    generated = pipe.generate(features, "")
    assert generated == pipe.generate(features, "", num_beams=1, max_new_tokens=20)
    assert len(generated.token_ids) == 20 or generated.finish_reason == "stop"
    assert [type(r) for r in (pipe.caption(features), answered, generated)] == [Caption, Answer, Generation]


def test_options_object_equals_keywords(pipe: Pipeline) -> None:
    """Two ways to say the same; keywords win; what is not said takes the default of the call."""
    features = pipe.encode(IMAGES[0])
    expected = pipe.caption(features, num_beams=3, num_return_sequences=2)
    assert pipe.caption(features, options=GenerationOptions(num_beams=3, num_return_sequences=2)) == expected
    assert (
        pipe.caption(features, options=GenerationOptions(num_beams=2), num_beams=3, num_return_sequences=2) == expected
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationOptions().num_beams = 2  # type: ignore[misc]


def test_results(pipe: Pipeline) -> None:
    """Frozen, plain values, best first, all of one type; the text is what its tokens decode to."""
    result = pipe.caption(IMAGES[0], num_beams=4, num_return_sequences=4)
    rows = [result, *result.alternatives]
    assert [type(row) for row in rows] == [Caption] * 4
    assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
    assert len({tuple(row.token_ids) for row in rows}) == 4
    for row in rows:
        assert str(row) == row.text == row.text.strip()
        assert len(row.token_ids) == len(row.token_logprobs)
        assert all(type(token) is int for token in row.token_ids)
        assert all(type(logprob) is float and logprob <= 0 for logprob in row.token_logprobs)
        assert row.finish_reason in ("stop", "length")
        assert type(row.score) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = ""


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "temperature": 2.0}])
def test_stream(pipe: Pipeline, options: dict[str, Any]) -> None:
    """The pieces joined are the text; no half characters; bytes that are never completed come out at the end."""
    for path in IMAGES:
        for prompt in ("a photo of", "", "Question: é? Answer:"):
            expected = pipe.generate(path, prompt, max_new_tokens=40, **options)
            pieces = list(pipe.stream(path, prompt, max_new_tokens=40, **options))
            assert "".join(pieces) == expected.text
            assert len(pieces) > 1 or len(expected.token_ids) < 3
    for piece in pipe.stream(IMAGES[0], max_new_tokens=40):  # a stream may be left early
        assert piece
        break


def test_seeds(pipe: Pipeline) -> None:
    """A seed reproduces the text; other seeds, and none, give others."""
    features = pipe.encode(IMAGES[0])
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    texts = [pipe.generate(features, "a", seed=seed, **options).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert pipe.generate(features, "a", **options) != pipe.generate(features, "a", **options)


WRONG_CALLS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "unknown option": (lambda p, f: p.caption(f, num_beem=3), "did you mean 'num_beams'"),
    "max_length": (lambda p, f: p.caption(f, max_length=3), "max_new_tokens"),
    "no beams": (lambda p, f: p.caption(f, num_beams=0), "num_beams must be"),
    "half a beam": (lambda p, f: p.caption(f, num_beams=1.5), "num_beams must be"),
    "text for a number": (lambda p, f: p.caption(f, length_penalty="1"), "length_penalty must be"),
    "NaN": (lambda p, f: p.caption(f, length_penalty=float("nan")), "length_penalty must be"),
    "no tokens": (lambda p, f: p.caption(f, max_new_tokens=0), "max_new_tokens must be"),
    "early stopping": (lambda p, f: p.caption(f, early_stopping="always"), "'never'"),
    "options of another type": (lambda p, f: p.caption(f, options={"num_beams": 2}), "GenerationOptions"),
    "more sequences than beams": (
        lambda p, f: p.caption(f, num_beams=2, num_return_sequences=3),
        "more than num_beams",
    ),
    "sequences of greedy search": (lambda p, f: p.generate(f, "a", num_return_sequences=2), "greedy"),
    "beams that sample": (lambda p, f: p.caption(f, do_sample=True), "sampling has no beams"),
    "temperature without sampling": (lambda p, f: p.generate(f, "a", temperature=0.5), "do_sample=True"),
    "min above max": (lambda p, f: p.generate(f, "a", min_new_tokens=21), "more than max_new_tokens"),
    "zero penalty": (lambda p, f: p.generate(f, "a", repetition_penalty=0), "repetition_penalty must be"),
    "top_p": (lambda p, f: p.generate(f, "a", do_sample=True, top_p=1.5), "top_p must be"),
    "negative seed": (lambda p, f: p.generate(f, "a", do_sample=True, seed=-1), "seed must be"),
    "rules": (lambda p, f: p.generate(f, "a", rules="mine"), "rules must be"),
    "empty list": (lambda p, f: p.caption([]), "empty"),
    "empty list to encode": (lambda p, f: p.encode([]), "empty"),
    "prompt of another type": (lambda p, f: p.generate(f, 3), "string"),
    "prompt in a list": (lambda p, f: p.generate(f, ["a"]), "one prompt"),
    "no prompt": (lambda p, f: p.generate([f], None), "string"),
    "too few prompts": (lambda p, f: p.generate([f, f], ["a"]), "1 prompts for 2 images"),
    "prompt in the list of another type": (lambda p, f: p.generate([f, f], ["a", b"b"]), "string"),
    "question of another type": (lambda p, f: p.answer(f, 3), "string"),
    "question in the list of another type": (lambda p, f: p.answer([f], [None]), "string"),
    "prompt that is too long": (lambda p, f: p.generate(f, "word " * 300), "positions: shorten the prompt"),
    "generation that is too long": (lambda p, f: p.generate(f, "a", max_new_tokens=5000), "can be 2[0-9]"),
    "placeholder of the image": (lambda p, f: p.generate(f, "a <image> b"), "placeholder"),
    "half a surrogate": (lambda p, f: p.generate(f, "a \ud800"), "valid text"),
    "stream of beams": (lambda p, f: p.stream(f, num_beams=2), "cannot be streamed"),
    "stream of samples": (lambda p, f: p.stream(f, do_sample=True, num_return_sequences=2), "cannot be streamed"),
    "stream of a list": (lambda p, f: p.stream([f]), "one image"),
    "no picture": (lambda p, f: p.caption(None), "NoneType"),
    "threads": (lambda p, f: Pipeline(p.directory, threads=0), "threads must be"),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_wrong_calls(pipe: Pipeline, what: str) -> None:
    """One clear error, at once, that is a ValueError too."""
    call, expected = WRONG_CALLS[what]
    with pytest.raises(ValueError, match=expected) as caught:
        call(pipe, pipe.encode(IMAGES[0]))
    assert isinstance(caught.value, Blip2rtError)
    assert "\n" not in str(caught.value)


def test_bad_picture_names_its_index(pipe: Pipeline, tmp_path: Path) -> None:
    """Also in the second batch, and not for a picture alone."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(IMAGES[0].read_bytes()[:100])
    images: list[Any] = [*(2 * IMAGES)[:9], bad]
    for call in (pipe.caption, pipe.encode):
        with pytest.raises(ImageError, match=r"image 9: .*bad.png") as caught:
            call(images)
        assert caught.value.index == 9
    with pytest.raises(ImageError, match=r"^(?!image)") as caught:
        pipe.caption(bad)
    assert caught.value.index is None


def test_features_of_another_model(pipe: Pipeline, tiny_pipeline: Pipeline, tiny_images: list[Array]) -> None:
    """Refused, with both shapes."""
    foreign = tiny_pipeline.encode(tiny_images[0])
    with pytest.raises(blip2rt.InputError, match="another model"):
        pipe.caption(foreign)
    with pytest.raises(blip2rt.InputError, match="another model"):
        pipe.caption(dataclasses.replace(foreign, prefix=None))


def test_wrong_device(pipe: Pipeline) -> None:
    """One sentence that names the command."""
    with pytest.raises(EngineError, match=r"`blip2rt export .*--device cuda`"):
        Pipeline(pipe.directory, device="cuda")
    assert Pipeline(pipe.directory, device="cpu", threads=1).caption(IMAGES[0]).text == pipe.caption(IMAGES[0]).text


def _fields(result: Generation) -> tuple[Any, ...]:
    return dataclasses.astuple(result)


def test_numbers_at_their_bounds(pipe: Pipeline) -> None:
    """As many sequences as were asked for, with finite scores; beyond the bounds one sentence."""
    found = pipe.caption(IMAGES[0], num_beams=4, num_return_sequences=4, max_new_tokens=60, length_penalty=-9.9)
    assert len(found.alternatives) == 3
    assert np.isfinite([found.score, *(other.score for other in found.alternatives)]).all()
    for name, value in (("length_penalty", -1000.0), ("length_penalty", 10**400), ("temperature", 1e-50)):
        with pytest.raises(InputError, match=f"{name} must be a number above"):
            pipe.generate(IMAGES[0], "a", **{"do_sample": True, name: value})  # type: ignore[arg-type]
