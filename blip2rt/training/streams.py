"""Endless streams of examples, the same at every run: shuffled by seed and epoch, split over processes, and resumable.

A stream's state is how many examples it has given. Lists jump there; shards are read again up to there, without
decoding a picture.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..bulk.webdataset import expand_shards, read_shards
from ..data.examples import BadRecords, Box, Example, parse_row, read_examples
from ..data.scenes import Scenes, Sprites, Thing
from ..data.scenes.targets import EXTENT
from ..errors import Blip2rtError, InputError
from .recipe import DataRecipe


class Stream(Protocol):
    """Examples of one data set for one process. `position`: how many were given."""

    position: int

    def __next__(self) -> Example: ...


class ListStream:
    """A data set in memory: every epoch a new order, of which each process takes every W-th example."""

    def __init__(self, examples: Sequence[Example], seed: int, rank: int = 0, processes: int = 1, position: int = 0):
        self.examples, self.position = examples, position
        self._seed, self._rank, self._processes = seed, rank, processes
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __next__(self) -> Example:
        epoch, place = divmod(self.position * self._processes + self._rank, len(self.examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.examples))
        self.position += 1
        return self.examples[self._order[place]]


class ShardStream:
    """WebDataset shards: every epoch in a new order, split over the processes, samples shuffled within a window."""

    def __init__(
        self,
        shards: Sequence[str],
        bad: BadRecords,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        position: int = 0,
        window: int = 1000,
    ):
        if len(shards) < processes:
            raise InputError(
                f"{len(shards)} shards cannot be split over {processes} processes: write more, smaller ones"
            )
        self.position = 0
        self._shards, self._bad, self._window = shards, bad, window
        self._seed, self._rank, self._processes = seed, rank, processes
        self._examples = self._shuffled()
        while self.position < position:
            next(self)
        if position:
            bad.count, bad.named = 0, []  # they were counted when they were met

    def __next__(self) -> Example:
        self.position += 1
        return next(self._examples)

    def _shuffled(self) -> Iterator[Example]:
        """An epoch after the other; each gives a random one of the window, and fills its place with the next."""
        epoch = 0
        while True:
            draw = np.random.default_rng((self._seed, epoch, self._rank))
            window: list[Example] = []
            is_empty = True
            for example in self._epoch(epoch):
                is_empty = False
                if len(window) < self._window:
                    window.append(example)
                    continue
                place = int(draw.integers(len(window)))
                yield window[place]
                window[place] = example
            if is_empty:
                raise InputError(f"{self._shards[0]} and the other shards have no usable record; {self._bad}")
            for place in draw.permutation(len(window)):
                yield window[place]
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Example]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._shards))[self._rank :: self._processes]
        samples = read_shards([self._shards[i] for i in order], None)
        while True:
            try:
                item = next(samples)
            except StopIteration:
                return
            except Blip2rtError as error:  # shards that could not be read to their end
                self._bad.add(str(error))
                return
            try:
                if item.error or item.data is None:
                    raise ValueError(item.error or "it has no picture")
                row = json.loads(item.members["json"]) if "json" in item.members else {}
                if "txt" in item.members:
                    row.setdefault("caption", item.members["txt"].decode())
                yield parse_row(item.id, item.data, row)
            except (ValueError, AttributeError, RecursionError) as error:
                self._bad.add(f"{item.id}: {error}")


class SceneStream:
    """Scenes that are composed when they are asked for, each but once: nothing can learn them by heart.

    `crowds`: four to seven things that overlap, without texts.
    """

    def __init__(self, scenes: Scenes, crowds: bool, rank: int = 0, processes: int = 1, position: int = 0):
        self.position = position
        self._scenes, self._crowds, self._rank, self._processes = scenes, crowds, rank, processes

    def __next__(self) -> Example:
        index = self.position * self._processes + self._rank
        self.position += 1
        scene = self._scenes.crowd(index) if self._crowds else self._scenes.scene(index)
        example = Example(
            f"{'crowd' if self._crowds else 'scene'} {index}",
            self._scenes.picture(scene),
            boxes=tuple(map(_box, scene.things)),
            background=scene.place,
        )
        if self._crowds:
            return example
        questions = self._scenes.questions(index, scene)
        return replace(
            example,
            captions=tuple(self._scenes.captions(index, scene)),
            questions=tuple((item.question, (item.answer,)) for item in questions),
        )


def _box(thing: Thing) -> Box:
    label = f"{thing.color} {thing.name}" if thing.color else thing.name
    radius = max(EXTENT * thing.size, 1e-3)
    return Box(label, thing.x - radius, thing.y - radius, thing.x + radius, thing.y + radius)


def open_scenes(source: DataRecipe, seed: int) -> Scenes:
    """The scenes of a data set: their sprites lie in `path`, in `styles` (empty: all)."""
    return Scenes(Sprites.open(Path(source.path), source.styles or None), source.split, seed, source.size)


class Mixture:
    """Several streams; which one gives the next example is drawn by weight from the seed and the place."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int, rank: int = 0):
        self._streams, self._seed, self._rank = streams, seed, rank
        self._shares = np.cumsum(weights) / np.sum(weights)

    @property
    def positions(self) -> list[int]:
        """The state: how many examples each stream has given."""
        return [stream.position for stream in self._streams]

    def __next__(self) -> tuple[int, int, Example]:
        """The number of the example in this process, that of its stream, and the example."""
        place = sum(self.positions)
        draw = np.random.default_rng((self._seed, self._rank, place)).random()
        source = int(np.searchsorted(self._shares, draw, side="right"))
        return place, source, next(self._streams[source])


def open_streams(
    data: Sequence[DataRecipe],
    seed: int,
    bad: BadRecords,
    rank: int = 0,
    processes: int = 1,
    positions: Sequence[int] | None = None,
) -> Mixture:
    """The data sets of a recipe, from the beginning or from `Mixture.positions`.

    Raises:
        InputError: a data set that is not there, is broken or has no usable record.
    """
    streams: list[Stream] = []
    for i, source in enumerate(data):
        position = positions[i] if positions else 0
        if source.format in ("scenes", "crowds"):
            streams.append(SceneStream(open_scenes(source, seed), source.format == "crowds", rank, processes, position))
        elif source.format == "webdataset":
            shards = expand_shards(source.path)
            if not shards:
                raise InputError(f"data.path {source.path} names no shard")
            absent = [shard for shard in shards if not Path(shard).is_file()]
            if absent:
                raise InputError(f"data.path {source.path}: {len(absent)} shards are missing, first {absent[0]}")
            streams.append(ShardStream(shards, bad, seed + i, rank, processes, position, max(1, source.shuffle)))
        else:
            examples = read_examples(source.format, Path(source.path), source.split, bad)
            streams.append(ListStream(examples, seed + i, rank, processes, position))
    return Mixture(streams, [source.weight for source in data], seed, rank)
