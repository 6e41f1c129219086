"""Conversions keep every tensor bit for bit, put parts together, and refuse what would lose something."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2rt import CheckpointError, InputError
from blip2rt.cli import main
from blip2rt.export.convert import convert_checkpoint
from blip2rt.export.tensor_files import Entry, write_safetensors, write_torch
from blip2rt.model import Checkpoint, CheckpointSource, load_blip2

State = dict[str, Tensor]
FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def same_tensors(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def mixed(directory: Path, seed: int) -> State:
    """Give a transformers checkpoint biases (query, 0, value), a type of its own for every tensor, perhaps a head."""
    draw = random.Random(seed)
    state = load_file(directory / "model.safetensors")
    embedding = next(state[key] for key in state if key.endswith((".embed_tokens.weight", ".shared.weight")))
    if draw.random() < 0.5:
        state["language_model.lm_head.weight"] = embedding.clone()
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
        if tensor is not embedding and "lm_head" not in name:
            state[name] = tensor.to(draw.choice(DTYPES))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return load_file(directory / "model.safetensors")


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A transformers checkpoint that the other formats have a place for."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    mixed(directory, seed=0)
    return directory


@pytest.mark.parametrize("seed", range(3))
def test_round_trips(seed: int, tmp_path: Path, checkpoint_maker: Callable[..., Path]) -> None:
    """transformers -> LAVIS -> mmpretrain -> transformers, and straight back from each."""
    source = checkpoint_maker(tmp_path / "source", seed)
    expected = mixed(source, seed)
    lavis, mmpretrain = tmp_path / "lavis.pth", tmp_path / "mmpretrain.pth"
    convert_checkpoint(source, lavis, "lavis")
    convert_checkpoint(CheckpointSource(lavis, lavis.with_suffix(".json")), mmpretrain, "mmpretrain")
    for i, file in enumerate((lavis, mmpretrain)):
        way = CheckpointSource(file, file.with_suffix(".json"))
        convert_checkpoint(way, tmp_path / f"back{i}", "transformers", tokenizer=source)
        same_tensors(load_file(tmp_path / f"back{i}" / "model.safetensors"), expected)
        assert json.loads(file.with_suffix(".json").read_text()) == json.loads((source / "config.json").read_text())
    again = tmp_path / "again.pth"
    convert_checkpoint(CheckpointSource(mmpretrain, mmpretrain.with_suffix(".json")), again, "lavis")
    first, second = (torch.load(file, weights_only=True, mmap=True)["model"] for file in (lavis, again))
    same_tensors(second, first)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back0").state_dict()
    for name, tensor in Blip2ForConditionalGeneration.from_pretrained(source).state_dict().items():
        assert torch.equal(theirs[name], tensor)
    assert not [path.name for path in tmp_path.iterdir() if "converting" in path.name]


@pytest.mark.parametrize("seed", range(3))
def test_round_trips_of_t5(seed: int, tmp_path: Path, checkpoint_maker: Callable[..., Path]) -> None:
    """transformers -> LAVIS -> transformers, with gated and plain feed-forward layers; mmpretrain never had T5."""
    source = checkpoint_maker(tmp_path / "source", seed, model_type="t5")
    expected = mixed(source, seed)
    notes = convert_checkpoint(source, tmp_path / "lavis.pth", "lavis")
    activation = json.loads((source / "config.json").read_text())["text_config"]["dense_act_fn"]
    assert any(f"activation is {activation}" in note for note in notes) == (activation != "gelu")
    way = CheckpointSource(tmp_path / "lavis.pth", tmp_path / "lavis.json")
    convert_checkpoint(way, tmp_path / "back", "transformers", tokenizer=source)
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), expected)
    assert {name.partition(".")[0] for name in torch.load(way.model, weights_only=True)["model"]} >= {"t5_proj"}
    with pytest.raises(CheckpointError, match="mmpretrain has no BLIP-2 with FLAN-T5"):
        convert_checkpoint(source, tmp_path / "mm.pth", "mmpretrain")


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the recorded outputs are not at {FIXTURES}")
@pytest.mark.parametrize("kind", ["stage2", "full"])
@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_files_of_lavis_itself(llm: str, kind: str, tmp_path: Path) -> None:
    """There and back, a file that LAVIS wrote has its tensors under its names again; mmpretrain's names are its own."""
    folder = FIXTURES / "lavis"
    parts = (folder / "lavis" / "eva_vit.pth", folder / "llm" / llm) if kind == "stage2" else (None, None)
    source = CheckpointSource(folder / "lavis" / f"{llm}_{kind}.pth", folder / "configs" / f"{llm}.json", *parts)
    convert_checkpoint(source, tmp_path / "hub", "transformers", tokenizer=folder / "tokenizers" / llm)
    convert_checkpoint(tmp_path / "hub", tmp_path / "lavis.pth", "lavis")
    expected = torch.load(folder / "lavis" / f"{llm}_full.pth", weights_only=True)["model"]
    buffer = expected.pop("Qformer.bert.embeddings.position_ids")
    assert torch.equal(buffer, torch.arange(buffer.numel())[None])
    # q_bias and v_bias became one tensor and two again; the language model of a stage-2 file is --llm's
    same_tensors(torch.load(tmp_path / "lavis.pth", weights_only=True)["model"], expected)
    models = [load_blip2(way).state_dict() for way in (source, CheckpointSource(tmp_path / "lavis.pth", source.config))]
    same_tensors(models[1], models[0])
    if llm == "opt":
        convert_checkpoint(tmp_path / "hub", tmp_path / "mmpretrain.pth", "mmpretrain")
        content = torch.load(tmp_path / "mmpretrain.pth", weights_only=True)
        theirs = json.loads((FIXTURES / "mmpretrain" / "keys.json").read_text())["caption"]
        names = {name for name in content["state_dict"] if not name.startswith("text_backbone.")}
        assert names | {"multimodal_backbone.bert.embeddings.position_ids"} == theirs.keys()
        assert content["meta"] == {}


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the recorded outputs are not at {FIXTURES}")
def test_files_of_stage_1(tmp_path: Path) -> None:
    """LAVIS's and mmpretrain's own, each in the other's format: the other's names, and back the same tensors."""
    config = FIXTURES / "lavis" / "configs" / "stage1.json"
    lavis, mmpretrain = FIXTURES / "lavis" / "lavis" / "stage1.pth", FIXTURES / "mmpretrain" / "retrieval.pth"
    names = {
        "lavis": json.loads((lavis.parent / "stage1_keys.json").read_text()).keys(),
        "mmpretrain": json.loads((FIXTURES / "mmpretrain" / "keys.json").read_text())["retrieval"].keys(),
    }
    buffer, wrappers = ".bert.embeddings.position_ids", {"lavis": "model", "mmpretrain": "state_dict"}
    for file, own, other in ((lavis, "lavis", "mmpretrain"), (mmpretrain, "mmpretrain", "lavis")):
        there, back = tmp_path / f"{own}-there.pth", tmp_path / f"{own}-back.pth"
        assert convert_checkpoint(CheckpointSource(file, config), there, other) == []
        found = torch.load(there, weights_only=True)[wrappers[other]].keys()
        assert found == {name for name in names[other] if not name.endswith(buffer)}
        convert_checkpoint(CheckpointSource(there, config), back, own)
        expected = torch.load(file, weights_only=True)[wrappers[own]]
        same_tensors(
            torch.load(back, weights_only=True)[wrappers[own]],
            {name: tensor for name, tensor in expected.items() if not name.endswith(buffer)},
        )
        with pytest.raises(CheckpointError, match=r"no place for .* temperature, itg\."):
            convert_checkpoint(CheckpointSource(file, config), tmp_path / "hub", "transformers", tokenizer=file.parent)


