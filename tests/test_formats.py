"""LAVIS's and mmpretrain's files: the same parameters as from transformers' format, or one clear error."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from blip2rt import CheckpointError, InputError
from blip2rt.cli import main
from blip2rt.model import Blip2, Checkpoint, CheckpointSource, load_blip2, load_retrieval
from blip2rt.model import Blip2Config as OurConfig
from blip2rt.model.config import RetrievalConfig, VisionConfig
from blip2rt.model.named_configs import NAMES, read_config
from blip2rt.model.names import FORMATS, Names
from blip2rt.model.retrieval import Blip2Retrieval
from blip2rt.model.vision import VisionEncoder

State = dict[str, Tensor]

# By hand and by replacement, where the product has a table: transformers -> LAVIS, and LAVIS -> mmpretrain.
TO_LAVIS = (
    ("vision_model.post_layernorm.", "ln_vision."),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    ("qformer.encoder.", "Qformer.bert.encoder."),
    ("attention.attention.", "attention.self."),
    ("language_projection.", "opt_proj."),
    ("language_model.", "opt_model."),
)
TO_MMPRETRAIN = (
    ("visual_encoder.patch_embed.proj.", "vision_backbone.patch_embed.projection."),
    ("visual_encoder.blocks.", "vision_backbone.layers."),
    ("visual_encoder.", "vision_backbone."),
    ("ln_vision.", "ln_vision_backbone."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
    ("Qformer.", "multimodal_backbone."),
    ("opt_proj.", "vision_neck.fc."),
    ("opt_model.", "text_backbone."),
)


def renamed(state: State, *steps: tuple[str, str]) -> State:
    result = {}
    for name, tensor in state.items():
        for old, new in steps:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def to_lavis(state: State) -> State:
    result = renamed(state, *TO_LAVIS)
    for name in [name for name in result if name.endswith(".attn.qkv.bias")]:
        query, key, value = result.pop(name).chunk(3)
        assert not key.any()
        block = name.removesuffix("qkv.bias")
        result |= {f"{block}q_bias": query.clone(), f"{block}v_bias": value.clone()}
    heads = "Qformer.bert.embeddings.position_ids"
    return result | {heads: torch.arange(48)[None], "opt_model.lm_head.weight": result[TOKENS].clone()}


TOKENS = "opt_model.model.decoder.embed_tokens.weight"


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in all formats: its parts as transformers, LAVIS and mmpretrain keep them. Do not write into it."""
    folder = tmp_path_factory.mktemp("formats")
    source = Path(shutil.copytree(tiny_checkpoint, folder / "transformers"))
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    lavis = to_lavis(state)
    torch.save({"model": lavis, "epoch": 3, "config": {"run": {"seed": 42}}}, folder / "full.pth")
    frozen = ("visual_encoder.", "opt_model.model.")  # the copy of the token embedding stays
    stage2 = {name: tensor for name, tensor in lavis.items() if not name.startswith(frozen)}
    torch.save({"model": stage2}, folder / "stage2.pth")
    tuned = {name: tensor for name, tensor in lavis.items() if not name.startswith("opt_model.model.")}
    torch.save({"model": tuned}, folder / "tuned.pth")
    blocks = sorted({int(name.split(".")[2]) for name in lavis if name.startswith("visual_encoder.blocks.")})
    extra = {  # a block more than BLIP-2 has, and what belonged to the pretraining
        name.replace(f"blocks.{blocks[-1]}.", f"blocks.{len(blocks)}."): tensor
        for name, tensor in part(lavis, "visual_encoder.").items()
        if f"blocks.{blocks[-1]}." in name
    } | {"head.weight": torch.ones(3, 4), "norm.bias": torch.ones(3)}
    torch.save(part(lavis, "visual_encoder.") | extra, folder / "eva_vit.pth")
    llm = folder / "llm"
    llm.mkdir()
    save_file(part(state, "language_model."), llm / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config["text_config"]))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, llm)
    mmpretrain = {"meta": {"epoch": 0}, "state_dict": renamed(lavis, *TO_MMPRETRAIN)}
    torch.save(mmpretrain, folder / "mmpretrain.pth")
    return folder


def sources(folder: Path) -> dict[str, CheckpointSource]:
    config = folder / "transformers" / "config.json"
    return {
        "transformers": CheckpointSource(folder / "transformers"),
        "full": CheckpointSource(folder / "full.pth", config),
        "stage2": CheckpointSource(folder / "stage2.pth", config, folder / "eva_vit.pth", folder / "llm"),
        "fine-tuned": CheckpointSource(folder / "tuned.pth", config, llm=folder / "llm"),
        "mmpretrain": CheckpointSource(folder / "mmpretrain.pth", config),
    }


