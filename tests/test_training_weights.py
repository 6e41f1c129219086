"""A model's first weights: from checkpoints of every format, of the whole or of parts, else from the seed."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from blip2rt.model import Blip2Retrieval, Checkpoint, CheckpointSource, load_blip2, load_retrieval
from blip2rt.training.build import build
from blip2rt.training.recipe import ModelRecipe, read_recipe
from blip2rt.training.weights import fill, initial, open_start

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
LAVIS = Path(__file__).parents[2] / "shared" / "fixtures" / "lavis"


@pytest.mark.skipif(not LAVIS.is_dir(), reason=f"LAVIS's checkpoints are not at {LAVIS}")
def test_stage1_of_lavis_and_an_opt_make_a_start_of_stage2() -> None:
    """LAVIS's own stage-2 file holds the same parts, the projection apart, which begins anew."""
    model = (
        f"model={{start='{LAVIS}/lavis/stage1.pth', start_config='{LAVIS}/configs/stage1.json', llm='{LAVIS}/llm/opt', "
        f"config='{LAVIS}/configs/opt.json', tokenizer='{LAVIS}/tokenizers/opt'}}"
    )
    built = build(read_recipe(RECIPES / "stage2.toml", [model, "data=[{format='jsonl', path='x'}]"]))
    assert {name.rsplit(".", 1)[0] for name in built.fresh} == {"qformer.projection"}
    stage1 = load_retrieval(CheckpointSource(LAVIS / "lavis" / "stage1.pth", LAVIS / "configs" / "stage1.json"))
    whole = load_blip2(CheckpointSource(LAVIS / "lavis" / "opt_full.pth", LAVIS / "configs" / "opt.json"))
    expected = dict(stage1.named_parameters()) | {
        name: parameter for name, parameter in whole.named_parameters() if name.startswith("decoder.")
    }
    for name, parameter in built.task.model.named_parameters():
        if name not in built.fresh:
            assert torch.equal(parameter, expected[name]), name
    learning = {name.split(".")[0] for name, p in built.task.model.named_parameters() if p.requires_grad}
    assert learning == {"qformer", "vision"}
    assert [n for n, p in built.task.model.named_parameters() if p.requires_grad and n.startswith("vision.")] == [
        "vision.norm.weight",
        "vision.norm.bias",
    ]


@pytest.mark.skipif(not LAVIS.is_dir(), reason=f"LAVIS's checkpoints are not at {LAVIS}")
def test_an_image_encoder_alone_and_training_parts() -> None:
    """The ViT's own file; and a stage-1 file of LAVIS's brings the temperature and the captioning head."""
    recipe = ModelRecipe(vision=str(LAVIS / "lavis" / "eva_vit.pth"))
    source = CheckpointSource(LAVIS / "lavis" / "stage1.pth", LAVIS / "configs" / "stage1.json")
    expected = load_retrieval(source)
    model = Blip2Retrieval(expected.config)
    fresh = fill(model, recipe, None, expected.config.vision, None, 0)
    assert {name.split(".")[0] for name in fresh} == {"qformer", "vision", "text", "itm", "itg", "temperature"}
    assert [name for name in fresh if name.startswith("vision.")] == ["vision.norm.weight", "vision.norm.bias"]
    for name, parameter in model.vision.named_parameters():
        if not name.startswith("norm."):
            assert torch.equal(parameter, expected.vision.get_parameter(name)), name
    start = open_start(ModelRecipe(start=str(source.model), start_config=str(source.config)))
    assert fill(model, ModelRecipe(), start, expected.config.vision, None, 0) == []
    assert all(torch.equal(p, dict(expected.named_parameters())[name]) for name, p in model.named_parameters())


def test_a_bert_starts_the_qformer(tmp_path: Path, tiny_retrieval_checkpoint: Path) -> None:
    """Its words, its layers for text and queries alike; cross-attention is new; [DEC] is the mean of its words."""
    config = Checkpoint(tiny_retrieval_checkpoint).config
    sizes = config.qformer
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=sizes.vocab_size - 1,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=sizes.max_position_embeddings,
        )
    )
    bert.save_pretrained(tmp_path)
    built = build(
        read_recipe(
            RECIPES / "stage1.toml",
            [
                f"model={{config='{tiny_retrieval_checkpoint}/config.json', vision='{tiny_retrieval_checkpoint}', "
                f"qformer='{tmp_path}', text_tokenizer='{tiny_retrieval_checkpoint}'}}",
                "data=[{format='jsonl', path='x'}]",
            ],
        )
    )
    model, theirs = built.task.model, bert.state_dict()
    layer = "bert.encoder.layer.0"
    for ours, name in {
        "qformer.embedding.position.weight": "bert.embeddings.position_embeddings.weight",
        "qformer.blocks.0.self_attention.proj.weight": f"{layer}.attention.output.dense.weight",
        "qformer.blocks.0.text_ffn.fc1.weight": f"{layer}.intermediate.dense.weight",
        "qformer.blocks.0.query_ffn.fc1.weight": f"{layer}.intermediate.dense.weight",
        "qformer.blocks.0.query_ffn.norm.bias": f"{layer}.output.LayerNorm.bias",
        "itg.dense.weight": "cls.predictions.transform.dense.weight",
    }.items():
        assert torch.equal(model.get_parameter(ours), theirs[name]), ours
    words = model.get_parameter("qformer.embedding.token.weight")
    assert torch.equal(words[:-1], theirs["bert.embeddings.word_embeddings.weight"])
    assert torch.allclose(words[-1], words[:-1].mean(0), atol=1e-7)
    parts = [theirs[f"{layer}.attention.self.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(model.get_parameter("qformer.blocks.0.self_attention.qkv.weight"), torch.cat(parts))
    qformer = {name for name in built.fresh if name.startswith("qformer.")}
    assert all(
        ".cross_attention." in name or name.endswith(("query_tokens", "itc.weight", "itc.bias")) for name in qformer
    )


def test_position_embeddings_take_the_size_of_the_pictures(tiny_checkpoint: Path) -> None:
    size = 2 * Checkpoint(tiny_checkpoint).config.vision.image_size
    recipe = [f"model={{start='{tiny_checkpoint}', image_size={size}}}", "data=[{format='jsonl', path='x'}]"]
    built = build(read_recipe(RECIPES / "stage2.toml", recipe))
    assert built.image is not None
    assert built.image[0] == size
    expected = load_blip2(CheckpointSource(tiny_checkpoint, image_size=size))
    for name, parameter in expected.named_parameters():
        assert torch.equal(built.task.model.get_parameter(name), parameter), name


def test_the_seed_gives_a_parameter_the_same_whatever_else_there_is() -> None:
    shape = torch.Size((48, 96))
    first = initial("qformer.blocks.0.qkv.weight", shape, 3)
    assert torch.equal(first, initial("qformer.blocks.0.qkv.weight", shape, 3))
    assert not torch.equal(first, initial("qformer.blocks.1.qkv.weight", shape, 3))
    assert not torch.equal(first, initial("qformer.blocks.0.qkv.weight", shape, 4))
    assert abs(float(first.std()) - 0.02 * (768 / 96) ** 0.5) < 0.002
    assert torch.equal(initial("decoder.blocks.0.norm1.weight", torch.Size((4,)), 0), torch.ones(4))
    assert torch.equal(initial("decoder.blocks.0.norm1.bias", torch.Size((4,)), 0), torch.zeros(4))
