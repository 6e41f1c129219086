"""A gallery finds exactly what a search through everything finds, and survives whatever happens to its writer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2rt import EngineError, Gallery, InputError, Pipeline, TextGallery, gallery_store
from blip2rt.gallery_scan import laid_out, nearest, numpy_cosines, widened
from blip2rt.gallery_store import GalleryStore
from blip2rt.native.cosines import native_cosines

Array = np.ndarray[Any, Any]


def unit(shape: tuple[int, ...], seed: int = 0) -> Array:
    vectors = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def brute_force(stored: Array, texts: Array, k: int) -> Array:
    """Places [T, k] by the largest cosine over the queries, in float64; the first of equal ones first."""
    cosines = np.einsum("nqe,te->tnq", stored.astype(np.float64), texts.astype(np.float64)).max(axis=2)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]


def test_search_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 images over several shards, a third of them removed: recall 1.0 against brute force."""
    monkeypatch.setattr(gallery_store, "SHARD_BYTES", 1 << 20)
    vectors, texts = unit((20_000, 4, 16)), unit((8, 16), seed=1)
    vectors[777] = vectors[12_345]  # equal ones, in two shards
    gallery = Gallery(tmp_path / "g")
    for start in range(0, 20_000, 3000):
        part = vectors[start : start + 3000]
        gallery.add_embeddings(part, list(range(start, start + len(part))))
    assert len(list((tmp_path / "g").glob("itc-*.f16"))) == 3
    removed = np.random.default_rng(2).permutation(20_000)[:6000]
    removed = removed[~np.isin(removed, [777, 12_345])]
    gallery.remove(removed.tolist())
    kept = np.setdiff1d(np.arange(20_000), removed)
    stored = vectors.astype(np.float16)[kept]
    texts[0] = vectors[777, 2]
    rows, cosines = Gallery(tmp_path / "g").nearest(texts, 50)
    expected = brute_force(stored, texts, 50)
    assert (rows == kept[expected]).all()
    assert rows[0, :2].tolist() == [777, 12_345]
    assert (np.diff(cosines, axis=1) <= 0).all()


