"""What LAVIS's and mmpretrain's own code computed from their files, through the reference and through the engines.

The arrays and the tiny random checkpoints lie in `../shared/fixtures` beside the repository, whose README says how they
were made. Features agree within 2e-5, logits and losses within 1e-5 of the array's largest value, ids exactly.
`pytest tests/test_fixtures.py -rP` prints every array with its difference.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer

from blip2rt import Generation, Pipeline
from blip2rt.backends.ort import Stage
from blip2rt.export import export_engine
from blip2rt.generative import Prompt
from blip2rt.manifest import Manifest
from blip2rt.model import Blip2, CheckpointSource, load_blip2
from blip2rt.model.config import OPTConfig, stop_token_ids
from blip2rt.options import ResolvedOptions
from blip2rt.stages import DECODER, MASKED, QFORMER, VISION, cache_names

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the recorded outputs are not at {FIXTURES}")

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Decode = Callable[..., Array]

LAVIS_DIR, MMPRETRAIN_DIR = FIXTURES / "lavis", FIXTURES / "mmpretrain"
CONFIG = LAVIS_DIR / "configs" / "opt.json"
LAVIS_SOURCE = CheckpointSource(
    LAVIS_DIR / "lavis" / "opt_stage2.pth", CONFIG, LAVIS_DIR / "lavis" / "eva_vit.pth", LAVIS_DIR / "llm" / "opt"
)
LAVIS_T5 = CheckpointSource(
    LAVIS_DIR / "lavis" / "t5_stage2.pth",
    LAVIS_DIR / "configs" / "t5.json",
    LAVIS_DIR / "lavis" / "eva_vit.pth",
    LAVIS_DIR / "llm" / "t5",
)
SOURCES = {
    "lavis": LAVIS_SOURCE,
    "lavis t5": LAVIS_T5,
    "lavis at 84 px": replace(LAVIS_SOURCE, image_size=84),
    **{
        name: CheckpointSource(MMPRETRAIN_DIR / f"{name}.pth", CONFIG, llm=MMPRETRAIN_DIR / "llm" / "opt")
        for name in ("caption", "vqa")
    },
    "caption with all blocks": CheckpointSource(
        MMPRETRAIN_DIR / "caption.pth", CONFIG, llm=MMPRETRAIN_DIR / "llm" / "opt", vision_layers=3
    ),
}
FEATURES, LOGITS = 2e-5, 1e-5


def arrays(name: str) -> Arrays:
    recorded = LAVIS_DIR / "lavis" / ("t5.npz" if name == "lavis t5" else "opt.npz")
    file = recorded if name.startswith("lavis") else MMPRETRAIN_DIR / f"{name.split()[0]}.npz"
    with np.load(file) as content:
        return {key: content[key] for key in content.files if "grad" not in key}


def pictures(name: str, key: str = "pixel_values") -> Array:
    with np.load((LAVIS_DIR if name.startswith("lavis") else MMPRETRAIN_DIR) / "images.npz") as content:
        return np.asarray(content[key])


def same_features(what: str, found: Any, expected: Array) -> None:
    """Largest absolute difference."""
    difference = float(np.abs(np.asarray(found) - expected).max())
    print(f"{what:<60} abs {difference:.1e}")
    assert np.asarray(found).shape == expected.shape
    assert difference <= FEATURES, what


def same_logits(what: str, found: Array, expected: Array) -> None:
    """Largest difference over the largest value."""
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{what:<60} rel {difference:.1e}")
    assert found.shape == expected.shape
    assert difference <= LOGITS, what


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Engines of SOURCES, each built once."""
    folder, built = tmp_path_factory.mktemp("engines"), dict[str, Path]()

    def engine(name: str) -> Path:
        if name not in built:
            language_model = "t5" if name == "lavis t5" else "opt"
            tokenizer = (LAVIS_DIR if name.startswith("lavis") else MMPRETRAIN_DIR) / "tokenizers" / language_model
            built[name] = export_engine(SOURCES[name], folder / name.replace(" ", "-"), tokenizer=tokenizer)
        return built[name]

    return engine


