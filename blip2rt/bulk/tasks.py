"""What a run does with its pictures: features, and the rows of its output.

A task with texts has one for all pictures, or one that comes with each. Rows are plain values, in the order of the
output's columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..manifest import ImageSpec, Manifest
from ..options import GenerationOptions, ResolvedOptions, resolve_options
from ..pipeline import ANSWER_DEFAULTS, CAPTION_DEFAULTS, GENERATE_DEFAULTS, Pipeline
from ..results import Generation, ImageFeatures
from ..retrieval import POOLINGS, pooled
from ..tokenizer import CAPTION_PROMPT
from .decoding import Pixels

Row = dict[str, Any]
DEFAULTS: dict[str, dict[str, Any]] = {
    "caption": CAPTION_DEFAULTS,
    "answer": ANSWER_DEFAULTS,
    "generate": GENERATE_DEFAULTS,
}
TASKS = (*DEFAULTS, "embed", "match")
TEXT_NAMES = {"caption": "prompt", "answer": "question", "generate": "prompt", "match": "text"}  # what each calls it
FORMATS_WITHOUT_TEXT = {"embed": ("jsonl", "parquet", "npy"), "match": ("jsonl", "csv", "parquet")}
SCORES = ("itc", "itm", "itm_probability")
VECTOR_ROWS = 1_000  # of a parquet file with a picture's vectors one by one: they are large


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What rows depend on, besides the source and the engine."""

    task: str = "caption"  # one of TASKS
    text: str | None = None  # the question, prompt or text for all; None: the column's; captions: "a photo of"
    options: GenerationOptions = field(default_factory=GenerationOptions)  # of tasks that write
    strip_prefixes: Sequence[str] = ()  # taken off the beginning of a text, whatever their case
    min_itm: float | None = None  # captions: drop those that ITM finds less probable; needs a retrieval engine
    pooling: str = "mean"  # embeddings: "mean": one vector a picture; "none": one for every query


class Task:
    """One kind of work with one pipeline."""

    def __init__(self, settings: TaskSettings, pipe: Pipeline):
        self.settings, self.pipe = settings, pipe

    def manifests(self) -> list[Manifest]:
        """Of the engines that rows depend on."""
        return [self.pipe.retrieval_engine.manifest]

    def as_dict(self) -> dict[str, Any]:
        """All that rows depend on, as JSON: a run with another value does not go on with this output."""
        return {
            "task": self.settings.task,
            "text": self.settings.text,
            "engine": ", ".join(f"{manifest.name}, {manifest.digest()[:16]}" for manifest in self.manifests()),
        }

    def images(self) -> list[ImageSpec]:
        """How pictures are decoded: what each engine wants, once where they want the same."""
        first, *others = [manifest.image for manifest in self.manifests()]
        return [first, *(image for image in others if image != first)]

    def columns(self) -> Mapping[str, str]:
        """Names and kinds of a table's columns, without those that come from the source."""
        raise NotImplementedError

    num_alternatives = 0  # other texts in a row
    rows_per_file: int | None = None  # of parquet; None: as usual

    def encode(self, pixels: list[Pixels]) -> list[ImageFeatures]:
        """Features of pictures, decoded as `images` says."""
        return self.pipe.retrieval_features([images[-1] for images in pixels], None)

    def rows(self, features: list[ImageFeatures], texts: list[Any]) -> list[Row | str]:
        """A row for every picture; instead of one that is not wanted, why it is not.

        Raises:
            InputError: a text that cannot be read; the others were not looked at either.
        """
        raise NotImplementedError


class Writing(Task):
    """Captions, answers, and whatever a prompt brings."""

    def __init__(self, settings: TaskSettings, pipe: Pipeline):
        super().__init__(settings, pipe)
        self._options: ResolvedOptions = resolve_options(DEFAULTS[settings.task], settings.options, {})
        self.num_alternatives = self._options.num_return_sequences - 1
        _ = pipe.generative_engine  # an error where there is none
        if settings.min_itm is None:
            return
        if settings.task != "caption":
            raise InputError(f"min_itm is for captions: ITM does not read the texts of the task {settings.task!r}")
        if not 0 <= settings.min_itm <= 1:
            raise InputError(f"min_itm must be a probability, 0 to 1, not {settings.min_itm}")

    def manifests(self) -> list[Manifest]:
        judge = [] if self.settings.min_itm is None else [self.pipe.retrieval_engine.manifest]
        return [self.pipe.generative_engine.manifest, *judge]

    def as_dict(self) -> dict[str, Any]:
        own = asdict(self._options) | {"strip_prefixes": list(self.settings.strip_prefixes)}
        return super().as_dict() | own | {"min_itm": self.settings.min_itm}

    def columns(self) -> Mapping[str, str]:
        itm = {} if self.settings.min_itm is None else {"itm_probability": "number"}
        return {"text": "text", "score": "number", "finish_reason": "text", **itm} | {
            "token_ids": "integers", "token_logprobs": "numbers", "alternatives": "alternatives",
        }  # fmt: skip

    def encode(self, pixels: list[Pixels]) -> list[ImageFeatures]:
        features = self.pipe.generative_engine.encode([images[0] for images in pixels], None)
        if self.settings.min_itm is None:
            return features
        seen = super().encode(pixels)
        return [replace(own, retrieval=judged) for own, judged in zip(features, seen, strict=True)]

    def rows(self, features: list[ImageFeatures], texts: list[Any]) -> list[Row | str]:
        call = getattr(self.pipe, self.settings.task)
        results = call(features, texts, options=self.settings.options, strip_prefix=self.settings.strip_prefixes)
        if self.settings.min_itm is None:
            return [self._row([result, *result.alternatives]) for result in results]
        return [self._good_enough(*pair, self.settings.min_itm) for pair in zip(features, results, strict=True)]

    def _good_enough(self, features: ImageFeatures, result: Generation, least: float) -> Row | str:
        """The row of the sequences that ITM finds probable enough, in their order."""
        sequences = [result, *result.alternatives]
        texts = [sequence.text for sequence in sequences if sequence.text]
        found = dict(zip(texts, self.pipe.match([features], texts).itm_probability[0], strict=True)) if texts else {}
        kept = [sequence for sequence in sequences if found.get(sequence.text, -1.0) >= least]
        if not kept:
            best = max(texts, key=lambda text: found[text], default="")
            return f"ITM gives its best text, {best!r:.200}, {found.get(best, 0.0):.4f}, below min_itm={least}"
        return self._row(kept, [float(found[sequence.text]) for sequence in kept])

    def _row(self, sequences: Sequence[Generation], itm: Sequence[float] | None = None) -> Row:
        rows = [
            {
                name: getattr(sequence, name)
                for name in ("text", "score", "finish_reason", "token_ids", "token_logprobs")
            }
            for sequence in sequences
        ]
        for row, probability in zip(rows, itm or (), strict=itm is not None):
            row["itm_probability"] = probability
        return rows[0] | {"alternatives": rows[1:]}


