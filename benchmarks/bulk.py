"""20,000 pictures, 1 % of them broken in twelve ways: killed at 20 random points, and beside the bare Pipeline.

python benchmarks/bulk.py --directory SCRATCH    -> results/bulk.json

Fails unless every kill hit a run at work and the output of the killed run equals that of the straight run byte for
byte, with each id once and each broken picture listed; or when bulk is slower than 0.9 of the bare Pipeline, or its
memory grows by a tenth.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2rt import Pipeline

RESULT = Path(__file__).parent / "results" / "bulk.json"
OPTIONS = ["--num-beams", "1", "--max-new-tokens", "5"]  # few tokens: what is measured is everything around them
RATE_PICTURES = 1900
RATE_REPEATS = 3
LEAST_RATE, MOST_GROWTH = 0.9, 1.1
EARLY = 0.2  # of the runs are killed while they start, before they answer anything
SIZE = (320, 240)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="20,000 pictures, killed 20 times.")
    parser.add_argument("--directory", type=Path, required=True, help="scratch: about 300 MB")
    parser.add_argument("--engine", default="engines", help="default: the one of `make demo`")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args(argv)
    least = max(100 * len(BREAKS), RATE_PICTURES * 100 // 99 + 2)
    if arguments.pictures < least:
        parser.error(f"--pictures {arguments.pictures}: it takes {least} to break one in a hundred in every way")
    home = arguments.directory / "bulk"
    shutil.rmtree(home, ignore_errors=True)
    engine = Path(arguments.engine).resolve()
    broken = make_pictures(home / "pictures", arguments.pictures)
    straight = run(home, engine, "straight.jsonl")
    kills = killed_run(home, engine, "killed.jsonl", arguments.kills, straight["seconds"])
    result = {
        "command": "python benchmarks/bulk.py --directory SCRATCH"
        f" --pictures {arguments.pictures} --kills {arguments.kills}",
        "task": f"{arguments.pictures} JPEGs of {SIZE[0]} x {SIZE[1]}, the bundled model, greedy, 5 tokens",
        "cores": len(os.sched_getaffinity(0)),
        "straight": straight,
        "kills": kills,
        **compare(home, broken, arguments.pictures),
        "rate": rates(home, engine),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    memory = straight["resident_mb"]
    checks = {
        "the killed run's output is that of the straight run": result["same_bytes"],
        "each id stands there once": result["each_id_once"],
        "each broken picture is listed": result["all_broken_listed"],
        f"bulk reaches {LEAST_RATE} of the bare Pipeline": result["rate"]["bulk_over_pipeline"] >= LEAST_RATE,
        "memory stays flat": memory["last_tenth"] <= MOST_GROWTH * memory["second_tenth"],
    }
    failed = [check for check, holds in checks.items() if not holds]
    for check in failed:
        print(f"failed: {check}", file=sys.stderr)
    return int(bool(failed))


def make_pictures(folder: Path, count: int) -> list[str]:
    """Ids of the broken ones: one in a hundred."""
    rng = np.random.default_rng(0)
    broken = []
    for i in range(count):
        path = folder / f"{i // 1000:02}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(path)
        if i % 100 == 50:
            BREAKS[i // 100 % len(BREAKS)](path)
            broken.append(path.relative_to(folder).as_posix())
    return broken


def _replace(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _edit(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(edit(path.read_bytes()))

    return change


def _png_claiming(width: int, height: int) -> bytes:
    import zlib

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + len(header).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


BREAKS: tuple[Callable[[Path], None], ...] = (
    _edit(lambda data: b""),
    _edit(lambda data: data[: len(data) // 2]),
    _edit(lambda data: data[:3]),
    _edit(lambda data: b"<html>404 Not Found</html>"),
    _edit(lambda data: bytes(len(data))),
    _edit(lambda data: data[:2] + b"\0" * 600 + data[602:]),
    _edit(lambda data: _png_claiming(100_000, 100_000)),
    _edit(lambda data: _png_claiming(0, 7)),
    _edit(lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    _replace(lambda path: path.symlink_to("nowhere")),
    _replace(os.mkfifo),
    _replace(lambda path: path.symlink_to(path.name)),
)


def command(home: Path, engine: Path, output: str) -> list[str]:
    program = [sys.executable, "-m", "blip2rt", "bulk", "pictures", "--json"]
    return [*program, "--engine", str(engine), "--output", output, *OPTIONS]


def run(home: Path, engine: Path, output: str) -> dict[str, Any]:
    """The straight run: its report, and how its memory grows."""
    with subprocess.Popen(
        command(home, engine, output), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        memory = []
        while process.poll() is None:
            time.sleep(1)
            memory.append(resident_mb(process.pid))
        assert process.stdout is not None
        report: dict[str, Any] = json.loads(process.stdout.read())
    memory = [value for value in memory if value]
    tenth = max(1, len(memory) // 10)
    means = {"second_tenth": memory[tenth : 2 * tenth], "last_tenth": memory[-tenth:]}
    return report | {"resident_mb": {name: round(sum(v) / max(1, len(v)), 1) for name, v in means.items()}}


def resident_mb(pid: int) -> float:
    """Of a process and its children."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6 + sum(resident_mb(int(child)) for child in children)


