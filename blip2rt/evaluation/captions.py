"""Caption metrics as COCO's evaluation computes them: pycocoevalcap, with its PTB tokenizer and METEOR on Java.

A score that needs what is not there is left out, and said to be; none is ever computed with another tokenizer.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import Blip2rtError, InputError

ALL = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class CaptionScores:
    """Scores over all pictures, 0..1 (CIDEr: 0..10), under COCO's names; `not_scored` says why the others are not."""

    scores: dict[str, float]
    not_scored: dict[str, str]


def not_scorable() -> dict[str, str]:
    """Metrics that cannot be scored here, with the reason.

    Raises:
        Blip2rtError: pycocoevalcap is not installed.
    """
    try:
        import pycocoevalcap  # noqa: F401
    except ModuleNotFoundError as error:
        raise Blip2rtError(f"this needs the package {error.name}: pip install 'blip2rt[eval]'") from error
    if shutil.which("java") is None:
        return dict.fromkeys(ALL, "Java is not there, and COCO's tokenizer runs on it")
    absent = _absent_spice_models()
    return {"SPICE": f"its jars are not there: {', '.join(absent)}"} if absent else {}


def score_captions(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> CaptionScores:
    """Score one caption for each picture against what people wrote.

    Args:
        captions: picture -> caption.
        references: picture -> captions by people, at least one; the same pictures.

    Raises:
        InputError: other pictures in one than in the other, or a picture without references.
        Blip2rtError: pycocoevalcap is not installed.
    """
    if not captions or captions.keys() != references.keys():
        missing = [str(key) for key in references if key not in captions]
        extra = [str(key) for key in captions if key not in references]
        raise InputError(
            f"{len(captions)} captions for {len(references)} pictures with references: without a caption "
            f"{', '.join(missing[:5]) or 'none'}, without references {', '.join(extra[:5]) or 'none'}"
        )
    bare = [str(key) for key, texts in references.items() if isinstance(texts, str) or not texts]
    if bare:
        raise InputError(f"pictures without a list of references: {', '.join(bare[:5])} ({len(bare)} pictures)")
    not_scored = not_scorable()
    if len(not_scored) == len(ALL):
        return CaptionScores({}, not_scored)
    with redirect_stdout(StringIO()):  # they report by print
        return CaptionScores(_score(captions, references, "SPICE" not in not_scored), not_scored)


def _score(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]], with_spice: bool) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # pictures by their number: METEOR and SPICE want the same order in both
    found = {i: [{"caption": _on_one_line(captions[key])}] for i, key in enumerate(references)}
    wanted = {i: [{"caption": _on_one_line(text)} for text in texts] for i, texts in enumerate(references.values())}
    tokenizer = PTBTokenizer()
    found, wanted = tokenizer.tokenize(found), tokenizer.tokenize(wanted)
    scores: dict[str, float] = {}
    scorers: list[tuple[Any, tuple[str, ...]]] = [
        (Bleu(4), ALL[:4]),
        (Meteor(), ("METEOR",)),
        (Rouge(), ("ROUGE_L",)),
        (Cider(), ("CIDEr",)),
    ]
    if with_spice:
        from pycocoevalcap.spice.spice import Spice

        scorers.append((Spice(), ("SPICE",)))
    for scorer, names in scorers:
        score, _ = scorer.compute_score(wanted, found)
        scores |= dict(zip(names, map(float, score if isinstance(score, list) else [score]), strict=True))
    return scores


def _on_one_line(text: str) -> str:
    """The tokenizer reads a caption a line, and takes more than a newline for its end: all behind it would shift."""
    return " ".join(text.splitlines())


def _absent_spice_models() -> list[str]:
    """pycocoevalcap would fetch them from the net, 0.4 GB, in the middle of an evaluation."""
    import pycocoevalcap.spice

    folder = Path(next(iter(pycocoevalcap.spice.__path__))) / "lib"
    return [name for name in SPICE_MODELS if not (folder / name).is_file()]
