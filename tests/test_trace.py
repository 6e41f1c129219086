"""BLIP2RT_TRACE shows which stage is slow and which one first goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_trace_file(tiny_engine: Path, tmp_path: Path) -> None:
    """One line for every run of a stage, and one for every array that vision and Q-Former give."""
    program = """
import sys, numpy, blip2rt
pipe = blip2rt.Pipeline(sys.argv[1])
size = pipe.manifest.image.size
pipe.generate(numpy.ones((3, size, size), numpy.float32), "w1", max_new_tokens=3, min_new_tokens=3)
"""
    file = tmp_path / "trace.jsonl"
    environment = os.environ | {"BLIP2RT_TRACE": str(file)}
    subprocess.run([sys.executable, "-c", program, str(tiny_engine)], check=True, env=environment)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    timed = [row["stage"] for row in rows if "seconds" in row]
    assert timed == ["vision", "qformer", "decoder", "decoder", "decoder"]  # prefill and two steps
    outputs = {row["output"]: row for row in rows if "output" in row}
    assert outputs.keys() == {"image_embeds", "query_embeds", "prefix"}
    assert all(row["min"] <= row["mean"] <= row["max"] and row["nan"] == 0 for row in outputs.values())