def refused(source: CheckpointSource, error: type[Exception] = CheckpointError) -> str:
    """The message of the one error, which is one line."""
    with pytest.raises(error) as caught:
        load_blip2(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrap(source: Path, target: Path, change: Callable[[State], object], key: str = "model") -> Path:
    """A copy of a file whose state dict has been changed."""
    content = torch.load(source, weights_only=True)
    change(content[key])
    torch.save(content, target)
    return target


# --- the same model from every format --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "stage2", "fine-tuned", "mmpretrain"])
def test_same_parameters_from_every_format(name: str, folder: Path) -> None:
    ours, expected = load_blip2(sources(folder)[name]), load_blip2(folder / "transformers")
    assert ours.config.vision.norm_eps == 1e-5
    assert expected.config.vision.norm_eps == 1e-6
    found = dict(ours.named_parameters())
    fewer = {key for key, _ in expected.named_parameters()} - found.keys()
    last = f"vision.blocks.{expected.config.vision.num_hidden_layers - 1}."
    assert all(key.startswith(last) for key in fewer)
    assert bool(fewer) == (name == "mmpretrain")  # whose code takes the output of the last block but one
    for key, tensor in expected.named_parameters():
        assert key in fewer or torch.equal(found[key], tensor), key


def test_what_is_left_out_is_accounted_for(folder: Path) -> None:
    blocks = Checkpoint(folder / "transformers").config.vision.num_hidden_layers
    left_out = {name: Checkpoint(source).left_out for name, source in sources(folder).items()}
    assert left_out["transformers"] == left_out["full"] == left_out["fine-tuned"] == []
    assert {"visual_encoder.head.weight", "visual_encoder.norm.bias"} < set(left_out["stage2"])
    assert len(left_out["stage2"]) == 2 + 13
    assert len(left_out["mmpretrain"]) == 13
    assert all(name.startswith(f"vision_backbone.layers.{blocks - 1}.") for name in left_out["mmpretrain"])


def test_vision_layers(folder: Path) -> None:
    for name, source in sources(folder).items():
        blocks = Checkpoint(folder / "transformers").config.vision.num_hidden_layers
        for wanted in (1, blocks):
            assert Checkpoint(replace(source, vision_layers=wanted)).config.vision.num_hidden_layers == wanted
        for wrong in (0, blocks + 1):
            assert f"so 1 to {blocks}" in refused(replace(source, vision_layers=wrong), InputError), name


def test_a_lone_safetensors_file(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "full.pth", weights_only=True)["model"]
    save_file(state, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path / "model.safetensors", folder / "transformers" / "config.json")
    expected = load_blip2(sources(folder)["full"]).state_dict()
    for name, tensor in load_blip2(source).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_vision_and_language_model_from_other_files(folder: Path, tmp_path: Path) -> None:
    """An encoder out of a file that holds more, and Meta's own OPT files, whose names lack the outermost module."""
    llm = Path(shutil.copytree(folder / "llm", tmp_path / "llm"))
    state = load_file(llm / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, llm / "model.safetensors")
    source = replace(sources(folder)["stage2"], vision=folder / "full.pth", llm=llm)
    expected = load_blip2(sources(folder)["full"]).state_dict()
    for name, tensor in load_blip2(source).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("name", ["transformers", "stage2", "mmpretrain"])
def test_image_size(name: str, folder: Path) -> None:
    """Interpolated as transformers does it on the fly; back at its own size, untouched."""
    source = sources(folder)[name]
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder / "transformers").vision_model.embeddings
    own = theirs.config.image_size
    for size in (own - theirs.config.patch_size, own + 2 * theirs.config.patch_size + 3):
        model = load_blip2(replace(source, image_size=size))
        tokens = torch.zeros(1, model.config.vision.num_tokens, theirs.config.hidden_size)
        expected = theirs.interpolate_pos_encoding(tokens, size, size)
        torch.testing.assert_close(model.vision.embedding.position, expected, rtol=1e-6, atol=1e-6)
        assert model.encode_image(torch.zeros(1, 3, size, size))[0].shape[1] == model.config.vision.num_tokens
    assert torch.equal(load_blip2(replace(source, image_size=own)).vision.embedding.position, theirs.position_embedding)
    assert "at least one patch" in refused(replace(source, image_size=3), InputError)


