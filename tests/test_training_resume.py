"""A training that is killed goes on to the same bits: kill -9 at random moments, against the straight run.

In one process, in two that hold the whole model each, and in two that hold slices of it.

One process imports everything and forks a child for each sitting, because imports take longer than these trainings.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
STEPS, KILLS = 12, 5

DRIVER = """
import importlib.util, json, os, signal, sys, time
from pathlib import Path
import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("train_program", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


def sitting(arguments, kill_after=None):
    '''A training in a process of its own, killed as soon as its log has so many rows.'''
    output = Path(next(a for a in arguments if a.startswith("output=")).removeprefix("output="))
    log = output / "log.jsonl"
    child = os.fork()
    if not child:
        os._exit(program.main(arguments))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and log.exists() and log.read_bytes().count(b"\\n") >= kill_after:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


for arguments, kills in json.loads(sys.argv[2]):
    codes = [sitting(arguments, kill) for kill in kills] + [sitting(arguments)]
    print(json.dumps(codes), flush=True)
"""


def run_sittings(jobs: list[tuple[list[str], list[int]]]) -> list[list[int]]:
    """Exit codes of the sittings of every job: arguments, and the log rows at which it is killed."""
    command = [sys.executable, "-c", DRIVER, str(REPOSITORY / "training" / "train.py"), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def train_together(arguments: list[str], kill_after: int | None = None) -> str:
    """A training in two processes, killed as soon as its log has so many rows; what they said. No GPU is seen."""
    output = Path(next(a for a in arguments if a.startswith("output=")).removeprefix("output="))
    port = str(random.Random(f"{os.getpid()} {output} {kill_after}").randint(20_000, 60_000))
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "training" / "train.py"), *(a for a in arguments if a != "--cpu")],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            | places,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    if kill_after is not None:
        log = output / "log.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < kill_after:
            assert processes[0].poll() is None
            time.sleep(0.01)
        for process in processes:
            process.kill()
    errors = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert all(codes) if kill_after is not None else not any(codes), errors
    return errors[0]


def curve(run: Path) -> list[dict[str, Any]]:
    """The log but for the time that steps took."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def newest_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(max((run / "states").glob("*.pt")), weights_only=True)
    return state


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Nested values, tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}.{i}")
    else:
        assert a == b, where


def common(folder: Path) -> list[str]:
    return [
        "optimizer.warmup_steps=3",
        "optimizer.name=muon",
        "optimizer.learning_rate=3e-3",
        f"run.steps={STEPS}",
        "run.batch_size=3",
        "run.accumulate=2",
        "run.workers=2",
        "run.precision=fp32",
        "run.save_every=2",
        "run.log_every=1",
        "text.max_tokens=12",
        "--cpu",
    ]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_trainings_go_on_to_the_same_bits(
    stage: str, tmp_path: Path, example_pictures: Path, tiny_checkpoint: Path, tiny_retrieval_checkpoint: Path
) -> None:
    """Parameters, optimiser, places in the data, log and checkpoint; with augmentation, threads and accumulation."""
    start = tiny_retrieval_checkpoint if stage == "stage1" else tiny_checkpoint
    arguments = [
        str(REPOSITORY / "training" / "recipes" / f"{stage}.toml"),
        f"data=[{{format='jsonl', path='{example_pictures}/train.jsonl'}}]",
        f"model={{start='{start}'}}",
        *common(tmp_path),
    ]
    kills = sorted(random.Random(stage).sample(range(1, STEPS), KILLS))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    codes = run_sittings([([*arguments, f"output={straight}"], []), ([*arguments, f"output={broken}"], kills)])
    assert codes == [[0], [-9] * KILLS + [0]]
    assert curve(straight) == curve(broken)
    assert [row["step"] for row in curve(broken)] == list(range(1, STEPS + 1))
    assert_same(newest_state(straight), newest_state(broken))
    files = [run / "checkpoint" / "model.safetensors" for run in (straight, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert newest_state(straight)["bad"][0] > 0  # a picture that cannot be read stands in every epoch


def test_two_processes_learn_from_the_joined_batch(
    tmp_path: Path, example_pictures: Path, tiny_retrieval_checkpoint: Path
) -> None:
    """Each takes every second picture; what they log is what one process logs of all of them."""
    rows = [json.loads(line) for line in (example_pictures / "train.jsonl").read_text().splitlines()]
    alone = [
        row | {"image": str(example_pictures / row["image"]), "captions": [f"w{i} w9"]} for i, row in enumerate(rows)
    ]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in alone[:8]))
    arguments = [
        str(REPOSITORY / "training" / "recipes" / "stage1.toml"),
        f"data=[{{format='jsonl', path='{tmp_path}/train.jsonl'}}]",
        f"model={{start='{tiny_retrieval_checkpoint}'}}",
        *common(tmp_path),
        "images.augment=false",
        "run.accumulate=1",
        "run.steps=4",
        "run.workers=0",
    ]
    train_together([*arguments, f"output={tmp_path}/two", "run.batch_size=4"])
    assert run_sittings([([*arguments, f"output={tmp_path}/one", "run.batch_size=8"], [])]) == [[0]]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 4
    for loss in ("itc", "itg"):  # the negatives of ITM are drawn anew in each process
        assert abs(one[0][loss] - two[0][loss]) < 1e-5
    assert [len(part) for part in newest_state(tmp_path / "two")["positions"]] == [1, 1]
    assert newest_state(tmp_path / "two")["positions"] == [[16], [16]]


