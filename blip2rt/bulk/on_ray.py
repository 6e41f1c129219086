"""START HERE for many machines: a collection as a Ray Dataset, an engine in every actor.

ItemSource (read tasks) ──> Ray's checkpoint: written already? ──> Answerer (actors) ──> PartSink (write tasks)

Ray schedules, retries and scales; its checkpoint names the inputs whose parts are written. An input that was lost with
its machine is answered again elsewhere, to the same bytes, because nothing in a row depends on the batch around it.
"""

import json
import pickle
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import fs, parquet
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask, WriteResult
from ray.exceptions import RayError

from ..errors import Blip2rtError, InputError, OutputError
from ..inspection import gpus_needed
from ..pipeline import Pipeline
from .decoding import decode
from .items import Item
from .job import BulkJob, BulkReport, make_plan
from .journal import refuse_other_settings
from .run import ONLY_THE_FIRST
from .sinks import Row, json_line, table_of
from .sources import Source
from .tasks import TaskSettings, answer, open_task

FORMATS = ("jsonl", "parquet")
PART_ITEMS = 64  # inputs that are answered and written together: work that a machine may take with it
STATE = ".blip2rt"  # behind the output's name: a folder with its settings and Ray's checkpoint
FORMAT = 1  # of the settings; raise it when an older blip2rt would misread the output
ERRORS = "_errors"  # in the output: the inputs that failed
AGAIN = "run the same command again, what is done stays done"
NO_CPU = {"num_cpus": 0}  # of tasks that write: so they never wait for an actor to end


def run_on_ray(
    job: BulkJob,
    output: str,
    engine: str | Path = "engines",
    name: str | None = None,
    threads: int | None = None,
    actors: int | None = None,
) -> BulkReport:
    """Answer every picture of a collection exactly once on a Ray cluster, across as many runs as it takes.

    Ray is the one that `ray.init` finds: that of RAY_ADDRESS, else one of this machine, else a new one. The engine and
    pictures that are named by paths must lie under the same path on every machine.

    Args:
        job: what to do; its `output` and `workers` are not looked at.
        output: a folder, or an address of an object store ("s3://bucket/folder"), that every machine can write.
        engine, name: as for `Pipeline`.
        threads: CPUs of an actor (default 1).
        actors: the most that work at once; None: as many as the cluster has room for, and scales to.

    Raises:
        InputError: a wrong call, a source without pictures, an output of other settings or in use.
        OutputError: the output cannot be written.
        EngineError: the engine is missing or damaged.
        Blip2rtError: Ray gave up.
    """
    if actors is not None and actors < 1:
        raise InputError(f"actors must be a whole number of at least 1, not {actors}")
    if job.batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, not {job.batch_size}")
    chosen = job.format or "jsonl"
    if chosen not in FORMATS:
        raise InputError(f"--ray writes --format {' or '.join(FORMATS)}, not {chosen!r}: leave --ray out for it")
    engine, threads = Path(engine).absolute(), threads or 1
    plan = make_plan(job, chosen, lambda: Pipeline(engine, name=name, threads=threads))
    start = monotonic()
    state = _State(output)
    with _connected(), _telling(state.output), _locked(state.output):
        state.begin(plan.settings, job.force)
        skipped = state.num_done()
        sink = PartSink(state.output, None if chosen == "jsonl" else plan.columns)
        context = DataContext.get_current()
        checkpoint = CheckpointConfig("key", state.checkpoint, delete_checkpoint_on_success=False)
        checkpoint.checkpoint_actor_memory_bytes = 0  # as much as the keys need, which Ray finds itself
        context.checkpoint_config = checkpoint
        gpus = gpus_needed(engine, name, ray.cluster_resources().get("GPU", 0))
        try:
            ray.data.read_datasource(ItemSource(plan.source), num_cpus=0).map_batches(
                Answerer,
                fn_constructor_args=(plan.task_settings, engine, name, threads, plan.text_column, job.batch_size),
                batch_size=PART_ITEMS,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=actors),
                num_cpus=threads,
                num_gpus=gpus,  # of its own: Ray shows an actor no other
            ).write_datasink(sink, ray_remote_args=NO_CPU)
        finally:
            context.checkpoint_config = None
    if not sink.answered + sink.failed + skipped:
        raise InputError(f"there are no pictures in {job.source}")
    return BulkReport(sink.answered, sink.failed, skipped, 0, monotonic() - start)


@contextmanager
def _connected() -> Iterator[None]:
    """To a cluster: the caller's connection, or one of our own that ends with the block."""
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level="warning", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


