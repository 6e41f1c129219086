"""The folder of a training: its states, from which it goes on as if nothing had happened, and its log.

    output/recipe.json         what is trained; the same folder takes no other recipe
    output/states/000100.pt    all that step 101 depends on; written beside its place, then renamed
    output/log.jsonl           losses, rates and gradient norms
    output/tensorboard/        the same, for looking at
    output/checkpoint/         the model as transformers has it

A state holds what learns, not what is frozen: that is read again from where it came from.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import CheckpointError, InputError, OutputError
from .recipe import Recipe
from .sharding import full, spread

# what a recipe may change between two sittings: how often something is written, not what is computed
FREE = {"output", "run.save_every", "run.log_every", "run.keep", "run.workers", "run.save_as"}


class RunFolder:
    """The folder `recipe.output`.

    Raises:
        InputError: it belongs to another recipe.
        OutputError: it cannot be written.
    """

    def __init__(self, recipe: Recipe, processes: int):
        self.path = Path(recipe.output)
        self.checkpoint = self.path / "checkpoint"
        self._states, self._log, self._keep = self.path / "states", self.path / "log.jsonl", recipe.run.keep
        try:
            self._states.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the output folder {self.path} cannot be made ({error.strerror})") from error
        self._identity = _flat(recipe.to_dict()) | {"processes": processes}

    def claim(self, may_change: bool = False) -> None:
        """Write the recipe into the folder, or compare it with the one that lies there.

        Raises:
            InputError: they differ, there is a state already, and the recipe may not change.
            OutputError: it cannot be written.
        """
        path = self.path / "recipe.json"
        if not path.is_file():
            self._write(path, (json.dumps(self._identity, indent=2) + "\n").encode())
            return
        old, new = json.loads(path.read_text("utf-8")), json.loads(json.dumps(self._identity))
        changed = sorted(key for key in old.keys() | new.keys() if key not in FREE and old.get(key) != new.get(key))
        if changed and not may_change and self.newest() is not None:
            listed = ", ".join(f"{key} {old.get(key)!r} (now {new.get(key)!r})" for key in changed[:5])
            raise InputError(
                f"{self.path} holds a training of another recipe: {listed}; choose another output, delete it to begin "
                "anew, or go on with --changed-recipe"
            )
        self._write(path, (json.dumps(self._identity, indent=2) + "\n").encode())

    def newest(self) -> Path | None:
        """The last state; None: the training has not come so far."""
        return max(self._states.glob("[0-9]*.pt"), default=None)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state behind a step, whole or not at all, and delete old ones.

        Raises:
            OutputError: there is no room for it; the states before it are untouched.
        """
        path = self._states / f"{step:09}.pt"
        beside = path.with_suffix(".writing")
        try:
            with beside.open("wb") as stream:
                torch.save(dict(state), stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
            beside.unlink(missing_ok=True)
            raise OutputError(
                f"the state of step {step} cannot be written to {self._states} ({error}): make room, and run the same "
                f"command again; it goes on from {self._name(self.newest())}"
            ) from error
        for old in sorted(self._states.glob("[0-9]*.pt"))[: -self._keep]:
            old.unlink(missing_ok=True)
        return path

    def drop(self, step: int) -> None:
        """Forget the state of a step that gives no finite loss, if there is one."""
        (self._states / f"{step:09}.pt").unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The newest state; None: there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.newest()
        if path is None:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch.load raises
            raise CheckpointError(f"{path} is damaged ({error}): delete it, and the one before it is taken") from error
        return state

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log.

        Raises:
            OutputError: there is no room for it.
        """
        try:
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self._log} cannot be written ({error.strerror}): make room, and run the same command again; it goes "
                f"on from {self._name(self.newest())}"
            ) from error

    def cut_log(self, step: int) -> None:
        """Forget rows behind a step, which will be written again."""
        if self._log.is_file():
            rows = [line for line in self._log.read_text("utf-8").splitlines() if _step(line) <= step]
            self._write(self._log, "".join(f"{row}\n" for row in rows).encode())

    def describe_newest(self) -> str:
        """The last good state, for messages."""
        return self._name(self.newest())

    @staticmethod
    def _name(path: Path | None) -> str:
        return "the beginning, as there is no state yet" if path is None else str(path)

    def _write(self, path: Path, content: bytes) -> None:
        beside = path.with_name(f".{path.name}.writing")
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}): make room for it") from error


def collect(task: nn.Module, optimizers: Sequence[Optimizer], step: int, positions: Any, bad: Any) -> dict[str, Any]:
    """All that the next step depends on, besides the recipe; by all processes where the model is spread over them."""
    learning = {name: full(parameter.detach()) for name, parameter in _learning(task).items()}
    return {
        "step": step,
        "parameters": learning,
        "optimizers": [
            _map_moments(optimizer, optimizer.state_dict(), lambda value, _: full(value)) for optimizer in optimizers
        ],
        "positions": positions,
        "bad": bad,
    }


@torch.no_grad()
def restore(task: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Put a state back.

    Raises:
        CheckpointError: it is of another model.
    """
    learning = _learning(task)
    stored: Mapping[str, Tensor] = state["parameters"]
    differing = sorted(learning.keys() ^ stored.keys())
    differing += [name for name in learning.keys() & stored.keys() if learning[name].shape != stored[name].shape]
    if differing or len(optimizers) != len(state["optimizers"]):
        raise CheckpointError(
            f"the state is of another model: {', '.join(differing[:5])} differ; begin in a new output"
        )
    for name, parameter in learning.items():
        parameter.copy_(spread(stored[name], parameter))
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(_map_moments(optimizer, values, spread))


def _learning(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def _map_moments(
    optimizer: Optimizer, state: Mapping[str, Any], change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """An optimiser's state_dict; what has the shape of its parameter is `change`d, beside that parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        i: {
            key: change(value, parameters[i]) if value.shape == parameters[i].shape and value.ndim else value
            for key, value in values.items()
        }
        for i, values in state["state"].items()
    }
    return {**state, "state": moments}


def _flat(table: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and tuples as one dict of dotted names."""
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, tuple) and table and isinstance(table[0], dict):
        items = enumerate(table)  # type: ignore[assignment]
    else:
        return {name: table}
    return {key: value for inner, part in items for key, value in _flat(part, f"{name}.{inner}".lstrip(".")).items()}


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a crash cut short
        return 1 << 62