def test_other_image_size_than_the_config(folder: Path, tmp_path: Path) -> None:
    """A file that was fine-tuned at 364 px with the configuration of 224 px: the error says how to have either."""
    config = json.loads((folder / "transformers" / "config.json").read_text())
    own, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = own + patch
    (tmp_path / "larger.json").write_text(json.dumps(config))
    source = replace(sources(folder)["full"], config=tmp_path / "larger.json")
    message = refused(source)
    assert f"--image-size {own}, or --image-size {own + patch} to interpolate" in message
    assert load_blip2(replace(source, image_size=own)).config.vision.image_size == own


@torch.no_grad()
def test_vit_l_equals_clip(folder: Path, tmp_path: Path) -> None:
    """LAVIS's ViT-L against CLIP's in transformers, whose last blocks and norm LAVIS does not have."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
    }
    clip = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=4, hidden_act="quick_gelu", **sizes)).eval()
    for parameter in clip.parameters():
        parameter.normal_(std=0.3)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    lavis = renamed(
        state,
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
        ("encoder.layers.", "transformer.resblocks."),
        ("layer_norm", "ln_"),
        ("self_attn.out_proj", "attn.out_proj"),
        (".fc1", ".c_fc"),
        (".fc2", ".c_proj"),
    )
    for name in [name for name in lavis if "q_proj" in name]:
        joined = torch.cat([lavis.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"])
        lavis[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
    torch.save({key: tensor for key, tensor in lavis.items() if "position_ids" not in key}, tmp_path / "clip_vit.pth")
    config = json.loads((folder / "transformers" / "config.json").read_text())
    old_width = config["vision_config"]["hidden_size"]
    config["vision_config"] = sizes | read_config("blip2-vitl")["vision_config"] | sizes | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def widen(stage2: State) -> None:
        for name, tensor in stage2.items():
            if name.startswith("ln_vision."):
                stage2[name] = torch.randn(24)
            elif "crossattention.self." in name and tensor.shape[-1:] == (old_width,) and "query" not in name:
                stage2[name] = torch.randn(len(tensor), 24) if tensor.ndim == 2 else tensor

    stage2 = rewrap(folder / "stage2.pth", tmp_path / "stage2.pth", widen)
    source = CheckpointSource(stage2, tmp_path / "config.json", tmp_path / "clip_vit.pth", folder / "llm")
    ours = load_blip2(source)
    pictures = torch.randn(2, 3, 28, 28)
    hidden = clip(pictures, output_hidden_states=True).hidden_states[3]
    weight, bias = (torch.load(stage2, weights_only=True)["model"][f"ln_vision.{leaf}"] for leaf in ("weight", "bias"))
    expected = torch.nn.functional.layer_norm(hidden, (24,), weight, bias, eps=1e-5)
    torch.testing.assert_close(ours.vision(pictures), expected, rtol=1e-5, atol=1e-5)
    # other sizes as LAVIS's clip_vit.py makes them: corners stay corners
    position = load_blip2(replace(source, image_size=42)).vision.embedding.position[0]
    own = state["embeddings.position_embedding.weight"]
    torch.testing.assert_close(position[[0, 1, 6, 31, 36]], own[[0, 1, 4, 13, 16]], rtol=1e-5, atol=1e-5)
    assert "pass the --config of the same" in refused(replace(source, config=folder / "transformers" / "config.json"))
    assert "pass the --config of the same" in refused(replace(sources(folder)["full"], config=tmp_path / "config.json"))


@pytest.mark.parametrize("format", FORMATS)
def test_no_two_parameters_have_one_name(format: str, folder: Path) -> None:
    checkpoint = Checkpoint(folder / "transformers")
    names = Names(format)
    keys = [key for name in checkpoint.parameter_names() for key in names(name) if key is not None]
    assert len(keys) == len(set(keys))
    assert len(keys) > 100


# --- configurations by name ------------------------------------------------------------------------------------------

# Published: the sums of the paper's table 2 in B (it adds up nominal sizes), its trained parameters in M, and the
# language models' own. DESIGN: 3,744.76 M for OPT-2.7B with 32 rows of padding more in the token embedding.
PUBLISHED = {
    "blip2-opt-2.7b": (3.8, 107, 2_651_596_800),
    "blip2-opt-2.7b-vitl": (3.1, 104, 2_651_596_800),
    "blip2-opt-6.7b": (7.8, 108, 6_658_473_984),
    "blip2-opt-6.7b-vitl": (7.1, 105, 6_658_473_984),
    "blip2-flan-t5-xl": (4.1, 107, 2_849_757_184),
    "blip2-flan-t5-xl-vitl": (3.4, 103, 2_849_757_184),
    "blip2-flan-t5-xxl": (12.1, 108, 11_135_332_352),
    "blip2-flan-t5-xxl-vitl": (11.4, 105, 11_135_332_352),
}


@pytest.mark.parametrize("name", NAMES)
def test_named_configs_have_the_published_sizes(name: str) -> None:
    """Through transformers' own classes, part by part, and through ours where we have the part."""
    config, base = read_config(name), name.removesuffix("-364")
    if base != name:  # the same with more positions
        smaller = read_config(base)
        assert (config["vision_config"].pop("image_size"), smaller["vision_config"].pop("image_size")) == (364, 224)
        assert config == smaller
        return
    is_large, is_retrieval = "-vitl" in name, "text_config" not in config
    kind = Blip2ForImageTextRetrieval if is_retrieval else Blip2ForConditionalGeneration
    with torch.device("meta"):
        theirs = kind(Blip2Config(**config))
        ours = VisionEncoder(VisionConfig(**config["vision_config"]))
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in theirs.named_children()}
    # transformers has no ViT-L: no norm before the first block, and a bias of the patches
    assert parts["vision_model"] + (1024 if is_large else 0) == sum(p.numel() for p in ours.parameters())
    assert sum(p.numel() for p in ours.parameters()) == (290_583_552 if is_large else 985_952_256)
    if is_retrieval:
        total = sum(p.numel() for p in theirs.parameters())
        assert total == (473_123_586 if is_large else 1_172_032_258)  # published: 474 M, 1.2 B
        with torch.device("meta"):
            stage1 = Blip2Retrieval(RetrievalConfig.from_transformers(config))
        assert sum(p.numel() for p in stage1.parameters()) == total + (1024 if is_large else 0)
        return
    billions, trained, language_model = PUBLISHED[base]
    if "t5" in name:
        parts["language_model"] += 32128 * config["text_config"]["d_model"]  # transformers ties what FLAN-T5 does not
    assert parts["language_model"] == language_model
    assert round((parts["qformer"] + 32 * 768 + parts["language_projection"]) / 1e6) == trained
    assert sum(parts.values()) / 1e9 == pytest.approx(billions, abs=0.2)
    config_of_ours = OurConfig.from_transformers(config)
    if "t5" in name:  # which of the two it is, the file decides
        config_of_ours = replace(config_of_ours, text=replace(config_of_ours.text, tie_word_embeddings=False))
    names = Names("transformers", config_of_ours.text.model_type, is_large)
    with torch.device("meta"):
        whole = Blip2(config_of_ours)
    assert round(sum(p.numel() for p in whole.qformer.parameters()) / 1e6) == trained
    stored = {
        names(f"{stage}.{key}"): p.numel()
        for stage, module in whole.named_children()
        for key, p in module.named_parameters()
        if stage in ("encoder", "decoder")
    }
    assert sum(stored.values()) == language_model


