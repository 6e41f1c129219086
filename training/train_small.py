"""Train the model that the package bundles, from artwork to a measured model, by one command.

    python training/train_small.py --output runs/small

    sprites -> texts -> vision, language -> stage1 -> stage2 -> captions -> captioner -> engines -> tables, card
                                              └─> retriever ────────────────────────────────┘

Everything is made in OUTPUT by a program of its own, and what is there already is left alone: the same command goes on
where it was stopped. On two CPU cores it takes about four hours; `--part` shortens every training.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from blip2rt import Blip2rtError, InputError
from blip2rt.training.precision import fast_precision
from blip2rt.training.recipe import read_recipe

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
UNSEEN = "openmoji"  # the style that no recipe names
DOCUMENTS = 80_000
STAGES = {  # folder of OUTPUT -> recipe
    "vision": "small-vision",
    "language": "small-language",
    "stage1": "small-stage1",
    "stage2": "small-stage2",
    "captions": "small-caption",
    "captioner": "small-caption-more",
    "retriever": "small-retrieval",
}
BUNDLED = ("captioner", "retriever")
ABLATION_STEPS = 250  # of stage 2, with stage 1 and without
TEST_SCENES, UNIQUE_SCENES = 2000, 1000


class Chain:
    """The parts of the chain, each made once.

    Args:
        output: the folder of everything.
        sprites: the folder of the artwork.
        part: of the steps, documents and test scenes.
        processes: that train together.
    """

    def __init__(self, output: Path, sprites: Path, part: float, processes: int):
        self.output, self.sprites, self._part, self._processes = output, sprites, part, processes
        self._precision = fast_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        known = read_recipe(RECIPES / "small-vision.toml").data[0].styles
        self.styles = [style for style in known if (sprites / style).is_dir()] or sorted(
            path.name for path in sprites.iterdir() if path.is_dir()
        )

    def run(self) -> None:
        """All of it."""
        self._once(self.output / "texts" / "documents.txt", self._write_texts)
        for name in STAGES:
            self.train(name, STAGES[name])
        self.train("before-stage1", "small-stage1", ["run.steps=1", "optimizer.warmup_steps=0"])
        steps = [f"run.steps={self.scaled(ABLATION_STEPS)}"]
        self.train("ablation-with", "small-stage2", steps)
        without = [f"model.config={RECIPES}/small.json", f"model.vision={self.output}/vision/checkpoint"]
        self.train("ablation-without", "small-stage2", [*steps, *without, "model.start="])
        for name in BUNDLED:
            self.export(f"engines/{name}", name)
        for name in ("before-stage1", "ablation-with", "ablation-without"):
            self.export(f"compared/{name}/engine", name)
        self.measure()
        call(HERE / "write_card.py", self.output, *STAGES)

    def train(self, name: str, recipe: str, overrides: Sequence[str] = ()) -> None:
        """One training, into OUTPUT/NAME; how long it took goes into OUTPUT/NAME/facts.json."""
        recipe_file, folder = RECIPES / f"{recipe}.toml", self.output / name
        settings = [*self._settings(recipe_file), *overrides, f"output={folder}"]
        self._once(folder / "facts.json", lambda: self._train(recipe_file, folder, settings))

    def export(self, name: str, stage: str) -> None:
        """An fp32 engine in OUTPUT/NAME of the checkpoint of a stage."""
        arguments = ["--model", self.output / stage / "checkpoint", "--output", self.output / name]
        self._once(self.output / name, lambda: call("-m", "blip2rt", "export", *arguments))

    def measure(self) -> None:
        """Test scenes, and a table of everything that the card compares."""
        drawn = {"": self.styles} | ({"-unseen": [UNSEEN]} if (self.sprites / UNSEEN).is_dir() else {})
        for suffix, styles in drawn.items():
            self.write_scenes(f"test{suffix}", styles, TEST_SCENES)
            self.write_scenes(f"unique{suffix}", styles, UNIQUE_SCENES, "--unique")
        both = self.output / "engines"
        self.evaluate("main", both, "", "--prior", self.sprites)
        self.evaluate("blind", both, "", "--blind")
        if "-unseen" in drawn:
            self.evaluate("unseen", both, "-unseen")
        compared = self.output / "compared"
        self.evaluate("before-stage1", compared / "before-stage1" / "engine", "", captions=False)
        for name in ("ablation-with", "ablation-without"):
            self.evaluate(name, compared / name / "engine", "", retrieval=False)

    def write_scenes(self, name: str, styles: Sequence[str], count: int, *options: str) -> None:
        """Test scenes in OUTPUT/NAME."""
        arguments = ["--sprites", self.sprites, "--styles", *styles, "--output", self.output / name, *options]
        count = self.scaled(count, least=12)
        self._once(self.output / name, lambda: call(HERE / "make_scenes.py", *arguments, "--count", count))

    def evaluate(
        self, name: str, engine: Path, suffix: str, *options: object, captions: bool = True, retrieval: bool = True
    ) -> None:
        """OUTPUT/tables/NAME/scenes-table.json."""
        folder = self.output / "tables" / name
        arguments: list[object] = ["--engine", engine, "--output", folder, *options]
        arguments += ["--data", self.output / f"test{suffix}"] if captions else []
        arguments += ["--retrieval", self.output / f"unique{suffix}"] if retrieval else []
        self._once(folder / "scenes-table.json", lambda: call(HERE / "evaluate_scenes.py", *arguments))

    def scaled(self, number: int, least: int = 4) -> int:
        return max(least, round(number * self._part))

    def _write_texts(self) -> None:
        arguments = ["--sprites", self.sprites, "--styles", *self.styles, "--output", self.output / "texts"]
        call(HERE / "make_texts.py", *arguments, "--documents", self.scaled(DOCUMENTS, least=200))

    def _settings(self, recipe_file: Path) -> list[str]:
        """What replaces values of the recipe: the folders of this chain, and shorter runs."""
        recipe = read_recipe(recipe_file)
        steps, batch = self.scaled(recipe.run.steps), max(2, recipe.run.batch_size // self._processes)
        settings = [f"run.steps={steps}", f"run.batch_size={batch}", f"run.precision={self._precision}"]
        settings += [f"optimizer.warmup_steps={min(recipe.optimizer.warmup_steps, steps // 2)}"]
        settings += [f"run.log_every={min(recipe.run.log_every, max(1, steps // 10))}"]
        for i, data in enumerate(recipe.data):
            if data.format == "text":
                settings += [f"data.{i}.path={self.output}/texts/documents.txt"]
            else:
                styles = json.dumps(self.styles)
                settings += [f"data.{i}.path={self.sprites}", f"data.{i}.styles={styles}"]
        for key in ("start", "vision", "llm", "tokenizer", "text_tokenizer"):
            value = getattr(recipe.model, key)
            if value:
                settings.append(f"model.{key}={self.output / Path(value).relative_to('runs/small')}")
        if recipe.model.config:
            settings.append(f"model.config={RECIPES / Path(recipe.model.config).name}")
        return settings

    def _train(self, recipe_file: Path, folder: Path, settings: Sequence[str]) -> None:
        together = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self._processes)
        call(*(together if self._processes > 1 else ()), HERE / "train.py", recipe_file, *settings)
        weights = folder / "checkpoint" / "model.safetensors"
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        facts = {
            "recipe": recipe_file.name,
            "seed": read_recipe(recipe_file).seed,
            "commit": commit(),
            "processes": self._processes,
            "precision": self._precision,
            "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),  # of all sittings
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
        (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")

    def _once(self, result: Path, make: Callable[[], None]) -> None:
        if result.exists():
            return
        print(f"== {result.relative_to(self.output)}", file=sys.stderr, flush=True)
        make()


def call(*arguments: object) -> None:
    """A Python program, as its own process.

    Raises:
        Blip2rtError: it failed; what it said stands above.
    """
    command = [sys.executable, *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise Blip2rtError(f"{' '.join(command[1:4])} ... ended with status {code}; the same command goes on from here")


def commit() -> str:
    """Of the code that trains; "+" where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and measure the bundled model.")
    parser.add_argument("--output", type=Path, default=Path("runs/small"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--sprites", type=Path, metavar="DIR", help="artwork that is there (default: drawn from npm)")
    parser.add_argument("--part", type=float, default=1.0, help="of all steps, documents and scenes (default: 1)")
    parser.add_argument("--processes", type=int, default=1, help="that train together (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.part <= 1 or args.processes < 1:
            raise InputError(
                f"--part {args.part} must be above 0 and at most 1, --processes {args.processes} at least 1"
            )
        output = args.output.absolute()
        output.mkdir(parents=True, exist_ok=True)
        sprites = args.sprites.absolute() if args.sprites else output / "sprites"
        if not (sprites / "CREDITS.md").exists() and args.sprites is None:
            call(HERE / "make_sprites.py", "--output", sprites)
        Chain(output, sprites, args.part, args.processes).run()
    except Blip2rtError as error:
        print(f"train_small: {error}", file=sys.stderr)
        return 1
    print(f"the tables are in {output / 'card' / 'tables.md'}; make_bundled.py puts the model into the package")
    return 0


if __name__ == "__main__":
    sys.exit(main())
