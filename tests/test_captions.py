"""Caption metrics are pycocoevalcap's own, or not given at all."""

import random
import shutil
from pathlib import Path

import pytest

from blip2rt.errors import InputError
from blip2rt.evaluation import score_captions

SOME_WORDS = "a the red blue small cat dog's house sits runs on near table, car. it's two zebras (in) snow!"
WORDS = SOME_WORDS.split()


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(count)]


def test_equals_pycocoevalcap() -> None:
    """200 captions of our own, five references each, every score as its scorer gives it."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed: pip install 'blip2rt[eval]'")
    if shutil.which("java") is None:
        pytest.skip("Java is not there, and COCO's tokenizer runs on it")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {f"picture {i}": text for i, text in enumerate(sentences(200, 0))}
    references = {key: sentences(5, i + 1) for i, key in enumerate(captions)}
    references = {key: [captions[key] + " there", *texts] for key, texts in references.items()}
    found = score_captions(dict(reversed(captions.items())), references)

    tokenizer = PTBTokenizer()
    ours = tokenizer.tokenize({key: [{"caption": text}] for key, text in captions.items()})
    theirs = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    expected = dict(zip(("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"), Bleu(4).compute_score(theirs, ours)[0], strict=True))
    for name, scorer in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        expected[name] = float(scorer.compute_score(theirs, ours)[0])
    assert {name: score for name, score in found.scores.items() if name != "SPICE"} == pytest.approx(
        expected, rel=1e-12
    )
    assert ("SPICE" in found.scores) != ("SPICE" in found.not_scored)
    assert 0.1 < found.scores["Bleu_4"] < 1


def test_without_java_nothing_is_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = score_captions({1: "a cat"}, {1: ["a cat"]})
    assert found.scores == {}
    assert set(found.not_scored) >= {"Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"}
    assert all("Java" in reason for reason in found.not_scored.values())


def test_a_line_within_a_caption_moves_no_other() -> None:
    """COCO's tokenizer takes more than a newline for the end of a caption."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed: pip install 'blip2rt[eval]'")
    if shutil.which("java") is None:
        pytest.skip("Java is not there, and COCO's tokenizer runs on it")
    texts = ["a cat\rsits", "two\u2028dogs run", "a red bird"]
    found = score_captions(dict(enumerate(texts)), {i: [" ".join(text.split())] for i, text in enumerate(texts)})
    assert found.scores["Bleu_1"] == pytest.approx(1)


def test_wrong_calls() -> None:
    with pytest.raises(InputError, match=r"1 captions for 2 pictures .*without a caption 2"):
        score_captions({1: "a"}, {1: ["a"], 2: ["b"]})
    with pytest.raises(InputError, match=r"without references 3"):
        score_captions({1: "a", 3: "b"}, {1: ["a"]})
    with pytest.raises(InputError, match=r"without a list of references: 1"):
        score_captions({1: "a"}, {1: []})