def assert_near(whole: Path, sliced: Path) -> None:
    """Two trainings that add in another order: the same losses, states and checkpoints but for rounding."""
    for row, other in zip(curve(whole), curve(sliced), strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert other[key] == pytest.approx(row[key], rel=1e-4), (row["step"], key)
    states = [newest_state(run)["parameters"] for run in (whole, sliced)]
    checkpoints = [load_file(run / "checkpoint" / "model.safetensors") for run in (whole, sliced)]
    for left, right in (states, checkpoints):
        assert left.keys() == right.keys()
        for name in left:
            # softmax cancels the biases of keys: their gradients are the rounding, of which Adam makes steps
            if not name.endswith(("kv.bias", "key.bias")):
                assert torch.allclose(left[name], right[name], atol=1e-4), name


def test_a_model_in_slices_learns_as_a_whole_one(
    tmp_path: Path, example_pictures: Path, tiny_retrieval_checkpoint: Path
) -> None:
    """FSDP against DDP, with everything that learns; killed and gone on with, the same bits."""
    arguments = [
        str(REPOSITORY / "training" / "recipes" / "stage1.toml"),
        f"data=[{{format='jsonl', path='{example_pictures}/train.jsonl'}}]",
        f"model={{start='{tiny_retrieval_checkpoint}', "
        "train=['vision', 'qformer', 'text', 'itm', 'itg', 'temperature']}",
        *common(tmp_path),
        "run.steps=6",
        "run.checkpoint_activations=true",
        "optimizer.clip=0.5",
    ]
    whole, straight, broken = (tmp_path / name for name in ("whole", "straight", "broken"))
    train_together([*arguments, f"output={whole}"])
    sliced = [*arguments, "run.shard=true"]
    train_together([*sliced, f"output={straight}"])
    train_together([*sliced, f"output={broken}"], kill_after=3)
    assert "going on behind step" in train_together([*sliced, f"output={broken}"])
    assert_near(whole, straight)
    assert curve(straight) == curve(broken)
    assert_same(newest_state(straight), newest_state(broken))
    checkpoints = [run / "checkpoint" / "model.safetensors" for run in (straight, broken)]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()


def test_slices_of_a_frozen_language_model_with_adapters(
    tmp_path: Path, example_pictures: Path, tiny_checkpoint: Path
) -> None:
    """They are brought together and merged for the checkpoint; one process has nothing to spread over."""
    arguments = [
        str(REPOSITORY / "training" / "recipes" / "caption-lora.toml"),
        f"data=[{{format='jsonl', path='{example_pictures}/train.jsonl'}}]",
        f"model={{start='{tiny_checkpoint}', lora_rank=2}}",
        f"images.cache={tmp_path}/features",
        *common(tmp_path),
        "run.steps=4",
    ]
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    train_together([*arguments, f"output={whole}"])
    train_together([*arguments, "run.shard=true", f"output={sliced}"])
    assert_near(whole, sliced)
    assert run_sittings([([*arguments, "run.shard=true", f"output={tmp_path}/alone"], [])]) == [[2]]
