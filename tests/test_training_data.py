"""What a training reads: recipes, streams of examples, views of pictures; and what it does with bad ones."""

import io
import itertools
import json
import resource
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip2rt import Blip2rtError, CheckpointError, InputError, OutputError
from blip2rt.data.examples import BadRecords, Box, Example, read_examples
from blip2rt.preprocess import preprocess
from blip2rt.training.build import build
from blip2rt.training.pictures import View, draw_view, patch_labels, render
from blip2rt.training.recipe import DataRecipe, ImageRecipe, OptimizerRecipe, read_recipe
from blip2rt.training.schedule import build_optimizers, learning_rate
from blip2rt.training.state import RunFolder
from blip2rt.training.streams import ListStream, Mixture, ShardStream, open_streams

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def test_every_recipe_is_read() -> None:
    recipes = [read_recipe(path) for path in sorted(RECIPES.glob("*.toml"))]
    assert {recipe.stage for recipe in recipes} >= {"stage1", "stage2", "caption", "vqa", "retrieval"}


WRONG = {
    "unknown key": (["run.batchsize=3"], "run.batchsize is unknown .did you mean batch_size"),
    "unknown section": (["optimiser.name=adamw"], "optimiser is unknown .did you mean optimizer"),
    "unknown stage": (["stage=stage3"], "stage is 'stage3', not one of vision, language"),
    "wrong type": (["run.steps=many"], "run.steps is 'many', not of type int"),
    "no steps": (["run.steps=0"], "run.steps is 0, and must be at least 1"),
    "warm-up": (["run.steps=2000"], "warmup_steps 2000 leaves nothing of run.steps 2000"),
    "format": (["data.0.format=coko"], "data.format is 'coko'"),
    "cached augmentation": (["images.cache=x"], "images.cache needs images.augment = false"),
    "cached, but learning": (["images={augment=false, cache='x'}", "model.train=['vision']"], "frozen image encoder"),
    "no weight": (["data.1.weight=0.0"], "data.weight is 0.0, and must be above 0"),
    "dropout": (["model.qformer_dropout=1.0"], "qformer_dropout is 1.0, and must be below 1"),
    "lora": (["model.lora_rank=4"], "model.lora_rank is for a language model"),
    "one picture": (["run.batch_size=1"], "leaves the stage stage1 no other picture"),
    "no data": (["data=[]"], "there is no ..data.."),
    "no model": (["model={}"], "model.start or model.config"),
    "text": (["data.0.format=text"], "has no pictures"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes(name: str) -> None:
    overrides, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        read_recipe(RECIPES / "stage1.toml", overrides)


def test_the_vision_norm_may_learn_behind_a_cache() -> None:
    override = ["images={augment=false, cache='x'}", "model.train=['vision.norm', 'qformer']"]
    read_recipe(RECIPES / "caption-lora.toml", override)


def test_all_problems_of_a_recipe_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('stage = "stage1"\nsteps = 3\n[run]\nsteps = 1.5\n')
    with pytest.raises(
        InputError, match=r"steps is unknown.*output is missing.*data is missing.*batch_size is missing"
    ):
        read_recipe(path)
    path.write_text("stage = ")
    with pytest.raises(InputError, match="is not TOML"):
        read_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "absent.toml")


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def examples(number: int) -> list[Example]:
    return [Example(str(i), captions=("w",)) for i in range(number)]


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 90), st.integers(0, 9))
def test_lists_are_split_and_resumed(number: int, processes: int, position: int, seed: int) -> None:
    """An epoch holds every example once, whoever takes it; a stream that begins later goes on like the first."""
    streams = [ListStream(examples(number), seed, rank, processes) for rank in range(processes)]
    drawn = [[next(stream).id for _ in range(2 * number)] for stream in streams]
    together = [id for row in zip(*drawn, strict=True) for id in row]
    for epoch in range(2):
        assert sorted(together[epoch * number : (epoch + 1) * number], key=int) == [e.id for e in examples(number)]
    whole, later = (
        ListStream(examples(number), seed, 0, processes),
        ListStream(examples(number), seed, 0, processes, position),
    )
    first = [next(whole).id for _ in range(position + 20)]
    assert [next(later).id for _ in range(20)] == first[position:]


