"""Presets over miniature data sets in the published layouts: interrupted or not, the same table and submission."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import InputError, Pipeline, evaluate, inference_model
from blip2rt.data import read_captions, read_questions
from blip2rt.evaluation import retrieval_table
from blip2rt.manifest import Manifest
from blip2rt.model import named_configs
from blip2rt.model.config import Blip2Config, RetrievalConfig
from blip2rt.options import GenerationOptions
from blip2rt.presets import PRESETS, Preset, find_preset

SHORT = GenerationOptions(num_beams=2, max_new_tokens=3, rules="lavis")


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    """VQAv2 in miniature: 21 questions about 7 pictures."""
    folder = tmp_path / "vqa"
    write_pictures(folder, [f"val2014/COCO_val2014_{i:012}.jpg" for i in range(7)])
    questions = [{"question_id": 10 * i, "image_id": i % 7, "question": f"w{i} w{i + 1}?"} for i in range(21)]
    annotations = [
        {
            "question_id": q["question_id"],
            "question_type": "what",
            "answer_type": "other" if i % 2 else "number",
            "answers": [{"answer": f"w{(i + n) % 5}", "answer_id": n} for n in range(10)],
        }
        for i, q in enumerate(questions)
    ]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO in Karpathy's split in miniature: 5 test pictures, and one of another split that is not there."""
    folder = tmp_path / "coco"
    images = [
        {
            "split": "test" if i < 5 else "train",
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012}.jpg",
            "cocoid": i,
            "sentences": [{"raw": f"w{i} w{n} w{i + n}"} for n in range(2)],
        }
        for i in range(6)
    ]
    write_pictures(folder, [f"val2014/{image['filename']}" for image in images[:5]])
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


def run(preset: Preset, pipe: Pipeline, data: Path, output: Path) -> tuple[Any, Any]:
    """Table and submission."""
    evaluate.evaluate(preset, pipe, data, output, any_engine=True)
    submission = output / "submission.json"
    return json.loads((output / "table.json").read_text()), submission.exists() and submission.read_bytes()


