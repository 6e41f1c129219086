"""Every recipe, from image encoder and language model to captions: each learns 16 examples by heart.

What is frozen stays as it was, bit by bit, and what comes out is what `blip2rt export` takes.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2rt import Pipeline
from blip2rt.export import CLIP_MEAN, CLIP_STD, export_engine
from blip2rt.model import Checkpoint, load_retrieval
from blip2rt.preprocess import preprocess

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "training" / "recipes"
EXAMPLES = 16
PROMPT = "w1 w2"

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """training/train.py in this process; what it sets for all of torch is put back for the files that come after."""
    spec = importlib.util.spec_from_file_location("train_program", REPOSITORY / "training" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    has_flash, is_deterministic = torch.backends.cuda.flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    yield module
    torch.backends.cuda.enable_flash_sdp(has_flash)
    torch.use_deterministic_algorithms(is_deterministic)


def captions() -> list[str]:
    """Three words each, none of them twice at the same place."""
    return [f"w{4 + i} w{20 + (7 * i) % EXAMPLES} w{36 + (5 * i) % EXAMPLES}" for i in range(EXAMPLES)]


def make_pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures of coarse noise, each with a rectangle, and what is said of it."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, caption in enumerate(captions()):
        pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        x, y = 8 * int(draw.integers(3)), 8 * int(draw.integers(3))
        pixels[y : y + 16, x : x + 16] = (30 * (i % 4), 255 - 60 * (i % 4), 200)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        box = {"label": f"thing{i % 4}", "box": [x / 32, y / 32, (x + 16) / 32, (y + 16) / 32]}
        question = {"question": f"w{52 + i % 3}", "answers": [caption.split()[1]]}
        rows.append({"image": f"{i}.png", "captions": [caption], "questions": [question], "boxes": [box]})
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    alone = [{key: row[key] for key in ("image", "captions")} for row in rows]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in alone))
    (folder / "texts.txt").write_text("\n\n".join(f"{PROMPT} {caption}" for caption in captions()))
    return rows


def small_config(folder: Path, **text: Any) -> Path:
    """A BLIP-2 for pictures of 32 x 32 pixels, and 64 words."""
    width = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    language = {
        "model_type": "opt",
        "vocab_size": 64,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "bos_token_id": 2,
        "pad_token_id": 1,
        "eos_token_id": 62,
    }
    config = {
        "model_type": "blip-2",
        "num_query_tokens": 8,
        "image_text_hidden_size": 24,
        "image_token_index": 63,
        "vision_config": width | {"image_size": 32, "patch_size": 8},
        "qformer_config": width | {"vocab_size": 64, "max_position_embeddings": 24, "encoder_hidden_size": 48},
        "text_config": text or language,
    }
    path = folder / "small.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_pictures(folder)
    small_config(folder)
    return folder


@pytest.fixture(scope="module")
def train(
    program: ModuleType, data: Path, tokenizers_of_64: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Train]:
    """Runs a recipe of the repository on the 16 examples; each run once."""
    runs = tmp_path_factory.mktemp("runs")

    def run(recipe: str, name: str = "", *overrides: str, steps: int = 120, rate: float = 3e-3) -> Path:
        output = runs / (name or recipe)
        if (output / "checkpoint").exists():
            return output
        is_language = "language" in recipe
        file = (
            "texts.txt"
            if is_language
            else "captions.jsonl"
            if recipe.startswith(("stage", "caption"))
            else "train.jsonl"
        )
        arguments = [
            f"output={output}",
            f"data=[{{format='{'text' if is_language else 'jsonl'}', prompt='{PROMPT}', path='{data / file}'}}]",
            f"optimizer.name={'muon' if recipe.startswith('small') else 'adamw'}",
            f"optimizer.learning_rate={rate}",
            "optimizer.min_learning_rate=0.0",
            "optimizer.warmup_steps=10",
            "optimizer.weight_decay=0.0",
            "images.augment=false",
            "model.qformer_dropout=0.0",
            f"run.steps={steps}",
            f"run.batch_size={EXAMPLES}",
            "run.workers=0",
            "run.precision=fp32",
            "text.max_tokens=16",
            *overrides,
        ]
        PartialState._reset_state()
        AcceleratorState._reset_state()
        torch.use_deterministic_algorithms(False)
        assert program.main([str(RECIPES / f"{recipe}.toml"), "--cpu", *arguments]) == 0
        return output

    torch.set_num_threads(1)
    yield run
    torch.use_deterministic_algorithms(False)


def last_row(run: Path) -> dict[str, float]:
    row: dict[str, float] = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return row


def floor(classes: int, smoothing: float) -> float:
    """The smallest cross-entropy that label smoothing leaves."""
    low = smoothing / classes
    high = 1 - smoothing + low
    return -high * math.log(high) - (classes - 1) * low * math.log(low)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def assert_frozen(before: Path, after: Path, prefixes: Sequence[str], but: str = "post_layernorm") -> None:
    old, new = tensors(before), tensors(after)
    names = [name for name in old if name.startswith(tuple(prefixes)) and but not in name]
    assert len(names) > 10
    assert all(torch.equal(old[name], new[name]) for name in names)


@pytest.fixture(scope="module")
def vision(train: Train, data: Path) -> Path:
    return train("small-vision", "", f"model.config={data}/small.json")


@pytest.fixture(scope="module")
def language(train: Train, data: Path, tokenizers_of_64: tuple[Path, Path]) -> Path:
    paths = f"model.config={data}/small.json", f"model.tokenizer={tokenizers_of_64[0]}"
    return train("small-language", "", *paths, steps=160)


@pytest.fixture(scope="module")
def random_language(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose texts depend on all that stands before them: one that knows 16 texts heeds no picture."""
    folder = tmp_path_factory.mktemp("random") / "llm"
    shutil.copytree(language / "checkpoint", folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        is_gain = "norm" in name and name.endswith("weight")
        tensor.copy_(is_gain + (0.1 if is_gain else 0.3) * torch.randn(tensor.shape, generator=generator))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stage1(train: Train, data: Path, vision: Path, tokenizers_of_64: tuple[Path, Path]) -> Path:
    return train(
        "stage1",
        "",
        f"model={{config='{data}/small.json', vision='{vision}/checkpoint', text_tokenizer='{tokenizers_of_64[1]}'}}",
        steps=300,
        rate=4e-3,
    )


@pytest.fixture(scope="module")
def stage2(train: Train, stage1: Path, random_language: Path) -> Path:
    return train("stage2", "", f"model={{start='{stage1}/checkpoint', llm='{random_language}'}}", steps=450, rate=1e-2)


def test_vision(vision: Path) -> None:
    row = last_row(vision)
    assert row["things"] == 1
    assert row["loss"] < floor(5, 0.05) + 0.05


def test_language(language: Path) -> None:
    """Only which of the documents it is cannot be known: one token of six."""
    assert last_row(language)["loss"] < math.log(EXAMPLES) / 6 + 0.05


def test_stage1(stage1: Path, vision: Path) -> None:
    row = last_row(stage1)
    assert row["itc"] < floor(EXAMPLES, 0.1) + 0.05
    assert row["itm"] < 0.05
    assert row["itg"] < floor(64, 0.1) + 0.05
    assert_frozen(vision, stage1, ["vision_model."])
    assert Blip2ForImageTextRetrieval.from_pretrained(stage1 / "checkpoint").config.num_query_tokens == 8


def test_retrieval(train: Train, stage1: Path, data: Path) -> None:
    """It goes on from stage 1, whose temperature and captioning head lie beside what transformers knows."""
    run = train(
        "retrieval",
        "",
        f"model.start={stage1}/checkpoint",
        "model.image_size=32",
        "optimizer.warmup_steps=1",
        "run.log_every=1",
        steps=5,
        rate=1e-5,  # at its optimum Adam makes whole steps of rounding noise
    )
    row = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert row["itg"] < floor(64, 0.1) + 0.1
    model = load_retrieval(run / "checkpoint")
    pixels = [preprocess(data / f"{i}.png", 32, CLIP_MEAN, CLIP_STD) for i in range(EXAMPLES)]
    image_embeds = model.vision(torch.from_numpy(np.stack(pixels)))
    # [CLS], three words from w0 = 4 on, [SEP]
    ids = torch.tensor([[2, *(4 + int(word[1:]) for word in text.split()), 3] for text in captions()])
    mask = torch.zeros(EXAMPLES, 1, 1, 5)
    _, images = model.qformer(image_embeds)
    _, texts = model.text(ids, mask)
    cosines = torch.einsum("iqe,te->itq", images, texts).amax(2)
    assert cosines.argmax(1).tolist() == cosines.argmax(0).tolist() == list(range(EXAMPLES))
    matched = model.itm(image_embeds, ids, mask)[1].mean(1).softmax(1)[:, 1]
    missed = model.itm(image_embeds, ids.roll(1, 0), mask)[1].mean(1).softmax(1)[:, 1]
    assert matched.min() > 0.5 > missed.max()


def test_stage2(stage2: Path, stage1: Path, random_language: Path) -> None:
    assert last_row(stage2)["loss"] < 0.05
    assert_frozen(stage1, stage2, ["vision_model."])
    old, new = load_file(random_language / "model.safetensors"), tensors(stage2)
    assert all(torch.equal(value, new[f"language_model.{name}"]) for name, value in old.items())
    Checkpoint(stage2 / "checkpoint")
    model = Blip2ForConditionalGeneration.from_pretrained(stage2 / "checkpoint")
    assert torch.equal(model.language_model.lm_head.weight, new["language_model.model.decoder.embed_tokens.weight"])


def test_captions_come_out_of_the_engine(train: Train, stage2: Path, data: Path, tmp_path: Path) -> None:
    run = train("caption", "", f"model.start={stage2}/checkpoint", "model.image_size=32", steps=60, rate=2e-4)
    assert last_row(run)["loss"] < 0.05
    assert_frozen(stage2, run, ["language_model."])
    pipe = Pipeline(export_engine(run / "checkpoint", tmp_path / "engine"))
    found = pipe.caption([data / f"{i}.png" for i in range(EXAMPLES)], prompt=PROMPT)
    assert [caption.text for caption in found] == captions()


def test_vqa_with_the_question_in_the_qformer(
    train: Train, stage2: Path, data: Path, tokenizers_of_64: tuple[Path, Path], tmp_path: Path
) -> None:
    model = f"model={{start='{stage2}/checkpoint', question_conditioned=true, text_tokenizer='{tokenizers_of_64[1]}'}}"
    run = train("vqa", "", model, steps=150)
    assert last_row(run)["loss"] < 0.05
    assert_frozen(stage2, run, ["language_model.", "vision_model."])
    pipe = Pipeline(export_engine(run / "checkpoint", tmp_path / "engine"))
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    asked = [row["questions"][0] for row in rows]
    found = pipe.answer([data / row["image"] for row in rows], [question["question"] for question in asked])
    assert [answer.text for answer in found] == [question["answers"][0] for question in asked]


def test_captions_and_questions_share_a_picture(train: Train, stage2: Path, data: Path) -> None:
    """Both behind one pass over the picture, through the frozen image encoder's cached output."""
    cache = stage2.parent / "features"
    run = train(
        "caption",
        "together",
        f"data=[{{format='jsonl', prompt='{PROMPT}', path='{data}/train.jsonl'}}]",
        f"model={{start='{stage2}/checkpoint', lora_rank=4}}",
        "text.per_picture=2",
        f"images.cache={cache}",
        steps=120,
    )
    assert last_row(run)["loss"] < 0.05
    assert_frozen(stage2, run, ["vision_model."])
    assert len(list(cache.glob("*.npy"))) == 1
    old, new = tensors(stage2), tensors(run)
    assert old.keys() == new.keys()  # the adapters are merged
    adapted = [name for name in old if name.startswith("language_model.") and not torch.equal(old[name], new[name])]
    assert {name.split(".")[-2] for name in adapted} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert all(name.endswith("weight") for name in adapted)


@pytest.mark.parametrize("is_gated", [True, False])
def test_t5_trains_and_keeps_its_output_layer(
    is_gated: bool, train: Train, tmp_path: Path, checkpoint_maker: Callable[..., Path]
) -> None:
    """Its configuration says that the output layer is tied whether it is or not."""
    untied = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu" if is_gated else "relu"}
    start = checkpoint_maker(tmp_path / "t5", 3, "t5", **untied)
    weights = load_file(start / "model.safetensors")
    head = weights["language_model.shared.weight"]
    weights["language_model.lm_head.weight"] = 2 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    expected: Any = Checkpoint(start)
    assert not expected.config.text.tie_word_embeddings
    run = train("stage2", f"t5-{is_gated}", f"model={{start='{start}'}}", "run.log_every=1", steps=12, rate=1e-2)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    found = Checkpoint(run / "checkpoint")
    names = [name for name in expected.parameter_names() if name.startswith(("encoder.", "decoder."))]
    assert "decoder.head.lm_head.weight" in names
    assert all(torch.equal(expected.parameter(name), found.parameter(name)) for name in names)


def test_a_loss_that_is_no_number_stops_it(
    program: ModuleType,
    stage1: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It names the batch, and keeps the last state that was good; a changed recipe goes on from there."""
    arguments = [
        str(RECIPES / "retrieval.toml"),
        "--cpu",
        f"output={tmp_path}",
        f"data=[{{format='jsonl', path='{data}/train.jsonl'}}]",
        f"model.start={stage1}/checkpoint",
        "model.image_size=32",
        "optimizer.warmup_steps=1",
        "run.precision=fp32",
        "run.steps=6",
        "run.batch_size=4",
        "run.save_every=1",
        "text.max_tokens=16",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(program, "learning_rate", lambda step, *_: 1e-5 if step < 3 else 1e30)
        assert program.main(arguments) == 1
    message = capsys.readouterr().err
    assert "step 5: the loss is nan with the pictures" in message
    assert message.count(".png") == 4
    assert f"the last good state is {tmp_path}/states/000000003.pt" in message
    assert program.main([*arguments, "optimizer.learning_rate=1e-6"]) == 2
    assert "optimizer.learning_rate 1e-05 (now 1e-06)" in capsys.readouterr().err
    assert program.main([*arguments, "optimizer.learning_rate=1e-6", "--changed-recipe"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1] == 6
