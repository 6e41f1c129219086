"""Differential test: token for token what transformers' `generate` gives, every picture alone and unpadded.

20 random checkpoints x 15 random calls for OPT and for T5; the environment variable BLIP2RT_DIFFERENTIAL=100x30 asks
for more. Engines are built by processes of their own while the tests run, because torch.export takes most of the time.
"""

import copy
import multiprocessing
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from blip2rt import Generation, Pipeline
from blip2rt.export import export_engine
from blip2rt.logits import probabilities, process, warp
from blip2rt.options import ResolvedOptions

Array = np.ndarray[Any, Any]
Options = dict[str, Any]
Key = tuple[str, int]  # type of the language model, seed

CHECKPOINTS, CASES = map(int, os.environ.get("BLIP2RT_DIFFERENTIAL", "20x15").split("x"))
MODEL_TYPES = ("opt", "t5")
SCORE_TOLERANCE = 1e-5  # absolute, and relative above 1: the contract's
NEAR_TIE = 1e-6  # largest relative gap between candidates that float32 may order either way
UNTIED = "language_model.lm_head.weight"


@dataclass
class Tally:
    """What happened in all cases, so that a test that has gone blind is noticed."""

    checkpoints: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads; transformers' advice about options is silenced."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]
) -> Iterator[Callable[[Key], tuple[Path, Path]]]:
    """Checkpoint and engine of a seed; those of the seeds that this run has selected are being built from the start."""
    folder = tmp_path_factory.mktemp("differential")
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted: list[Any] = [
        (t.callspec.params["model_type"], t.callspec.params["seed"])
        for t in tests
        if t.module is request.module and hasattr(t, "callspec")
    ]
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        engines: dict[Key, Future[Path]] = {}
        for key in dict.fromkeys(wanted):
            checkpoint = varied_checkpoint(checkpoint_maker, folder / f"checkpoint-{key[0]}-{key[1]}", *key)
            engines[key] = pool.submit(export_engine, checkpoint, folder / f"engine-{key[0]}-{key[1]}")
        yield lambda key: (folder / f"checkpoint-{key[0]}-{key[1]}", engines[key].result())
        pool.shutdown(cancel_futures=True)


def varied_checkpoint(make: Callable[..., Path], directory: Path, model_type: str, seed: int) -> Path:
    """A checkpoint of `seed`, with what published ones may have and the maker's own do not."""
    text: Options = {}
    if seed % 4 == 1:
        text["activation_function" if model_type == "opt" else "dense_act_fn"] = "gelu"
    if seed % 5 == 2 and model_type == "opt":
        text["pad_token_id"] = None
    if seed % 3 == 2 and model_type == "t5":
        text["decoder_start_token_id"] = None  # transformers takes BOS
    if seed % 3 == 1:
        text["eos_token_id"] = random.Random(seed).sample(range(2, 38), 2 + seed % 4)
    if seed % 10 == 6:
        text["eos_token_id"] = None
    if seed % 7 == 3:
        text["tie_word_embeddings"] = False
    make(directory, seed, model_type, **text)
    if seed % 7 == 5:  # the config says tied, the file holds two different tensors: transformers unties them
        weights = load_file(directory / "model.safetensors")
        embedding = next(w for name, w in weights.items() if name.endswith(("embed_tokens.weight", "shared.weight")))
        weights[UNTIED] = embedding.flip(0).contiguous()
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@dataclass(frozen=True)
class Expected:
    """One sequence of transformers."""

    token_ids: list[int]
    finish_reason: str
    score: float
    token_logprobs: list[float]


class Jitter(LogitsProcessor):
    """Moves every score by about half of what counts as a near-tie.

    Beams are compared by sums of as many scores as they are long. So there the noise of step t grows with its root, and
    that of a sum is in proportion to the sum.
    """

    def __init__(self, seed: int, adds_up: bool):
        self.generator = torch.Generator().manual_seed(seed)
        self.adds_up, self.step = adds_up, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        noise = (2 * torch.rand(scores.shape, generator=self.generator) - 1) * (self.step**0.5 if self.adds_up else 1)
        return scores + noise * (NEAR_TIE / 2) * scores.abs().clamp(min=1).nan_to_num(posinf=0)