def test_unknown_names_of_configs(folder: Path) -> None:
    for wrong, nearest in (("blip2-opt2.7b", "blip2-opt-2.7b"), ("blip2-flan-t5-xl-vitL", "blip2-flan-t5-xl-vitl")):
        message = refused(replace(sources(folder)["full"], config=wrong))
        assert f"did you mean {nearest}?" in message
        assert all(name in message for name in NAMES)
    (folder / "empty.json").write_text("[]")
    assert "not an object" in refused(replace(sources(folder)["full"], config=folder / "empty.json"))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_missing_parts_name_their_options(folder: Path) -> None:
    source = sources(folder)["stage2"]
    message = refused(CheckpointSource(source.model))
    assert all(option in message for option in ("--config", "--vision", "--llm"))
    no_vision, no_llm = refused(replace(source, vision=None)), refused(replace(source, llm=None))
    assert ("--vision" in no_vision, "--llm" in no_vision) == (True, False)
    assert ("--vision" in no_llm, "--llm" in no_llm) == (False, True)
    assert "--config" in refused(CheckpointSource(folder / "mmpretrain.pth"))
    assert "no such file" in refused(replace(source, vision=folder / "nothing.pth"))
    assert "for --llm" in refused(replace(source, llm=folder / "nothing"))


def test_superfluous_options(folder: Path) -> None:
    full, whole = sources(folder)["full"], sources(folder)["transformers"]
    for source, option in (
        (replace(full, vision=folder / "eva_vit.pth"), "--vision"),
        (replace(full, llm=folder / "llm"), "--llm"),
        (replace(whole, config="blip2-opt-2.7b"), "--config"),
        (replace(whole, vision=folder / "eva_vit.pth"), "--vision"),
        (replace(whole, llm=folder / "llm"), "--llm"),
        (replace(sources(folder)["mmpretrain"], llm=folder / "llm"), "--llm"),
    ):
        assert f"leave {option} out" in refused(source, InputError)