def killed_run(home: Path, engine: Path, output: str, kills: int, seconds: float) -> dict[str, Any]:
    """So many runs killed at random moments, and one that ends."""
    draw = random.Random(0)
    rows: list[int] = []
    path = home / output
    for _ in range(kills):
        with subprocess.Popen(
            command(home, engine, output), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            if draw.random() < EARLY:
                time.sleep(draw.uniform(0, 1))
            else:
                size = path.stat().st_size if path.exists() else 0
                while process.poll() is None and not (path.exists() and path.stat().st_size > size):
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 1.5 * seconds / kills))
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise SystemExit(f"a run ended with status {process.returncode} after {len(rows)} of {kills} kills")
        rows.append(path.read_bytes().count(b"\n") if path.exists() else 0)
    subprocess.run(command(home, engine, output), cwd=home, check=True, stdout=subprocess.DEVNULL)
    return {"number": kills, "rows_when_killed": rows}


def compare(home: Path, broken: list[str], count: int) -> dict[str, Any]:
    files = [(home / f"{name}.jsonl", home / f"{name}.jsonl.errors.jsonl") for name in ("straight", "killed")]
    (rows, errors), (killed_rows, killed_errors) = ([path.read_bytes() for path in pair] for pair in files)
    ids = [json.loads(line)["id"] for line in killed_rows.splitlines()]
    listed = [json.loads(line) for line in killed_errors.splitlines()]
    return {
        "same_bytes": rows == killed_rows and errors == killed_errors,
        "each_id_once": len(ids) == len(set(ids)) == count - len(broken),
        "all_broken_listed": sorted(row["id"] for row in listed) == sorted(broken),
        "kinds_of_errors": sorted({row["error"].rpartition("jpg' ")[2][:60] for row in listed}),
    }


def rates(home: Path, engine: Path) -> dict[str, Any]:
    """Pictures a second: the bare Pipeline at several batches, and bulk; interleaved, the best of each."""
    pipe = Pipeline(engine)
    folder = home / "some"
    folder.mkdir()
    paths = sorted((home / "pictures").glob("*/*.jpg"))
    for path in [path for path in paths if int(path.stem) % 100 != 50][:RATE_PICTURES]:
        os.link(path, folder / path.name)
    pictures = sorted(folder.iterdir())
    best: dict[str, float] = {}
    for repeat in range(RATE_REPEATS):
        for batch in (1, 8, 32):
            start = time.perf_counter()
            for i in range(0, len(pictures), batch):
                pipe.caption(pictures[i : i + batch], num_beams=1, max_new_tokens=5)
            name = f"pipeline, batch {batch}"
            best[name] = max(best.get(name, 0), len(pictures) / (time.perf_counter() - start))
        for workers in (0, 1):
            arguments = ["some", "--workers", str(workers), "--json", "--output", f"some-{repeat}-{workers}.jsonl"]
            done = subprocess.run(
                [sys.executable, "-m", "blip2rt", "bulk", *arguments, "--engine", engine, *OPTIONS],
                cwd=home, check=True, stdout=subprocess.PIPE,
            )  # fmt: skip
            report = json.loads(done.stdout)
            name = f"bulk, {workers} workers"
            best[name] = max(best.get(name, 0), report["answered"] / report["seconds"])
    bare = max(value for name, value in best.items() if name.startswith("pipeline"))
    ours = max(value for name, value in best.items() if name.startswith("bulk"))
    rounded = {name: round(value, 1) for name, value in best.items()}
    return {"pictures": len(pictures), "a_second": rounded, "bulk_over_pipeline": round(ours / bare, 3)}


if __name__ == "__main__":
    sys.exit(main())
