"""One call for people who come from mmpretrain: its model names, its result keys."""

import difflib
from pathlib import Path
from typing import Any

from .errors import InputError
from .inputs import is_list
from .pipeline import Pipeline
from .presets import VQA, find_preset

# mmpretrain's names -> presets with its settings. Its retrieval model finds images in a gallery: see `Gallery`.
MODELS = {
    "blip2-opt2.7b_3rdparty-zeroshot_caption": "mmpretrain-caption-opt-2.7b",
    "blip2-opt2.7b_3rdparty-zeroshot_vqa": "mmpretrain-vqav2-opt-2.7b",
}


def inference_model(
    name: str, image: Any, question: str | None = None, *, engine: Pipeline | str | Path = "engines"
) -> Any:
    """What mmpretrain's function of this name gives, for its BLIP-2 models.

    Args:
        name: the model, by mmpretrain's name.
        image: whatever `Pipeline.encode` takes; a list gives a list.
        question: for the VQA model.
        engine: a pipeline, or where its engine lies. A pipeline is opened once, a path at every call.

    Returns:
        {"pred_caption": text}, or {"question": question, "pred_answer": text}.

    Raises:
        InputError: an unknown name, or a question where none belongs, or none where one does, or no string.
    """
    if not isinstance(name, str):
        raise InputError(f"the model is named by a string, not {name!r}: one of {', '.join(MODELS)}")
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise InputError(f"there is no model {name!r}; did you mean {nearest!r}? All: {', '.join(MODELS)}")
    preset = find_preset(MODELS[name])
    if (question is not None) != (preset.task == VQA):
        raise InputError(f"{name} takes {'an image and a question' if preset.task == VQA else 'an image alone'}")
    if question is not None and not isinstance(question, str):
        raise InputError(f"question must be one string, asked of every image, not {type(question).__name__}")
    pipe = engine if isinstance(engine, Pipeline) else Pipeline(engine)
    prompt = preset.prompt if question is None else preset.ask(question)
    images = image if is_list(image) else [image]
    results = pipe.generate(images, prompt, options=preset.options)
    rows = [
        {"pred_caption": result.text} if question is None else {"question": question, "pred_answer": result.text}
        for result in results
    ]
    return rows if is_list(image) else rows[0]