def test_retrieval_models_of_transformers(tmp_path: Path) -> None:
    """They lack what only training needs, so they go there and back."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    config = Blip2Config(
        vision_config=sizes | {"image_size": 14, "patch_size": 7},
        qformer_config=sizes
        | {"use_qformer_text_input": True, "vocab_size": 20, "max_position_embeddings": 9, "encoder_hidden_size": 8},
        image_text_hidden_size=6,
        num_query_tokens=3,
    )
    source = tmp_path / "source"
    Blip2ForImageTextRetrieval(config).save_pretrained(source)
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        tensor.normal_()
        if name.endswith("self_attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    for format in ("lavis", "mmpretrain"):
        file = tmp_path / f"{format}.pth"
        notes = convert_checkpoint(source, file, format)
        assert "no temperature and no captioning head" in notes[-1]
        assert not [note for note in notes if "blocks" in note]  # mmpretrain's retrieval models use all of them
        way = CheckpointSource(file, file.with_suffix(".json"))
        convert_checkpoint(way, tmp_path / format, "transformers", tokenizer=source)
        same_tensors(load_file(tmp_path / format / "model.safetensors"), state)


def test_notes_say_what_differs(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's eps is the format's, and a command says so."""
    assert main(["convert", str(source), str(tmp_path / "a.pth"), "--to", "mmpretrain"]) == 0
    notes = capsys.readouterr().err
    assert "transformers normalises the image encoder's output with eps 1e-06, mmpretrain with 1e-05" in notes
    blocks = Checkpoint(source).config.vision.num_hidden_layers
    assert f"all {blocks} blocks of the image encoder are kept" in notes
    assert f"transformers uses {blocks} and mmpretrain {blocks - 1}" in notes
    config = str(tmp_path / "a.json")
    command = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b"), "--to", "transformers", "--config", config]
    assert main([*command, "--tokenizer", str(source)]) == 0
    assert "mmpretrain normalises" in capsys.readouterr().err
    eps = {
        "hub": Checkpoint(tmp_path / "b").config.vision.norm_eps,
        "mmpretrain": Checkpoint(CheckpointSource(tmp_path / "a.pth", config)).config.vision.norm_eps,
    }
    assert eps == {"hub": 1e-6, "mmpretrain": 1e-5}
    changed = json.loads((source / "config.json").read_text())
    changed["vision_config"]["hidden_act"] = "quick_gelu"
    (source / "config.json").write_text(json.dumps(changed))
    (note,) = [n for n in convert_checkpoint(source, tmp_path / "c.pth", "lavis") if "hidden_act" in n]
    assert note == "vision.hidden_act is quick_gelu, and lavis's code has gelu"