class ItemSource(Datasource):  # type: ignore[misc]
    """The items of a source, pickled, each under its key: its id, which Ray's checkpoint knows it by.

    Files that hold pictures (shards, parquet) are read where there is room; paths are listed here and handed out.
    """

    def __init__(self, source: Source):
        super().__init__()
        self._parts = list(self._split(source))

    @staticmethod
    def _split(source: Source) -> Iterator[Any]:
        if files := source.files_with_pictures():
            yield from (partial(_keyed, file) for file in files)
            return
        keyed = _keyed(source)
        while part := list(islice(keyed, PART_ITEMS)):
            yield partial(iter, part)

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[ReadTask]:
        """One for every part, however many are wanted."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_blocks, part), unknown) for part in self._parts]

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: pictures may lie in files that nobody opened yet."""
        return None


def _keyed(source: Source) -> Iterator[tuple[str, Item]]:
    """Items and their keys; an id that came before is an error, and so is a source that breaks off."""
    met: dict[str, int] = {}
    items = iter(source)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (Blip2rtError, OSError) as error:
            item = Item(f"{source.name}", error=f"it cannot be read to its end ({error})")
        key = item.id.encode("utf-8", "backslashreplace").decode()
        met[key] = met.get(key, 0) + 1
        if met[key] > 1:
            item = replace(item, error=f"its id came before{ONLY_THE_FIRST}")
            key = f"{key}\0{met[key]}"
        yield key, item


def _blocks(part: Any) -> Iterator[pa.Table]:
    items = part()
    while some := list(islice(items, PART_ITEMS)):
        keys, values = zip(*some, strict=True)
        yield pa.table({"key": keys, "item": [pickle.dumps(value) for value in values]})


class Answerer:
    """An engine that lives in an actor: batches of items -> rows as JSON, or the errors in their place.

    For `map_batches` over a Dataset of one's own as well: columns key (text) and item (a pickled `Item`) come in, and
    key, line (bytes) and is_error go out.
    """

    def __init__(
        self,
        settings: TaskSettings,
        engine: Path,
        name: str | None,
        threads: int | None,
        text_column: str | None,
        batch_size: int,
    ):
        self._text, self._text_column, self._batch_size = settings.text, text_column, batch_size
        self._task = open_task(settings, Pipeline(engine, name=name, threads=threads))

    def __call__(self, batch: pa.Table) -> pa.Table:
        items: list[Item] = [pickle.loads(value) for value in batch["item"].to_pylist()]
        found: dict[int, Row | str] = {i: item.error for i, item in enumerate(items) if item.error is not None}
        readable = [i for i in range(len(items)) if i not in found]
        for start in range(0, len(readable), self._batch_size):
            found |= self._answers(items, readable[start : start + self._batch_size])
        lines = [self._line(item, found[i]) for i, item in enumerate(items)]
        is_error = [isinstance(found[i], str) for i in range(len(items))]
        return pa.table({"key": batch["key"], "line": pa.array(lines, pa.binary()), "is_error": is_error})

    def _answers(self, items: list[Item], places: list[int]) -> dict[int, Row | str]:
        sources: list[Any] = [items[i].path if items[i].data is None else items[i].data for i in places]
        decoded = dict(zip(places, decode(self._task.images(), sources), strict=True))
        pixels = {i: found for i, found in decoded.items() if not isinstance(found, str)}
        errors: dict[int, Row | str] = {i: found for i, found in decoded.items() if isinstance(found, str)}
        if not pixels:
            return errors
        texts = [self._text if self._text is not None else items[i].text for i in pixels]
        features = self._task.encode(list(pixels.values()))
        rows = answer(self._task, features, texts, is_one_for_all=self._text is not None)
        return errors | dict(zip(pixels, rows, strict=True))

    def _line(self, item: Item, row: Row | str) -> bytes:
        if isinstance(row, str):
            return json_line({"id": item.id, "error": row})
        own = {self._text_column: item.text} if self._text_column else {}
        return json_line({"id": item.id, **own, **row})


class LinesSink(BlockBasedFileDatasink):  # type: ignore[misc]
    """Rows of JSON as files: of JSON lines, or of a table where `columns` gives their names and kinds."""

    def __init__(self, folder: str, columns: Mapping[str, str] | None):
        super().__init__(folder, dataset_uuid="part", file_format="jsonl" if columns is None else "parquet")
        self._columns = columns

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        """A part."""
        lines = block.to_arrow()["line"].to_pylist()
        if self._columns is None:
            file.write(b"".join(lines))
        else:
            parquet.write_table(table_of(lines, self._columns), file)


