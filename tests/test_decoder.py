"""The tree cache: in place, small steps, dead rows dropped, and always what a full recompute gives."""

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2rt.backends.ort import Binding, Stage
from blip2rt.decoder import GROWTH, ROOM, ROW_STEP, CachedDecoder
from blip2rt.export import export_engine
from blip2rt.manifest import Manifest
from blip2rt.model import Blip2, load_blip2
from blip2rt.model.config import OPTConfig
from blip2rt.stages import DECODER, MASKED

Array = np.ndarray[Any, Any]
MAX_NEW_TOKENS = 400


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]) -> tuple[Path, Blip2]:
    """An engine with room for long texts, and its reference model."""
    folder = tmp_path_factory.mktemp("long")
    checkpoint = checkpoint_maker(folder / "checkpoint", seed=5, max_position_embeddings=600, num_hidden_layers=2)
    return export_engine(checkpoint, folder / "engine"), load_blip2(checkpoint)


class Walk:
    """Images with random prompts whose rows descend from each other as a search might have it."""

    def __init__(self, engine: Path, model: Blip2, num_images: int, num_rows: int, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.model, self.num_rows = model, num_rows
        text = model.config.text
        shape = (num_images, model.config.num_query_tokens, text.hidden_size)
        self.prefixes = self.rng.standard_normal(shape, dtype=np.float32)
        self.prompts = [self.rng.integers(0, text.vocab_size, 1 + 3 * i).tolist() for i in range(num_images)]
        self.sequences = [[list(prompt) for _ in range(num_rows)] for prompt in self.prompts]
        manifest = Manifest.read(engine)
        stage = Stage(DECODER, engine / manifest.stages[DECODER].file, threads=1)
        self.decoder = CachedDecoder(
            stage, manifest.stages[DECODER].signature, self.prefixes, self.prompts, num_rows, MAX_NEW_TOKENS
        )

    def step(self, parents: Sequence[Sequence[int]]) -> Array:
        """Random tokens; row r of image b continues row parents[b][r]."""
        tokens = self.rng.integers(0, self.model.config.text.vocab_size, (len(self.sequences), self.num_rows))
        for b, rows in enumerate(self.sequences):
            self.sequences[b] = [[*rows[parent], int(tokens[b, r])] for r, parent in enumerate(parents[b])]
        logits = self.decoder.step(tokens, np.asarray(parents))
        assert isinstance(logits, np.ndarray)
        return logits.copy()

    def random_parents(self, most: int) -> list[list[int]]:
        """Parents among the first `most` rows."""
        return self.rng.integers(0, most, (len(self.sequences), self.num_rows)).tolist()

    def recomputed(self, b: int, r: int) -> Array:
        """Logits [V] after one row's whole sequence, by the reference without any cache."""
        ids = torch.tensor([[-1] * self.prefixes.shape[1] + self.sequences[b][r]])
        length = ids.shape[1]
        prefix = torch.zeros(1, length, self.prefixes.shape[2])
        prefix[0, : self.prefixes.shape[1]] = torch.from_numpy(self.prefixes[b])
        mask = torch.full((length, length), MASKED).triu(1)[None, None]
        text = self.model.config.text
        assert isinstance(text, OPTConfig)
        heads = text.num_attention_heads
        empty = [torch.zeros(1, heads, length, text.hidden_size // heads) for _ in range(2 * text.num_hidden_layers)]
        last, zero = torch.tensor([[length - 1]]), torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            logits, *_ = self.model.decoder(prefix, ids, torch.arange(length)[None], zero, mask, last, *empty)
        return logits[0, 0].numpy()


def test_tree_equals_full_recompute(long_model: tuple[Path, Blip2]) -> None:
    """Beams that change places, images at different lengths, dropped rows and grown capacities move no logit."""
    walk = Walk(*long_model, num_images=3, num_rows=5)
    logits = walk.decoder.prefill()
    assert isinstance(logits, np.ndarray)
    for b in range(3):
        np.testing.assert_allclose(logits[b, 0], walk.recomputed(b, 0), rtol=1e-4, atol=2e-4)
    for step in range(60):
        logits = walk.step(walk.random_parents(most=2 if step % 20 < 10 else 5))
        if step % 6 == 0:
            for b, r in ((0, 0), (1, 4), (2, step % 5)):
                np.testing.assert_allclose(logits[b, r], walk.recomputed(b, r), rtol=1e-4, atol=2e-4)


def test_images_leave(long_model: tuple[Path, Blip2]) -> None:
    """`keep` moves the caches of those that stay: each goes on as if nothing had happened."""
    walk = Walk(*long_model, num_images=4, num_rows=3)
    walk.decoder.prefill()
    for _ in range(5):
        walk.step(walk.random_parents(most=3))
    for kept in ([0, 3, 2], [0, 2], [1]):
        walk.decoder.keep(kept)
        walk.sequences = [walk.sequences[b] for b in kept]
        walk.prefixes = walk.prefixes[kept]
        for _ in range(4):
            logits = walk.step(walk.random_parents(most=3))
        for b in range(len(kept)):
            np.testing.assert_allclose(logits[b, 1], walk.recomputed(b, 1), rtol=1e-4, atol=2e-4)


def test_cache_is_updated_in_place(long_model: tuple[Path, Blip2], monkeypatch: pytest.MonkeyPatch) -> None:
    """Past and present of every layer are one array, bound once: a step copies no cache."""
    bound: dict[str, int] = {}
    bindings = 0
    for direction in ("input", "output"):
        original = getattr(Binding, direction)

        def spy(self: Binding, name: str, array: Any, *constant: bool, original: Any = original) -> None:
            nonlocal bindings
            bindings += 1
            bound[name] = id(array)
            original(self, name, array, *constant)

        monkeypatch.setattr(Binding, direction, spy)
    walk = Walk(*long_model, num_images=2, num_rows=4)
    walk.decoder.prefill()
    for _ in range(40):
        capacity, before = walk.decoder._rows, bindings
        walk.step(walk.random_parents(most=4))
        assert bindings == before or walk.decoder._rows > capacity
        for i, cache in enumerate(walk.decoder._caches):
            kind, layer = ("key", "value")[i % 2], i // 2
            assert bound[f"past_{kind}_{layer}"] == bound[f"present_{kind}_{layer}"] == id(cache)


def test_a_step_allocates_little(long_model: tuple[Path, Blip2]) -> None:
    """At 100 and at 1,000 cached rows a step that does not grow the cache allocates less than 1 MB."""
    walk = Walk(*long_model, num_images=1, num_rows=5)
    walk.decoder.prefill()
    measured = dict.fromkeys((100, 1000), 0)
    identity = [list(range(5))]  # nothing dies, so rows only grow
    while walk.decoder._used[0] < 1000:
        used, capacity = int(walk.decoder._used[0]), int(walk.decoder._capacities[0])
        tracemalloc.start()
        resident = _resident_bytes()
        walk.step(identity)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        target = next((rows for rows in measured if rows <= used < rows + 60), None)
        if (target or used > 940) and walk.decoder._capacities[0] == capacity:
            assert peak < 1e6
            assert _resident_bytes() - resident < 1e6
            measured[target or 1000] += 1
    assert all(measured.values()), measured


def test_capacity_follows_the_live_rows(long_model: tuple[Path, Blip2]) -> None:
    """Beams that share their ancestors do not make the cache grow with their number."""
    walk = Walk(*long_model, num_images=1, num_rows=5)
    walk.decoder.prefill()
    for _ in range(200):
        walk.step(walk.random_parents(most=1))
    live = len(walk.sequences[0][0]) + walk.prefixes.shape[1] + 4  # one trunk and five leaves
    assert ROOM < walk.decoder._capacities[0] <= GROWTH * live + ROW_STEP
    straight = Walk(*long_model, num_images=1, num_rows=5)
    straight.decoder.prefill()
    for _ in range(100):
        straight.step([[0, 1, 2, 3, 4]])
    assert straight.decoder._capacities[0] <= GROWTH * (straight.decoder._used[0] + 5) + ROW_STEP


def test_capacity_never_exceeds_what_can_be_used(long_model: tuple[Path, Blip2]) -> None:
    """A short generation takes no more cache than its last step needs."""
    engine, model = long_model
    walk = Walk(engine, model, num_images=1, num_rows=2)
    assert walk.decoder._capacity(0, 10_000) == 10_000
    walk.decoder._most_rows[:] = 21
    assert walk.decoder._capacity(0, 20) == 32  # 21 rounded up, not 30


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
