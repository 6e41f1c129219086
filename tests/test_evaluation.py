"""Scores equal those of the scripts that papers use."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2rt.errors import InputError
from blip2rt.evaluation import recall_at, retrieval_table, vqa_accuracy, vqa_table

VQA = Path(__file__).parents[2] / "shared" / "fixtures" / "vqa"


def verdicts() -> list[dict[str, Any]]:
    if not VQA.is_dir():
        pytest.skip(f"the recorded verdicts of the VQA scripts are not at {VQA}")
    with gzip.open(VQA / "verdicts.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("rule", ["official", "lavis", "mmpretrain"])
def test_vqa_accuracy_equals_the_scripts(rule: str) -> None:
    """Every question; the scripts round percent to two digits (mmpretrain's verdicts: six)."""
    rows = verdicts()
    assert len(rows) == 4000
    tolerance = 0.0051 if rule != "mmpretrain" else 1e-6
    wrong = [
        row for row in rows if abs(100 * vqa_accuracy(row["prediction"], row["answers"], rule) - row[rule]) > tolerance
    ]
    assert wrong == []
    expected = json.loads((VQA / "summary.json").read_text())[rule]
    table = vqa_table(rows, rule)
    assert table == expected if rule != "mmpretrain" else table["overall"] == round(expected, 2)


def test_vqa_rules_differ_as_their_scripts_do() -> None:
    """Without the recorded verdicts: one question for each difference."""
    same, mixed = ["left"] * 10, ["left"] * 5 + ["The left."] * 5
    assert [vqa_accuracy("left.", same, rule) for rule in ("official", "lavis", "mmpretrain")] == [0, 1, 1]
    assert [vqa_accuracy("Left", mixed, rule) for rule in ("official", "lavis", "mmpretrain")] == [1, 1, 1]
    few = ["cat", "cat", *(f"dog {i}" for i in range(8))]
    assert vqa_accuracy("cat", few) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("cat", few, rule="mmpretrain") == pytest.approx(2 / 3)
    assert vqa_accuracy("two", ["2", *few[1:]]) == pytest.approx(0.3)
    counts = Counter(vqa_accuracy(word, ["dont", "don't", "isn't"] + ["x"] * 7) > 0 for word in ("dont", "don't"))
    assert counts == {True: 2}


def test_vqa_wrong_calls() -> None:
    for prediction, answers, rule, message in (
        ("a", ["a"], "offical", "rule must be one of official, lavis, mmpretrain, not 'offical'"),
        (1, ["a"], "official", "must be a string, not int"),
        ("a", [], "official", "answers must be a list of strings and not empty"),
        ("a", "a", "official", "answers must be a list"),
    ):
        with pytest.raises(InputError, match=message):
            vqa_accuracy(prediction, answers, rule)  # type: ignore[arg-type]


def test_recall_counts_what_brute_force_counts() -> None:
    rng = np.random.default_rng(0)
    image_of_text = np.sort(rng.integers(0, 20, 70))
    image_of_text[:20] = range(20)
    i2t, t2i = rng.standard_normal((20, 70)), rng.standard_normal((70, 20))
    table = retrieval_table(i2t, t2i, image_of_text.tolist())
    for k in (1, 5, 10):
        texts = [any(image_of_text[t] == i for t in np.argsort(-i2t[i])[:k]) for i in range(20)]
        images = [image_of_text[t] in np.argsort(-t2i[t])[:k] for t in range(70)]
        assert table[f"txt_r{k}"] == pytest.approx(100 * np.mean(texts))
        assert table[f"img_r{k}"] == pytest.approx(100 * np.mean(images))
    assert table["r_mean"] == pytest.approx(np.mean([table[f"{d}_r{k}"] for d in ("txt", "img") for k in (1, 5, 10)]))
    assert recall_at(np.array([[1.0, 1.0]]), [[1]], ks=(1,)) == {1: 0.0}  # of equal ones the first is better
    with pytest.raises(InputError, match="each row needs one"):
        recall_at(i2t, [[]] * 20)