class Embedding(Task):
    """ITC embeddings: of a picture's queries [Q, E] ("none"), or the unit vector of their mean [E] ("mean")."""

    def __init__(self, settings: TaskSettings, pipe: Pipeline):
        super().__init__(settings, pipe)
        if settings.pooling not in POOLINGS:
            raise InputError(f"pooling {settings.pooling!r} is none of {', '.join(POOLINGS)}")
        self.rows_per_file = VECTOR_ROWS if settings.pooling == "none" else None

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"pooling": self.settings.pooling}

    def columns(self) -> Mapping[str, str]:
        return {"embedding": "vectors" if self.settings.pooling == "none" else "vector"}

    def rows(self, features: list[ImageFeatures], texts: list[Any]) -> list[Row | str]:
        embeds = pooled(np.stack([f.itc_embeds for f in features if f.itc_embeds is not None]), self.settings.pooling)
        return [{"embedding": embed.tolist()} for embed in embeds]


class Matching(Task):
    """ITC and ITM scores of every picture with its text; `score` is their sum, which ranks."""

    def __init__(self, settings: TaskSettings, pipe: Pipeline):
        super().__init__(settings, pipe)
        if settings.text is not None:
            pipe.retrieval_engine.token_ids(settings.text)  # a wrong one is refused before a picture is looked at

    def columns(self) -> Mapping[str, str]:
        return dict.fromkeys(("score", *SCORES), "number")

    def rows(self, features: list[ImageFeatures], texts: list[Any]) -> list[Row | str]:
        ids = self.pipe.retrieval_engine.token_ids(texts)
        return [self._row(*pair) for pair in zip(features, ids, strict=True)]

    def _row(self, features: ImageFeatures, token_ids: list[int]) -> Row:
        scores = self.pipe.retrieval_engine.match([features], [token_ids])
        found = {name: float(getattr(scores, name)[0, 0]) for name in SCORES}
        return {"score": found["itm"] + found["itc"], **found}


def check_settings(settings: TaskSettings) -> TaskSettings:
    """The same, with the text that captions have by default; before an engine is opened.

    Raises:
        InputError: an unknown task, or settings that have no effect on it.
    """
    if settings.task not in TASKS:
        raise InputError(f"task {settings.task!r} is none of {', '.join(TASKS)}")
    if settings.task in DEFAULTS:
        resolve_options(DEFAULTS[settings.task], settings.options, {})
        return settings
    given = [name for name, value in asdict(settings.options).items() if value is not None]
    given += [name for name in ("strip_prefixes", "min_itm") if getattr(settings, name) not in (None, (), [])]
    given += ["text"] if settings.task == "embed" and settings.text is not None else []
    if given:
        raise InputError(f"{', '.join(given)} has no effect on the task {settings.task!r}: leave it out")
    return settings


def open_task(settings: TaskSettings, pipe: Pipeline) -> Task:
    """The task that `settings` mean.

    Raises:
        InputError: settings that contradict each other, or the engines.
        EngineError: there is no engine for it.
    """
    kind = {"embed": Embedding, "match": Matching}.get(settings.task, Writing)
    return kind(settings, pipe)


def answer(task: Task, features: list[ImageFeatures], texts: list[Any], is_one_for_all: bool) -> list[Row | str]:
    """Rows of pictures; instead of one that there is not, why there is none.

    Raises:
        InputError: the text of all pictures is refused. One that came with its picture is that picture's error.
    """
    try:
        return task.rows(features, texts)
    except InputError as error:
        if is_one_for_all:
            raise
        if len(features) == 1:
            return [str(error)]
    return [row for one in zip(features, texts, strict=True) for row in answer(task, [one[0]], [one[1]], False)]


def text_for_all(settings: TaskSettings, column: str | None) -> tuple[TaskSettings, str | None]:
    """The settings, perhaps with the default prompt, and the column that holds a text for each picture.

    Raises:
        InputError: there is a text for all and one for each.
    """
    name = TEXT_NAMES.get(settings.task)
    if name is None:
        return settings, None
    if settings.text is not None and column:
        raise InputError(f"there is a {name} for all and a column {column!r} with one for each: give one of the two")
    if settings.text is not None or column:
        return settings, column
    if settings.task == "caption":
        return replace(settings, text=CAPTION_PROMPT), None
    return settings, name
