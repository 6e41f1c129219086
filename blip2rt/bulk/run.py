"""START HERE: the loop over a collection, from items to rows."""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from ..errors import Blip2rtError, InputError
from ..pipeline import Pipeline
from ..preprocess import ImageSource
from ..progress import Progress
from .decoding import Decoded, Decoders, Pixels
from .formats import errors_file, open_sink, output_folder, pick_format, start_anew
from .items import Item
from .job import BulkJob, BulkReport, make_plan
from .journal import Journal, Key
from .sinks import AppendedFile, Row, Sink, json_line
from .tasks import answer
from .webdataset import MAX_SAMPLE

ONLY_THE_FIRST = " in this source, and only the first is answered: give every input an id of its own"
COMMIT_SECONDS = 1.0  # work that a kill may cost
LOG_SECONDS = 60.0


@dataclass
class _Entry:
    """An item on its way. With `error` there is nothing to decode."""

    item: Item
    key: Key
    error: str | None = None


def run_bulk(
    job: BulkJob, engine: str | Path = "engines", name: str | None = None, threads: int | None = None
) -> BulkReport:
    """Answer every picture of a collection exactly once, across as many runs as it takes.

    Args:
        job: what to do.
        engine, name, threads: as for `Pipeline`.

    Raises:
        InputError: a wrong call, a source without pictures, an output of other settings or in use.
        OutputError: the output cannot be written.
        EngineError: the engine is missing or damaged.
        Blip2rtError: parts of the source could not be read; everything else is done.
    """
    run = _Run(job, engine, name, threads)
    try:
        return run.to_the_end()
    finally:
        run.close()