class Reference:
    """transformers, one picture at a time."""

    def __init__(self, checkpoint: Path):
        self.model = Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.config = self.model.config
        self.has_encoder = bool(self.config.text_config.is_encoder_decoder)
        stop = self.config.text_config.eos_token_id
        self.stop_ids: list[int] = [] if stop is None else stop if isinstance(stop, list) else [stop]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Image slots and prompt: OPT's behind BOS, T5's as its tokenizer ends them."""
        words = self.tokenizer(prompt, add_special_tokens=self.has_encoder).input_ids
        image_slots = [self.config.image_token_index] * self.config.num_query_tokens
        bos = [] if self.has_encoder else [self.config.text_config.bos_token_id]
        return [*image_slots, *bos, *words]

    def history(self, prompt: str) -> list[int]:
        """What stands before the generated tokens."""
        if not self.has_encoder:
            return self.prompt_ids(prompt)
        text = self.config.text_config
        start = getattr(text, "decoder_start_token_id", None)
        return [text.bos_token_id if start is None else start]

    def run(self, pixel_values: Array, prompt: str, options: Options, model: Any = None, **more: Any) -> Any:
        """The output of `generate`, with scores and logits."""
        ids = torch.tensor([self.prompt_ids(prompt)])
        model = model or self.model
        return model.generate(
            torch.from_numpy(pixel_values)[None].to(model.dtype),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
            **more,
        )

    def token_ids(self, output: Any, prompt: str, options: Options) -> list[tuple[list[int], str]]:
        """Generated ids of every sequence up to and without the first stop token, and why it ended."""
        found = []
        for row in output.sequences[:, len(self.history(prompt)) :].tolist():
            stops = [i for i, token in enumerate(row) if token in self.stop_ids]
            assert stops or len(row) == options["max_new_tokens"]
            found.append((row[: stops[0]], "stop") if stops else (row, "length"))
        return found

    def generate(self, pixel_values: Array, prompt: str, options: Options) -> list[Expected]:
        """Every sequence of `generate`, best first."""
        output = self.run(pixel_values, prompt, options)
        expected = []
        for row, (ids, reason) in enumerate(self.token_ids(output, prompt, options)):
            if options["num_beams"] > 1:
                score = float(output.sequences_scores[row])
            else:  # transformers has no score here: from its logits, the stop token's included
                tokens = output.sequences[row, len(self.history(prompt)) :].tolist()
                steps = [torch.log_softmax(step[row].double(), 0) for step in output.logits]
                score = sum(float(steps[i][token]) for i, token in enumerate(tokens))
                score /= len(tokens) ** options["length_penalty"]
            logprobs = torch.log_softmax(self.logits(pixel_values, prompt, ids)[:-1].double(), 1)
            expected.append(Expected(ids, reason, score, [float(logprobs[i, token]) for i, token in enumerate(ids)]))
        return expected

    @torch.no_grad()
    def logits(self, pixel_values: Array, prompt: str, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [len(token_ids) + 1, V] before every token and after the last, from one forward without a cache."""
        image_embeds = self.model.vision_model(torch.from_numpy(pixel_values)[None]).last_hidden_state
        query_tokens = self.model.query_tokens
        queries = self.model.qformer(query_embeds=query_tokens, encoder_hidden_states=image_embeds).last_hidden_state
        prefix = self.model.language_projection(queries)
        ids = self.prompt_ids(prompt)[prefix.shape[1] :] + ([] if self.has_encoder else list(token_ids))
        embeds = prefix
        if ids:
            embeds = torch.cat((prefix, self.model.get_input_embeddings()(torch.tensor([ids]))), 1)
        generated = torch.tensor([[*self.history(prompt), *token_ids]])
        decoder = {"decoder_input_ids": generated} if self.has_encoder else {}
        logits: torch.Tensor = self.model.language_model(inputs_embeds=embeds, **decoder).logits[0]
        return logits[-1 - len(token_ids) :]

    def reached_by_jitter(self, pixel_values: Array, prompt: str, options: Options, ids: list[list[int]]) -> int | None:
        """Whether the float64 model gives `ids` when scores move by less than a near-tie; the seed that shows it."""
        double = copy.deepcopy(self.model).double()
        for seed in range(60):
            jitter = LogitsProcessorList([Jitter(seed, options["num_beams"] > 1)] if seed else [])
            output = self.run(pixel_values, prompt, options, double, logits_processor=jitter)
            if [found for found, _ in self.token_ids(output, prompt, options)] == ids:
                return seed
        return None