@pytest.mark.parametrize("width", [2, 7, 64])
def test_every_half_is_widened_exactly(width: int) -> None:
    """A row of a unit matrix picks each value out; the slow twin is numpy's own conversion."""
    half: Array = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    half = half[: len(half) // width * width].reshape(-1, width)
    picked = widened(half) @ laid_out(np.eye(width, dtype=np.float32))
    assert (picked == half.astype(np.float32)).all()


@pytest.mark.parametrize("path", ["vnni", "avx2"])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 33), st.integers(1, 70), st.integers(1, 70))
def test_the_native_pass_equals_its_twin(path: str, seed: int, rows: int, per_row: int, width: int, count: int) -> None:
    """Any sizes; subnormal halves as well; a row alone has the bits that it has among others."""
    native = native_cosines(path)
    if native is None:
        pytest.skip(f"there is no native pass with {path} here")
    half = (unit((rows, per_row, width), seed) * np.float32(10.0) ** -(seed % 7)).astype(np.float16)
    queries = unit((count, width), seed + 1)
    found, expected = native(queries)(half), numpy_cosines(queries)(half)
    assert found.shape == (rows, count)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max() + 1e-12
    assert (native(queries)(half[rows // 2 :]) == found[rows // 2 :]).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(1, 32), (32, 1), (5, 3), (1, 1)]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 40),
)
def test_any_shape_is_searched_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    parts: tuple[int, int],
    num_queries: int,
    count: int,
    width: int,
) -> None:
    """Rows of some vectors against queries of some: texts among images, images among texts."""
    (per_row, per_query), store = parts, GalleryStore(tmp_path_factory.mktemp("gallery") / "g")
    store.lock()
    store.create(None, (per_row, width), None)
    vectors, queries = unit((count, per_row, width), seed), unit((num_queries, per_query, width), seed + 1)
    store.append(list(range(count)), {"itc": vectors})
    rows, cosines = nearest(store, queries, 20)
    stored = vectors.astype(np.float16).astype(np.float64)
    expected = np.einsum("nqe,tpe->tnqp", stored, queries.astype(np.float64)).max(axis=(2, 3))
    assert rows.shape == (num_queries, min(20, count))
    assert np.abs(cosines - np.sort(expected, axis=1)[:, ::-1][:, :20]).max() < 1e-6
    assert np.abs(cosines - np.take_along_axis(expected, rows, axis=1)).max() < 1e-6
    store.close()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_changes_leave_what_a_dictionary_would_hold(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Adds, replacements and removals by writers that come and go, beside a reader that stays open."""
    path = tmp_path_factory.mktemp("gallery") / "g"
    reader, held = Gallery(path), dict[Any, int]()
    for change in range(data.draw(st.integers(1, 8))):
        writer = Gallery(path)
        is_removal: bool = data.draw(st.booleans())
        if held and is_removal:
            gone = data.draw(st.lists(st.sampled_from(sorted(held, key=str)), min_size=1, unique=True))
            writer.remove(gone)
            held = {i: row for i, row in held.items() if i not in gone}
        else:
            ids: list[Any] = data.draw(
                st.lists(st.sampled_from([0, 1, 2, "0", "a", "é\ud800"]), min_size=1, unique=True)
            )
            writer.add_embeddings(unit((len(ids), 2, 3), seed=change), ids)
            for place, identifier in enumerate(ids):
                held.pop(identifier, None)
                held[identifier] = change * 10 + place
        writer.close()
        assert reader.ids == list(held)
        if held:
            texts = unit((2, 3), seed=100)
            stored = np.stack([unit((row % 10 + 1, 2, 3), seed=row // 10)[row % 10] for row in held.values()])
            rows, _ = reader.nearest(texts, 9)
            expected = brute_force(stored.astype(np.float16), texts, 9)
            assert [[reader._store.ids[r] for r in rs] for rs in rows] == [
                [list(held)[p] for p in ps] for ps in expected
            ]


def test_many_threads_read_what_another_writes(tmp_path: Path) -> None:
    """One reader, used by several threads at once: each sees whole batches, none twice, and finds what it sees."""
    vectors = unit((400, 2, 16))
    writer, reader = Gallery(tmp_path / "g"), Gallery(tmp_path / "g")
    writer.add_embeddings(vectors[:4], list(range(4)))

    def read(_: int) -> None:
        while len(ids := reader.ids) < len(vectors):
            assert ids == list(range(len(ids)))
            assert len(ids) % 4 == 0
            with reader.guard:
                known = len(reader)
                rows = reader.nearest(vectors[known - 1, :1], known)[0]
            assert rows[0, 0] == known - 1
            assert len(rows[0]) == known

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(read, i) for i in range(6)]
        for start in range(4, len(vectors), 4):
            writer.add_embeddings(vectors[start : start + 4], list(range(start, start + 4)))
        for thread in running:
            thread.result()


def test_a_gallery_made_anew_in_its_place(tmp_path: Path) -> None:
    """A reader forgets the old one, and an old writer does not write beside the new one."""
    path = tmp_path / "g"
    old, reader = Gallery(path), Gallery(path)
    old.add_embeddings(unit((5, 2, 3)), list("abcde"))
    assert reader.ids == list("abcde")
    shutil.rmtree(path)
    assert reader.ids == []
    new = Gallery(path)
    new.add_embeddings(unit((7, 4, 8), seed=1), list("tuvwxyz"))
    assert reader.ids == list("tuvwxyz")
    rows, _ = reader.nearest(unit((7, 4, 8), seed=1)[3, :1], 1)
    assert reader.id_at(rows[0, 0]) == "w"
    with pytest.raises(EngineError, match="another process or Gallery is writing"):
        old.add_embeddings(unit((1, 4, 8)), ["k"])
    new.close()
    old.remove(["t"])
    assert reader.ids == list("uvwxyz")


WRITER = """
import sys
import numpy as np
from blip2rt import Gallery
gallery, first = Gallery(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for batch in range(first, 100_000):
    vectors = np.full((7, 8, 16), batch % 1000, np.float32)
    gallery.add_embeddings(vectors, [f"{batch}-{i}" for i in range(7)])
    print(batch, flush=True)
"""


def test_killed_while_adding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at any moment: every batch that was reported is there, whole; a half written line does not count."""
    path, first = tmp_path / "g", 0
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path, str(first)], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == f"{first}\n"
        with pytest.raises(EngineError, match=r"another process or Gallery is writing to .*: wait"):
            Gallery(path).add_embeddings(unit((1, 8, 16)), ["x"])
        time.sleep(0.05 * (attempt + 1))
        os.kill(process.pid, signal.SIGKILL)
        reported = [int(line) for line in process.stdout.read().split()]
        process.wait()
        gallery = Gallery(path)
        whole = len(gallery) // 7
        assert len(gallery) == 7 * whole
        assert whole >= (reported[-1] + 1 if reported else first + 1)
        assert gallery.ids == [f"{batch}-{i}" for batch in range(whole) for i in range(7)]
        rows = np.concatenate([np.array(shard) for _, shard in gallery._store.shards("itc")])
        assert (rows == (np.arange(7 * whole) // 7 % 1000)[:, None, None]).all()
        with (path / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"add": ["half')
        first = whole


def test_wrong_calls(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g")
    with pytest.raises(EngineError, match="is empty: add images"):
        gallery.nearest(unit((1, 4)), 3)
    gallery.add_embeddings(unit((2, 3, 4)), ["a", "b"])
    for call, error, message in (
        (
            lambda: gallery.add_embeddings(unit((2, 3, 5)), ["c", "d"]),
            InputError,
            r"itc_embeds \[2, 3, 5\], and .* wants \[2, 3, 4\]",
        ),
        (lambda: gallery.add_embeddings(unit((2, 3, 4)), ["c", "c"]), InputError, "given twice: 'c'"),
        (lambda: gallery.add_embeddings(unit((1, 3, 4)), [1.5]), InputError, "not 1.5"),  # type: ignore[list-item]
        (lambda: gallery.add_embeddings(unit((1, 3, 4)), []), InputError, "not empty"),
        (lambda: gallery.add_embeddings(unit((2, 4)), ["c", "d"]), InputError, r"three dimensions.*not \[2, 4\]"),
        (lambda: gallery.add_embeddings(unit((2, 3, 4)) * np.nan, ["c", "d"]), InputError, "no finite"),
        (lambda: gallery.nearest(unit((1, 5)), 3), InputError, "embeddings of width 5, and .* wants 4"),
        (lambda: gallery.remove(["a", "z"]), InputError, "not in the gallery: 'z'"),
        (lambda: Gallery(tmp_path / "g").remove(["a"]), EngineError, "another process or Gallery is writing"),
        (lambda: Gallery(tmp_path), EngineError, r"no gallery, it has no gallery\.json"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert gallery.ids == ["a", "b"]
    header = json.loads((tmp_path / "g" / "gallery.json").read_text())
    (tmp_path / "g" / "gallery.json").write_text(json.dumps(header | {"format_revision": 2}))
    with pytest.raises(EngineError, match="format revision 2, and this blip2rt reads 1"):
        Gallery(tmp_path / "g")
    (tmp_path / "g" / "gallery.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        Gallery(tmp_path / "g")


@pytest.fixture(scope="module")
def pipe(tiny_retrieval_engine: Path) -> Pipeline:
    return Pipeline(tiny_retrieval_engine, threads=1)


def test_images_are_found_by_texts(pipe: Pipeline, tmp_path: Path) -> None:
    """By ITC alone and re-ranked by ITM, as `match` scores them; the features on disk are float16."""
    size = pipe.manifest.image.size
    images = [np.random.default_rng(i).standard_normal((3, size, size), np.float32) for i in range(9)]
    names = [f"image {i}" for i in range(9)]
    gallery = Gallery(tmp_path / "g", pipe)
    gallery.add(images[:4], names[:4])
    gallery.add(pipe.encode(images[4:]), names[4:])
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]
    scores = pipe.match(images, texts)
    found = gallery.search(texts, k=3, rerank=0)
    for t, (ids, cosines) in enumerate(zip(found.ids, found.scores, strict=True)):
        assert np.abs(cosines - np.sort(scores.itc[:, t])[::-1][:3]).max() < 2e-3
        assert np.abs(cosines - scores.itc[[names.index(i) for i in ids], t]).max() < 2e-3
    for rerank, pool in ((None, 9), (4, 4)):
        found = gallery.search(texts, k=2, rerank=rerank)
        for t in range(3):
            both = scores.itm[:, t] + scores.itc[:, t]
            candidates = np.argsort(-scores.itc[:, t])[:pool]
            expected = np.sort(both[candidates])[::-1][:2]
            assert np.abs(found.scores[t] - expected).max() < 0.02 * max(1, np.abs(scores.itm).max())
    ids, alone = gallery.search(texts[0], k=20)
    assert len(ids) == 9
    assert (alone[:2] == gallery.search(texts, k=2).scores[0]).all()
    gallery.remove([ids[0]])
    gallery.add([images[int(ids[0][-1])]], [ids[1]])  # the best picture under another's name
    again, replaced = gallery.search(texts[0], k=1)
    assert again == [ids[1]]
    assert abs(replaced[0] - alone[0]) < 1e-5
    with pytest.raises(InputError, match="2 images and 1 ids"):
        gallery.add(images[:2], ["x"])
    with pytest.raises(InputError, match="k must be a whole number of at least 1, not 0"):
        gallery.search(texts, k=0)


def test_of_another_model_or_without_features(pipe: Pipeline, tmp_path: Path) -> None:
    size = pipe.manifest.image.size
    gallery = Gallery(tmp_path / "g", pipe, features=False)
    gallery.add([np.zeros((3, size, size), np.float32)], ["x"])
    assert gallery.search("w1").ids == ["x"]
    with pytest.raises(EngineError, match="without image features"):
        gallery.search("w1", rerank=5)
    header = json.loads((tmp_path / "g" / "gallery.json").read_text())
    (tmp_path / "g" / "gallery.json").write_text(json.dumps(header | {"model_sha256": "0" * 64}))
    with pytest.raises(EngineError, match=r"is a gallery of another model \(checkpoint 0000000000000000"):
        Gallery(tmp_path / "g", pipe)
    with pytest.raises(EngineError, match="of another model"):
        Gallery(tmp_path / "g", pipe.directory).search("w1")


def test_texts_are_found_by_images(pipe: Pipeline, tmp_path: Path) -> None:
    """The other direction: by ITC alone and re-ranked by ITM, as `match` scores them."""
    size = pipe.manifest.image.size
    images = [np.random.default_rng(i).standard_normal((3, size, size), np.float32) for i in range(3)]
    texts = [f"w{i} w{i * 7 % 30} w{i * 11 % 30}" for i in range(40)]
    gallery = TextGallery(tmp_path / "g", pipe)
    gallery.add(texts[:30])
    gallery.add([*texts[20:], texts[0]])
    assert gallery.ids == texts
    scores = pipe.match(images, texts)
    for rerank, all_scores, pool in ((0, scores.itc, 40), (None, scores.itm + scores.itc, 40), (8, None, 8)):
        found = TextGallery(tmp_path / "g", pipe).search(images, k=5, rerank=rerank)
        for i in range(3):
            expected = all_scores[i] if all_scores is not None else scores.itm[i] + scores.itc[i]
            candidates = np.argsort(-scores.itc[i])[:pool]
            best = np.sort(expected[candidates])[::-1][:5]
            assert np.abs(found.scores[i] - best).max() < 2e-3 * max(1, np.abs(expected).max())
            places = [texts.index(text) for text in found.ids[i]]
            assert np.abs(found.scores[i] - expected[places]).max() < 2e-3 * max(1, np.abs(expected).max())
    alone = gallery.search(pipe.encode(images[1]), k=100)
    assert len(alone.ids) == 40
    assert alone.ids[:5] == gallery.search(images, k=5).ids[1]
    gallery.remove([alone.ids[0]])
    assert gallery.search(images[1], k=1).ids == [alone.ids[1]]
    longest = pipe.manifest.model["qformer"]["max_position_embeddings"]
    for wrong, message in ((["w1", " "], "text 1 is empty"), (["w1 " * longest], "positions"), ([], "is empty")):
        with pytest.raises(InputError, match=message):
            gallery.add(wrong)
    assert len(gallery) == 39
    with pytest.raises(EngineError, match="another process or Gallery is writing"):
        TextGallery(tmp_path / "g", pipe).add("w1 w1")
    with pytest.raises(EngineError, match=r"is a gallery of texts, not of images: search it by image .*--image FILE"):
        Gallery(tmp_path / "g", pipe)