class _Run:
    def __init__(self, job: BulkJob, engine: str | Path, name: str | None, threads: int | None):
        for option, value, least in (("workers", job.workers, 0), ("batch_size", job.batch_size, 1)):
            if value is not None and value < least:
                raise InputError(f"{option} must be a whole number of at least {least}, not {value}")
        self.job = job
        chosen = pick_format(job.format, job.output, job.extension)
        plan = make_plan(job, chosen, lambda: Pipeline(engine, name=name, threads=threads))
        self.source, self.task, self.text, self.text_column = plan.source, plan.task, plan.text, plan.text_column
        folder = output_folder(job.output, chosen)
        if job.force:
            start_anew(job.output, chosen, folder)
        self.journal = Journal(folder, plan.settings)
        try:
            state = self.journal.state()
            self.sink: Sink = open_sink(
                chosen,
                job.output,
                folder,
                state.get("sink"),
                columns=plan.columns,
                num_alternatives=self.task.num_alternatives,
                rows_per_file=self.task.rows_per_file,
                extension=job.extension,
                field=job.task,
            )
            self.errors = AppendedFile(errors_file(job.output, chosen), state.get("errors", 0))
            cores = len(os.sched_getaffinity(0))
            workers = max(1, cores // 2) if job.workers is None else job.workers
            self.decoders = Decoders(self.task.images(), workers)
        except BaseException:
            self.journal.close()
            raise
        self.skipped = self.kept = self.answered = self.failed = 0
        self.source_error: Blip2rtError | None = None
        self._answered: list[Key] = []
        self._failed: list[Key] = []
        self._committed = monotonic()

    def close(self) -> None:
        self.decoders.close()
        self.sink.close()
        self.errors.close()
        self.journal.close()

    def to_the_end(self) -> BulkReport:
        start = monotonic()
        self.progress = Progress("pictures", self.source.count(), LOG_SECONDS)
        try:
            for batch, features in self._encoded(self._batches(self.decoders.run(self._entries()))):
                self._write(batch, self._answer(batch, features))
                self.progress.advance(len(batch))
                if monotonic() - self._committed > COMMIT_SECONDS:
                    self._commit()
            self.sink.finish()
            self._commit()
        finally:
            self.progress.close()
        if self.source_error:
            raise self.source_error
        if not self.answered + self.failed + self.skipped + self.kept:
            raise InputError(f"there are no pictures in {self.job.source}")
        return BulkReport(self.answered, self.failed, self.skipped, self.kept, monotonic() - start)

    def _entries(self) -> Iterator[tuple[_Entry, ImageSource | None]]:
        """What is not done yet, with what is to be decoded."""
        for item in self._items():
            error = item.error
            try:
                name = self.sink.name(item)
            except InputError as problem:
                name, error = item.id, str(problem)
            key, is_done = self.journal.meet(name)
            if is_done:
                self.skipped += 1
                self._one_less()
                continue
            if key[1] > 1:
                taken = "its id came before" if name == item.id else f"its output {name} is another input's"
                error = f"{taken}{ONLY_THE_FIRST}"
            if error is None and self.sink.has(item):
                self.kept += 1
                self._answered.append(key)
                self._one_less()
                continue
            if error is None and self.sink.needs_picture and item.data is None:
                item, error = _with_picture(item)
            source = item.path if item.data is None else item.data
            yield _Entry(item, key, error), None if error is not None else source

    def _one_less(self) -> None:
        if self.progress.total is not None:
            self.progress.total -= 1

    def _items(self) -> Iterator[Item]:
        """The source's items. Where it breaks, what came before is answered first."""
        try:
            yield from self.source
        except Blip2rtError as error:
            self.source_error = error
        except OSError as error:
            self.source_error = Blip2rtError(
                f"{self.job.source} cannot be read to its end ({error}): mend it and run the same command again, what "
                "is done stays done"
            )

    def _batches(
        self, entries: Iterator[tuple[_Entry, Decoded | None]]
    ) -> Iterator[list[tuple[_Entry, Pixels | None]]]:
        """Entries in their order, with as many pictures as fill a batch: broken ones leave no hole."""
        batch: list[tuple[_Entry, Pixels | None]] = []
        for entry, decoded in entries:
            if isinstance(decoded, str):
                entry.error, decoded = decoded, None
            batch.append((entry, decoded))
            pictures = sum(pixels is not None for _, pixels in batch)
            if pictures == self.job.batch_size or len(batch) == 64 * self.job.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _encoded(
        self, batches: Iterator[list[tuple[_Entry, Pixels | None]]]
    ) -> Iterator[tuple[list[_Entry], list[Any]]]:
        """Batches with the features of their pictures: the next one is encoded while the last one is answered."""
        waiting = None
        with ThreadPoolExecutor(1) as executor:
            for batch in batches:
                pixels = [pixels for _, pixels in batch if pixels is not None]
                entries = [entry for entry, _ in batch]
                future = executor.submit(self.task.encode, pixels) if pixels else None
                if waiting:
                    yield waiting[0], waiting[1].result() if waiting[1] else []
                waiting = entries, future
            if waiting:
                yield waiting[0], waiting[1].result() if waiting[1] else []

    def _answer(self, batch: list[_Entry], features: list[Any]) -> list[Row | None]:
        """Rows of the entries of a batch; None, and the entry's error, where there is none."""
        readable = [entry for entry in batch if entry.error is None]
        texts = [self.text if self.text is not None else entry.item.text for entry in readable]
        if not readable:
            return [None] * len(batch)
        found = answer(self.task, features, texts, is_one_for_all=self.text is not None)
        rows: dict[int, Row] = {}
        for entry, row in zip(readable, found, strict=True):
            if isinstance(row, str):
                entry.error = row
            else:
                rows[id(entry)] = row
        return [rows.get(id(entry)) for entry in batch]

    def _write(self, batch: list[_Entry], rows: list[Row | None]) -> None:
        for entry, row in zip(batch, rows, strict=True):
            if row is None:
                self.errors.append(json_line({"id": entry.item.id, "error": entry.error}))
                self._failed.append(entry.key)
                self.failed += 1
            else:
                text = {self.text_column: entry.item.text} if self.text_column else {}
                self.sink.write(entry.item, {"id": entry.item.id, **text, **row})
                self._answered.append(entry.key)
                self.answered += 1

    def _commit(self) -> None:
        self.sink.sync()
        self.errors.sync()
        self.journal.commit(self._answered, self._failed, {"sink": self.sink.state(), "errors": self.errors.size})
        self.sink.committed()
        self._answered.clear()
        self._failed.clear()
        self._committed = monotonic()


def _with_picture(item: Item) -> tuple[Item, str | None]:
    """The item with the content of its file, or why it cannot be read."""
    assert item.path is not None
    try:
        status = os.stat(item.path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SAMPLE:
            return item, f"{item.path} is no file of at most {MAX_SAMPLE} bytes"
        return replace(item, data=item.path.read_bytes()), None
    except (OSError, ValueError) as error:
        return item, f"{item.path} cannot be opened ({getattr(error, 'strerror', error)}): check the path"
