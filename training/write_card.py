"""From a folder of `train_small.py` to a model card: its tables, the curves of every stage, the sheet of pictures.

python training/write_card.py RUNS STAGE ...
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Table = dict[str, Any]
WIDTH, HEIGHT, MARGIN, TITLE = 300, 150, 34, 22  # of one curve's panel, in pixels of the SVG
ACROSS = 5  # panels side by side
COLORS = ("#1f5fbf", "#c2571a", "#12702b", "#7b3fa0", "#5f6368")
NO_LOSSES = ("step", "learning_rate", "gradient_norm", "bad_records", "seconds")
SMOOTH = 0.05  # a curve is a mean over so large a part of its points
ROWS = {  # key of scenes-table.json -> how the card calls it
    "captions": {
        "CIDEr": "CIDEr",
        "Bleu_4": "BLEU-4",
        "captions true": "captions with every fact true, %",
        "things named": "things named, %",
        "facts true": "facts true, %",
    },
    "answers": {"accuracy": "VQA accuracy, %"},
    "retrieval": {
        "ITC txt_r1": "text R@1 (ITC), %",
        "ITC img_r1": "image R@1 (ITC), %",
        "ITC+ITM txt_r1": "text R@1 (ITC + ITM), %",
        "ITC+ITM img_r1": "image R@1 (ITC + ITM), %",
        "ITC true before almost true": "true before 5 almost true (ITC), %",
        "ITM true before almost true": "true before 5 almost true (ITM), %",
    },
}
COLUMNS = {  # folder of tables -> what it measures
    "main": "the model",
    "blind": "grey pictures",
    "prior": "texts alone",
    "unseen": "unseen art style",
    "before-stage1": "before stage 1",
    "ablation-with": "stage 2 after stage 1",
    "ablation-without": "stage 2 without",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write RUNS/card: tables, curves, the sheet of pictures, the log.")
    parser.add_argument("runs", type=Path, help="what train_small.py made")
    parser.add_argument("stages", nargs="+", metavar="STAGE", help="its trainings that the card tells of, in order")
    args = parser.parse_args(argv)
    try:
        write_card(args.runs, args.stages)
    except OSError as error:
        print(f"write_card: {error}: train_small.py makes what is missing", file=sys.stderr)
        return 1
    return 0


def write_card(runs: Path, stages: Sequence[str]) -> None:
    """Write RUNS/card: tables.md, tables.json, curves.svg, sheet.png, log.json."""
    card = runs / "card"
    card.mkdir(exist_ok=True)
    logs = {stage: read_log(runs / stage / "log.jsonl") for stage in stages}
    facts = {stage: json.loads((runs / stage / "facts.json").read_text("utf-8")) for stage in stages}
    tables = {path.parent.name: json.loads(path.read_text("utf-8")) for path in runs.glob("tables/*/scenes-table.json")}
    if "prior" in tables.get("main", {}):
        tables["prior"] = tables["main"]["prior"]
    (card / "curves.svg").write_text(draw_curves(logs), "utf-8")
    shutil.copy(runs / "tables" / "main" / "sheet.png", card / "sheet.png")
    thinned = {stage: thin(log) for stage, log in logs.items()}
    log = {stage: {**facts[stage], "log": thinned[stage]} for stage in stages}
    (card / "log.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    sections = {
        "stages": stage_table(logs, facts),
        "comparison": comparison(tables),
        "kinds": by_kind(tables["main"]),
    }
    (card / "tables.json").write_text(json.dumps(sections, indent=1) + "\n", "utf-8")
    (card / "tables.md").write_text("\n\n".join(sections.values()) + "\n", "utf-8")


def read_log(path: Path) -> list[Table]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def thin(log: Sequence[Table], points: int = 100) -> list[Table]:
    """At most about so many rows, the last one among them, without what only the run itself needs."""
    every = max(1, len(log) // points)
    kept = [*log[:-1:every], log[-1]]
    return [
        {key: round(value, 5) for key, value in row.items() if key not in ("bad_records", "seconds")} for row in kept
    ]


def stage_table(logs: Mapping[str, Sequence[Table]], facts: Mapping[str, Table]) -> str:
    """How each stage was trained and what its losses came down to."""
    rows = []
    for stage, log in logs.items():
        known, last = facts[stage], log[-max(1, round(len(log) * SMOOTH)) :]
        losses = [key for key in log[-1] if key not in NO_LOSSES]
        ends = ", ".join(f"{key} {sum(row[key] for row in last) / len(last):.3f}" for key in losses)
        rows.append(
            [
                *(stage, f"`{known['recipe']}`", known["seed"], log[-1]["step"], known["minutes"], ends),
                *(f"`{known['commit']}`", f"`{known['sha256'][:16]}`"),
            ]
        )
    head = ["stage", "recipe", "seed", "steps", "minutes", "mean of the last twentieth", "commit", "sha256"]
    return markdown(head, rows)


def comparison(tables: Mapping[str, Table]) -> str:
    """Every measure beside what it must be better than."""
    columns = [name for name in COLUMNS if name in tables]
    rows = []
    for part, keys in ROWS.items():
        for key, title in keys.items():
            values = [tables[column].get(part, {}).get(key) for column in columns]
            if any(value is not None for value in values):
                rows.append([title, *("" if value is None else f"{value:.2f}" for value in values)])
    return markdown(["", *(COLUMNS[column] for column in columns)], rows)


def by_kind(table: Table) -> str:
    """Facts of captions and answers, by their kind."""
    rows = []
    for part, prefix, title in (("captions", "facts true, ", "fact of a caption"), ("answers", "accuracy, ", "answer")):
        for key, value in table.get(part, {}).items():
            if key.startswith(prefix):
                rows.append([title, key.removeprefix(prefix), f"{value:.2f}"])
    return markdown(["", "kind", "right, %"], rows)


def markdown(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def draw_curves(logs: Mapping[str, Sequence[Table]]) -> str:
    """A panel for each stage: its losses over its steps, smoothed."""
    panels = [draw_panel(stage, log) for stage, log in logs.items()]
    right, down = WIDTH + MARGIN, HEIGHT + TITLE + 2 * MARGIN
    width, height = right * min(ACROSS, len(panels)) + MARGIN, down * -(-len(panels) // ACROSS)
    groups = "\n".join(
        f'<g transform="translate({MARGIN + i % ACROSS * right},{TITLE + 6 + i // ACROSS * down})">\n{panel}\n</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>\n{groups}\n</svg>\n'
    )


def draw_panel(stage: str, log: Sequence[Table]) -> str:
    names = [key for key in ("loss", "itc", "itm", "itg", "things") if key in log[0]]
    curves = {name: smoothed([row[name] for row in log]) for name in names}
    top = max(max(curve) for curve in curves.values()) or 1.0
    last = log[-1]["step"]
    parts = [
        f'<text x="0" y="-8" font-weight="bold">{stage}</text>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#d5d5d8"/>',
        f'<text x="-4" y="9" text-anchor="end">{top:.1f}</text><text x="-4" y="{HEIGHT}" text-anchor="end">0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{last} steps</text>',
    ]
    for i, (name, curve) in enumerate(curves.items()):
        points = " ".join(
            f"{WIDTH * row['step'] / last:.1f},{HEIGHT * (1 - value / top):.1f}"
            for row, value in zip(log, curve, strict=True)
        )
        color = COLORS[i]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        parts.append(f'<text x="{4 + i * 58}" y="{HEIGHT + 28}" fill="{color}">{name} {curve[-1]:.2f}</text>')
    return "\n".join(parts)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window that ends at each point."""
    window = max(1, round(len(values) * SMOOTH))
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


if __name__ == "__main__":
    sys.exit(main())