def test_no_format_and_several(folder: Path, tmp_path: Path) -> None:
    full = sources(folder)["full"]
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    assert "holds no BLIP-2 in the format of" in refused(replace(full, model=tmp_path / "resnet.pth"))
    mixed = rewrap(folder / "full.pth", tmp_path / "mixed.pth", lambda s: s.update({"vision_neck.fc.bias": s[TOKENS]}))
    message = refused(replace(full, model=mixed))
    assert "mixes formats" in message
    assert "1 of mmpretrain (vision_neck.fc.bias)" in message
    both = rewrap(folder / "full.pth", tmp_path / "both.pth", lambda s: s.update({"t5_proj.bias": s[TOKENS]}))
    assert "of opt and of t5" in refused(replace(full, model=both))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert "neither torch's nor safetensors" in refused(replace(full, model=folder / "llm" / name))


def test_files_that_claim_another_format(folder: Path, tmp_path: Path) -> None:
    full = sources(folder)["full"]
    state = torch.load(folder / "full.pth", weights_only=True)["model"]
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "claims.pth")
    message = refused(replace(full, model=tmp_path / "claims.pth"))
    assert "packed as mmpretrain" in message
    assert "tensors are lavis's" in message
    shutil.copy(folder / "full.pth", tmp_path / "full.safetensors")
    assert "is called safetensors and is a torch file" in refused(replace(full, model=tmp_path / "full.safetensors"))
    lone = folder / "transformers" / "model.safetensors"
    assert "pass its directory" in refused(replace(full, model=lone))
    directory = Path(shutil.copytree(folder / "transformers", tmp_path / "directory"))
    save_file(state, directory / "model.safetensors")
    message = refused(CheckpointSource(directory))
    assert "laid out as a transformers checkpoint" in message
    assert "pass the file itself" in message


def test_stage_1_is_told_from_stage_2(folder: Path, tmp_path: Path) -> None:
    heads = {"itm_head.weight": torch.ones(2, 4), "temp": torch.tensor(0.07)}
    kept = lambda s: [s.pop(name) for name in list(s) if name.startswith("opt_")] and s.update(heads)  # noqa: E731
    stage1 = rewrap(folder / "full.pth", tmp_path / "stage1.pth", kept)
    assert "does not hold the model of --config blip2" in refused(CheckpointSource(stage1, "blip2"))
    assert "--config blip2 is of a retrieval model" in refused(replace(sources(folder)["full"], config="blip2"))
    assert "a retrieval model reads text" in refused(replace(sources(folder)["full"], model=stage1))
    with pytest.raises(CheckpointError, match="without retrieval heads"):
        load_retrieval(sources(folder)["full"])


def test_language_models_that_do_not_belong(
    folder: Path, tmp_path: Path, checkpoint_maker: Callable[..., Path]
) -> None:
    stage2 = sources(folder)["stage2"]
    llm = Path(shutil.copytree(folder / "llm", tmp_path / "llm"))
    config = json.loads((llm / "config.json").read_text())
    sizes = {"hidden_size": config["hidden_size"], "num_hidden_layers": 99, "ffn_dim": 7}
    (llm / "config.json").write_text(json.dumps(config | sizes))
    message = refused(replace(stage2, llm=llm))
    assert "num_hidden_layers 99 (--config: " in message
    assert "ffn_dim 7" in message
    assert "hidden_size" not in message
    (llm / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in refused(replace(stage2, llm=llm))
    (llm / "config.json").write_text(json.dumps(config))
    state = load_file(llm / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in state.items()}, llm / "model.safetensors")
    message = refused(replace(stage2, llm=llm))  # the copy of the token embedding that LAVIS leaves in stage 2 tells
    assert "opt_model.lm_head.weight is a copy of" in message
    assert "of different models" in message
    assert "is of a language model 'opt'" in refused(replace(sources(folder)["full"], config="blip2-flan-t5-xl"))