def test_a_killed_run_goes_on(
    tiny_pipeline: Pipeline, vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted five times, once in the middle of a line: same table, same submission, nothing asked twice."""
    preset = replace(find_preset("paper-vqav2-opt-2.7b"), options=SHORT)
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    expected = run(preset, tiny_pipeline, vqa, tmp_path / "straight")
    generate, asked = tiny_pipeline.generate, list[str]()

    def killed(images: Any, prompts: list[str], **keywords: Any) -> Any:
        if asked and len(asked) % 4 == 0 and killed.armed:  # type: ignore[attr-defined]
            killed.armed = False  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        asked.extend(prompts)
        killed.armed = True  # type: ignore[attr-defined]
        return generate(images, prompts, **keywords)

    killed.armed = False  # type: ignore[attr-defined]
    monkeypatch.setattr(tiny_pipeline, "generate", killed)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run(preset, tiny_pipeline, vqa, tmp_path / "killed")
        with (tmp_path / "killed" / "predictions.jsonl").open("a") as stream:
            stream.write('{"id": 4')
    assert run(preset, tiny_pipeline, vqa, tmp_path / "killed") == expected
    assert len(asked) == 21
    submission = json.loads((tmp_path / "killed" / "submission.json").read_text())
    assert [row["question_id"] for row in submission] == [10 * i for i in range(21)]
    assert expected[0]["published"] == {"accuracy": 53.5}
    assert set(expected[0]["found"]) == {"accuracy", "accuracy, number", "accuracy, other"}
    with pytest.raises(InputError, match="holds another run"):
        run(replace(preset, rule="lavis"), tiny_pipeline, vqa, tmp_path / "killed")


def test_captions(tiny_pipeline: Pipeline, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java: the submission is written, and the table says what is missing
    preset = replace(find_preset("paper-coco-caption-opt-2.7b"), options=SHORT)
    report = evaluate.evaluate(preset, tiny_pipeline, coco, tmp_path / "run", any_engine=True)
    assert report.found == {}
    assert set(report.not_scored) >= {"Bleu_4", "CIDEr"}
    assert "145.80" in str(report)
    rows = json.loads((tmp_path / "run" / "submission.json").read_text())
    pictures = [coco / "val2014" / f"COCO_val2014_{i:012}.jpg" for i in range(5)]
    texts = [result.text for result in tiny_pipeline.generate(pictures, "a photo of", options=SHORT)]
    assert rows == [{"image_id": i, "caption": text} for i, text in enumerate(texts)]


def test_retrieval(coco: Path, tmp_path: Path, tiny_retrieval_engine: Path) -> None:
    pipe = Pipeline(tiny_retrieval_engine, threads=1)
    preset = find_preset("paper-coco-retrieval")
    table, _ = run(preset, pipe, coco, tmp_path / "run")
    items = read_captions(coco, "coco", "test")
    scores = pipe.match([item.path for item in items], [text for item in items for text in item.captions])
    both = scores.itm + scores.itc
    expected = retrieval_table(both, both.T, [i for i in range(5) for _ in range(2)])
    assert table["found"] == pytest.approx({name: round(value, 2) for name, value in expected.items()})
    lines = (tmp_path / "run" / "itm.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "itm.jsonl").write_text("".join(lines[:2]) + lines[2][:7])
    assert run(preset, pipe, coco, tmp_path / "run")[0] == table


def test_an_engine_that_does_not_fit(tiny_pipeline: Pipeline, vqa: Path, tmp_path: Path) -> None:
    preset = find_preset("paper-vqav2-opt-2.7b")
    with pytest.raises(InputError, match=r"pictures have .* px, not 224; .*blocks of width .*`blip2rt export --model"):
        evaluate.evaluate(preset, tiny_pipeline, vqa, tmp_path / "run")
    with pytest.raises(InputError, match=r"did you mean 'paper-vqav2-opt-2\.7b'"):
        find_preset("paper-vqa-opt-2.7b")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_published_models(name: str, tiny_engine: Path) -> None:
    """The sizes that a preset wants are those of the configuration that it names."""
    preset = PRESETS[name]
    content = named_configs.read_config(preset.config)
    config: Any = (RetrievalConfig if preset.task == "retrieval" else Blip2Config).from_transformers(content)
    if preset.vision_layers:
        config = replace(config, vision=replace(config.vision, num_hidden_layers=preset.vision_layers))
    tiny = Manifest.read(tiny_engine)
    image = replace(tiny.image, size=config.vision.image_size)
    fitting = replace(tiny, kind=preset.kind, model=json.loads(json.dumps(config.to_dict())), image=image)
    assert preset.problems(fitting) == []
    assert preset.problems(replace(fitting, image=replace(image, size=100)))
    assert f"--config {preset.config}" in preset.export_command()
    assert preset.published


def test_all_that_is_wrong_with_a_data_set_is_listed(vqa: Path, coco: Path) -> None:
    (vqa / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    path = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(path.read_text())
    content["questions"][1]["question_id"] = 0
    content["questions"].append({"question_id": 999, "image_id": 0, "question": "w1?"})
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"3 problems: .*000003\.jpg is missing; question 999 has no answers; question 0 comes"
    ):
        read_questions(vqa, "vqav2")
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_questions(vqa, "vqav2")
    shutil.rmtree(coco / "val2014")
    with pytest.raises(InputError, match=r"5 problems: .*is missing"):
        read_captions(coco, "coco", "test")
    with pytest.raises(InputError, match=r"holds no captions of NoCaps: put nocaps_val_4500_captions\.json"):
        read_captions(coco, "nocaps", "val")


def test_other_layouts(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["images/12.jpg", "images/val2014/COCO_val2014_000000000042.jpg", "n7.jpg"])
    (tmp_path / "flickr30k_test.json").write_text(
        json.dumps([{"image": "flickr30k-images/12.jpg", "caption": ["a", "b"]}])
    )
    (tmp_path / "coco_karpathy_val.json").write_text(
        json.dumps([{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "c"}])
    )
    nocaps = {
        "images": [{"id": 3, "file_name": "n7.jpg", "domain": "out-domain"}],
        "annotations": [{"image_id": 3, "caption": "d"}, {"image_id": 3, "caption": "e"}],
    }
    (tmp_path / "nocaps_val_4500_captions.json").write_text(json.dumps(nocaps))
    gqa = {"201": {"imageId": "12", "question": "is it?", "answer": "yes"}}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(gqa))
    found = [
        read_captions(tmp_path, *which)[0] for which in (("flickr30k", "test"), ("coco", "val"), ("nocaps", "val"))
    ]
    assert [(i.id, i.path.name, i.captions, i.domain) for i in found] == [
        (12, "12.jpg", ("a", "b"), None),
        (42, "COCO_val2014_000000000042.jpg", ("c",), None),
        (3, "n7.jpg", ("d", "e"), "out-domain"),
    ]
    (question,) = read_questions(tmp_path, "gqa")
    assert (question.id, question.path.name, question.answers) == ("201", "12.jpg", ("yes",))


def test_inference_model(tiny_pipeline: Pipeline, coco: Path) -> None:
    picture = next((coco / "val2014").iterdir())
    caption = inference_model("blip2-opt2.7b_3rdparty-zeroshot_caption", picture, engine=tiny_pipeline)
    options = GenerationOptions(num_beams=5, max_new_tokens=30, rules="lavis")
    assert caption == {"pred_caption": tiny_pipeline.generate(picture, "a photo of", options=options).text}
    (answer,) = inference_model("blip2-opt2.7b_3rdparty-zeroshot_vqa", [picture], "What, is it?", engine=tiny_pipeline)
    expected = tiny_pipeline.answer(picture, "what is it", rules="lavis")
    assert answer == {"question": "What, is it?", "pred_answer": expected.text}
    with pytest.raises(InputError, match="takes an image alone"):
        inference_model("blip2-opt2.7b_3rdparty-zeroshot_caption", picture, "why?", engine=tiny_pipeline)
    with pytest.raises(InputError, match="there is no model"):
        inference_model("blip2", picture, engine=tiny_pipeline)
