"""blip2rt: BLIP-2 as fast, portable engines.

    import blip2rt
    pipe = blip2rt.Pipeline("engines/")
    print(pipe.caption("photo.jpg"))

The runtime needs numpy, onnxruntime, tokenizers and pillow; torch is for export and training only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import evaluation as evaluation
    from .errors import Blip2rtError as Blip2rtError
    from .errors import CheckpointError as CheckpointError
    from .errors import EngineError as EngineError
    from .errors import ExportError as ExportError
    from .errors import ImageError as ImageError
    from .errors import InputError as InputError
    from .errors import OutputError as OutputError
    from .gallery import Gallery as Gallery
    from .inference import inference_model as inference_model
    from .options import GenerationOptions as GenerationOptions
    from .pipeline import Pipeline as Pipeline
    from .results import Answer as Answer
    from .results import Caption as Caption
    from .results import Generation as Generation
    from .results import ImageFeatures as ImageFeatures
    from .results import MatchScores as MatchScores
    from .text_gallery import TextGallery as TextGallery

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "pipeline",
    "Gallery": "gallery",
    "TextGallery": "text_gallery",
    "inference_model": "inference",
    "GenerationOptions": "options",
    **dict.fromkeys(("Answer", "Caption", "Generation", "ImageFeatures", "MatchScores"), "results"),
    **dict.fromkeys(
        ("Blip2rtError", "CheckpointError", "EngineError", "ExportError", "ImageError", "InputError", "OutputError"),
        "errors",
    ),
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use: numpy, onnxruntime and pillow take longer than all of blip2rt."""
    if name == "evaluation":
        return import_module(".evaluation", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
