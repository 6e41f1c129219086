"""Search over table models: against transformers' own beam search and processors, and against brute force."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

from blip2rt.backends.torch_modules import likeliest
from blip2rt.errors import EngineError
from blip2rt.logits import draw, largest, log_softmax, probabilities, process, warp
from blip2rt.options import ResolvedOptions
from blip2rt.scores import Continuations, Shortlist, num_continuations
from blip2rt.search import TokenSequence, run_searches, shortlist_size, start_search

Array = np.ndarray[Any, Any]
MEMORY = 3  # last tokens that a table model looks at

seeds = st.integers(0, 2**32 - 1)


class TableModel:
    """A language model that looks at the last few tokens only: logits come from a table, exactly."""

    def __init__(self, seed: int, vocab_size: int, spread: float = 3.0):
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.table = (spread * rng.standard_normal((MEMORY, vocab_size, vocab_size))).astype(np.float32)

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits [V] after `ids`."""
        last = list(ids)[: -MEMORY - 1 : -1]
        logits: Array = self.table[np.arange(len(last)), last].sum(axis=0)
        return logits


class TableDecoder:
    """A `search.Decoder` over table models, one an image, which checks how it is used."""

    def __init__(self, models: Sequence[TableModel], prompts: Sequence[Sequence[int]], num_rows: int):
        self.models = list(models)
        self.rows = [[list(prompt)] * num_rows for prompt in prompts]
        self.num_rows = num_rows

    def prefill(self) -> Array:
        return np.stack([[m.logits(rows[0])] for m, rows in zip(self.models, self.rows, strict=True)])

    def step(self, tokens: Array, parents: Array, sums: Array) -> Array:
        assert tokens.shape == parents.shape == sums.shape == (len(self.rows), self.num_rows)
        self.rows = [
            [[*rows[parent], int(token)] for token, parent in zip(ts, ps, strict=True)]
            for rows, ts, ps in zip(self.rows, tokens, parents, strict=True)
        ]
        return np.stack([[m.logits(ids) for ids in rows] for m, rows in zip(self.models, self.rows, strict=True)])

    def keep(self, images: Sequence[int]) -> None:
        # what the cache relies on: it moves images to smaller places only, in one pass
        assert 0 < len(images) < len(self.rows)
        assert len(set(images)) == len(images)
        assert all(place <= image for place, image in enumerate(images))
        self.models = [self.models[image] for image in images]
        self.rows = [self.rows[image] for image in images]


class ShortlistDecoder(TableDecoder):
    """Gives the likeliest tokens of every row, as a GPU does."""

    def __init__(self, models: list[TableModel], prompts: list[list[int]], num_rows: int, size: int):
        super().__init__(models, prompts, num_rows)
        self.size = size

    def prefill(self) -> Shortlist:  # type: ignore[override]
        return self._shortened(super().prefill())

    def step(self, tokens: Array, parents: Array, sums: Array) -> Shortlist:  # type: ignore[override]
        return self._shortened(super().step(tokens, parents, sums))

    def _shortened(self, logits: Array) -> Shortlist:
        logprobs = np.stack([log_softmax(rows) for rows in logits])
        best = np.argsort(-logprobs, axis=2, kind="stable")[:, :, : self.size]
        return Shortlist(best, np.take_along_axis(logprobs, best, axis=2))


class ScoringDecoder(ShortlistDecoder):
    """Gives the best continuations of every image, as torch does on a GPU."""

    def step(self, tokens: Array, parents: Array, sums: Array) -> Continuations:  # type: ignore[override]
        logits = torch.from_numpy(TableDecoder.step(self, tokens, parents, sums))
        found = likeliest(logits, num_continuations(self.size, self.num_rows, logits.shape[2]), torch.from_numpy(sums))
        parts = (found[f"best_{name}"].numpy() for name in ("sums", "parents", "tokens", "logprobs"))
        return Continuations(*parts)


class TableConfig(PretrainedConfig):
    model_type = "table"


