"""The decoder engine and its cache: prefill once, step many, the beams of an image as branches of one tree.

All rows of an image lie in one cache [B, H, C, d]: first its prefix (query slots and prompt, prefilled once, whatever
the number of beams), then R rows a step. Which rows a beam descends from is told by `mask` alone, so beams that change
places move no keys and values. The engine writes new rows into the cache in place. A model with an encoder (T5) has
no prefix: its cache begins with the start token, and all beams look at one copy of what the encoder gave.

Every image has a capacity of its own, at first enough for a caption. Where it is reached, rows that no beam descends
from are dropped, and if it is still nearly full it grows to 1.5 times the live rows. Both depend on nothing but the
image's own history: this is what makes an answer the same, bit for bit, alone and in any batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .backends import Stage
from .errors import InputError
from .scores import Continuations, Scores, Shortlist, num_continuations
from .stages import MASKED, StageSpec

Array = np.ndarray[Any, Any]

GROWTH = 1.5
ROOM = 192  # rows of a cache at first, where so many can be used: enough for 30 tokens with 5 beams
# rows that attention sees are padded to a multiple of this: else kernels sum up their last rows otherwise
ROW_STEP = 16
CONSTANT = ("prefix", "logit_rows")  # inputs that are the same in every step


def padded(num_rows: int) -> int:
    """The next multiple of `ROW_STEP`."""
    return -(-num_rows // ROW_STEP) * ROW_STEP


def lay_out_rows(prefixes: Array, prompts: Sequence[Sequence[int]], num_rows: int) -> tuple[Array, Array]:
    """[prefix, prompt] of every image, right-padded: prefix [B, S, D], and input_ids [B, S] with -1 for its rows."""
    batch, num_queries, width = prefixes.shape
    prefix = np.zeros((batch, num_rows, width), np.float32)
    prefix[:, :num_queries] = prefixes
    input_ids = np.zeros((batch, num_rows), np.int64)
    input_ids[:, :num_queries] = -1
    for b, prompt in enumerate(prompts):
        input_ids[b, num_queries : num_queries + len(prompt)] = prompt
    return prefix, input_ids


def run_encoder(encoder: Stage, prefixes: Array, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the decoder of a model with an encoder looks at: [prefix, prompt] of every image, right-padded and encoded.

    Args:
        encoder: the encoder engine.
        prefixes: [B, Q, D] float32, what the Q-Former saw.
        prompts: token ids of every image; lengths may differ.
    """
    lengths = np.array([prefixes.shape[1] + len(prompt) for prompt in prompts])
    num_rows = padded(int(lengths.max()))  # E
    prefix, input_ids = lay_out_rows(prefixes, prompts, num_rows)
    rows = np.arange(num_rows)
    mask = np.where(rows < lengths[:, None], np.float32(0), np.float32(MASKED))[:, None, None]  # [B, 1, 1, E]
    positions = np.tile(rows, (len(prompts), 1))
    return {**encoder(prefix=prefix, input_ids=input_ids, positions=positions, encoder_mask=mask), "encoder_mask": mask}