def features_of_engine(engine: Path, pixel_values: Array) -> tuple[Array, Array, Array]:
    """image_embeds, query_embeds, prefix of a batch."""
    features = Pipeline(engine).encode(list(pixel_values))
    image_embeds, query_embeds, prefix = (
        np.stack([getattr(f, name) for f in features]) for name in ("image_embeds", "query_embeds", "prefix")
    )
    return image_embeds, query_embeds, prefix


@torch.no_grad()
def features_of_reference(model: Blip2, pixel_values: Array) -> tuple[Array, Array, Array]:
    image_embeds, query_embeds, prefix = model.encode_image(torch.from_numpy(pixel_values))
    return image_embeds.numpy(), query_embeds.numpy(), prefix.numpy()


def decoder_inputs(prefix: Array, ids: Array, layers: int, heads: int) -> Arrays:
    """One picture [Q, D] and its tokens in one pass, logits of every row."""
    queries, width = prefix.shape
    rows = queries + len(ids)
    past = np.zeros((1, heads, rows, width // heads), np.float32)
    return {
        "prefix": np.concatenate((prefix, np.zeros((len(ids), width), np.float32)))[None],
        "input_ids": np.concatenate((np.full(queries, -1), ids))[None],
        "positions": np.arange(rows)[None],
        "write_indices": np.zeros(1, np.int64),
        "mask": np.where(np.tri(rows, dtype=bool), np.float32(0), np.float32(MASKED))[None, None],
        "logit_rows": np.arange(rows)[None],
        **dict.fromkeys(cache_names(layers, "past"), past),
    }


def decoders(name: str, model: Blip2, engine: Path) -> dict[str, tuple[Decode, Array]]:
    """Both ways from a picture's rows and ids to logits [Q+T, V], each with the prefixes of its own way."""
    text = model.config.text
    assert isinstance(text, OPTConfig)
    sizes = text.num_hidden_layers, text.num_attention_heads
    stage = Stage(DECODER, engine / "decoder.onnx")

    @torch.no_grad()
    def by_reference(prefix: Array, ids: Array) -> Array:
        inputs = decoder_inputs(prefix, ids, *sizes).values()
        logits: Array = model.decoder(*(torch.from_numpy(value) for value in inputs))[0].numpy()
        return logits[0]

    def by_engine(prefix: Array, ids: Array) -> Array:
        logits: Array = stage(**decoder_inputs(prefix, ids, *sizes))["logits"]
        return logits[0]

    pixel_values = pictures(name)
    return {
        "reference": (by_reference, features_of_reference(model, pixel_values)[2]),
        "engine": (by_engine, features_of_engine(engine, pixel_values)[2]),
    }


# --- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lavis_vision_block_by_block() -> None:
    model, pixel_values = load_blip2(LAVIS_SOURCE), torch.from_numpy(pictures("lavis"))
    with np.load(LAVIS_DIR / "lavis" / "stage1.npz") as expected:  # the image encoder is the same in all their files
        x = model.vision.embedding(pixel_values)
        for i, block in enumerate(model.vision.blocks):
            x = block(x)
            same_features(f"lavis stage1 vit_block_{i}, reference", x[:1], expected[f"vit_block_{i}"])
        same_features("lavis stage1 vit_output, reference", x, expected["vit_output"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["caption", "vqa"])
def test_mmpretrain_vision_block_by_block(name: str) -> None:
    """Its generative models stop before the last block that they store; what follows is the last one as well."""
    used, expected = load_blip2(SOURCES[name]), arrays(name)
    whole = load_blip2(replace(SOURCES[name], vision_layers=3))
    pixel_values = torch.from_numpy(pictures(name))
    x = whole.vision.embedding(pixel_values)
    for i, block in enumerate(whole.vision.blocks):
        x = block(x)
        same_features(f"{name} vision_layers[{i}], reference", x, expected["vision_layers"][i])
    same_features(f"{name} vision_out_last, reference", x, expected["vision_out_last"])
    assert len(used.vision.blocks) == 2
    x = used.vision.embedding(pixel_values)
    for block in used.vision.blocks:
        x = block(x)
    same_features(f"{name} vision_out, reference", x, expected["vision_out"])
    larger = load_blip2(replace(SOURCES[name], image_size=84))
    same_features(
        f"{name} bigmodel_pos_embed, reference", larger.vision.embedding.position, expected["bigmodel_pos_embed"]
    )
    x = larger.vision.embedding(torch.from_numpy(pictures(name, "big_pixel_values")))
    for block in larger.vision.blocks:
        x = block(x)
    for key in ("bigmodel_vision_out_big", "big_forward_vision_out"):
        same_features(f"{name} {key}, reference", x, expected[key])
    # built for larger pictures than it is given, as its VQA is: enlarged and made small again
    by_way = load_blip2(replace(SOURCES[name], image_size=56, via_image_size=84))
    x = by_way.vision.embedding(pixel_values)
    for block in by_way.vision.blocks:
        x = block(x)
    same_features(f"{name} bigmodel_vision_out_small, reference", x, expected["bigmodel_vision_out_small"])
    assert np.abs(expected["bigmodel_vision_out_small"] - expected["vision_out"]).max() > 100 * FEATURES


NAMES_OF_FEATURES = {
    "lavis": (None, None, "query_embeds_proj"),
    "lavis t5": (None, None, "query_embeds_proj"),
    "caption": ("ln_vision_out", "query_output", "query_proj"),
    "caption with all blocks": ("ln_vision_out_last", "query_output_last", "query_proj_last"),
    "vqa": ("ln_vision_out", "query_output", "query_proj"),
}


@pytest.mark.parametrize("name", NAMES_OF_FEATURES)
def test_features(name: str, engines: Callable[[str], Path]) -> None:
    expected = arrays(name)
    for way, found in (
        ("reference", features_of_reference(load_blip2(SOURCES[name]), pictures(name))),
        ("engine", features_of_engine(engines(name), pictures(name))),
    ):
        for array, key in zip(found, NAMES_OF_FEATURES[name], strict=True):
            if key is not None:
                same_features(f"{name} {key}, {way}", array, expected[key])


def test_lavis_features_of_other_sizes(engines: Callable[[str], Path]) -> None:
    """Position embeddings interpolated from 56 to 84 px."""
    name, size = "lavis at 84 px", "big_pixel_values"
    model = load_blip2(SOURCES[name])
    with np.load(LAVIS_DIR / "lavis" / "stage1.npz") as expected:
        same_features("lavis big_pos_embed, reference", model.vision.embedding.position, expected["big_pos_embed"])
        for way, found in (
            ("reference", features_of_reference(model, pictures(name, size))),
            ("engine", features_of_engine(engines(name), pictures(name, size))),
        ):
            same_features(f"lavis big_ln_vision_output, {way}", found[0], expected["big_ln_vision_output"])
        for way, found in (
            ("reference", features_of_reference(load_blip2(LAVIS_SOURCE), pictures("lavis"))),
            ("engine", features_of_engine(engines("lavis"), pictures("lavis"))),
        ):
            same_features(f"lavis ln_vision_output, {way}", found[0], expected["ln_vision_output"])


@pytest.mark.parametrize("name", ["lavis", "caption"])
def test_eps_as_a_number(name: str, engines: Callable[[str], Path]) -> None:
    """No tolerance separates 1e-5 from 1e-6 in the outputs: the last norm's is read in the graph and the manifest."""
    graph = onnx.load(engines(name) / "vision.onnx", load_external_data=False).graph
    eps = [
        attribute.f
        for node in graph.node
        if node.op_type == "LayerNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    ]
    blocks = 3 if name == "lavis" else 2
    assert eps == pytest.approx([*[1e-6] * 2 * blocks, 1e-5], rel=1e-6)
    vision = Manifest.read(engines(name)).model["vision"]
    assert (vision["layer_norm_eps"], vision["norm_eps"], vision["num_hidden_layers"]) == (1e-6, 1e-5, blocks)


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lavis", "caption", "vqa"])
def test_logits_and_loss(name: str, engines: Callable[[str], Path]) -> None:
    """Texts that are given, row by row without their padding, which no position counts."""
    expected, model = arrays(name), load_blip2(SOURCES[name])
    passes = {"lavis": {"loss_": "logits"}, "caption": {"loss_": "logits", "gen_": "prefill_logits"}}
    passes["vqa"] = {"loss_": "logits", "vqa_raw_": "prefill_logits", "vqa_clean_": "prefill_logits"}
    for way, (decode, prefixes) in decoders(name, model, engines(name)).items():
        for tag, key in passes[name].items():
            found, recorded, losses = [], [], []
            for i, prefix in enumerate(prefixes):
                real = expected[f"{tag}attention_mask"][i].astype(bool)
                ids = expected[f"{tag}input_ids"][i][real[len(prefix) :]]
                logits = decode(prefix, ids)
                found.append(logits)
                recorded.append(expected[tag + key][i][real])
                if tag == "loss_":
                    labels = expected["loss_labels"][i][real][1:]
                    shifted = logits[:-1][labels >= 0].astype(np.float64)
                    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
                    losses += [-row[label] for row, label in zip(shifted, labels[labels >= 0], strict=True)]
            same_logits(f"{name} {tag}{key}, {way}", np.concatenate(found), np.concatenate(recorded))
            if losses:
                recorded_loss = expected["loss" if name == "lavis" else "loss_loss"]
                same_logits(f"{name} {tag}loss, {way}", np.mean(losses), recorded_loss)


def test_embeddings_of_prompts() -> None:
    """What LAVIS and mmpretrain feed their language models: projected queries, then the tokens."""
    for name, tags in {"lavis": ("loss_", "gen_", "vqa2_"), "caption": ("gen_",), "vqa": ("vqa_raw_",)}.items():
        expected, model = arrays(name), load_blip2(SOURCES[name])
        prefixes = features_of_reference(model, pictures(name))[2]
        for tag in tags:
            ids = expected["gen_prompt_ids" if (name, tag) == ("lavis", "gen_") else f"{tag}input_ids"]
            tokens = model.decoder.embedding.token.weight.numpy()[ids]
            rows = np.concatenate((prefixes[: len(ids)], tokens), axis=1)
            real = expected[f"{tag}attention_mask"].astype(bool)
            same_features(f"{name} {tag}inputs_embeds, reference", rows[real], expected[f"{tag}inputs_embeds"][real])


def test_lavis_greedy(engines: Callable[[str], Path]) -> None:
    """Ids, and the logits of the first six steps up to each row's end; `max_length=30` counts the start token."""
    expected, model = arrays("lavis"), load_blip2(LAVIS_SOURCE)
    (stop,) = stop_token_ids(model.config.text)
    rows = [row[1:].tolist() for row in expected["gen_greedy_ids"]]
    rows = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    results = Pipeline(engines("lavis")).generate(list(pictures("lavis")), "a photo of", max_new_tokens=29)
    for result, row in zip(results, rows, strict=True):
        assert [*result.token_ids, *([stop] if result.finish_reason == "stop" else [])] == row
    prompt = expected["gen_prompt_ids"][0]
    for way, (decode, prefixes) in decoders("lavis", model, engines("lavis")).items():
        found, recorded = [], []
        for i, row in enumerate(rows):
            steps = min(len(row), 6)
            logits = decode(prefixes[i], np.concatenate((prompt, row[: steps - 1])).astype(np.int64))
            found.append(logits[len(prefixes[i]) + len(prompt) - 1 :])
            recorded.append(expected["gen_greedy_step_logits"][i, :steps])
            assert logits[-1].argmax() == row[steps - 1]
        same_logits(f"lavis gen_greedy_step_logits, {way}", np.concatenate(found), np.concatenate(recorded))


@pytest.mark.parametrize("name", ["lavis", "vqa"])
def test_token_ids_of_prompts(name: str, engines: Callable[[str], Path]) -> None:
    """Their tokenizers, which put one start token first, and ours out of the same files."""
    tokenizer, expected = Pipeline(engines(name)).generative_engine.tokenizer, arrays(name)
    texts = json.loads(
        (LAVIS_DIR / "lavis" / "texts.json" if name == "lavis" else MMPRETRAIN_DIR / "texts.json").read_text()
    )
    if name == "lavis":
        own = texts["opt"]
        assert tokenizer.encode(own["prompt"]) == expected["gen_prompt_ids"][0].tolist()
        prompts, tag = [own["question_prompt"].format(question) for question in own["questions"]], "vqa_all_"
    else:
        prompts, tag = texts["vqa"]["vqa_raw_prompts"], "vqa_raw_"
    for prompt, ids, mask in zip(
        prompts, expected[f"{tag}input_ids"], expected[f"{tag}text_attention_mask"], strict=True
    ):
        real = ids[mask.astype(bool)].tolist()
        assert tokenizer.encode(prompt)[: len(real)] == real  # LAVIS cuts at 24 tokens
    assert {VISION, QFORMER, DECODER} == Manifest.read(engines(name)).stages.keys()


# --- generated texts -------------------------------------------------------------------------------------------------

LAVIS_CAPTIONS = [
    "gen_greedy",
    "gen_beam5",
    "gen_beam5_lpm1",
    "gen_beam5_lp2",
    "gen_beam5_n3",
    "gen_beam5_min8",
    "gen_beam5_rep15",
    "gen_greedy_rep15",
]
GENERATED = {
    "lavis": [*LAVIS_CAPTIONS, "gen_prompt2_beam5", "vqa2_lp0", "vqa2_lpm1", "vqa2_lp1", "vqa_all_lp0"],
    "lavis t5": [*LAVIS_CAPTIONS, "gen_prompts_beam5", "vqa2_lp0", "vqa2_lpm1", "vqa2_lp1", "vqa_all_lpm1"],
    "caption": ["gen", "gen_n3", "gen_trunc", "gen_noprompt"],
    "vqa": ["vqa_raw", "vqa_clean"],
}


def recorded_call(name: str, case: str) -> tuple[list[list[int]], ResolvedOptions]:
    """Prompt ids of every picture without padding, and the options that transformers 4.33 was given.

    Its lengths count the start token.
    """
    texts = json.loads(
        (LAVIS_DIR / "lavis" / "texts.json" if "lavis" in name else MMPRETRAIN_DIR / "texts.json").read_text()
    )
    if "lavis" in name:
        own = texts["t5" if name == "lavis t5" else "opt"]
        given = own["generate_kwargs"][case]
        family = case.rpartition("_")[0] if case.startswith("vqa") else "gen_prompt"
        if case in ("gen_prompt2_beam5", "gen_prompts_beam5"):
            tokenizer = AutoTokenizer.from_pretrained(LAVIS_DIR / "tokenizers" / ("t5" if "t5" in name else "opt"))
            prompts = own.get("gen_prompts") or [own["gen_prompt2"]] * len(pictures(name))
            return [tokenizer(prompt).input_ids for prompt in prompts], resolved(given)
        key = "gen_prompt_ids" if family == "gen_prompt" else f"{family}_input_ids"
        mask_key = f"{family}_text_attention_mask"
    else:
        changed: dict[str, Any] = {"gen_n3": {"num_return_sequences": 3}, "gen_trunc": {"max_new_tokens": 6}}
        given = texts[name]["generate_kwargs"] | changed.get(case, {})
        key = "gen_input_ids" if case == "gen_n3" else f"{case}_input_ids"
        mask_key = key.replace("input_ids", "text_attention_mask")
    recorded = arrays(name)
    ids = recorded[key]
    mask = recorded.get(mask_key, np.ones_like(ids)).astype(bool)
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], resolved(given)


def resolved(given: dict[str, Any]) -> ResolvedOptions:
    return ResolvedOptions(
        num_beams=given["num_beams"],
        max_new_tokens=given.get("max_new_tokens") or given["max_length"] - 1,
        min_new_tokens=max(0, given["min_length"] - 1),
        length_penalty=float(given.get("length_penalty", 1.0)),
        repetition_penalty=given.get("repetition_penalty", 1.0),
        num_return_sequences=given.get("num_return_sequences", 1),
        rules="lavis",
    )


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in GENERATED.items() for case in cases])
def test_generated_ids(name: str, case: str, engines: Callable[[str], Path]) -> None:
    """From their checkpoint files through the engines: every row that LAVIS and mmpretrain generated, and its score."""
    prompts, options = recorded_call(name, case)
    pipe, expected = Pipeline(engines(name)), arrays(name)
    features = pipe.encode(list(pictures(name)[: len(prompts)]))
    engine = pipe.generative_engine
    results = engine.decode(Generation, features, list(map(Prompt, prompts)), options)
    sequences = [sequence for result in results for sequence in (result, *result.alternatives)]
    (stop,), start = pipe.manifest.tokens.stop, pipe.manifest.tokens.bos
    rows = expected[f"{case}_ids"]
    for sequence, row in zip(sequences, rows.tolist(), strict=True):
        ended = [stop] if sequence.finish_reason == "stop" else []
        found = [start, *sequence.token_ids, *ended]
        assert found + [pipe.manifest.tokens.pad] * (len(row) - len(found)) == row
    scores = expected.get(f"{case}_scores", expected.get(f"{case}_beam_scores"))
    if scores is not None:
        same_logits(f"{name} {case} scores, engine", np.array([s.score for s in sequences]), scores)


def test_whole_and_parts_are_the_same_t5() -> None:
    """LAVIS's whole T5 file, and what its trainer leaves out put beside the rest."""
    whole = load_blip2(CheckpointSource(LAVIS_DIR / "lavis" / "t5_full.pth", LAVIS_T5.config))
    parts = load_blip2(LAVIS_T5)
    for (name, tensor), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(tensor, other), name


@torch.no_grad()
def test_t5_logits_and_loss(engines: Callable[[str], Path]) -> None:
    """LAVIS's teacher-forced pass: decoder rows after the start token, each picture without its padding."""
    recorded, model = arrays("lavis t5"), load_blip2(LAVIS_T5)
    stage, encoder = (
        Stage(DECODER, engines("lavis t5") / "decoder.onnx"),
        Stage("encoder", engines("lavis t5") / "encoder.onnx"),
    )
    text: Any = model.config.text
    found: dict[str, list[Array]] = {"reference": [], "engine": []}
    expected, labels = [], []
    for i in range(len(pictures("lavis"))):
        real, kept = (recorded[f"loss_{part}mask"][i].astype(bool) for part in ("attention_", "decoder_attention_"))
        embeds = recorded["loss_inputs_embeds"][i][real]
        target = recorded["loss_output_ids"][i][kept]
        rows, length = len(embeds), len(target)
        encoded = {
            "prefix": embeds[None],
            "input_ids": np.full((1, rows), -1),
            "positions": np.arange(rows)[None],
            "encoder_mask": np.zeros((1, 1, 1, rows), np.float32),
        }
        given = {
            "input_ids": np.concatenate(([text.start_token_id], target[:-1]))[None],
            "positions": np.arange(length)[None],
            "cached_positions": np.arange(length)[None],
            "write_indices": np.zeros(1, np.int64),
            "mask": np.where(np.tri(length, dtype=bool), np.float32(0), np.float32(MASKED))[None, None],
            "encoder_mask": np.zeros((1, 1, length, rows), np.float32),
            "logit_rows": np.arange(length)[None],
            **dict.fromkeys(
                cache_names(text.num_decoder_layers, "past"),
                np.zeros((1, text.num_heads, length, text.d_kv), np.float32),
            ),
        }
        cross = encoder(**encoded)
        found["engine"].append(stage(**given, **cross)["logits"][0])
        tensors = [torch.from_numpy(value) for value in given.values()]
        reference_cross = model.encoder(*(torch.from_numpy(value) for value in encoded.values()))
        found["reference"].append(model.decoder(*tensors, *reference_cross)[0][0].numpy())
        expected.append(recorded["loss_logits"][i][kept])
        labels.append(target)
    for way, logits in found.items():
        same_logits(f"lavis t5 loss_logits, {way}", np.concatenate(logits), np.concatenate(expected))
        rows64 = np.concatenate(logits).astype(np.float64)
        rows64 -= np.log(np.exp(rows64).sum(-1, keepdims=True))
        loss = -np.mean([row[label] for row, label in zip(rows64, np.concatenate(labels), strict=True)])
        same_logits(f"lavis t5 loss, {way}", loss, recorded["loss"])