class PartSink(LinesSink):
    """Rows in parts of one folder, the inputs that failed in parts of the same names beside them."""

    answered = failed = 0  # of this run, when it has ended

    def __init__(self, folder: str, columns: Mapping[str, str] | None):
        super().__init__(folder, columns)
        self._errors = LinesSink(posixpath.join(folder, ERRORS), None)

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Make the folders."""
        super().on_write_start(schema)
        self._errors.on_write_start(schema)

    def write(self, blocks: Iterable[Any], ctx: Any) -> tuple[int, int]:
        """A part and its errors; how many rows each has."""
        table = pa.concat_tables(BlockAccessor.for_block(block).to_arrow() for block in blocks)
        failed = table.filter(table["is_error"])
        answered = table.filter(pc.invert(table["is_error"]))
        if answered.num_rows:
            super().write([answered], ctx)
        if failed.num_rows:
            self._errors.write([failed], ctx)
        return answered.num_rows, failed.num_rows

    def on_write_complete(self, write_result: WriteResult) -> None:
        """Count what was written."""
        counts = [sum(numbers) for numbers in zip(*write_result.write_returns, strict=True)]
        self.answered, self.failed = counts or (0, 0)


class _State:
    """What lies beside an output: the settings it was made with, and Ray's checkpoint of the inputs it answers."""

    def __init__(self, output: str):
        self.output = output if "://" in output else str(Path(output).absolute())
        try:
            self._files, self._path = fs.FileSystem.from_uri(self.output)
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"{output!r} is no folder and no address of an object store ({error})") from error
        self.checkpoint = f"{self.output}{STATE}/checkpoint"
        self._settings = f"{self._path}{STATE}/settings.json"

    def begin(self, settings: dict[str, Any], force: bool) -> None:
        """Claim the output for these settings.

        Raises:
            InputError: it has others, or is no output of a run.
        """
        settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        if self._files.get_file_info(self._settings).type == fs.FileType.File:
            with self._files.open_input_stream(self._settings) as file:
                old = json.loads(file.read())
            if force:
                for folder in (f"{self._path}{STATE}", self._path):
                    if self._files.get_file_info(folder).type != fs.FileType.NotFound:
                        self._files.delete_dir(folder)
            elif old != settings:
                refuse_other_settings(old, settings)
            else:
                return
        elif self._files.get_file_info(fs.FileSelector(self._path, allow_not_found=True)):
            raise InputError(
                f"{self.output} exists and was not written by `blip2rt bulk --ray`: choose another --output"
            )
        self._files.create_dir(posixpath.dirname(self._settings), recursive=True)
        with self._files.open_output_stream(self._settings) as file:
            file.write(json.dumps(settings, indent=1).encode())

    def num_done(self) -> int:
        """How many inputs earlier runs have answered or listed."""
        selector = fs.FileSelector(f"{self._path}{STATE}/checkpoint", allow_not_found=True)
        parts = [
            part.path for part in self._files.get_file_info(selector) if not part.path.endswith(".pending.parquet")
        ]
        return sum(parquet.read_metadata(part, filesystem=self._files).num_rows for part in parts)


@contextmanager
def _locked(output: str) -> Iterator[None]:
    """Nobody else on this cluster writes the output: an actor of its name lives as long as this run."""
    lock = ray.remote(num_cpus=0)(_Lock).options(name=f"bulk {output}", namespace="blip2rt")
    try:
        held = lock.remote()
    except ValueError as error:
        raise InputError(f"another run is writing {output}: wait for it, or choose another --output") from error
    try:
        yield
    finally:
        ray.kill(held)


class _Lock:
    pass


@contextmanager
def _telling(output: str) -> Iterator[None]:
    """Turns what Ray says into what a person can do."""
    try:
        yield
    except (RayError, OSError, pa.ArrowException) as error:
        reasons: list[BaseException] = [error]
        while cause := (getattr(reasons[-1], "cause", None) or reasons[-1].__cause__):
            reasons.append(cause)
        for reason in reasons:
            if isinstance(reason, Blip2rtError):
                raise reason from error
        if isinstance(reasons[-1], OSError):
            raise OutputError(f"{output} cannot be written ({reasons[-1]}): {AGAIN}") from error
        last = str(reasons[-1]).strip().splitlines() or [type(reasons[-1]).__name__]
        raise Blip2rtError(f"Ray gave up ({last[-1]:.300}): {AGAIN}") from error