class CachedDecoder:
    """The `search.Decoder` of a language model.

    Args:
        stage: the decoder engine.
        spec: its signature.
        prefixes: [B, Q, D] float32, what the Q-Former saw; [B, 0, D] where an encoder has read it.
        prompts: token ids of every image, BOS first; lengths may differ.
        num_rows: R, rows of an image that are decoded side by side.
        max_new_tokens: longest generation, so that no more cache is taken than can be used.
        encoded: what an encoder gave and every row looks at, by the names of `spec`, [B, ...]; its `encoder_mask` is
            [B, 1, 1, E], which serves the one row of a prefill and is repeated for steps.
        shortlist: how many of the likeliest tokens of a row are asked for, where the stage can choose them; None: all
            logits.
    """

    def __init__(
        self,
        stage: Stage,
        spec: StageSpec,
        prefixes: Array,
        prompts: Sequence[Sequence[int]],
        num_rows: int,
        max_new_tokens: int,
        encoded: Mapping[str, Any] | None = None,
        shortlist: int | None = None,
    ):
        batch, num_queries, _ = prefixes.shape
        self._binding = stage.bind()
        self._inputs = {tensor.name for tensor in spec.inputs}
        self._scores_rows = stage.scores_rows
        self._encoded = dict(encoded or {})
        self._prefixes, self._prompts, self._num_rows = prefixes, prompts, num_rows
        self._lengths = np.array([num_queries + len(prompt) for prompt in prompts])  # of the prefixes, [B]
        self._used = np.zeros(batch, np.int64)  # cached rows, [B]
        self._depths = self._lengths.copy()  # position of the next token, [B]
        self._most_rows = self._lengths + num_rows * (max_new_tokens - 1)
        _, num_heads, capacity, head_width = spec.outputs[1].shape  # of a cache
        self._fixed_capacity = capacity if isinstance(capacity, int) else None
        self._capacities = np.array([self._capacity(b, n + num_rows) for b, n in enumerate(self._lengths)])
        self._vocab_size = int(spec.outputs[0].shape[-1])
        self._past = [tensor.name for tensor in spec.inputs if tensor.name.startswith("past_")]
        self._present = [tensor.name for tensor in spec.outputs if tensor.name.startswith("present_")]
        # zeros, because a masked row still takes part in a product: 0 * NaN would be NaN
        shape = (batch, int(num_heads), int(self._capacities.max()), int(head_width))
        self._caches = [stage.cache(shape) for _ in self._past]
        self._rows = shape[2]  # that the caches hold of every image
        self._step: dict[str, Array] = {}  # inputs of a step
        can_choose = shortlist and min(shortlist, self._vocab_size) <= stage.longest_shortlist
        self._shortlist = shortlist if can_choose else None
        self._outputs: dict[str, Array] = {}  # of a step

    def prefill(self) -> Scores:
        """Run all prefixes at once, right-padded: logits [B, 1, V], or the likeliest."""
        batch, num_rows = len(self._prompts), int(self._lengths.max())  # S
        prefix, input_ids = lay_out_rows(self._prefixes, self._prompts, num_rows)
        capacity = self._rows
        causal = np.where(np.arange(capacity) <= np.arange(num_rows)[:, None], np.float32(0), np.float32(MASKED))
        inputs = {
            "prefix": prefix,
            "input_ids": input_ids,
            "positions": np.minimum(np.arange(num_rows), self._lengths[:, None] - 1),
            "cached_positions": np.tile(np.arange(capacity), (batch, 1)),
            "write_indices": np.zeros(batch, np.int64),
            "mask": np.ascontiguousarray(np.broadcast_to(causal, (batch, 1, num_rows, capacity))),
            "logit_rows": self._lengths[:, None] - 1,
        }
        outputs = self._output_arrays(batch, 1)
        self._bind(inputs, outputs)
        self._binding.run()
        self._used = self._lengths.copy()
        self._prepare_steps()
        return _scores(outputs)

    def step(self, tokens: Array, parents: Array, sums: Array | None = None) -> Scores:
        """Run one new row for each of the R rows of every image: logits [B, R, V], valid until the next step.

        Args:
            tokens: [B, R], what the rows hold.
            parents: [B, R], the rows of the step before that they continue.
            sums: [B, R] float32, the scores of the rows; None: all the same.
        """
        num_rows = self._num_rows
        mask = self._step["mask"]
        for b in range(len(tokens)):
            mask[b, 0] = mask[b, 0, parents[b]]
        self._make_room()
        for b, used in enumerate(self._used):
            self._step["mask"][b, 0, range(num_rows), range(used, used + num_rows)] = 0  # a row sees itself
            self._step["cached_positions"][b, used : used + num_rows] = self._depths[b]
        self._step["input_ids"][:] = tokens
        self._step["positions"][:] = self._depths[:, None]
        self._step["write_indices"][:] = self._used
        self._step["sums"][:] = 0 if sums is None else sums
        self._binding.run()
        self._used += num_rows
        self._depths += 1
        return _scores(self._outputs)

    def keep(self, images: Sequence[int]) -> None:
        """Go on with these images, in this order; an image moves only to a smaller index or stays."""
        for cache in self._caches:
            cache.keep(images)
        for name in ("_lengths", "_used", "_depths", "_most_rows", "_capacities"):
            setattr(self, name, getattr(self, name)[list(images)])
        self._step, self._encoded = (
            {name: _kept(array, images) for name, array in arrays.items()} for arrays in (self._step, self._encoded)
        )
        self._outputs = {name: array[: len(images)] for name, array in self._outputs.items()}
        self._bind(self._step, self._outputs)

    def _prepare_steps(self) -> None:
        """Buffers of a step, bound once: only their contents change from step to step."""
        if "encoder_mask" in self._encoded:
            self._encoded["encoder_mask"] = self._encoded["encoder_mask"].repeat(self._num_rows, axis=2)
        batch, capacity = len(self._lengths), self._rows
        num_rows, width = self._num_rows, self._prefixes.shape[2]
        mask = np.full((batch, 1, num_rows, capacity), MASKED, np.float32)
        mask[np.broadcast_to(np.arange(capacity) < self._lengths[:, None, None, None], mask.shape)] = 0
        self._step = {
            "prefix": np.zeros((batch, num_rows, width), np.float32),
            "input_ids": np.zeros((batch, num_rows), np.int64),
            "positions": np.zeros((batch, num_rows), np.int64),
            "cached_positions": np.tile(np.arange(capacity), (batch, 1)),
            "write_indices": np.zeros(batch, np.int64),
            "mask": mask,
            "logit_rows": np.tile(np.arange(num_rows), (batch, 1)),
            "sums": np.zeros((batch, num_rows), np.float32),
        }
        if self._shortlist and self._scores_rows:
            self._inputs.add("sums")
        self._outputs = self._output_arrays(batch, num_rows)
        self._bind(self._step, self._outputs)

    def _output_arrays(self, batch: int, num_rows: int) -> dict[str, Array]:
        """What the binding writes: logits, of every row the likeliest tokens, or of every image continuations."""
        if self._shortlist is None:
            return {"logits": np.empty((batch, num_rows, self._vocab_size), np.float32)}
        scored: dict[str, Any] = {}
        shape: tuple[int, ...] = (batch, num_rows, min(self._shortlist, self._vocab_size))
        if "sums" in self._inputs:
            shape = (batch, num_continuations(self._shortlist, num_rows, self._vocab_size))
            scored = {"best_sums": np.empty(shape, np.float32), "best_parents": np.empty(shape, np.int64)}
        return scored | {"best_tokens": np.empty(shape, np.int64), "best_logprobs": np.empty(shape, np.float32)}

    def _make_room(self) -> None:
        """Drop dead rows of images that have reached their capacity; let capacities grow where that is not enough."""
        for b in np.flatnonzero(self._used + self._num_rows > self._capacities).tolist():
            self._drop_dead_rows(b)
            needed = int(self._used[b]) + self._num_rows
            self._capacities[b] = max(self._capacities[b], self._capacity(b, needed))
        capacity = int(self._capacities.max())
        if capacity > self._rows:
            rows, self._rows = int(self._used.max()), capacity
            for cache in self._caches:
                cache.grow(capacity, rows)
            mask = np.full((*self._step["mask"].shape[:3], capacity), MASKED, np.float32)
            mask[..., : self._step["mask"].shape[3]] = self._step["mask"]
            self._step["mask"] = mask
            cached_positions = np.zeros((len(mask), capacity), np.int64)
            cached_positions[:, :rows] = self._step["cached_positions"][:, :rows]
            self._step["cached_positions"] = cached_positions
            self._bind(self._step, self._outputs)

    def _drop_dead_rows(self, b: int) -> None:
        """Move the rows that some beam descends from together, in their order."""
        used = int(self._used[b])
        mask = self._step["mask"][b, 0]  # [R, C]
        live = np.flatnonzero((mask[:, :used] == 0).any(axis=0))
        first = int(np.argmin(np.append(live, -1) == np.arange(len(live) + 1)))  # rows before this one stay
        if first == used:
            return
        moved = live[first:]
        for cache in self._caches:
            cache.move_rows(b, moved, first)
        mask[:, first : len(live)] = mask[:, moved]
        mask[:, len(live) : used] = MASKED
        cached_positions = self._step["cached_positions"][b]  # [C]
        cached_positions[first : len(live)] = cached_positions[moved]
        self._used[b] = len(live)

    def _capacity(self, b: int, rows: int) -> int:
        """Rows to hold for image b when `rows` of them are in use: half as many again, and never more than can be.

        Raises:
            InputError: more than the engine can hold.
        """
        if self._fixed_capacity is not None:
            if rows > self._fixed_capacity:
                raise InputError(
                    f"the prompt and the beams need {rows} rows of the cache, and this engine holds "
                    f"{self._fixed_capacity}: fewer beams, tokens or words, or export with --capacity {padded(rows)}"
                )
            return self._fixed_capacity
        wanted = min(max(int(rows * GROWTH), ROOM), max(int(self._most_rows[b]), rows))
        return padded(wanted)

    def _bind(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        for name, array in (inputs | self._encoded).items():
            if name in self._inputs:
                self._binding.input(name, array, name in CONSTANT or name in self._encoded)
        for name, array in outputs.items():
            self._binding.output(name, array)
        for past, present, cache in zip(self._past, self._present, self._caches, strict=True):
            self._binding.input(past, cache)
            self._binding.output(present, cache)
        self._bound = inputs  # keeps the arrays alive for as long as they are bound


def _kept(array: Any, images: Sequence[int]) -> Any:
    """An array or a cache that goes on with these images."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array[list(images)])
    array.keep(images)
    return array


def _scores(outputs: Mapping[str, Array]) -> Scores:
    """The outputs of a step as a search takes them."""
    if "logits" in outputs:
        return outputs["logits"]
    best = outputs["best_tokens"], outputs["best_logprobs"]
    if "best_sums" in outputs:
        return Continuations(outputs["best_sums"], outputs["best_parents"], *best)
    return Shortlist(*best)