def test_a_note_about_questions(tmp_path: Path, asking_checkpoint_maker: Callable[..., Path]) -> None:
    """Other codes would load the weights of a fine-tuning for VQA, and leave the question out."""
    directory = asking_checkpoint_maker(tmp_path / "asking")
    (note,) = convert_checkpoint(directory, tmp_path / "again", "transformers")
    assert "reads the question beside its queries, and transformers's code gives it none" in note


def test_refusals(source: Path, tmp_path: Path) -> None:
    """One error, and nothing written."""
    before = sorted(tmp_path.iterdir())

    def refused(error: type[Exception], *arguments: Any, **keywords: Any) -> str:
        with pytest.raises(error) as caught:
            convert_checkpoint(*arguments, **keywords)
        assert sorted(tmp_path.iterdir()) == before
        return str(caught.value)

    assert "not one of transformers, lavis, mmpretrain" in refused(InputError, source, tmp_path / "x.pth", "hub")
    assert "exists" in refused(InputError, source, source, "transformers")
    assert "x.pth" in refused(InputError, source, tmp_path / "x", "lavis")
    state = load_file(source / "model.safetensors")
    bias = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    middle = state[bias].numel() // 2
    state[bias][middle] = 0.5
    save_file(state, source / "model.safetensors", {"format": "pt"})
    message = refused(CheckpointError, source, tmp_path / "x.pth", "lavis")
    assert bias in message
    assert "not zero (up to 0.5)" in message
    assert bias in refused(CheckpointError, source, tmp_path / "x.pth", "mmpretrain")
    state[bias][middle] = float("inf")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    assert f"{bias} holds NaN or infinite values" in refused(CheckpointError, source, tmp_path / "x", "transformers")


