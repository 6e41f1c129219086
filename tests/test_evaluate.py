"""Presets over miniature data sets in the published layouts: interrupted or not, the same table and submission."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import InputError, Pipeline, cli, evaluate, evaluate_scores, inference_model
from blip2rt.cli import main
from blip2rt.data import read_captions, read_questions
from blip2rt.data.cleaning import clean_caption, clean_question
from blip2rt.evaluate_scores import as_scored, score, submission
from blip2rt.evaluation import CaptionScores, retrieval_table
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
    return write_vqa(tmp_path / "vqa", 21)


def write_vqa(folder: Path, count: int) -> Path:
    write_pictures(folder, [f"val2014/COCO_val2014_{i:012}.jpg" for i in range(7)])
    questions = [{"question_id": 10 * i, "image_id": i % 7, "question": f"w{i} w{i + 1}?"} for i in range(count)]
    annotations = [
        {
            "question_id": q["question_id"],
            "question_type": "what" if i % 3 else "is the",
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
    return write_coco(tmp_path / "coco", 5)


def write_coco(folder: Path, count: int) -> Path:
    images = [
        {
            "split": "test" if i < count else "train",
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012}.jpg",
            "cocoid": i,
            "sentences": [{"raw": f"w{i} w{n} w{i + n}"} for n in range(2)],
        }
        for i in range(count + 1)
    ]
    write_pictures(folder, [f"val2014/{image['filename']}" for image in images[:count]])
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


def run(preset: Preset, pipe: Pipeline, data: Path, output: Path) -> tuple[Any, Any]:
    """Table and submission."""
    evaluate.evaluate(preset, pipe, data, output, any_engine=True)
    submission = output / "submission.json"
    return json.loads((output / "table.json").read_text()), submission.exists() and submission.read_bytes()


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_five_kills(task: str, tmp_path: Path, tiny_engine: Path, tiny_retrieval_engine: Path) -> None:
    """`blip2rt eval`, killed with SIGKILL at five drawn moments: the table and submission of a straight run."""
    if task == "vqa":
        data, preset, engine = write_vqa(tmp_path / "data", 300), "paper-vqav2-opt-2.7b", tiny_engine
        work, total = "predictions.jsonl", 300
    else:
        data, preset, engine = write_coco(tmp_path / "data", 150), "paper-coco-retrieval", tiny_retrieval_engine
        work, total = "itm.jsonl", 150
    command = [sys.executable, "-m", "blip2rt", "eval", preset, "--data", str(data), "--engine", str(engine)]
    command += ["--any-engine", "--threads", "1", "--json", "--output"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    expected = subprocess.run([*command, str(straight)], check=True, stdout=subprocess.PIPE).stdout
    draw = random.Random(0)
    for kill in range(5):
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = 0 if kill == 0 else draw.randint(kill * total // 7, (kill + 1) * total // 7)
        file = killed / "run.json" if wanted == 0 else killed / work
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        assert process.poll() is None, "it was done before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "table.json").exists()
    assert 0 < (killed / work).read_bytes().count(b"\n") < total
    assert subprocess.run([*command, str(killed)], check=True, stdout=subprocess.PIPE).stdout == expected
    for name in ("table.json", work, *(["submission.json"] if task == "vqa" else [])):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert json.loads(expected) == json.loads((killed / "table.json").read_text())


def test_a_killed_run_goes_on(
    tiny_pipeline: Pipeline, vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted five times, once in the middle of a line: same table, same submission, nothing asked twice."""
    preset = replace(find_preset("paper-vqav2-opt-2.7b"), options=SHORT)
    monkeypatch.setattr(tiny_pipeline.generative_engine, "batch_size", 4)
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
    assert set(expected[0]["by_question_type"]) == {"what", "is the"}
    with pytest.raises(InputError, match="holds another run"):
        run(replace(preset, rule="lavis"), tiny_pipeline, vqa, tmp_path / "killed")
    files = {name: replace(entry, sha256="1" * 64) for name, entry in tiny_pipeline.manifest.files.items()}
    monkeypatch.setattr(tiny_pipeline, "manifest", replace(tiny_pipeline.manifest, files=files))
    with pytest.raises(InputError, match="holds another run"):  # the same checkpoint in int8, say
        run(preset, tiny_pipeline, vqa, tmp_path / "killed")
    monkeypatch.undo()
    questions = next(vqa.glob("*questions.json"))
    questions.write_text(questions.read_text().replace('"question": "', '"question": "so, '))
    with pytest.raises(InputError, match="holds another run"):  # the same ids
        run(preset, tiny_pipeline, vqa, tmp_path / "killed")


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


