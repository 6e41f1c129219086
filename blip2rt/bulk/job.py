"""A job, and what it means with an engine: the same on one machine (run.py) and on many (on_ray.py)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..inputs import BATCH_SIZE
from ..pipeline import Pipeline
from .formats import FORMATS
from .sources import Columns, Source
from .tasks import FORMATS_WITHOUT_TEXT, TEXT_NAMES, Task, TaskSettings, check_settings, open_task, text_for_all


@dataclass(frozen=True)
class BulkJob(TaskSettings):
    """What is to be done; all that the output depends on, and a few things that only make it faster."""

    source: str
    output: Path
    columns: Columns = field(default_factory=Columns)
    format: str | None = None  # "jsonl", "csv", "parquet", "webdataset", "sidecar", "npy"; None: by the output's ending
    extension: str = ".txt"  # of sidecar files
    workers: int | None = None  # processes that decode; None: one for every two cores; 0: decode in this process
    batch_size: int = BATCH_SIZE
    force: bool = False  # throw an output away that is there, and begin anew


@dataclass(frozen=True)
class BulkReport:
    """How it went. `skipped` were done in earlier runs, `kept` had a sidecar file of somebody else's."""

    answered: int
    failed: int
    skipped: int
    kept: int
    seconds: float

    def __str__(self) -> str:
        done = self.answered + self.failed
        rate = f", {done / self.seconds:.1f} a second" if done else ""
        before = f", {self.skipped} done in earlier runs" if self.skipped else ""
        kept = f", {self.kept} with a text file that stays" if self.kept else ""
        return f"{self.answered} answered, {self.failed} failed{before}{kept}{rate}"


@dataclass(frozen=True)
class Plan:
    """What has to be read, done and written."""

    source: Source
    task_settings: TaskSettings
    task: Task
    text_column: str | None  # of the output: the text that comes with each picture
    settings: dict[str, Any]  # all that the output depends on, as JSON

    @property
    def text(self) -> str | None:
        """The text of all pictures."""
        return self.task_settings.text

    @property
    def columns(self) -> dict[str, str]:
        """Names and kinds of the output's columns."""
        own = {self.text_column: "text"} if self.text_column else {}
        return {"id": "text", **own, **self.task.columns()}


def make_plan(job: BulkJob, chosen: str, open_pipeline: Callable[[], Pipeline]) -> Plan:
    """The plan of a job whose output has the format `chosen`; the engine is opened last.

    Raises:
        InputError: settings that contradict each other, the source, the format or the engine.
        EngineError: the engine is missing or damaged.
    """
    task_settings, text_column = text_for_all(check_settings(job), job.columns.text)
    columns = replace(job.columns, text=text_column)
    source = Source(job.source, columns)
    possible = FORMATS_WITHOUT_TEXT.get(job.task)
    if (chosen == "npy" and possible is None) or chosen not in (possible or (chosen,)):
        raise InputError(
            f"--format {chosen} has no place for what the task {job.task!r} gives: pass --format "
            + ", ".join(possible or (known for known in FORMATS if known != "npy"))
        )
    task = open_task(task_settings, open_pipeline())
    settings = {
        **task.as_dict(),
        "source": source.name,
        **{f"{name}_column": value for name, value in asdict(columns).items()},
        "format": chosen,
        "extension": job.extension if chosen == "sidecar" else None,
    }
    return Plan(source, task_settings, task, text_column and TEXT_NAMES[job.task], settings)