class TableTransformer(PreTrainedModel, GenerationMixin):
    """The same table for transformers' `generate`."""

    config_class = TableConfig

    def __init__(self, model: TableModel, stop_ids: Sequence[int]):
        config = TableConfig()
        config.vocab_size = model.vocab_size
        super().__init__(config)
        self.table = model
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(
            eos_token_id=list(stop_ids) or None, pad_token_id=0, use_cache=False, do_sample=False
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        logits = np.stack([self.table.logits(ids) for ids in input_ids.tolist()])
        return CausalLMOutput(logits=torch.from_numpy(logits)[:, None])


def search(
    model: TableModel, prompt: Sequence[int], options: ResolvedOptions, stop_ids: Sequence[int]
) -> list[TokenSequence]:
    """One image alone."""
    found = start_search(options, prompt, stop_ids)
    for _ in run_searches(TableDecoder([model], [prompt], options.num_rows), [found]):
        pass
    return found.sequences()


EARLY_STOPPING: list[bool | str] = [False, True, "never"]


@st.composite
def search_options(draw: st.DrawFn, most_beams: int = 8, most_tokens: int = 12) -> ResolvedOptions:
    beams, most = draw(st.integers(1, most_beams)), draw(st.integers(1, most_tokens))
    return ResolvedOptions(
        num_beams=beams,
        num_return_sequences=draw(st.integers(1, beams)),
        max_new_tokens=most,
        min_new_tokens=draw(st.integers(0, min(3, most))),
        length_penalty=draw(st.sampled_from([-1.0, -0.3, 0.0, 0.5, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from(EARLY_STOPPING)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.7, 1.3])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 2, 3])),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seeds,
    st.integers(20, 40),
    st.integers(0, 3),
    st.lists(st.integers(0, 19), min_size=1, max_size=6),
    search_options(),
)
def test_same_as_transformers(
    seed: int, vocab_size: int, num_stops: int, prompt: list[int], options: ResolvedOptions
) -> None:
    """Catches any deviation from transformers' beam search, down to the last beam; logits are exactly the same here."""
    model, stop_ids = TableModel(seed, vocab_size), list(range(1, 1 + num_stops))
    names = ("num_beams", "num_return_sequences", "max_new_tokens", "min_new_tokens", "length_penalty",
             "early_stopping", "repetition_penalty", "no_repeat_ngram_size")  # fmt: skip
    transformer: Any = TableTransformer(model, stop_ids)
    output = transformer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        return_dict_in_generate=True,
        output_scores=True,
        **{name: getattr(options, name) for name in names},
    )
    found = search(model, prompt, options, stop_ids)
    assert len(found) == len(output.sequences)
    for row, sequence in zip(output.sequences[:, len(prompt) :].tolist(), found, strict=True):
        stops = [i for i, token in enumerate(row) if token in stop_ids]
        assert sequence.token_ids == (row[: stops[0]] if stops else row)
        assert sequence.finish_reason == ("stop" if stops else "length")
        assert len(sequence.token_logprobs) == len(sequence.token_ids)
    if options.num_beams > 1:
        np.testing.assert_allclose([s.score for s in found], output.sequences_scores.numpy(), rtol=1e-6, atol=1e-6)


def all_sequences(vocab_size: int, stop_id: int, most: int, least: int) -> Iterator[list[int]]:
    """Everything that a search can end with, the stop token included."""
    for length in range(1, most + 1):
        for ids in itertools.product(range(vocab_size), repeat=length):
            ends = ids[-1] == stop_id and length > least
            if stop_id not in ids[:-1] and (ends or (length == most and (ids[-1] != stop_id))):
                yield list(ids)


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([2, 3]),
)
def test_wide_beam_finds_the_best(seed: int, most: int, least: int, length_penalty: float, vocab_size: int) -> None:
    """Catches wrong scores, lengths or an early end: a beam as wide as there are sequences is exhaustive search."""
    model, prompt, stop_id, least = TableModel(seed, vocab_size), [0, 1], 1, min(least, most)
    everything = list(all_sequences(vocab_size, stop_id, most, least))
    options = ResolvedOptions(
        num_beams=max(2, vocab_size**most),
        max_new_tokens=most,
        min_new_tokens=least,
        length_penalty=length_penalty,
        early_stopping="never",
    )

    def score(ids: list[int]) -> float:
        steps = [model.logits([*prompt, *ids[:i]]).astype(np.float64) for i in range(len(ids))]
        return (
            float(sum(s[i] - np.logaddexp.reduce(s) for s, i in zip(steps, ids, strict=True)))
            / len(ids) ** length_penalty
        )

    best = max(everything, key=score)
    found = search(model, prompt, options, [stop_id])[0]
    assert found.score == pytest.approx(score(best), rel=1e-5, abs=1e-6)
    assert found.token_ids + [stop_id] * (found.finish_reason == "stop") == best


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 30), st.integers(1, 20), st.sampled_from([-1.0, 0.0, 1.0]))
def test_greedy_is_an_argmax_loop(seed: int, vocab_size: int, most: int, length_penalty: float) -> None:
    """Catches a greedy search that stops late or early, or counts the stop token wrongly."""
    model, ids, logprobs = TableModel(seed, vocab_size), [0], []
    while len(ids) <= most and (len(ids) == 1 or ids[-1] != 1):
        logits = model.logits(ids).astype(np.float64)
        ids.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.logaddexp.reduce(logits))
    options = ResolvedOptions(max_new_tokens=most, length_penalty=length_penalty)
    (found,) = search(model, [0], options, [1])
    stopped = ids[-1] == 1
    assert found.token_ids == ids[1 : len(ids) - stopped]
    assert found.finish_reason == ("stop" if stopped else "length")
    assert found.score == pytest.approx(sum(logprobs) / len(logprobs) ** length_penalty, rel=1e-5, abs=1e-4)
    assert found.token_logprobs == pytest.approx(logprobs[: len(logprobs) - stopped], rel=1e-5, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(seeds, min_size=1, max_size=7), search_options(most_tokens=20), st.booleans(), st.data())
