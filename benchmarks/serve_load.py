"""Many clients at once: every answer compared with the Pipeline's, and the rate beside one at a time and the Pipeline.

python benchmarks/serve_load.py    -> results/serve-load.json

Fails when an answer is wrong, a request ends otherwise than with an answer or a 429 that says when to come again, the
rate is below 0.85 of the bare Pipeline's at its best batch, memory grows by a tenth, or the server dies.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from blip2rt import Pipeline

RESULT = Path(__file__).parent / "results" / "serve-load.json"
QUESTIONS = ("what is on the table?", "where is it?", "which colour is it?")
OPTIONS: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 10}
SIZE = (320, 240)
LEAST_RATE, MOST_GROWTH = 0.85, 1.1
WARM_UP = 0.1  # of the time: until then memory may grow as it likes
GOOD = {"200", "429"}
Case = tuple[dict[str, Any], str]  # body of a request, and the text that must come


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many clients of `blip2rt serve`.")
    parser.add_argument("--engine", default="engines", help="default: the one of `make demo`")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=16, help="of the server, and the largest that is tried here")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    pipe = Pipeline(arguments.engine)
    pictures = [make_picture(seed) for seed in range(arguments.pictures)]
    cases = [case for picture in pictures for case in make_cases(pipe, picture)]
    seconds = max(3.0, arguments.seconds / 20)
    batches = [size for size in (1, 4, 8, 16, 32) if size <= arguments.max_batch]
    pipeline = {f"batch {size}": round(pipeline_rate(pipe, pictures, size, seconds), 2) for size in batches}
    with Server(arguments.engine, arguments.clients, arguments.max_batch) as server:
        alone = asyncio.run(load(server, cases, 1, seconds))
        many = asyncio.run(load(server, cases, arguments.clients, arguments.seconds))
    best = max(pipeline.values())
    result = {
        "command": f"python benchmarks/serve_load.py --clients {arguments.clients} --seconds {arguments.seconds:g}"
        f" --pictures {arguments.pictures} --max-batch {arguments.max_batch}",
        "task": f"a question about a PNG of {SIZE[0]} x {SIZE[1]} as data URL, {pipe.manifest.name}, greedy, 10 tokens",
        "cores": len(os.sched_getaffinity(0)),
        "pipeline_a_second": pipeline,
        "one_client": alone,
        f"{arguments.clients}_clients": many,
        "over_one_client": round(many["a_second"] / alone["a_second"], 3) if alone["a_second"] else None,
        "over_pipeline": round(many["a_second"] / best, 3),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    runs = (alone, many)
    checks = {
        "every answer is right": not any(run["wrong"] for run in runs),
        "every request is answered or told to come again": all({"200"} <= set(run["statuses"]) <= GOOD for run in runs),
        f"the rate is {LEAST_RATE} of the bare Pipeline's": many["a_second"] >= LEAST_RATE * best,
        "memory stays flat": many["resident_mb"]["last_third"] <= MOST_GROWTH * many["resident_mb"]["first_third"],
    }
    failed = [check for check, holds in checks.items() if not holds]
    for check in failed:
        print(f"failed: {check}", file=sys.stderr)
    return int(bool(failed))


def make_picture(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def make_cases(pipe: Pipeline, picture: bytes) -> list[Case]:
    """Requests about a picture, with the Pipeline's answers."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    features = pipe.encode(picture)
    cases = []
    for question in QUESTIONS:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": pipe.manifest.name, "messages": [{"role": "user", "content": content}], **OPTIONS}
        cases.append((body, pipe.answer(features, question, length_penalty=1.0, **OPTIONS).text))
    return cases


def pipeline_rate(pipe: Pipeline, pictures: list[bytes], size: int, seconds: float) -> float:
    """Pictures a second of the bare Pipeline, decoding included, at one batch size."""
    prompt = pipe.generative_engine.question_template.format(QUESTIONS[0])
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = [pictures[(done + i) % len(pictures)] for i in range(size)]
        pipe.generate([pipe.preprocess(picture) for picture in batch], prompt, **OPTIONS)
        done += size
    return done / (time.perf_counter() - start)


class Server:
    """`blip2rt serve` on a free port; its end is the end of what it accepted."""

    def __init__(self, engine: str, clients: int, max_batch: int):
        limits = ["--max-batch", max_batch, "--max-queue", 2 * clients, "--max-uploads", 2 * clients, "--timeout", 600]
        command = [sys.executable, "-m", "blip2rt", "serve", engine, "--port", "0", *map(str, limits)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if "serving" not in line:
            raise SystemExit(line + self.process.stderr.read())
        self.url = line.split()[-1]
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop the server

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=120)

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def load(server: Server, cases: list[Case], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients ask one question after the other until the time is up."""
    statuses: Counter[str] = Counter()
    times: list[float] = []
    wrong: list[dict[str, str]] = []
    start, cpu = time.perf_counter(), time.process_time()
    memory: list[float] = []

    async def client(number: int) -> None:
        """With a connection of its own: a shared pool looks through all of them at every request."""
        async with httpx.AsyncClient(base_url=server.url, timeout=600, verify=False) as http:
            await ask(random.Random(number), http)

    async def ask(draw: random.Random, http: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < seconds:
            body, expected = draw.choice(cases)
            began = time.perf_counter()
            try:
                response = await http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                if server.process.poll() is not None:
                    raise SystemExit(f"the server ended with status {server.process.returncode}") from error
                statuses[type(error).__name__] += 1
                continue
            statuses[str(response.status_code)] += 1
            if response.status_code == 429:
                await asyncio.sleep(int(response.headers["retry-after"]))
                continue
            if response.status_code != 200:
                continue
            times.append(time.perf_counter() - began)
            found = response.json()["choices"][0]["message"]["content"]
            if found != expected:
                wrong.append({"expected": expected, "found": found})

    async def watch() -> None:
        while True:
            if time.perf_counter() - start > WARM_UP * seconds:
                memory.append(server.resident_mb())
            await asyncio.sleep(max(0.2, seconds / 100))

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*map(client, range(clients)))
    watcher.cancel()
    elapsed = time.perf_counter() - start
    p50, p99 = np.percentile(times, [50, 99]) if times else (0.0, 0.0)
    third = max(1, len(memory) // 3)
    return {
        "seconds": round(elapsed, 1),
        "statuses": dict(statuses),
        "wrong": len(wrong),
        "first_wrong": wrong[:3],
        "a_second": round(statuses["200"] / elapsed, 2),
        "clients_part_of_the_cores": round((time.process_time() - cpu) / elapsed / len(os.sched_getaffinity(0)), 3),
        "p50_ms": round(1000 * float(p50), 1),
        "p99_ms": round(1000 * float(p99), 1),
        "resident_mb": {
            "first_third": round(float(np.mean(memory[:third])), 1),
            "last_third": round(float(np.mean(memory[-third:])), 1),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