def test_a_tokenizer_is_wanted_and_taken(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "a.pth", "lavis")
    way = CheckpointSource(tmp_path / "a.pth", tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="--tokenizer"):
        convert_checkpoint(way, tmp_path / "b", "transformers")
    convert_checkpoint(way, tmp_path / "b", "transformers", tokenizer=source)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((tmp_path / "b" / name).read_text()) == json.loads((source / name).read_text())


def test_vit_l_has_no_place_elsewhere(source: Path, tmp_path: Path) -> None:
    """CLIP's image encoder: LAVIS alone has it."""
    convert_checkpoint(source, tmp_path / "a.pth", "lavis")
    content = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    config = json.loads((tmp_path / "a.json").read_text())
    sizes = config["vision_config"]
    width, patches = sizes["hidden_size"], (sizes["image_size"] // sizes["patch_size"]) ** 2
    kept = {name: tensor for name, tensor in content.items() if not name.startswith("visual_encoder.")}
    kept |= {
        "visual_encoder.class_embedding": torch.ones(width),
        "visual_encoder.positional_embedding": torch.ones(patches + 1, width),
        "visual_encoder.conv1.weight": torch.ones(width, 3, sizes["patch_size"], sizes["patch_size"]),
    } | {f"visual_encoder.ln_pre.{leaf}": torch.ones(width) for leaf in ("weight", "bias")}
    for i in range(sizes["num_hidden_layers"]):
        block, inner = f"visual_encoder.transformer.resblocks.{i}.", sizes["intermediate_size"]
        kept |= {f"{block}{norm}.{leaf}": torch.ones(width) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
        kept |= {f"{block}attn.in_proj_weight": torch.ones(3 * width, width)}
        kept |= {f"{block}attn.in_proj_bias": torch.ones(3 * width)}
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", inner, width),
            ("mlp.c_proj", width, inner),
        ):
            kept |= {f"{block}{name}.weight": torch.ones(rows, columns), f"{block}{name}.bias": torch.ones(rows)}
    torch.save({"model": kept}, tmp_path / "clip.pth")
    sizes["pre_norm"] = True
    (tmp_path / "clip.json").write_text(json.dumps(config))
    way = CheckpointSource(tmp_path / "clip.pth", tmp_path / "clip.json")
    for format, output in (("transformers", "hub"), ("mmpretrain", "mm.pth")):
        with pytest.raises(CheckpointError, match=f"{format}'s format has no place for .* vision.embedding"):
            convert_checkpoint(way, tmp_path / output, format, tokenizer=source)
    convert_checkpoint(way, tmp_path / "same.pth", "lavis")
    same_tensors(torch.load(tmp_path / "same.pth", weights_only=True)["model"], kept)


@pytest.mark.parametrize("seed", range(3))
def test_files_are_as_torch_and_safetensors_write_them(seed: int, tmp_path: Path) -> None:
    """Any shapes and types, also empty ones and scalars; mapped or not."""
    draw = random.Random(seed)
    state = {
        f"tensor.{i}": (torch.randn([draw.randint(0, 5) for _ in range(draw.randint(0, 4))]) * 9).to(
            draw.choice([*DTYPES, torch.float64, torch.int64, torch.bool])
        )
        for i in range(20)
    }
    entries = {
        name: Entry(tuple(tensor.shape), tensor.dtype, partial(state.__getitem__, name))
        for name, tensor in state.items()
    }
    count: list[int] = []
    write_torch(tmp_path / "a.pth", "model", entries, {"meta": {"epoch": 3}}, lambda: count.append(1))
    for mmap in (True, False):
        content = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        same_tensors(dict(content["model"]), state)
        assert content["meta"] == {"epoch": 3}
    reader: Any = torch._C.PyTorchFileReader(str(tmp_path / "a.pth"))
    assert {reader.get_record_offset(f"data/{i}") % 64 for i in range(len(state))} == {0}
    write_safetensors(tmp_path / "a.safetensors", entries, lambda: count.append(1))
    same_tensors(load_file(tmp_path / "a.safetensors"), state)
    assert len(count) == 2 * len(state)
