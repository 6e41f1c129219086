"""How well engines see: captions, answers and retrieval over scenes that `training/make_scenes.py` wrote.

    python training/evaluate_scenes.py --engine ENGINES --data TEST --retrieval UNIQUE --output RUN

Captions and answers go through `blip2rt.evaluate` (a run that was killed goes on), captions are read into facts and
checked against the scenes as well. `--blind` shows the engines grey pictures; `--prior` adds what can be answered from
the texts alone. RUN/scenes-table.json holds the numbers, RUN/sheet.png pictures with what was said about them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2rt import Blip2rtError, InputError, Pipeline
from blip2rt.data import read_captions, read_questions
from blip2rt.data.scenes import Scenes, Sprites, TextPrior, WrittenScenes, draw_sheet, read_scenes, write_blank_twin
from blip2rt.data.scenes.sheet import Cell
from blip2rt.evaluate import evaluate
from blip2rt.evaluation import retrieval_table, score_captions, vqa_table
from blip2rt.options import GenerationOptions
from blip2rt.presets import CAPTION, RETRIEVE, VQA, Preset

PRIOR_SCENES = 20_000  # of the training split, whose texts the prior knows
SHEET = 24  # pictures, wrong captions among them as often as they are
RANKED = 16  # that ITM looks at for each query
RIGHT, WRONG, GIVEN = "#12702b", "#b3261e", "#5f6368"

Table = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure engines over written scenes.")
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="an engine, or a folder of both")
    parser.add_argument("--data", type=Path, metavar="DIR", help="scenes to caption and ask about")
    parser.add_argument("--retrieval", type=Path, metavar="DIR", help="scenes made with --unique")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the run")
    parser.add_argument("--blind", action="store_true", help="show grey pictures in place of the scenes")
    parser.add_argument("--prior", type=Path, metavar="SPRITES", help="add the baseline that knows texts only")
    parser.add_argument("--prompt", default="a photo of", help="of captions (default: %(default)s)")
    parser.add_argument("--num-beams", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.data is None and args.retrieval is None:
            raise InputError("nothing to measure: pass --data, --retrieval or both")
        table = measure(args)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "scenes-table.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    except Blip2rtError as error:
        print(f"evaluate_scenes: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines(table)))
    return 0


def measure(args: argparse.Namespace) -> Table:
    """All that was asked for."""
    pipe = Pipeline(args.engine)
    table: Table = {"engine": str(args.engine), "blind": args.blind}
    if args.data:
        written, shown = read_scenes(args.data), seen(args.data, args)
        preset = scene_preset(CAPTION, written.split, args)
        report = evaluate(preset, pipe, shown, args.output / "captions", any_engine=True)
        rows = json.loads((args.output / "captions" / "submission.json").read_text("utf-8"))
        captions = {row["image_id"]: row["caption"] for row in rows}
        table["captions"] = {**report.found, **truth(captions, written)} | not_scored(report.not_scored)
        sheet(args.data, captions, written).save(args.output / "sheet.png")
        if written.split != "train":
            preset = scene_preset(VQA, "val", args)  # VQAv2 publishes the answers of no other split
            report = evaluate(preset, pipe, shown, args.output / "answers", any_engine=True)
            rows = json.loads((args.output / "answers" / "submission.json").read_text("utf-8"))
            table["answers"] = answers(args.data, {row["question_id"]: row["answer"] for row in rows})
    if args.retrieval:
        table["retrieval"] = retrieval(pipe, args)
    if args.prior and args.data:
        table["prior"] = prior(args.prior, args.data)
    return table


def scene_preset(task: str, split: str, args: argparse.Namespace) -> Preset:
    """How scenes are captioned, asked about or ranked."""
    captions = task == CAPTION
    return Preset(
        name=f"scenes-{task}",
        task=task,
        data_set="vqav2" if task == VQA else "coco",
        split=split,
        config="blip2" if task == RETRIEVE else "blip2-opt-2.7b",  # not looked at: any engine is taken
        checkpoint="",
        source="scenes of training/make_scenes.py",
        published={},
        prompt=args.prompt if captions else "Question: {} Answer:",
        options=GenerationOptions(
            num_beams=args.num_beams, max_new_tokens=60 if captions else 10, length_penalty=1.0 if captions else -1.0
        ),
        candidates=RANKED,
        text_length=64,
    )


def seen(folder: Path, args: argparse.Namespace) -> Path:
    """The folder, or its twin without anything to see."""
    if not args.blind:
        return folder
    twin: Path = args.output / f"blank-{folder.name}"
    if not (twin / "scenes.json").exists():
        write_blank_twin(folder, twin)
    return twin


def truth(captions: dict[int, str], written: WrittenScenes) -> dict[str, float]:
    """Percent of facts that are true, of captions that are true as a whole, and of things that are named."""
    checker = written.checker
    verdicts = [checker.check(captions[i], scene) for i, scene in written.scenes.items()]
    found = {
        "captions true": percent(sum(v.is_true for v in verdicts), len(verdicts)),
        "facts true": percent(sum(v.true_facts for v in verdicts), sum(len(v.facts) for v in verdicts)),
        "things named": percent(sum(v.named for v in verdicts), sum(v.things for v in verdicts)),
    }
    kinds: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for fact, holds in verdict.facts:
            kinds.setdefault(fact.kind, []).append(holds)
    return found | {f"facts true, {kind}": percent(sum(all_), len(all_)) for kind, all_ in sorted(kinds.items())}


def answers(data: Path, said: dict[int | str, str]) -> dict[str, float]:
    """VQA accuracy, official rule, overall and by kind of question."""
    rows = [
        {"prediction": said[q.id], "answers": list(q.answers), "question_type": q.question_type}
        for q in read_questions(data, "vqav2")
    ]
    table = vqa_table(rows)
    return {"accuracy": table["overall"]} | {f"accuracy, {k}": v for k, v in sorted(table["perQuestionType"].items())}


def retrieval(pipe: Pipeline, args: argparse.Namespace) -> dict[str, float]:
    """R@k by ITC alone and with ITM, and how often the true caption beats five that are almost true."""
    written, shown = read_scenes(args.retrieval), seen(args.retrieval, args)
    items = read_captions(shown, "coco", written.split)
    images = pipe.embed_images([item.path for item in items])  # [I, Q, E]
    texts = pipe.embed_texts([text for item in items for text in item.captions])  # [T, E]
    itc = np.stack([(image @ texts.T).max(0) for image in images])  # [I, T]
    owners = [i for i, item in enumerate(items) for _ in item.captions]
    found = {f"ITC {name}": round(value, 2) for name, value in retrieval_table(itc, itc.T, owners).items()}
    preset = scene_preset(RETRIEVE, written.split, args)
    report = evaluate(preset, pipe, shown, args.output / "retrieval", any_engine=True)
    found |= {f"ITC+ITM {name}": value for name, value in report.found.items()}
    best = {"ITC": 0, "ITM": 0}
    for item in items:
        scores = pipe.match(item.path, [item.captions[0], *written.distractors[item.id]])
        best["ITC"] += int(np.argmax(scores.itc) == 0)
        best["ITM"] += int(np.argmax(scores.itm) == 0)
    return found | {f"{kind} true before almost true": percent(n, len(items)) for kind, n in best.items()}


def prior(sprites: Path, data: Path) -> Table:
    """Answers and the one caption that training texts alone make most likely."""
    scenes = Scenes(Sprites.open(sprites), "train", seed=0)
    drawn = [(i, scenes.scene(i)) for i in range(PRIOR_SCENES)]
    guess = TextPrior(
        (item for i, scene in drawn for item in scenes.questions(i, scene)),
        (text for i, scene in drawn for text in scenes.captions(i, scene)),
    )
    written = read_scenes(data)
    said = {q.id: guess.answer(q.question) for q in read_questions(data, "vqav2")}
    items = read_captions(data, "coco", written.split)
    captions = {item.id: guess.caption for item in items}
    scored = score_captions(captions, {item.id: item.captions for item in items})
    scores = {name: round(100 * value, 2) for name, value in scored.scores.items()}
    return {"captions": {**scores, **truth(captions, written)}, "answers": answers(data, said)}


def sheet(data: Path, captions: dict[int, str], written: WrittenScenes) -> Image.Image:
    """The first pictures with what was said, in green where all of it is true, and a true caption under what is not."""
    cells = []
    for item in read_captions(data, "coco", written.split)[:SHEET]:
        is_true = written.checker.check(captions[item.id], written.scenes[item.id]).is_true
        said = [(captions[item.id] or "(nothing)", RIGHT if is_true else WRONG)]
        with Image.open(item.path) as image:
            cells.append(Cell(np.array(image.convert("RGB")), said + [(item.captions[0], GIVEN)] * (not is_true)))
    return draw_sheet(cells)


def not_scored(reasons: dict[str, str]) -> dict[str, Any]:
    return {"not scored": reasons} if reasons else {}


def percent(part: int, whole: int) -> float:
    return round(100 * part / max(1, whole), 2)


def lines(table: Table, indent: str = "") -> list[str]:
    """The table for people."""
    rows = []
    for name, value in table.items():
        if isinstance(value, dict):
            rows += [f"{indent}{name}", *lines(value, f"{indent}  ")]
        elif isinstance(value, float):
            rows.append(f"{indent}{name:<40}{value:>8.2f}")
        else:
            rows.append(f"{indent}{name:<40} {value}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