def write_shards(folder: Path, number: int, samples: int) -> list[str]:
    """Shards whose sample 1 has neither caption nor picture that can be read, as the shard may be."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    shards = []
    for shard in range(number):
        path = folder / f"shard-{shard}.tar"
        with tarfile.open(path, "w") as archive:
            for i in range(samples):
                text = json.dumps({"caption": "" if i == 1 else f"w{i}"}).encode()
                for ending, data in (("png", picture.getvalue()), ("json", text)):
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        shards.append(str(path))
    return shards


def test_shards_are_split_shuffled_and_resumed(tmp_path: Path) -> None:
    shards, usable = write_shards(tmp_path, 5, 7), 5 * 6
    bad = BadRecords()
    streams = [ShardStream(shards, bad, 3, rank, 2, window=4) for rank in range(2)]
    # an epoch of a process is as long as the shards that it drew
    first = [[next(stream).id for _ in range(12)] for stream in streams]
    assert set(first[0]) & set(first[1]) == set()
    alone = ShardStream(shards, BadRecords(), 3, window=4)
    epochs = [[next(alone).id for _ in range(usable)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == usable
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    for position in (0, 1, 17, 31, 44):
        later = ShardStream(shards, BadRecords(), 3, position=position, window=4)
        assert [next(later).id for _ in range(9)] == list(itertools.chain(*epochs))[position : position + 9]
    assert bad.count
    assert "no caption" in str(bad)


def test_damaged_shards_and_too_few(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 2, 7)
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[:3000])
    bad = BadRecords()
    stream = ShardStream(shards, bad, 0, window=4)
    found = {next(stream).id.split("/")[0] for _ in range(30)}
    assert "shard-1" in found
    assert "shard-0" in str(bad)
    with pytest.raises(InputError, match="2 shards cannot be split over 3 processes"):
        ShardStream(shards, bad, 0, 0, 3)
    with pytest.raises(InputError, match="names no shard"):
        open_streams([DataRecipe("webdataset", str(tmp_path / "nothing-*.tar"))], 0, bad)
    for shard in shards:
        Path(shard).write_bytes(b"")
    with pytest.raises(InputError, match="no usable record"):
        next(ShardStream(shards, bad, 0))


def test_mixtures_keep_their_weights_and_their_place() -> None:
    def mixture(positions: list[int]) -> Mixture:
        return Mixture([ListStream(examples(5), i, position=p) for i, p in enumerate(positions)], [3.0, 1.0], 7)

    whole = mixture([0, 0])
    drawn = []
    for _ in range(400):
        drawn.append(next(whole))
        if len(drawn) == 150:
            positions = whole.positions
    counts = Counter(source for _, source, _ in drawn)
    assert 0.68 < counts[0] / 400 < 0.82
    later = mixture(positions)
    assert [next(later) for _ in range(250)] == drawn[150:]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets with bad records


def test_bad_records_are_counted_and_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    rows: list[Any] = [
        {"image": "good.png", "captions": ["w1", " "]},
        {"image": "absent.png", "caption": "w1"},
        {"image": "good.png", "captions": [" "]},
        {"image": "good.png", "captions": "w1"},
        {"image": "good.png", "questions": [{"question": "w1", "answers": [""]}]},
        {"image": "good.png", "boxes": [{"label": "w1", "box": [0.5, 0, 0.5, 1]}]},
        {"captions": ["w1"]},
        [1],
    ]
    lines = [*map(json.dumps, rows), "{"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    bad = BadRecords()
    (found,) = read_examples("jsonl", tmp_path / "train.jsonl", "", bad)
    assert found.captions == ("w1",)
    assert bad.count == len(lines) - 1
    for named in ("line 2: absent.png is missing", "line 3: it has no caption", "line 6: the box of w1", "line 9"):
        assert named in str(bad)
    (tmp_path / "train.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"no usable record; 8 bad records: line 1: absent.png is missing"):
        read_examples("jsonl", tmp_path / "train.jsonl", "", BadRecords())


def test_karpathy_and_vqav2_for_training(tmp_path: Path) -> None:
    """restval is training too; questions of a picture stand together; what is missing is named."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "COCO_train2014_000000000007.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    rows = [
        ("a.jpg", "restval", ["w1"]),
        ("b.jpg", "train", ["w2"]),
        ("a.jpg", "val", ["w3"]),
        ("a.jpg", "train", [""]),
    ]
    images = [
        {"cocoid": i, "filename": file, "split": split, "sentences": [{"raw": raw} for raw in captions]}
        for i, (file, split, captions) in enumerate(rows)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    bad = BadRecords()
    assert [example.captions for example in read_examples("coco", tmp_path, "train", bad)] == [("w1",)]
    assert bad.named == ["b.jpg is missing", "a.jpg has no caption"]

    asked = [{"question_id": i, "image_id": 7 + i // 2, "question": f"w{i}"} for i in range(3)]
    answers = [{"question_id": i, "answers": [{"answer": "w5"}, {"answer": "w6"}]} for i in range(3)]
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    bad = BadRecords()
    (example,) = read_examples("vqav2", tmp_path, "train", bad)
    assert example.questions == (("w0", ("w5", "w6")), ("w1", ("w5", "w6")))
    assert bad.named == ["train2014/COCO_train2014_000000000008.jpg is missing"]


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_without_augmentation_a_view_is_what_the_runtime_sees(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    recipe = ImageRecipe(augment=False)
    values, view = render(pixels, 28, MEAN, STD, recipe, np.random.default_rng(0))
    assert view == View()
    assert np.array_equal(values, preprocess(pixels, 28, MEAN, STD))


@given(st.integers(0, 10_000), st.integers(8, 90), st.integers(8, 90), st.floats(0.1, 1))
def test_views(seed: int, width: int, height: int, smallest: float) -> None:
    """A crop is large enough and inside; a box in the picture is where the view says it is."""
    draw = np.random.default_rng(seed)
    view = draw_view((width, height), ImageRecipe(min_scale=smallest), draw)
    assert 0 <= view.x0 < view.x1 <= 1
    assert 0 <= view.y0 < view.y1 <= 1
    area = (view.x1 - view.x0) * (view.y1 - view.y0)
    assert area >= smallest - (width + height) / (width * height)  # sides are whole pixels
    x, y = draw.random(2)
    box = Box("a", 0.8 * x, 0.8 * y, 0.8 * x + 0.2, 0.8 * y + 0.2)
    moved = view.move(box)
    for across, down in draw.random((20, 2)):
        u = view.x0 + ((1 - across) if view.is_flipped else across) * (view.x1 - view.x0)
        v = view.y0 + down * (view.y1 - view.y0)
        is_inside = box.x0 < u < box.x1 and box.y0 < v < box.y1
        assert is_inside == (moved is not None and moved.x0 < across < moved.x1 and moved.y0 < down < moved.y1)


def test_patches_take_the_smallest_box_over_their_centre() -> None:
    boxes = [Box("small", 0.3, 0.3, 0.6, 0.6), Box("large", 0.0, 0.0, 0.9, 0.7)]
    labels = patch_labels(boxes, 0, {"small": 1, "large": 2}, View(), 4).reshape(4, 4)
    assert labels.tolist() == [[2, 2, 2, 2], [2, 1, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0]]
    flipped = patch_labels(boxes, 0, {"small": 1, "large": 2}, View(is_flipped=True), 4).reshape(4, 4)
    assert flipped.tolist() == [row[::-1] for row in labels.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers, checkpoints, states


def test_groups_and_rates() -> None:
    recipe = OptimizerRecipe("muon", 1e-3, 1e-5, warmup_steps=4, vision_layer_decay=0.5)
    shapes = {
        "vision.embedding.patch.weight": (2, 3, 1, 1),
        "vision.blocks.0.fc1.weight": (3, 2),
        "vision.blocks.1.fc1.bias": (3,),
        "vision.norm.weight": (2,),
        "qformer.blocks.0.qkv.weight": (6, 2),
        "qformer.projection.weight": (4, 2),
    }
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    found = {}
    for optimizer in build_optimizers(named.items(), recipe):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = next(name for name, other in named.items() if other is parameter)
                found[name] = (type(optimizer).__name__, group["weight_decay"], group["scale"])
    assert found == {
        "vision.embedding.patch.weight": ("AdamW", 0.05, 0.25),
        "vision.blocks.0.fc1.weight": ("Muon", 0.05, 0.5),
        "vision.blocks.1.fc1.bias": ("AdamW", 0.0, 1.0),
        "vision.norm.weight": ("AdamW", 0.0, 1.0),
        "qformer.blocks.0.qkv.weight": ("Muon", 0.05, 1.0),
        "qformer.projection.weight": ("AdamW", 0.05, 1.0),
    }
    rates = [learning_rate(step, 24, recipe) for step in range(24)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[14] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 1e-5 < rates[-1] < 2e-5


def test_checkpoints_that_do_not_fit(tmp_path: Path, tiny_checkpoint: Path, tiny_retrieval_checkpoint: Path) -> None:
    data = [f"data=[{{format='jsonl', path='{tmp_path}/x.jsonl'}}]"]

    def wrong(recipe: str, model: str, error: type[Blip2rtError], message: str) -> None:
        with pytest.raises(error, match=message):
            build(read_recipe(RECIPES / f"{recipe}.toml", [*data, model, "images.augment=false", "images.cache=''"]))

    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["vision_config"]["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = f"model={{start='{tiny_checkpoint}', config='{tmp_path}/config.json'"
    wrong("stage2", f"{other}}}", CheckpointError, r"do not fit the recipe's model: vision.blocks.0.fc1.weight is")
    wrong("stage2", f"model={{start='{tiny_retrieval_checkpoint}'}}", InputError, "name it with model.llm")
    wrong(
        "stage2",
        f"model={{config='{tmp_path}/config.json', tokenizer='{tiny_checkpoint}'}}",
        CheckpointError,
        "no checkpoint of the recipe",
    )
    wrong("caption-lora", f"model={{start='{tiny_checkpoint}', train=['qformers']}}", InputError, "names qformers")
    wrong("stage2", f"model={{start='{tmp_path}/absent'}}", CheckpointError, "no such directory")
    wrong("stage1", f"model={{start='{tiny_checkpoint}'}}", InputError, "model.text_tokenizer must name")


def small_recipe(output: Path, *overrides: str) -> Any:
    return read_recipe(RECIPES / "stage1.toml", [f"output={output}", *overrides])


def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    folder = RunFolder(small_recipe(tmp_path), 1)
    folder.claim()
    folder.save(1, {"step": 1, "values": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"state of step 2 cannot be written.*000000001.pt"):
            folder.save(2, {"step": 2, "values": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = folder.load()
    assert state is not None
    assert state["step"] == 1
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000000001.pt"]
    for step in (2, 3, 4):
        folder.save(step, {"step": step})
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["000000003.pt", "000000004.pt"]


def test_a_folder_keeps_to_its_recipe(tmp_path: Path) -> None:
    folder = RunFolder(small_recipe(tmp_path), 1)
    folder.claim()
    folder.save(1, {"step": 1})
    RunFolder(small_recipe(tmp_path, "run.save_every=7", "run.workers=1"), 1).claim()
    with pytest.raises(InputError, match=r"another recipe: optimizer.learning_rate 0.0001 .now 0.001., seed 0 .now 1."):
        RunFolder(small_recipe(tmp_path, "seed=1", "optimizer.learning_rate=1e-3"), 1).claim()
    with pytest.raises(InputError, match=r"processes 1 .now 2."):
        RunFolder(small_recipe(tmp_path), 2).claim()
    (tmp_path / "states" / "000000002.pt").write_bytes(b"half a st")
    with pytest.raises(CheckpointError, match=r"000000002.pt is damaged"):
        folder.load()
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    folder.cut_log(1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