def test_a_short_copy_of_a_long_tensor_is_a_copy(folder: Path, tmp_path: Path) -> None:
    def shorten(state: State) -> None:
        state["opt_model.lm_head.weight"] = state["opt_model.lm_head.weight"].to(torch.bfloat16)

    load_blip2(replace(sources(folder)["full"], model=rewrap(folder / "full.pth", tmp_path / "short.pth", shorten)))


def test_vision_files_that_hold_none(folder: Path) -> None:
    stage2 = sources(folder)["stage2"]
    for wrong in ("stage2.pth", "mmpretrain.pth", "llm/model.safetensors"):
        assert "holds no image encoder in LAVIS's format" in refused(replace(stage2, vision=folder / wrong))


def test_strict_accounting(folder: Path, tmp_path: Path) -> None:
    """A missing and an unknown tensor, a block that the configuration does not know, each by its name in the file."""
    full = sources(folder)["full"]

    def spoil(state: State) -> None:
        del state["opt_model.model.decoder.final_layer_norm.bias"]
        state["Qformer.adapter.weight"] = torch.ones(1)
        state["visual_encoder.blocks.90.norm1.weight"] = state["ln_vision.weight"]

    message = refused(replace(full, model=rewrap(folder / "full.pth", tmp_path / "spoilt.pth", spoil)))
    assert "1 missing: opt_model.model.decoder.final_layer_norm.bias" in message
    assert "2 unused: Qformer.adapter.weight, visual_encoder.blocks.90.norm1.weight" in message


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_name_their_tensor(value: float, folder: Path, tmp_path: Path) -> None:
    def overflow(state: State) -> None:
        for name in state:
            state[name] = state[name].half() if state[name].is_floating_point() else state[name]
        state["opt_proj.weight"][0, 0] = value

    spoilt = rewrap(folder / "full.pth", tmp_path / "fp16.pth", overflow)
    message = refused(replace(sources(folder)["full"], model=spoilt))
    assert "fp16.pth: opt_proj.weight holds NaN or infinite values" in message


class Malice:
    """A pickle that runs a command."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("option", ["model", "vision"])
def test_code_in_a_file_does_not_run(option: str, is_zip: bool, folder: Path, tmp_path: Path) -> None:
    source = sources(folder)["stage2"]
    content = torch.load(getattr(source, option), weights_only=True) | {"optimizer": Malice(tmp_path / "ran")}
    evil: dict[str, Any] = {option: tmp_path / "evil.pth"}
    torch.save(content, evil[option], _use_new_zipfile_serialization=is_zip)
    assert "code, which blip2rt does not run" in refused(replace(source, **evil))
    assert not (tmp_path / "ran").exists()


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    full, content = sources(folder)["full"], (folder / "full.pth").read_bytes()
    for i, spoilt in enumerate((content[: len(content) // 2], content[:-1], b"PK", b"PK" + os.urandom(999))):
        (tmp_path / f"{i}.pth").write_bytes(spoilt)
        assert "is damaged" in refused(replace(full, model=tmp_path / f"{i}.pth"))
    for i, other in enumerate((b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1")):
        (tmp_path / f"other{i}.pth").write_bytes(other)
        assert "neither torch's nor safetensors" in refused(replace(full, model=tmp_path / f"other{i}.pth"))
    torch.save({"model": {"a": [1]}}, tmp_path / "list.pth")
    assert "dictionary of plain tensors" in refused(replace(full, model=tmp_path / "list.pth"))


def test_export_says_what_to_pass(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line: one line on stderr, nothing written."""
    config = str(folder / "transformers" / "config.json")
    large = Path(shutil.copytree(folder / "llm", tmp_path / "tokenizer"))
    tokenizer = json.loads((large / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 5000
    (large / "tokenizer.json").write_text(json.dumps(tokenizer))
    calls: dict[str, tuple[list[str], int]] = {
        "pass its directory with --tokenizer": (["--config", config], 1),
        "has id 5000 ('far'), but the language model has 70 embedding rows": (
            ["--config", config, "--tokenizer", str(large)],
            1,
        ),
        "so 1 to": (["--config", config, "--vision-layers", "77"], 2),
        "leave --llm out": (["--config", config, "--llm", str(folder / "llm")], 2),
    }
    for message, (options, status) in calls.items():
        command = ["export", "--model", str(folder / "full.pth"), "--output", str(tmp_path / "engine"), *options]
        assert main(command) == status
        captured = capsys.readouterr()
        assert message in captured.err
        assert (captured.err.count("\n"), captured.out) == (1, "")
        assert not (tmp_path / "engine").exists()
