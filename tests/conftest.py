"""Tiny random checkpoints in transformers' own format, and engines of one of them, for all tests."""

import fcntl
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import blip2rt.export
from blip2rt import Pipeline, bundled
from blip2rt.export import export_engine
from blip2rt.export.graphs import trace_stage
from blip2rt.stages import StageSpec

pytest_plugins = ["serving"] if find_spec("fastapi") else []

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids as OPT's: <pad> is 1, </s> is BOS and 2

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

ASKING_QFORMER = {"use_qformer_text_input": True, "vocab_size": 40, "max_position_embeddings": 60}

# torch.onnx builds the same table of operators anew for each graph, which is half of the time of a tiny one
ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]

CheckpointMaker = Callable[..., Path]

# of few tests, and minutes long: begun first, so that no core waits for one of them at the end
LONG_FILES = ("test_train_small.py", "test_training_resume.py", "test_torch_device.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others keep their order."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def structure(module: torch.nn.Module) -> tuple[object, ...]:
    """What a graph depends on: the kinds of all parts, their settings, the shapes of their parameters."""
    parts = [
        (name, type(part), repr([(key, value) for key, value in vars(part).items() if not key.startswith("_")]))
        for name, part in module.named_modules()
    ]
    return *parts, *((name, parameter.shape) for name, parameter in module.named_parameters())


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Graphs of the same structure are traced once for all exports: that is where their time goes."""
    known: dict[tuple[object, ...], ir.Model] = {}

    def trace_once(module: torch.nn.Module, spec: StageSpec) -> ir.Model:
        key = spec, *structure(module)
        if key not in known:
            known[key] = trace_stage(module, spec)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip2rt.export, "trace_stage", trace_once)
        yield


def make_checkpoint(
    directory: Path,
    seed: int = 0,
    model_type: str = "opt",
    *,
    vision: dict[str, Any] | None = None,
    qformer: dict[str, Any] | None = None,
    **text: Any,
) -> Path:
    """A random BLIP-2 of odd sizes drawn from `seed`; `text` overrides fields of the language model's config.

    `model_type` is the language model's, "opt" or "t5".

    Weights are large enough that pictures and prompts matter, and the last id but one of the tokenizer stops a text
    often enough. Words are w0, w1, ...; the last id is the placeholder of the image.
    """
    draw = random.Random(seed)
    vocab_size = draw.randint(40, 130)
    heads = {part: draw.randint(1, 4) for part in ("vision", "qformer", "text")}
    widths = {part: heads[part] * draw.randint(3, 11) for part in heads}
    patch = draw.choice([7, 14])
    most_layers = 2 if model_type == "t5" else 6  # T5 has layers enough in its language model
    config = Blip2Config(
        vision_config={
            "hidden_size": widths["vision"],
            "intermediate_size": draw.randint(10, 70),
            "num_hidden_layers": draw.randint(1, most_layers),
            "num_attention_heads": heads["vision"],
            "image_size": patch * draw.randint(1, 6),
            "patch_size": patch,
            **(vision or {}),
        },
        qformer_config={
            "hidden_size": widths["qformer"],
            "intermediate_size": draw.randint(10, 70),
            "num_hidden_layers": draw.randint(1, most_layers),
            "num_attention_heads": heads["qformer"],
            "cross_attention_frequency": draw.choice([1, 2, 2, 3]),
            **(qformer or {}),
        },
        text_config={
            **(random_t5 if model_type == "t5" else random_opt)(draw, widths["text"], heads["text"]),
            "model_type": model_type,
            "vocab_size": vocab_size,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": vocab_size - 2,
            **text,
        },
        num_query_tokens=draw.randint(1, 40),
        image_token_index=vocab_size - 1,
    )
    model = Blip2ForConditionalGeneration(config)
    randomise(model, seed)
    model.language_model.tie_weights()
    model.save_pretrained(directory)
    write_tokenizer(directory, vocab_size, ends_prompts=model_type == "t5")
    return directory


def make_asking_checkpoint(
    directory: Path, seed: int = 0, model_type: str = "opt", others: dict[str, Any] | None = None, **qformer: Any
) -> Path:
    """A random BLIP-2 whose Q-Former reads questions, as VQA fine-tuning leaves it; `others` are of other parts."""
    make_checkpoint(directory, seed, model_type, qformer=ASKING_QFORMER | qformer, **(others or {}))
    width = json.loads((directory / "config.json").read_text())["qformer_config"]["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    tables = {"word": ASKING_QFORMER["vocab_size"], "position": ASKING_QFORMER["max_position_embeddings"]}
    tensors = load_file(directory / "model.safetensors")
    for name, rows in tables.items():  # transformers keeps them in its retrieval model alone
        tensors[f"embeddings.{name}_embeddings.weight"] = torch.randn(rows, width, generator=generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_text_tokenizer(directory / "qformer_tokenizer", ASKING_QFORMER["vocab_size"])
    return directory


def make_retrieval_checkpoint(
    directory: Path, seed: int = 0, *, qformer: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A random retrieval model of odd sizes drawn from `seed`; `config` overrides fields of its `Blip2Config`.

    Its tokenizer knows the words w0, w1, ... and puts [CLS] before and [SEP] behind a text, as BERT's does.
    """
    draw = random.Random(seed)
    vocab_size = draw.randint(40, 130)
    heads = {part: draw.randint(1, 4) for part in ("vision", "qformer")}
    widths = {part: heads[part] * draw.randint(3, 11) for part in heads}
    patch = draw.choice([7, 14])
    model = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config={
                "hidden_size": widths["vision"],
                "intermediate_size": draw.randint(10, 70),
                "num_hidden_layers": draw.randint(1, 4),
                "num_attention_heads": heads["vision"],
                "image_size": patch * draw.randint(1, 6),
                "patch_size": patch,
            },
            qformer_config={
                "hidden_size": widths["qformer"],
                "intermediate_size": draw.randint(10, 70),
                "num_hidden_layers": draw.randint(1, 6),
                "num_attention_heads": heads["qformer"],
                "cross_attention_frequency": draw.choice([1, 2, 2, 3]),
                "vocab_size": vocab_size,
                "max_position_embeddings": draw.randint(20, 90),
                "use_qformer_text_input": True,
                **(qformer or {}),
            },
            num_query_tokens=draw.randint(1, 40),
            image_text_hidden_size=draw.randint(3, 40),
            **config,
        )
    )
    randomise(model, seed)
    model.save_pretrained(directory)
    write_text_tokenizer(directory, vocab_size)
    return directory


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that pictures and texts matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_gain else 0.3 * noise)
            if name.endswith((".q.weight", ".k.weight")):  # T5's scores are not scaled: these keep them from saturating
                parameter.mul_(0.3)
            is_scaled = getattr(model.config.text_config, "scale_decoder_outputs", False)
            if name == "language_model.decoder.final_layer_norm.weight" and is_scaled:
                parameter.mul_(4)  # else all words are as likely as each other, and beams full of near-ties
        model.get_parameter("query_tokens").normal_(generator=generator)