def test_images_that_end_at_different_times(
    models: list[int], options: ResolvedOptions, do_sample: bool, data: st.DataObject
) -> None:
    """Catches rows mixed up when some images are done: each must get what it gets alone. `TableDecoder` checks keep."""
    if do_sample:
        options = ResolvedOptions(
            do_sample=True, seed=data.draw(seeds), num_return_sequences=options.num_return_sequences, max_new_tokens=20
        )
    # many stop tokens in some images, none in others
    stops = [data.draw(st.sampled_from([[], [1], list(range(1, 8)), list(range(1, 15))])) for _ in models]
    prompts = [data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=5)) for _ in models]
    tables = [TableModel(seed, 16) for seed in models]
    searches = [start_search(options, p, s) for p, s in zip(prompts, stops, strict=True)]
    for _ in run_searches(TableDecoder(tables, prompts, options.num_rows), searches):
        pass
    for found, table, prompt, stop_ids in zip(searches, tables, prompts, stops, strict=True):
        assert found.sequences() == search(table, prompt, options, stop_ids)


@settings(max_examples=200, deadline=None)
@given(
    seeds, search_options(), st.integers(8, 40), st.sets(st.integers(0, 4)), st.sampled_from(["transformers", "lavis"])
)
def test_a_shortlist_is_enough(
    seed: int, options: ResolvedOptions, vocab_size: int, stop_ids: set[int], rules: str
) -> None:
    """Catches a shortlist that is too short for beams, stop tokens and bans; equal logits are among the tables'."""
    options = replace(options, repetition_penalty=1.0, no_repeat_ngram_size=0, rules=rules)
    table, stops = TableModel(seed, vocab_size), sorted(stop_ids)
    table.table = np.round(table.table)
    size = shortlist_size(options, stops)
    assert size is not None
    expected = search(table, [3, 1], options, stops)
    found = start_search(options, [3, 1], stops)
    for _ in run_searches(ShortlistDecoder([table], [[3, 1]], options.num_rows, size), [found]):
        pass
    assert found.sequences() == expected
    # torch rounds log-probabilities otherwise, and of more equal ones than are asked for it takes any: here none are
    table.table += np.random.default_rng(seed).random(table.table.shape, np.float32) / 8
    expected = search(table, [3, 1], options, stops)
    found = start_search(options, [3, 1], stops)
    for _ in run_searches(ScoringDecoder([table], [[3, 1]], options.num_rows, size), [found]):
        pass
    for left, right in zip(found.sequences(), expected, strict=True):
        assert left.token_ids == right.token_ids
        assert left.token_logprobs == pytest.approx(right.token_logprobs, abs=1e-5)
        assert left.score == pytest.approx(right.score, abs=1e-4)
    for changed in ({"repetition_penalty": 1.1}, {"no_repeat_ngram_size": 2}, {"do_sample": True}):
        assert shortlist_size(replace(options, **changed), stops) is None


