"""A gallery from ten thousand to a million images: how fast it grows and is searched, and in how much memory.

    python benchmarks/gallery.py --directory SCRATCH [--images 1000000]        (16.4 GB of disk for a million)

Vectors are synthetic, of full size (32 queries x 256), float16 on disk. At 10^4, 10^5, ... images 32 texts are
searched in one pass, ITC alone, in a process of its own whose peak memory is read, and one text is searched alone: once
from the disk, with the shards out of the page cache, and once from memory. In the same process the shards are read from
front to back without any arithmetic, which is the ceiling of a search.
The last line on stdout is one JSON object, also written to `benchmarks/results/gallery.json`. Exit status 1 when a
search holds more than 2 GB, or reads the disk at less than half the rate that it can be read at. From memory, 32 texts
are bound by arithmetic: 32 operations for every byte.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from blip2rt import Gallery
from blip2rt.native import native_path

RESULT = Path(__file__).parent / "results" / "gallery.json"
QUERIES, WIDTH, TEXTS, ADDED_AT_ONCE = 32, 256, 32, 2000
IMAGE_BYTES = 2 * QUERIES * WIDTH
LEAST_SHARE, MOST_MEMORY, PASSES = 0.5, 2e9, 2  # the best of so many passes counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast a gallery grows and is searched.")
    parser.add_argument("--directory", type=Path, required=True, help="where the gallery is built, and removed again")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)  # the other process
    arguments = parser.parse_args(argv)
    if arguments.search:
        print(json.dumps(measure_search(arguments.search)))
        return 0
    path = arguments.directory / "gallery"
    sizes, size = [], 10_000
    while size < arguments.images:
        sizes.append(size)
        size *= 10
    rows = []
    shutil.rmtree(path, ignore_errors=True)  # what a killed run has left
    try:
        for size in [*sizes, arguments.images]:
            added = grow(path, size)
            command = [sys.executable, __file__, "--directory", str(arguments.directory), "--search", str(path)]
            searched = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append({"images": size, "added_per_second": added, **searched})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    result = {
        "command": "python benchmarks/gallery.py --directory SCRATCH",
        "task": f"{TEXTS} texts in one pass, ITC alone, {QUERIES} x {WIDTH} float16 an image",
        "kernels": native_path() or "numpy",
        "cores": len(os.sched_getaffinity(0)),
        "sizes": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    last = rows[-1]
    return int(last["peak_bytes"] > MOST_MEMORY or last["disk"]["search_over_read"] < LEAST_SHARE)


def grow(path: Path, size: int) -> float:
    """Fill a gallery up to `size` images; images a second, the drawing of the vectors not counted."""
    seconds, added = 0.0, 0
    with Gallery(path) as gallery:
        rng = np.random.default_rng(len(gallery))
        block = rng.standard_normal((ADDED_AT_ONCE, QUERIES, WIDTH), dtype=np.float32)
        block /= np.linalg.norm(block, axis=-1, keepdims=True)
        for start in range(len(gallery), size, ADDED_AT_ONCE):
            count = min(ADDED_AT_ONCE, size - start)
            vectors = np.roll(block, start // ADDED_AT_ONCE, axis=1)[:count]
            began = perf_counter()
            gallery.add_embeddings(vectors, list(range(start, start + count)))
            seconds += perf_counter() - began
            added += count
    return added / seconds


def measure_search(path: Path) -> dict[str, Any]:
    """Rates in bytes a second from the disk and from memory, and the peak of this process."""
    gallery = Gallery(path)
    rng = np.random.default_rng(1)
    texts = rng.standard_normal((TEXTS, WIDTH)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    size = len(gallery) * IMAGE_BYTES
    found: dict[str, Any] = {
        "bytes_per_image": sum(file.stat().st_size for file in path.iterdir()) / len(gallery),
    }
    for source in ("disk", "memory"):
        cold = path if source == "disk" else None
        reads = [seconds(lambda: read(path), cold) for _ in range(PASSES)]
        searches = [seconds(lambda: gallery.nearest(texts, 128), cold) for _ in range(PASSES)]
        lone = [seconds(lambda: gallery.nearest(texts[:1], 128), cold) for _ in range(PASSES)]
        found[source] = {
            "read_bytes_per_second": size / min(reads),
            "search_bytes_per_second": size / min(searches),
            "search_over_read": min(reads) / min(searches),
            "search_seconds": min(searches),
            "one_text_seconds": min(lone),
        }
    return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def seconds(work: Callable[[], object], cold: Path | None) -> float:
    """How long it takes; with `cold`, after the files of that folder have left the page cache."""
    if cold is not None:
        for shard in cold.glob("itc-*.f16"):
            with shard.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = perf_counter()
    work()
    return perf_counter() - began


def read(path: Path) -> None:
    """The shards from front to back, without any arithmetic."""
    buffer = np.empty(1 << 24, np.uint8)
    for shard in sorted(path.glob("itc-*.f16")):
        with shard.open("rb", buffering=0) as stream:
            while stream.readinto(buffer.data):
                pass


if __name__ == "__main__":
    raise SystemExit(main())