def write_text_tokenizer(directory: Path, vocab_size: int) -> None:
    """A word-level tokenizer with BERT's special tokens; the last word is [DEC]."""
    words = [*BERT_SPECIAL, *(f"w{i}" for i in range(vocab_size - len(BERT_SPECIAL) - 1)), "[DEC]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*BERT_SPECIAL, "[DEC]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    wrapped.save_pretrained(directory)


def random_opt(draw: random.Random, width: int, heads: int) -> dict[str, Any]:
    """Sizes of an OPT."""
    return {
        "hidden_size": width,
        "ffn_dim": draw.randint(10, 90),
        "num_hidden_layers": draw.randint(1, 6),
        "num_attention_heads": heads,
        "max_position_embeddings": 160,
        "word_embed_proj_dim": width,
    }


def random_t5(draw: random.Random, width: int, heads: int) -> dict[str, Any]:
    """Sizes of a T5; transformers sizes the decoder's cache by the encoder, which must not be the shorter one."""
    return {
        "d_model": width,
        "d_kv": draw.randint(3, 11),
        "d_ff": draw.randint(10, 90),
        "num_layers": draw.randint(2, 4),
        "num_decoder_layers": draw.randint(1, 2),
        "num_heads": heads,
        "relative_attention_num_buckets": draw.choice([6, 9, 16, 32]),
        "relative_attention_max_distance": draw.choice([20, 40, 128]),
        "feed_forward_proj": draw.choice(["gated-gelu", "gated-silu", "relu"]),
        "decoder_start_token_id": 1,
    }


def write_tokenizer(directory: Path, vocab_size: int, ends_prompts: bool = False) -> None:
    """A word-level tokenizer in transformers' format; its last two words are the stop token and the image.

    With `ends_prompts` it puts </s> behind a text, as T5's does.
    """
    words = [*SPECIAL, *(f"w{i}" for i in range(vocab_size - len(SPECIAL) - 2)), "\n", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([*SPECIAL, "<image>"])
    if ends_prompts:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)


@pytest.fixture(scope="session")
def tokenizers_of_64(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a language model's tokenizer and of a Q-Former's, 64 words each. Do not write into them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "opt").mkdir()
    (folder / "bert").mkdir()
    write_tokenizer(folder / "opt", 64)
    write_text_tokenizer(folder / "bert", 64)
    return folder / "opt", folder / "bert"


@pytest.fixture(scope="session")
def example_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl`: eight pictures with two captions and a question each, and one that is damaged. Do not write."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    rows = []
    for i in range(8):
        Image.fromarray(draw.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        captions = [f"w{i + 1} w{i + 2}", f"w{i + 3}"]
        question = {"question": f"w{i}", "answers": [f"w{i + 4}", f"w{i + 5} w1"]}
        rows.append({"image": f"{i}.png", "captions": captions, "questions": [question]})
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:200])
    rows.append({"image": "damaged.png", "captions": ["w1"]})
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def checkpoint_maker() -> CheckpointMaker:
    """`make_checkpoint`."""
    return make_checkpoint


@pytest.fixture(scope="session")
def asking_checkpoint_maker() -> CheckpointMaker:
    """`make_asking_checkpoint`."""
    return make_asking_checkpoint


@pytest.fixture(scope="session")
def retrieval_checkpoint_maker() -> CheckpointMaker:
    """`make_retrieval_checkpoint`."""
    return make_retrieval_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint. Do not write into it."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", seed=3)


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path) -> Path:
    """Its engine directory. Do not write into it."""
    return export_engine(tiny_checkpoint, tiny_checkpoint.parent / "engine")


@pytest.fixture(scope="session")
def tiny_retrieval_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random retrieval model. Do not write into it."""
    return make_retrieval_checkpoint(tmp_path_factory.mktemp("tiny-retrieval") / "checkpoint", seed=7)


@pytest.fixture(scope="session")
def tiny_retrieval_engine(tiny_retrieval_checkpoint: Path) -> Path:
    """Its engine directory. Do not write into it."""
    return export_engine(tiny_retrieval_checkpoint, tiny_retrieval_checkpoint.parent / "engine")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_engine: Path) -> Pipeline:
    """The pipeline of the tiny engine."""
    return Pipeline(tiny_engine)


@pytest.fixture(scope="session")
def tiny_images(tiny_pipeline: Pipeline) -> list[np.ndarray[Any, Any]]:
    """Normalised pixel values of six random pictures."""
    size = tiny_pipeline.manifest.image.size
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, size, size), dtype=np.float32) for _ in range(6)]


@pytest.fixture(scope="session")
def bundled_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled captioner and retriever, exported once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundled"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for checkpoint in (bundled.CHECKPOINT, bundled.RETRIEVER):
            if not (folder / checkpoint.name).exists():
                export_engine(checkpoint, folder / checkpoint.name)
    return folder