def test_search_knows_three_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that reaches into the decoder: then no other decoder could take its place."""
    used = set()

    class Spy:
        def __init__(self, decoder: TableDecoder):
            self._decoder = decoder

        def __getattribute__(self, name: str) -> Any:
            if name != "_decoder":
                used.add(name)
                return getattr(self._decoder, name)
            return object.__getattribute__(self, name)

    for options in (ResolvedOptions(num_beams=4), ResolvedOptions(), ResolvedOptions(do_sample=True, seed=1)):
        prompts, tables = [[0], [1], [2]], [TableModel(seed, 12) for seed in range(3)]
        searches = [
            start_search(options, prompt, stop) for prompt, stop in zip(prompts, ([1, 2, 3, 4], [], [5]), strict=True)
        ]
        for _ in run_searches(Spy(TableDecoder(tables, prompts, options.num_rows)), searches):
            pass
    assert used == {"prefill", "step", "keep"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [ResolvedOptions(), ResolvedOptions(num_beams=3), ResolvedOptions(do_sample=True)])
def test_logits_that_are_no_numbers(value: float, options: ResolvedOptions) -> None:
    """Catches a damaged engine whose NaN would come out as an ordinary text, at the first step or later."""
    for first in (True, False):
        found = start_search(options, [0], [1])
        logits = np.zeros((1 if first else options.num_rows, 9), np.float32)
        if not first:
            found.advance(logits[:1].copy())
        logits[-1, 4] = value
        with pytest.raises(EngineError, match="verify"):
            found.advance(logits)
    if not options.do_sample:  # log-probabilities of such logits are no numbers at all
        shortlist = Shortlist(np.zeros((1, 4), np.int64), np.full((1, 4), np.nan, np.float32))
        with pytest.raises(EngineError, match="verify"):
            start_search(options, [0], [1]).advance(shortlist)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """Scores [R, V], ids [R, L] that repeat themselves, how many of them were generated."""
    rows, vocab_size, length = draw(st.integers(1, 4)), draw(st.integers(3, 40)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(seeds))
    scores = (draw(st.sampled_from([0.1, 3.0, 30.0])) * rng.standard_normal((rows, vocab_size))).astype(np.float32)
    history = rng.integers(0, draw(st.integers(1, vocab_size)), (rows, length))
    return scores, history, draw(st.integers(0, length))


@settings(max_examples=300, deadline=None)
@given(histories(), st.floats(0.3, 3), st.integers(0, 5), st.integers(0, 6), st.sets(st.integers(0, 2)))
def test_processors(
    history: tuple[Array, Array, int], penalty: float, ngram: int, least: int, stop_ids: set[int]
) -> None:
    """Catches penalties and bans that differ from transformers' processors in a value, a place or their order."""
    scores, ids, num_generated = history
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    if ngram:
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    if least and stop_ids:
        processors.append(MinNewTokensLengthLogitsProcessor(ids.shape[1] - num_generated, least, sorted(stop_ids)))
    expected = processors(torch.LongTensor(ids), torch.from_numpy(scores.copy())).numpy()
    options = ResolvedOptions(repetition_penalty=penalty, no_repeat_ngram_size=ngram, min_new_tokens=least)
    np.testing.assert_array_equal(process(scores.copy(), ids, num_generated, options, sorted(stop_ids)), expected)
    # image slots of a model without an id for them take part in no rule
    slots = np.concatenate((np.full((len(ids), 3), -1), ids), axis=1)
    if ngram < 2:
        np.testing.assert_array_equal(process(scores.copy(), slots, num_generated, options, sorted(stop_ids)), expected)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(histories(), st.floats(0.1, 5), st.integers(0, 50), st.floats(0.01, 1), st.booleans())
def test_warpers(history: tuple[Array, Array, int], temperature: float, top_k: int, top_p: float, bans: bool) -> None:
    """Catches sampling probabilities that differ from transformers', also where tokens are banned or k exceeds V."""
    scores, ids, _ = history
    if bans:
        scores[:, 1::2] = -np.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = torch.softmax(warpers(torch.LongTensor(ids), torch.from_numpy(scores.copy())), dim=-1).numpy()
    ours = probabilities(
        warp(scores, ResolvedOptions(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p))
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    """Catches a draw that is off by one token or ignores a row: chi-square over 40,000 draws of two distributions."""
    rng = np.random.default_rng(0)
    probs = probabilities(rng.standard_normal((2, 20)).astype(np.float32))
    probs[0, [0, 7, 19]] = 0
    drawn = np.array([draw(probs, rng) for _ in range(20_000)])
    for row in range(2):
        counts = np.bincount(drawn[:, row], minlength=20)
        expected = probs[row] / probs[row].sum() * len(drawn)
        possible = expected > 0
        assert not counts[~possible].any()
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 45  # 19 degrees of freedom: beyond it once in 1,500 seeds


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1, 0)])
def test_draws_at_the_ends(uniform: float) -> None:
    """Catches the token that cannot be drawn, or does not exist, at the ends of the random numbers' range."""

    class Fixed(np.random.Generator):
        def random(self, *_: Any, **__: Any) -> Any:
            return np.full(3, uniform)

    probs = np.array([[0, 0.3, 0.7, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 1, 0]], np.float32) * np.float32(0.99999)
    tokens = draw(probs, Fixed(np.random.PCG64()))
    assert (probs[np.arange(3), tokens] > 0).all()


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from([1, 50, 1e4, 1e30]))
def test_log_softmax(seed: int, spread: float) -> None:
    """Catches overflow for large logits, and logits [R, V] that are changed in place."""
    logits = (spread * np.random.default_rng(seed).standard_normal((3, 17))).astype(np.float32)
    logits[0, 0] = -np.inf  # a token that a graph rules out
    before = logits.copy()
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 2000), st.integers(1, 40), st.sampled_from([3, 1000]))
def test_largest(seed: int, count: int, size: int, levels: int) -> None:
    """Against a stable sort of everything: blocks, what is left beside them, equal scores, tokens ruled out."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, count).astype(np.float32)
    scores[rng.random(count) < rng.random()] = -np.inf
    np.testing.assert_array_equal(largest(scores, size), np.argsort(-scores, kind="stable")[:size])