def random_prompt(choose: random.Random, vocab_size: int) -> str:
    length = choose.choice([0, 0, 1, 2, 3, 5, 8, 40])
    return " ".join(f"w{choose.randrange(vocab_size - 6)}" for _ in range(length))


def random_case(choose: random.Random) -> Options:
    beams = choose.choice([1, *range(1, 9)])
    most = choose.choice([1, 2, 4, 8, 16, 64, choose.randint(1, 64)])
    return {
        "num_beams": beams,
        "num_return_sequences": choose.randint(1, beams),
        "max_new_tokens": most,
        "min_new_tokens": choose.choice([0, 0, choose.randint(0, min(6, most))]),
        "length_penalty": choose.choice([-1.0, 0.0, 0.5, 1.0, 2.0, choose.uniform(-1, 2)]),
        "early_stopping": choose.choice([False, True, "never"]),
        "repetition_penalty": choose.choice([1.0, 1.0, 1.3, 0.8, choose.uniform(0.5, 3)]),
        # unigrams only in short texts: once every word is banned all that is left are ties
        "no_repeat_ngram_size": choose.choice([0, 0, 1 if most <= 16 else 2, 2, 3, 4]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("seed", range(CHECKPOINTS))
def test_same_as_transformers(
    model_type: str, seed: int, checkpoints: Callable[[Key], tuple[Path, Path]], tally: Tally
) -> None:
    """Catches any change in any part from checkpoint to text that moves a token, a score or a log-probability."""
    checkpoint, engine = checkpoints((model_type, seed))
    reference, pipeline = Reference(checkpoint), Pipeline(engine, threads=1)
    weights = load_file(checkpoint / "model.safetensors")
    if UNTIED in weights:  # else the comparison would say nothing about untied models
        assert torch.equal(reference.model.language_model.lm_head.weight, weights[UNTIED])
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    size, vocab_size = reference.config.vision_config.image_size, reference.config.text_config.vocab_size
    near_ties = 0
    for _ in range(CASES):
        options = random_case(choose)
        images = list(rng.standard_normal((choose.randint(1, 6), 3, size, size), dtype=np.float32))
        prompts = [random_prompt(choose, vocab_size) for _ in images]
        for image, prompt, ours in zip(images, prompts, pipeline.generate(images, prompts, **options), strict=True):
            theirs = reference.generate(image, prompt, options)
            rows = [ours, *ours.alternatives]
            ids = [row.token_ids for row in rows]
            if ids != [row.token_ids for row in theirs]:
                details = (
                    f"checkpoint {model_type} {seed}, {options}, prompt {prompt!r}\nours   {rows}\ntheirs {theirs}"
                )
                jitter = reference.reached_by_jitter(image, prompt, options, ids)
                assert jitter is not None, f"not a near-tie: {details}"
                warnings.warn(f"near-tie (float64, jitter {jitter}): {details}", stacklevel=1)
                near_ties += 1
                continue
            for row, expected in zip(rows, theirs, strict=True):
                check_row(row, expected, reference, options)
                tally.seen.update(events(row, reference, options))
    assert near_ties <= 1, "that many near-ties are a bug"
    tally.seen["near-tie"] += near_ties
    tally.checkpoints[model_type] += 1


def check_row(row: Generation, expected: Expected, reference: Reference, options: Options) -> None:
    """Everything but the token ids."""
    assert row.finish_reason == expected.finish_reason, options
    text: Any = reference.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
    assert row.text == text.strip(), options
    assert abs(row.score - expected.score) <= SCORE_TOLERANCE * max(1, abs(expected.score)), options
    np.testing.assert_allclose(
        row.token_logprobs, expected.token_logprobs, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE, err_msg=f"{options}"
    )


def events(row: Generation, reference: Reference, options: Options) -> Iterator[str]:
    yield f"{row.finish_reason} with {'beams' if options['num_beams'] > 1 else 'greedy'}"
    if row.finish_reason == "stop" and len(row.token_ids) == options["max_new_tokens"] - 1:
        yield "stop token at the last step"
    if row.finish_reason == "stop" and len(row.token_ids) == options["min_new_tokens"] > 0:
        yield "stop token as soon as it is allowed"
    if not row.token_ids:
        yield "nothing but a stop token"
    if reference.config.text_config.pad_token_id in row.token_ids:
        yield "pad token generated"
    if reference.config.image_token_index in row.token_ids:
        yield "image token generated"


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "seed"), [(("opt", "t5")[seed % 2], seed) for seed in range(0, CHECKPOINTS, 7)])
def test_samples_like_transformers(model_type: str, seed: int, checkpoints: Callable[[Key], tuple[Path, Path]]) -> None:
    """Catches probabilities that are not transformers', and draws or a cache that do not follow the probabilities.

    The probabilities of every step of a text that transformers sampled are compared; then every token that the
    pipeline samples has to be the one that its seed draws from the probabilities of transformers' logits.
    """
    checkpoint, engine = checkpoints((model_type, seed))
    reference, pipeline = Reference(checkpoint), Pipeline(engine, threads=1)
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    size, vocab_size = reference.config.vision_config.image_size, reference.config.text_config.vocab_size
    torch.manual_seed(seed)
    for case in range(CASES):
        options = random_case(choose) | {
            "num_beams": 1,
            "early_stopping": False,
            "num_return_sequences": choose.randint(1, 5),
            "do_sample": True,
            "temperature": choose.choice([1.0, 0.7, choose.uniform(0.2, 3)]),
            "top_k": choose.choice([0, 1, 5, 50, 1000]),
            "top_p": choose.choice([1.0, 0.9, 0.3, choose.uniform(0.01, 1)]),
        }
        image = rng.standard_normal((3, size, size), dtype=np.float32)
        prompt = random_prompt(choose, vocab_size)
        before = reference.history(prompt)
        resolved = ResolvedOptions(**options)

        output = reference.run(image, prompt, options)
        for row, sequence in enumerate(output.sequences[:, len(before) :].tolist()):
            for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
                ours = next_token(logits[[row]], before + sequence[:step], step, resolved, reference.stop_ids)
                theirs = torch.softmax(scores[row], 0).numpy()
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6, err_msg=f"{options} {prompt!r}")

        result = pipeline.generate(image, prompt, seed=case, **options)
        rows = [result, *result.alternatives]
        uniform = np.random.default_rng(case).random((options["max_new_tokens"], len(rows)))
        for r, row in enumerate(rows):
            for step, logits in enumerate(reference.logits(image, prompt, row.token_ids)[: options["max_new_tokens"]]):
                history = before + row.token_ids[:step]
                probs = next_token(logits[None], history, step, resolved, reference.stop_ids)
                high = np.cumsum(probs, dtype=np.float64)
                is_hit = (high - probs - 1e-5 <= uniform[step, r]) & (uniform[step, r] <= high + 1e-5) & (probs > 0)
                allowed = row.token_ids[step : step + 1] or reference.stop_ids
                assert is_hit[allowed].any(), f"checkpoint {seed}, case {case}, row {r}, step {step}: {options}"


def next_token(
    logits: torch.Tensor, history: list[int], step: int, options: ResolvedOptions, stop_ids: list[int]
) -> Array:
    """The probabilities [V] that a token is drawn from, from logits [1, V], by the runtime's own functions."""
    scores = process(logits.numpy().copy(), np.array([history]), step, options, stop_ids)
    probs: Array = probabilities(warp(scores, options))[0]
    return probs


def test_cases_are_worth_it(tally: Tally) -> None:
    """Catches a differential test that has gone blind, and near-ties that are waved through by the dozen."""
    if any(tally.checkpoints[model_type] < CHECKPOINTS for model_type in MODEL_TYPES):
        pytest.skip("some of the cases did not run or failed")
    print(tally.seen)
    wanted = {
        "stop with beams", "stop with greedy", "length with beams", "length with greedy", "pad token generated",
        "image token generated", "stop token at the last step", "stop token as soon as it is allowed",
        "nothing but a stop token",
    }  # fmt: skip
    assert wanted <= {event for event, count in tally.seen.items() if count >= CHECKPOINTS * CASES // 100}
    assert tally.seen["near-tie"] <= max(1, len(MODEL_TYPES) * CHECKPOINTS * CASES // 100)
