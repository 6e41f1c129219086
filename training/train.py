"""Train BLIP-2, or a part of it, by a recipe.

    python training/train.py training/recipes/stage1.toml [section.key=value ...]

The same command goes on where it was stopped, to the same bits. Several GPUs or machines: `accelerate launch
training/train.py ...`; `run.batch_size` is one process's. With `run.shard=true` each holds a part of the model only.

    recipe -> model and objective -> batches -> loss -> gradients -> step -> states, log -> a transformers checkpoint
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add in another order at every run

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch.utils.tensorboard import SummaryWriter

from blip2rt import Blip2rtError, InputError
from blip2rt.data.examples import BadRecords
from blip2rt.progress import Progress
from blip2rt.training.batches import Batches, PictureReader, to_device
from blip2rt.training.build import Built, build
from blip2rt.training.features import cached_reader
from blip2rt.training.precision import fast_precision
from blip2rt.training.recipe import Recipe, read_recipe
from blip2rt.training.schedule import build_optimizers, clip, learning_rate, set_rate
from blip2rt.training.sharding import average_whole, bring_together, shard, spread
from blip2rt.training.state import RunFolder, collect, restore
from blip2rt.training.streams import open_streams
from blip2rt.training.tasks import key_biases


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train BLIP-2, or a part of it, by a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--changed-recipe", action="store_true", help="go on although the recipe is another now")
    args = parser.parse_intermixed_args(argv)
    try:
        train(read_recipe(args.recipe, args.overrides), args.cpu, args.changed_recipe)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Blip2rtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(recipe: Recipe, on_cpu: bool = False, may_change: bool = False) -> None:
    run, rates = recipe.run, recipe.optimizer
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only makes what is wrong show, and costs time
    accelerator = start_processes(recipe, on_cpu)
    if run.precision == "bf16" and fast_precision(accelerator.device) != "bf16":
        say(accelerator, "warning: this device has no bf16 instructions; run.precision=fp32 is many times faster here")
    if accelerator.device.type == "cpu":  # its fused attention takes four times as long backwards in bf16
        torch.backends.cuda.enable_flash_sdp(False)
    folder = RunFolder(recipe, accelerator.num_processes)
    if accelerator.is_main_process:
        folder.claim(may_change)
    accelerator.wait_for_everyone()

    built = build(recipe)
    say(accelerator, describe(built))
    state: dict[str, Any] = folder.load() or {"step": 0, "positions": None, "bad": [0, []]}
    batches, bad = open_batches(recipe, accelerator, built, state)
    task = shard(built.task, accelerator.device) if run.shard else built.task.to(accelerator.device)
    optimizers = build_optimizers(task.model.named_parameters(), rates, run.precision)
    held = [(parameter, spread(learns, parameter)) for parameter, learns in key_biases(task)]
    if state["step"]:
        restore(task, optimizers, state)
        say(accelerator, f"going on behind step {state['step']}")
    if accelerator.is_main_process:
        folder.cut_log(state["step"])
    module = task if run.shard else accelerator.prepare(task)
    board = (
        SummaryWriter(folder.path / "tensorboard", purge_step=state["step"]) if accelerator.is_main_process else None
    )

    log_seconds = 30 if accelerator.is_main_process else None
    bar = Progress(recipe.stage, run.steps, log_seconds, done=state["step"])
    start = perf_counter()
    for step in range(state["step"] + 1, run.steps + 1):
        rate = learning_rate(step - 1, run.steps, rates)
        set_rate(optimizers, rate)
        names: list[str] = []
        totals: dict[str, Any] = {}
        for part in range(run.accumulate):
            batch = next(batches)
            names += batch.names
            seed = hash((recipe.seed, step, part, accelerator.process_index)) % (1 << 63)
            is_last = part == run.accumulate - 1
            with nullcontext() if is_last or run.shard else accelerator.no_sync(module):
                torch.manual_seed(seed)  # what is dropped out
                with accelerator.autocast():
                    losses = module(to_device(batch.batch, accelerator.device), seed)
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach() / run.accumulate
                stop_unless_finite(accelerator, losses["loss"], "loss", step, names, folder)
                accelerator.backward(losses["loss"] / run.accumulate)
        if run.shard:
            average_whole(task)
        for parameter, learns in held:
            if parameter.grad is not None:
                parameter.grad *= learns
        norm = clip((p for p in task.parameters() if p.grad is not None), rates.clip)
        stop_unless_finite(accelerator, torch.tensor(norm, device=accelerator.device), "gradient", step, names, folder)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.advance()
        if step % run.log_every == 0 or step == run.steps:
            means = {name: float(accelerator.reduce(total, "mean")) for name, total in totals.items()}
            row = {"step": step, **means, "learning_rate": rate, "gradient_norm": norm, "bad_records": bad.count}
            if board is not None:
                folder.log(row | {"seconds": round(perf_counter() - start, 3)})  # since the row before
                for name, value in row.items():
                    board.add_scalar(name, value, step)
            start = perf_counter()
        if step % run.save_every == 0 or step == run.steps:
            # by all: each process has its own place in the streams
            positions = gather(accelerator, batch.positions)
            collected = collect(task, optimizers, step, positions, [bad.count, bad.named])
            if accelerator.is_main_process:
                folder.save(step, collected)
    bar.close()
    batches.close()
    bring_together(task, accelerator.is_main_process)
    if accelerator.is_main_process:
        assert board is not None
        board.close()
        built.save(folder.checkpoint)
        print(f"wrote {folder.checkpoint}" + (f"; {bad}" if bad.count else ""), file=sys.stderr)
    accelerator.wait_for_everyone()
    # DDP must not be the last that holds the group of processes: its end holds Python's lock while it waits for gloo's
    # thread, which may want that lock to let go of the barrier above
    del module
    accelerator.free_memory()
    accelerator.end_training()


def start_processes(recipe: Recipe, on_cpu: bool) -> Accelerator:
    """This process's place among those that train together."""
    # Some parameters have no part in some losses: a question's rows end before the last block's feed-forward layer.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    precision = "bf16" if recipe.run.precision == "bf16" else "no"
    on_cpu |= not torch.accelerator.is_available()  # else accelerate joins no processes on a CPU
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise InputError(
            f"{started} processes were started and {accelerator.num_processes} train together: each goes its own way "
            "in one folder; start them with torchrun or `accelerate launch`"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise InputError(
            f"accelerate is set up for {accelerator.distributed_type.value}, and training runs in one process or in "
            "several: run `accelerate config` anew; run.shard=true spreads the model over them as FSDP does"
        )
    if recipe.run.shard and accelerator.num_processes == 1:
        raise InputError("run.shard spreads the model over several processes, and this is one: use `accelerate launch`")
    return accelerator


def open_batches(
    recipe: Recipe, accelerator: Accelerator, built: Built, state: dict[str, Any]
) -> tuple[Batches, BadRecords]:
    """Batches from where the state stands, and what they could not use."""
    rank, positions = accelerator.process_index, state["positions"]
    from_files = BadRecords()
    examples = open_streams(
        recipe.data, recipe.seed, from_files, rank, accelerator.num_processes, positions[rank] if positions else None
    )
    if from_files.count:
        say(accelerator, f"warning: {from_files}")
    bad = BadRecords(*state["bad"])
    pictures = None
    if built.image is not None:
        cached = None
        if recipe.images.cache:
            with accelerator.main_process_first():
                built.task.model.vision.to(accelerator.device)
                cached = cached_reader(recipe, built.task.model, built.image, from_files)
        pictures = PictureReader(*built.image, recipe.images, cached)
    run = recipe.run
    return Batches(examples, built.rows, pictures, run.batch_size, recipe.seed, rank, run.workers, bad), bad


def stop_unless_finite(
    accelerator: Accelerator, value: torch.Tensor, what: str, step: int, names: list[str], folder: RunFolder
) -> None:
    """End all processes where one has no number any more.

    Raises:
        Blip2rtError: it names the batch and the last good state.
    """
    is_bad = (~torch.isfinite(value.detach())).float().reshape(1)
    if float(accelerator.reduce(is_bad, "sum")) == 0:
        return
    if what == "loss" and accelerator.is_main_process:
        folder.drop(step - 1)  # its parameters are where the numbers ended
    everywhere = [name for part in gather(accelerator, names) for name in part]
    listed = ", ".join(everywhere[:64]) + (f" and {len(everywhere) - 64} more" if len(everywhere) > 64 else "")
    raise Blip2rtError(
        f"step {step}: the {what} is {float(value.detach())} with the pictures {listed}: lower the learning rate, clip "
        f"gradients, or look at the batch; the last good state is {folder.describe_newest()}"
    )


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """Every process's value, in order of their ranks."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def describe(built: Built) -> str:
    """How much learns, how much is frozen, and what began anew."""
    parameters = [(p.numel(), p.requires_grad) for p in built.task.model.parameters()]
    learning, total = sum(n for n, learns in parameters if learns), sum(n for n, _ in parameters)
    fresh = ", ".join(sorted({name.rsplit(".", 2)[0] for name in built.fresh})[:6])
    return f"{learning:,} of {total:,} parameters learn" + (f"; from the seed: {fresh} ..." if fresh else "")


def say(accelerator: Accelerator, message: str) -> None:
    if accelerator.is_main_process:
        print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
