"""`rules="lavis"`: the search gives the ids and scores that LAVIS recorded, over its own recorded inputs.

The decoder under the search is transformers' language model, recomputed from the start at every step: only the search
is ours. The whole path, from LAVIS checkpoints through engines, is tested where those are loaded.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from blip2rt.options import ResolvedOptions
from blip2rt.search import TokenSequence, run_searches, start_search

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "lavis"
CAPTIONS = ("gen_greedy", "gen_beam5", "gen_beam5_lpm1", "gen_beam5_lp2", "gen_beam5_n3", "gen_beam5_min8",
            "gen_beam5_rep15", "gen_greedy_rep15")  # fmt: skip
CASES = {
    "opt": [*CAPTIONS, "vqa2_lp0", "vqa2_lpm1", "vqa2_lp1", "vqa_all_lp0"],
    "t5": [*CAPTIONS, "vqa2_lp0", "vqa2_lpm1", "vqa2_lp1", "vqa_all_lpm1"],
}

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the LAVIS fixtures are not beside this checkout")


class Recomputed:
    """A `search.Decoder` that runs every row of every image from its start, in transformers."""

    def __init__(self, model: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, num_rows: int):
        self.model, self.embeds, self.mask = model, inputs_embeds, attention_mask
        self.rows: list[list[list[int]]] = [[[] for _ in range(num_rows)] for _ in inputs_embeds]

    def prefill(self) -> np.ndarray[Any, Any]:
        return np.stack([self._logits(b, [rows[0]]) for b, rows in enumerate(self.rows)])

    def step(self, tokens: np.ndarray[Any, Any], parents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.rows = [
            [[*rows[parent], int(token)] for token, parent in zip(tokens[b], parents[b], strict=True)]
            for b, rows in enumerate(self.rows)
        ]
        return np.stack([self._logits(b, rows) for b, rows in enumerate(self.rows)])

    def keep(self, images: Sequence[int]) -> None:
        self.rows = [self.rows[b] for b in images]
        self.embeds, self.mask = self.embeds[list(images)], self.mask[list(images)]

    @torch.no_grad()
    def _logits(self, b: int, rows: list[list[int]]) -> np.ndarray[Any, Any]:
        """Logits [R, V] after each of these texts of image b."""
        embeds, mask = (x[b : b + 1].repeat_interleave(len(rows), 0) for x in (self.embeds, self.mask))
        ids = torch.tensor(rows, dtype=torch.int64)
        if self.model.config.is_encoder_decoder:
            start = torch.full((len(rows), 1), self.model.config.decoder_start_token_id)
            inputs: dict[str, Any] = {"decoder_input_ids": torch.cat((start, ids), 1), "inputs_embeds": embeds}
        else:
            inputs = {"inputs_embeds": torch.cat((embeds, self.model.get_input_embeddings()(ids)), 1)}
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
        logits: torch.Tensor = self.model(**inputs, attention_mask=mask, use_cache=False).logits[:, -1]
        return logits.numpy()


@lru_cache
def load_language_model(kind: str) -> Any:
    loader = AutoModelForCausalLM if kind == "opt" else AutoModelForSeq2SeqLM
    return loader.from_pretrained(FIXTURES / "llm" / kind, dtype=torch.float32).eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded_options(arguments: dict[str, Any]) -> ResolvedOptions:
    """What LAVIS passed to transformers 4.33; its lengths count the start token."""
    new = arguments.get("max_new_tokens") or arguments["max_length"] - 1
    return ResolvedOptions(
        num_beams=arguments["num_beams"],
        max_new_tokens=new,
        min_new_tokens=max(0, arguments["min_length"] - 1),
        length_penalty=float(arguments["length_penalty"]),
        repetition_penalty=arguments.get("repetition_penalty", 1.0),
        num_return_sequences=arguments.get("num_return_sequences", 1),
        rules="lavis",
    )


def recorded_inputs(arrays: Any, case: str, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [B, Q+P, D] and mask that generation started from."""
    family = case.partition("_")[0] if case.startswith("gen") else case.rpartition("_")[0]
    if f"{family}_inputs_embeds" in arrays:
        return tuple(torch.from_numpy(arrays[f"{family}_{name}"]) for name in ("inputs_embeds", "attention_mask"))  # type: ignore[return-value]
    queries = torch.from_numpy(arrays["query_embeds_proj"])
    text = model.get_input_embeddings()(torch.from_numpy(arrays[f"{family}_input_ids"])).detach()
    mask = torch.from_numpy(arrays[f"{family}_text_attention_mask"])
    return torch.cat((queries, text), 1), torch.cat((torch.ones(queries.shape[:2], dtype=mask.dtype), mask), 1)


def rows_of(sequences: list[TokenSequence], start: int, stop: int, pad: int, length: int) -> list[list[int]]:
    """As transformers 4.33 returned them: start token, ids, stop token where one came, padding."""
    rows = [[start, *s.token_ids, *([stop] if s.finish_reason == "stop" else [])] for s in sequences]
    return [row + [pad] * (length - len(row)) for row in rows]


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in CASES.items() for case in cases])
def test_same_as_lavis(kind: str, case: str) -> None:
    """Ids identical, scores within 1e-5: every length rule, stop test and last step of the old beam search."""
    language_model = load_language_model(kind)
    arrays = np.load(FIXTURES / "lavis" / f"{kind}.npz")
    texts = json.loads((FIXTURES / "lavis" / "texts.json").read_text())[kind]
    arguments = texts["generate_kwargs"][case]
    options = recorded_options(arguments)
    config = language_model.config
    stop = arguments.get("eos_token_id", config.eos_token_id)
    start = config.decoder_start_token_id if kind == "t5" else config.bos_token_id
    embeds, mask = recorded_inputs(arrays, case, language_model)
    searches = [start_search(options, [start], [stop]) for _ in embeds]
    for _ in run_searches(Recomputed(language_model, embeds, mask, options.num_rows), searches):
        pass
    expected = arrays[f"{case}_ids"]
    found = [search.sequences() for search in searches]
    rows = [row for s in found for row in rows_of(s, start, stop, config.pad_token_id, expected.shape[1])]
    assert rows == expected.tolist()
    if f"{case}_scores" in arrays:
        scores = [sequence.score for sequences in found for sequence in sequences]
        np.testing.assert_allclose(scores, arrays[f"{case}_scores"], rtol=1e-5, atol=1e-5)
