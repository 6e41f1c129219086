"""A preset over its data set: predictions that a kill does not lose, the official submission file, and the table.

The folder of a run holds `run.json` (what is evaluated with what), `predictions.jsonl` (one line for each picture or
question, appended batch by batch; of retrieval what `evaluate_retrieval` says), and, at the end, `submission.json` and
`table.json`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import CaptionItem, Question, read_captions, read_questions
from .data.cleaning import clean_question
from .errors import InputError
from .evaluate_retrieval import evaluate_retrieval
from .evaluate_scores import Scores, as_scored, score, submission
from .evaluation.captions import not_scorable
from .pipeline import Pipeline
from .presets import CAPTION, RETRIEVE, VQA, Preset
from .progress import Progress


@dataclass(frozen=True)
class Report:
    """What came out, beside what was published; percent. `not_scored` says why a metric is missing."""

    preset: str
    source: str
    items: int
    engine: str  # its precision, and the checkpoint it was made of
    found: dict[str, float]
    published: dict[str, float]
    not_scored: dict[str, str]
    by_question_type: dict[str, float]  # VQA: accuracy; in table.json only
    differs: list[str]  # how the engine differs from what the preset asks for, where the caller insisted

    def __str__(self) -> str:
        rows = [
            f"{self.preset}: {self.items} items ({self.source})",
            f"engine: {self.engine}",
            f"{'':<24}{'here':>10}{'published':>12}",
        ]
        for name in dict.fromkeys((*self.published, *self.found)):
            here = f"{self.found[name]:.2f}" if name in self.found else "not scored"
            there = f"{self.published[name]:.2f}" if name in self.published else ""
            rows.append(f"{name:<24}{here:>10}{there:>12}")
        rows += [f"not scored: {name} ({reason})" for name, reason in self.not_scored.items()]
        rows += [f"not the preset's engine: {difference}" for difference in self.differs]
        return "\n".join(rows)


def evaluate(preset: Preset, pipe: Pipeline, data: Path, output: Path, *, any_engine: bool = False) -> Report:
    """Run a preset, or go on with a run that was interrupted.

    Args:
        preset: from `presets`.
        pipe: the engine.
        data: folder of the data set, as it is published.
        output: folder of the run.
        any_engine: evaluate an engine that the preset was not published for.

    Raises:
        InputError: the engine does not fit the preset (it names the export command), the data set is not whole, or
            `output` holds another run.
    """
    manifest = pipe.manifest
    if preset.task == RETRIEVE and pipe.has_retrieval:
        manifest = pipe.retrieval_engine.manifest
    differs = preset.problems(manifest)
    if differs and (not any_engine or manifest.kind != preset.kind):
        raise InputError(
            f"{pipe.directory} is not the engine of {preset.name}: {'; '.join(differs)}. Make it with "
            f"`{preset.export_command()}`"
            + ("" if preset.checkpoint else " (nobody published its checkpoint)")
            + (", or pass --any-engine" if manifest.kind == preset.kind else "")
        )
    items: Sequence[CaptionItem | Question]
    if preset.task == VQA:
        items = read_questions(data, preset.data_set, preset.split)
    else:
        items = read_captions(data, preset.data_set, preset.split)
    if preset.task == CAPTION:
        _warn_of(not_scorable())
    _claim(output, {"preset": asdict(preset), "engine": manifest.digest(), "items": _digest(items)})
    if preset.task == RETRIEVE:
        pictures = [item for item in items if isinstance(item, CaptionItem)]
        scores = Scores(evaluate_retrieval(pipe, pictures, output, preset))
    else:
        texts, why_not = as_scored(preset, _predict(preset, pipe, items, output / "predictions.jsonl"))
        _write(output / "submission.json", submission(preset, items, texts))
        scores = score(preset, items, texts, why_not)
    report = Report(
        preset.name,
        preset.source,
        len(items),
        f"{manifest.precision}, {manifest.source_id} (sha256 {manifest.source_sha256[:16]})",
        scores.found,
        preset.published,
        scores.not_scored,
        scores.by_question_type,
        differs,
    )
    _write(output / "table.json", asdict(report))
    return report


def _warn_of(not_scored: dict[str, str]) -> None:
    """Say before the work what will be missing after it."""
    for reason in dict.fromkeys(not_scored.values()):
        names = ", ".join(name for name, why in not_scored.items() if why == reason)
        print(f"will not be scored: {names} ({reason})", file=sys.stderr)


def _digest(items: Sequence[CaptionItem | Question]) -> str:
    """What tells a data set from another: ids, pictures by name, texts, in their order."""
    rows = [asdict(item) | {"path": item.path.name} for item in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _claim(output: Path, run: dict[str, Any]) -> None:
    """Make the folder of a run, or see that it is of the same one."""
    run = json.loads(json.dumps(run))
    path = output / "run.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            known = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete {output}, or choose another --output") from None
        if known != run:
            raise InputError(f"{output} holds another run (another preset, model or data set): choose another --output")
    elif any(file.name != _new(path).name for file in output.iterdir()):
        raise InputError(f"{output} holds files of something else: choose another --output")
    else:
        _write(path, run)


def _predict(
    preset: Preset, pipe: Pipeline, items: Sequence[CaptionItem | Question], path: Path
) -> dict[int | str, str]:
    """Texts by id; those that are in the file already are not asked for again."""
    done = dict(_read_predictions(path))
    left = [item for item in items if item.id not in done]
    bar = Progress(preset.name, len(items))
    bar.advance(len(items) - len(left))
    with path.open("a", encoding="utf-8") as stream:
        size = pipe.generative_engine.batch_size
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            prompts = [_prompt(preset, pipe, item) for item in batch]
            ask = pipe.answer if preset.reads_questions else pipe.generate
            results = ask([item.path for item in batch], prompts, options=preset.options)
            for item, result in zip(batch, results, strict=True):
                done[item.id] = result.text
                stream.write(json.dumps({"id": item.id, "text": result.text}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            bar.advance(len(batch))
    bar.close()
    return done


def _read_predictions(path: Path) -> Iterator[tuple[int | str, str]]:
    """What an earlier run has written; a line that it did not finish is cut off."""
    if not path.exists():
        return
    whole = number = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            number += 1
            try:
                row = json.loads(line)
                identifier, text = row["id"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number} is damaged ({error!r}): delete the line") from None
            whole += len(line)
            yield identifier, text
    os.truncate(path, whole)


def _prompt(preset: Preset, pipe: Pipeline, item: CaptionItem | Question) -> str:
    if preset.reads_questions and isinstance(item, Question):
        return clean_question(item.question, preset.style)  # `answer` puts it into the prompt
    prompt = preset.ask(item.question) if isinstance(item, Question) else preset.prompt
    return (
        prompt if preset.prompt_tokens is None else pipe.generative_engine.tokenizer.cut(prompt, preset.prompt_tokens)
    )


def _write(path: Path, content: Any) -> None:
    """In one step, so that a kill leaves no half of it."""
    new = _new(path)
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(new, path)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