def test_eval_command(
    tiny_engine: Path,
    tiny_retrieval_engine: Path,
    vqa: Path,
    coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is wrong is said before anything is computed, with the command that mends it."""
    command = ["eval", "paper-vqav2-opt-2.7b", "--data", str(vqa), "--output", str(tmp_path / "run")]
    engine = ["--engine", str(tiny_engine)]
    for changed, message in (
        ([], "Make it with `blip2rt export --model blip2_pretrained_opt2.7b.pth --config blip2-opt-2.7b --vision"),
        (
            ["--engine", str(tiny_retrieval_engine), "--any-engine"],
            "it is a retrieval engine, not a generative one.",
        ),
        (["--any-engine", "--data", str(coco)], "holds no questions of vqav2: put v2_OpenEnded_mscoco_val2014_quest"),
        (["--any-engine", "--output", str(coco)], "holds files of something else: choose another --output"),
    ):
        assert main([*command, *engine, *changed]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", "paper-coco-retrieval", "--data", str(coco), *engine, "--any-engine"]) == 2
    assert "not a retrieval one. Make it with `blip2rt export --model blip2_finetune_coco.pth --config blip2-364" in (
        capsys.readouterr().err
    )
    assert main(["eval", "paper-vqav2-opt27b", "--data", str(coco), *engine]) == 2
    assert "did you mean 'paper-vqav2-opt-2.7b'?" in capsys.readouterr().err
    assert main([*command, *engine, "--any-engine"]) == 0
    table = capsys.readouterr().out
    assert "paper-vqav2-opt-2.7b: 21 items (BLIP-2, arXiv 2301.12597v3, table 2)" in table
    assert "     53.50\n" in table
    assert "not the preset's engine: " in table
    rows = json.loads((tmp_path / "run" / "submission.json").read_text())
    assert set(rows[0]) == {"question_id", "answer"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_published_models(name: str, tiny_engine: Path) -> None:
    """The sizes that a preset wants are those of the configuration that it names."""
    preset = PRESETS[name]
    content = named_configs.read_config(preset.config)
    config: Any = (RetrievalConfig if preset.task == "retrieval" else Blip2Config).from_transformers(content)
    if preset.vision_layers:
        config = replace(config, vision=replace(config.vision, num_hidden_layers=preset.vision_layers))
    tiny = Manifest.read(tiny_engine)
    image = replace(tiny.image, size=490 if preset.reads_questions else config.vision.image_size)
    fitting = replace(tiny, kind=preset.kind, model=json.loads(json.dumps(config.to_dict())), image=image)
    if preset.reads_questions:
        assert preset.problems(fitting) == ["its Q-Former reads no questions"]
        fitting = replace(fitting, question_tokens=tiny.tokens)
    else:
        check_command(preset, config)
    assert preset.problems(fitting) == []
    assert preset.problems(replace(fitting, image=replace(image, size=100)))
    assert preset.published


def check_command(preset: Preset, config: Any) -> None:
    """The command is one, and asks for the sizes that the preset wants."""
    program, *arguments = shlex.split(preset.export_command())
    assert program == "blip2rt"
    given = cli._parser().parse_args(arguments)
    named = named_configs.read_config(given.config)
    assert (given.image_size or named["vision_config"].get("image_size", 224)) == preset.image_size
    assert given.text_tokenizer if preset.task == "retrieval" else given.llm
    assert given.model == (preset.checkpoint or "CHECKPOINT")
    from_lavis = preset.style == "lavis" and not preset.checkpoint.startswith("blip2_caption")
    assert bool(given.vision) == (from_lavis and preset.task != "retrieval")
    assert (named["vision_config"].get("hidden_size", 1408) == 1024) == ("vitl" in preset.name)


def test_a_q_former_is_given_the_question(
    tiny_pipeline: Pipeline, vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `answer`, which makes the same prompt of it."""
    preset = replace(PRESETS["paper-vqav2-finetuned-opt-2.7b"], split="val")
    asked: list[str] = []
    answer = tiny_pipeline.answer

    def noted(images: Any, questions: list[str], **keywords: Any) -> Any:
        asked.extend(questions)
        return answer(images, questions, **keywords)

    monkeypatch.setattr(tiny_pipeline, "answer", noted)
    _, submission = run(preset, tiny_pipeline, vqa, tmp_path / "asked")
    assert asked
    assert not any("Answer:" in question for question in asked)
    _, other = run(replace(preset, reads_questions=False), tiny_pipeline, vqa, tmp_path / "told")
    assert submission == other


def test_all_that_is_wrong_with_a_data_set_is_listed(vqa: Path, coco: Path) -> None:
    (vqa / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    path = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    truth = vqa / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    content["questions"][1]["question_id"] = 0
    content["questions"].append({"question_id": 999, "image_id": 0, "question": "w1?"})
    content["questions"] += ["no object", {"question_id": [7], "image_id": "x", "question": None}]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_questions(vqa, "vqav2")
    assert f"{path}: 7 problems: " in str(caught.value)
    for problem in (
        "questions[22] is str, not an object",
        "COCO_val2014_000000000003.jpg is missing",
        "question 999 has no answers",
        "question [7] is not as published: None",
        "question [7] has no answers",
        "the picture 'x' is missing",
        "question 0 comes twice",
    ):
        assert problem in str(caught.value).replace("'[7]'", "[7]")
    path.write_text("{")
    truth.write_text("[]")
    with pytest.raises(
        InputError, match=r"_questions\.json cannot be read as JSON .*; .*holds list, not dict: fetch them"
    ):
        read_questions(vqa, "vqav2")
    shutil.rmtree(coco / "val2014")
    content = json.loads((coco / "dataset_coco.json").read_text())
    content["images"][1]["cocoid"] = 0
    content["images"][2]["sentences"] = []
    content["images"][3]["sentences"] = [{"raw": None}]
    content["images"].append(3)
    (coco / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"8 problems: images\[6\] is int.*is missing.*no caption.*id 3.*id 0 comes"):
        read_captions(coco, "coco", "test")
    for i in range(1, 40):
        content["images"].append({**content["images"][0], "cocoid": 100 + i, "filename": f"absent-{i}.jpg"})
    (coco / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_captions(coco, "coco", "test")
    assert all(f"absent-{i}.jpg is missing" in str(caught.value) for i in range(1, 40))  # however many there are
    with pytest.raises(InputError, match=r"holds no captions of NoCaps: put nocaps_val_4500_captions\.json"):
        read_captions(coco, "nocaps", "val")


def test_what_comes_twice(vqa: Path, tmp_path: Path) -> None:
    """Answers of one question, and keys of one object, of which JSON's reader would keep the last in silence."""
    truth = vqa / "v2_mscoco_val2014_annotations.json"
    content = json.loads(truth.read_text())
    content["annotations"].append(content["annotations"][0])
    content["annotations"][1]["question_type"] = 7
    truth.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"question 0 is answered twice; question 10 has types \(7, 'other'\)"):
        read_questions(vqa, "vqav2")
    row = '{"imageId": "1", "question": "why?", "answer": "so", "types": {"structural": "query"}}'
    (tmp_path / "testdev_balanced_questions.json").write_text(f'{{"5": {row}, "5": {row}}}')
    with pytest.raises(InputError, match="keys come twice: '5'"):
        read_questions(tmp_path, "gqa", "testdev")


def write_data_set(folder: Path, data_set: str) -> None:
    """Every other data set as it is published: 5 pictures, some of them with two questions."""
    if data_set == "gqa":
        write_pictures(folder, [f"images/{i}.jpg" for i in range(5)])
        content: Any = {
            f"2{i:03}": {
                "imageId": str(i % 5),
                "question": f"w{i} w{i + 1}?",
                "answer": f"w{i}",
                "types": {"structural": "verify" if i % 2 else "query"},
            }
            for i in range(8)
        }
        (folder / "testdev_balanced_questions.json").write_text(json.dumps(content))
    elif data_set == "okvqa":
        write_vqa(folder, 8)
        (folder / "v2_OpenEnded_mscoco_val2014_questions.json").rename(
            folder / "OpenEnded_mscoco_val2014_questions.json"
        )
        (folder / "v2_mscoco_val2014_annotations.json").rename(folder / "mscoco_val2014_annotations.json")
    elif data_set == "nocaps":
        write_pictures(folder, [f"images/n{i}.jpg" for i in range(5)])
        domains = ["in-domain", "near-domain", "out-domain", "near-domain", "out-domain"]
        content = {
            "images": [{"id": i, "file_name": f"n{i}.jpg", "domain": domain} for i, domain in enumerate(domains)],
            "annotations": [
                {"id": 9 * i + n, "image_id": i, "caption": f"w{i} w{n}"} for i in range(5) for n in (1, 2)
            ],
        }
        (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    else:
        write_pictures(folder, [f"flickr30k-images/{i}.jpg" for i in range(5)])
        images = [
            {
                "split": "test" if i < 4 else "train",
                "filename": f"{i}.jpg",
                "imgid": i,
                "sentences": [{"raw": f"w{i} w{n + 7}"} for n in range(5)],
            }
            for i in range(5)
        ]
        (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("lavis-gqa-flan-t5-xl", 8),
        ("paper-okvqa-opt-2.7b", 8),
        ("paper-nocaps-caption-opt-2.7b", 5),
        ("paper-flickr30k-retrieval", 4),
    ],
)
def test_every_data_set_end_to_end(
    name: str,
    items: int,
    tmp_path: Path,
    tiny_pipeline: Pipeline,
    tiny_retrieval_engine: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Straight, and in two sittings: the same table and submission; the report says what the engine is."""
    preset = find_preset(name)
    preset = replace(preset, options=SHORT) if preset.task != "retrieval" else replace(preset, candidates=3)
    pipe = tiny_pipeline if preset.task != "retrieval" else Pipeline(tiny_retrieval_engine)
    write_data_set(tmp_path / "data", preset.data_set)
    table, sent = run(preset, pipe, tmp_path / "data", tmp_path / "straight")
    assert table["items"] == items
    assert table["found"]
    assert table["engine"].startswith("fp32, ")
    work = "itm.jsonl" if preset.task == "retrieval" else "predictions.jsonl"
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for file in ("table.json", "submission.json"):
        (tmp_path / "again" / file).unlink(missing_ok=True)
    lines = (tmp_path / "again" / work).read_bytes().splitlines(keepends=True)
    (tmp_path / "again" / work).write_bytes(b"".join(lines[:2]) + lines[2][:5])  # killed while it wrote the third
    assert run(preset, pipe, tmp_path / "data", tmp_path / "again") == (table, sent)
    (tmp_path / "again" / work).write_bytes(b"[]\n" + b"".join(lines[1:]))
    with pytest.raises(InputError, match=rf"{work}, line 1 is damaged"):
        run(preset, pipe, tmp_path / "data", tmp_path / "again")
    (tmp_path / "again" / "run.json").write_text('{"preset')
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        run(preset, pipe, tmp_path / "data", tmp_path / "again")
    if preset.task == "caption":
        assert "will not be scored: SPICE (its jars are not there" in capsys.readouterr().err


def test_a_caption_without_words_is_found_before_the_work(
    coco: Path, tmp_path: Path, tiny_retrieval_engine: Path
) -> None:
    content = json.loads((coco / "dataset_coco.json").read_text())
    content["images"][2]["sentences"][0]["raw"] = " ... "
    (coco / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"captions without a word: ' \.\.\. ' of COCO_val2014_000000000002\.jpg"):
        run(find_preset("paper-coco-retrieval"), Pipeline(tiny_retrieval_engine), coco, tmp_path / "run")
    assert not (tmp_path / "run" / "gallery").exists()


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
    gqa = {"201": {"imageId": "12", "question": "is it?", "answer": "yes", "types": {"structural": "verify"}}}
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
    assert question.answer_type == "verify"
    write_pictures(tmp_path, ["test2015/COCO_test2015_000000000001.jpg"])
    testdev = {"questions": [{"question_id": 5, "image_id": 1, "question": "Why?"}]}
    (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(testdev))
    (question,) = questions = read_questions(tmp_path, "vqav2", "testdev")
    assert (question.path.name, question.answers) == ("COCO_test2015_000000000001.jpg", ())
    preset = find_preset("paper-vqav2-testdev-opt-2.7b")
    scores = score(preset, questions, {5: "because"})
    assert scores.found == {}
    assert submission(preset, questions, {5: "because"}) == [{"question_id": 5, "answer": "because"}]
    assert "not public: send submission.json" in scores.not_scored["accuracy"]


def test_texts_are_cleaned_as_the_sources_clean_them(tiny_pipeline: Pipeline) -> None:
    question = "What's that: a (red) U.F.O., or 2 birds??  "
    assert clean_question(question, "lavis") == "what's that a red ufo, or 2 birds??"
    assert clean_question(question, "mmpretrain") == "whats that a red ufo or 2 birds"
    assert clean_question("What is this ?", "mmpretrain") == "what is this "
    assert clean_question("w " * 60, "lavis") == " ".join(["w"] * 50)
    caption = "A man, his dog's ball.  It's *big*!\n"
    assert clean_caption(caption, "lavis") == "a man, his dog's ball it's big"
    assert clean_caption(caption, "mmpretrain") == "a man his dogs ball its big"
    ask = find_preset("paper-vqav2-opt-2.7b").ask
    assert ask("Is it {0} so?") == "Question: is it {0} so? Answer:"
    words = " ".join(f"w{i}" for i in range(30))
    assert tiny_pipeline.generative_engine.tokenizer.cut(words, 31) == words
    assert tiny_pipeline.generative_engine.tokenizer.cut(words, 32 - 12) == " ".join(f"w{i}" for i in range(19))


def test_gqa_is_scored_as_in_lavis(tmp_path: Path) -> None:
    """Cleaned and compared with the one answer; the official server's names in the submission."""
    write_pictures(tmp_path, ["1.jpg"])
    answers = {"1": ("The dog.", "dog"), "2": ("two", "2"), "3": ("cats", "cat"), "4": ("yes", "yes")}
    content = {
        key: {
            "imageId": "1",
            "question": "q",
            "answer": right,
            "types": {"structural": "verify" if key > "2" else "query"},
        }
        for key, (_, right) in answers.items()
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(content))
    questions = read_questions(tmp_path, "gqa", "testdev")
    preset, texts = find_preset("lavis-gqa-flan-t5-xl"), {key: said for key, (said, _) in answers.items()}
    scores = score(preset, questions, texts)
    assert scores.found == {"accuracy": 75.0, "accuracy, query": 100.0, "accuracy, verify": 50.0}
    assert submission(preset, questions, texts)[0] == {"questionId": "1", "prediction": "The dog."}


def test_okvqa_answers_are_lemmatised_or_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With spaCy's model as LAVIS; without it the table says so instead of giving another number."""
    data = write_vqa(tmp_path, 2)
    for name in ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"):
        (data / name).rename(data / name.removeprefix("v2_"))
    content = json.loads((data / "mscoco_val2014_annotations.json").read_text())
    for row in content["annotations"]:
        row["answers"] = [{"answer": "dog run"}] * 10
    (data / "mscoco_val2014_annotations.json").write_text(json.dumps(content))
    questions, preset = read_questions(data, "okvqa"), find_preset("lavis-okvqa-flan-t5-xl")
    texts: dict[int | str, str] = {0: "dogs running", 10: "dog run"}
    monkeypatch.setitem(sys.modules, "spacy", None)  # import fails
    scores = score(preset, questions, *as_scored(preset, texts))
    assert scores.found["accuracy, not lemmatised"] == 50
    assert "accuracy" not in scores.found
    assert "pip install 'blip2rt[okvqa]' && python -m spacy download en_core_web_sm" in scores.not_scored["accuracy"]

    def load(name: str) -> Any:
        words = {"dogs": ("NOUN", "dog"), "running": ("VERB", "run"), "better": ("ADJ", "good")}
        assert name == "en_core_web_sm"
        return lambda text: [
            SimpleNamespace(text=w, pos_=words.get(w, ("X", w))[0], lemma_=words.get(w, ("X", w))[1])
            for w in text.split()
        ]

    spacy = ModuleType("spacy")
    spacy.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    scores = score(preset, questions, *as_scored(preset, texts))
    assert (scores.found["accuracy"], scores.not_scored) == (100, {})
    assert submission(preset, questions, as_scored(preset, texts)[0])[0]["answer"] == "dog run"
    assert submission(preset, questions, as_scored(preset, texts | {10: "better dogs"})[0])[1]["answer"] == "better dog"


def test_nocaps_has_a_table_of_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each domain is scored by itself, as the official server does; what is missing is said once."""
    domains = ["in-domain", "near-domain", "out-domain"] * 2
    write_pictures(tmp_path, [f"{i}.jpg" for i in range(6)])
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "domain": domain} for i, domain in enumerate(domains)],
        "annotations": [{"image_id": i, "caption": f"cat {i}"} for i in range(6)],
    }
    (tmp_path / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    items = read_captions(tmp_path, "nocaps", "val")

    def share_of_right_ones(captions: dict[int, str], references: dict[int, tuple[str, ...]]) -> CaptionScores:
        assert captions.keys() == references.keys()
        right = [captions[key] in references[key] for key in captions]
        return CaptionScores({"CIDEr": sum(right) / len(right)}, {"SPICE": "no jars"})

    monkeypatch.setattr(evaluate_scores, "score_captions", share_of_right_ones)
    texts = {i: f"cat {i}" if domains[i] == "near-domain" or i == 0 else "dog" for i in range(6)}
    preset = find_preset("paper-nocaps-caption-opt-2.7b")
    scores = evaluate_scores.score(preset, items, texts)
    assert scores.found == {
        "CIDEr": 50.0,
        "CIDEr, in-domain": 50.0,
        "CIDEr, near-domain": 100.0,
        "CIDEr, out-domain": 0.0,
    }
    assert scores.not_scored == {"SPICE": "no jars"}
    assert submission(preset, items, texts)[3] == {"image_id": 3, "caption": "dog"}


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
